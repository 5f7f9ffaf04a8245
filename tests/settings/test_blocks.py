"""A study's file: read as strictly as a recipe, in its own order."""

from pathlib import Path

import pytest

from fastproj.core.errors import InputError, SettingError
from fastproj.settings import STUDY, load
from fastproj.settings.study import Blocks, read_blocks

GOOD = """
study: {recipe: demo, seeds: [3, 1]}
settings:
  optim: {epochs: 2}
  optim.lr: 0.5
sets:
  digits: {data: {train: a, val: b}}
  others:
arms:
  default:
  z: {settings: {matrix_information.weight: [0, 0.1]}, published: {digits: 0.26}, acted: x lower}
  a:
    recipe: other
    published: -1
    sweep: {optim: {lr: [1, 2]}}
  empty: {}
sweep:
  projector.hidden: [8, 16]
"""


def read(tmp_path: Path, text: str, *argv: str) -> Blocks:
    (tmp_path / "mine.yaml").write_text(text)
    settings = load(STUDY, ["--cfg", str(tmp_path / "mine.yaml"), *argv], "fastproj study", "")
    return read_blocks(settings)


def test_blocks_keep_the_files_order_and_values_their_text(tmp_path: Path) -> None:
    blocks = read(tmp_path, GOOD, "--settings.optim.lr", "0.7", "--arms.a.settings.optim.epochs=9")
    assert blocks.settings == {"optim.epochs": "2", "optim.lr": "0.7"}
    assert blocks.sweep == {"projector.hidden": ("8", "16")}
    assert list(blocks.sets) == ["digits", "others"]
    assert blocks.sets["digits"].settings == {"data.train": "a", "data.val": "b"}
    assert list(blocks.arms) == ["default", "z", "a", "empty"]
    z, a = blocks.arms["z"], blocks.arms["a"]
    assert z.settings == {"matrix_information.weight": "0,0.1"}
    assert (z.published, z.acted) == ({"digits": 0.26}, "x lower")
    assert (a.recipe, a.published, a.sweep) == ("other", {"": -1}, {"optim.lr": ("1", "2")})
    assert a.settings == {"optim.epochs": "9"}


def test_the_section_study_is_checked_and_named_after_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    given = load(STUDY, ["--cfg", str(tmp_path / "mine.yaml"), "--processes", "2"], "study", "")
    assert (given.study.name, given.study.seeds, given.study.processes) == ("mine", (3, 1), 2)
    with pytest.raises(SettingError, match=r"study.seeds must be different whole numbers"):
        load(STUDY, ["--study.seeds", "1,1"], "study", "")


def test_a_study_may_be_based_on_another(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text(GOOD)
    blocks = read(tmp_path, "base: first.yaml\narms:\n  a:\n    published: 2\n  new:\n")
    assert list(blocks.arms) == ["default", "z", "a", "empty", "new"]
    assert (blocks.arms["a"].published, blocks.arms["a"].recipe) == ({"": 2}, "other")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arm: {}", r"line 1: unknown setting 'arm'; did you mean 'arms'\?"),
        ("study: {seed: 1}", r"unknown setting 'study.seed'; did you mean 'study.seeds'\?"),
        ("study: {seeds: []}", "study.seeds must be different whole numbers"),
        ("arms:\n  a: {publised: 1}",
         r"line 2: unknown setting 'arms.a.publised'; did you mean 'arms.a.published'\?"),
        ("arms:\n  a: {published: much}", "arms.a.published must be a number, not 'much'"),
        ("arms:\n  a: {settings: {data: {trian: 1}}}",
         r"unknown setting 'data.trian'; did you mean 'data.train'\?"),
        ("arms:\n  a: 3", "arms.a has parts; write them below it"),
        ("arms:\n  a: {}\n  a: {}", "arms.a is already set on line 2"),
        ("arms:\n  a/b: {}", "a name that can be a folder's"),
        ("arms: {}", "write 'NAME:' below arms"),
        ("settings: {run: {seed: 1}}", "a study gives run.seed to each run itself"),
        ("sweep: {optim: {lr: [1]}}", "a sweep takes two or more values"),
        ("arms:\n  a: &x\n    b: *x", "nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("12:00:00", "12:00:00"), ("0123", "0123"), ("on", "on"), ("true", True), ("60", 60),
     ("-1", -1), ("0.5", 0.5), ("2026-02-30", "2026-02-30")],
)  # fmt: skip
def test_submitits_parameters_are_what_they_look_like(tmp_path: Path, text: str, value) -> None:
    """Not what YAML 1.1 makes of them: a time of base 60, an octal number, a truth."""
    assert read(tmp_path, f"submitit: {{slurm_x: {text}}}").submitit == {"slurm_x": value}
