"""Settings: what the reader must accept, what it must refuse, and with which words."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastproj.core.errors import InputError, SettingError
from fastproj.settings import PREPARE, RUN, load
from fastproj.settings.checkers import (
    Bool,
    Choice,
    File,
    Float,
    Floats,
    Int,
    Ints,
    Keys,
    OrNull,
    Schedule,
    Text,
    Texts,
)

PARAMS = {".".join(path): param for path, param in RUN.entries.items()}
TRAIN = ["--data.train", "train.beton"]


def read(*argv, schema=RUN):
    return load(schema, argv, "prog", "what it does")


def from_file(folder: Path, text: str, *argv):
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return read("--cfg", str(path), *TRAIN, *argv)


# One value or one refusal of every checker. The oracle is the value written beside the text.
@pytest.mark.parametrize(
    ("checker", "text", "value"),
    [
        (Bool(), "true", True),
        (Bool(), "False", False),
        (Bool(), "no", False),
        (Bool(), "1", True),
        (Int(), "1e3", 1000),
        (Int(), "1_000", 1000),
        (Int(), "-7", -7),
        (Int(), "2.0", 2),
        (Float(), "1e-4", 0.0001),
        (Float(), "3", 3.0),
        (Float(low=0, high=1), "1", 1.0),
        (Floats(), "0.1,0.3", (0.1, 0.3)),
        (Floats(), "[1, 2]", (1.0, 2.0)),
        (Floats(), ["1e-3", "2"], (0.001, 2.0)),
        (Floats(), "5", (5.0,)),
        (Ints(), "1,2e1", (1, 20)),
        (Keys("fastproj.evaluation:PROBES"), "knn, logistic", ("knn", "logistic")),
        (Keys("fastproj.evaluation:PROBES"), ["KNN"], ("knn",)),
        (Schedule(), "1e-4", (1e-4,)),
        (Schedule(), "0.1,0", (0.1, 0.0)),
        (OrNull(Int()), None, None),
        (OrNull(Int()), "null", None),
        (OrNull(Int()), "4", 4),
        (Choice("auto", "true"), "True", "true"),
        (File(), "a/b c", "a/b c"),
    ],
)
def test_checker_reads(checker, text, value):
    found = checker.check(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("checker", "text"),
    [
        (Bool(), "maybe"),
        (Bool(), "2"),
        (Bool(), None),
        (Int(), "0.5"),
        (Int(), "true"),
        (Int(), "1e400"),
        (Int(low=1), "0"),
        (Int(high=10), "9" * 400),
        (Int(), ["1"]),
        (Float(), "nan"),
        (Float(), "inf"),
        (Float(), "0,1"),
        (Float(), None),
        (Float(above=0), "0"),
        (Float(high=1), "1.0001"),
        (Ints(), "1,2.5"),
        (Keys("fastproj.evaluation:PROBES"), "knn,knn"),
        (Keys("fastproj.evaluation:PROBES"), "knn,KNN"),
        (Keys("fastproj.evaluation:PROBES"), []),
        (Floats(), "1,,2"),
        (Floats(), []),
        (Floats(), None),
        (Floats(low=0), "1,-1"),
        (Schedule(), "1,2,3"),
        (Schedule(low=0), "0,-1"),
        (Text(), ""),
        (Text(), "two\nlines"),
        (Text(), "nul\0"),
        (Text(), None),
        (Choice("a", "b"), "c"),
        (OrNull(Int()), "x"),
    ],
)
def test_checker_refuses(checker, text):
    with pytest.raises(ValueError):
        checker.check(text)


def test_tilde_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert read("--data.train", "~/x.beton").data.train == "/somewhere/x.beton"


def test_command_line_goes_before_file_before_default(tmp_path):
    found = from_file(tmp_path, "optim:\n  lr: 0.3\n  epochs: 5\n", "--optim.epochs", "7")
    assert (found.optim.lr, found.optim.epochs, found.optim.options["momentum"]) == (0.3, 7, 0.9)
    sources = found.sources()
    assert sources["optim.lr"] == f"file {tmp_path / 'recipe.yaml'}"
    assert sources["optim.epochs"] == "command line"
    assert sources["optim.momentum"] == "default"


@pytest.mark.parametrize(
    "argv",
    [["--optim.lr", "0.25"], ["--optim.lr=0.25"], ["--lr", "0.25"], ["--lr=1", "--lr=0.25"]],
)
def test_ways_to_write_an_option(argv):
    assert read(*TRAIN, *argv, "--debug").optim.lr == 0.25


def test_name_follows_the_recipe(tmp_path):
    assert from_file(tmp_path, "optim:\n  lr: 1\n").run.name == "recipe"
    assert from_file(tmp_path, "run:\n  name: mine\n").run.name == "mine"
    assert read(*TRAIN).run.name == "run"


def test_null_in_a_file_unsets_and_an_empty_section_sets_nothing(tmp_path):
    found = from_file(tmp_path, "eval:\n  size: null\nviews:\n", "--views.flip_prob", "0.5,0")
    assert found.eval.size is None
    assert found.views.flip_prob == (0.5, 0.0)
    assert read(*TRAIN, "--views.flip_prob=1", "--views.flip_prob=null").views.flip_prob is None


def test_settings_are_frozen_and_leak_nothing():
    found = read(*TRAIN, "--optim.lr", "9")
    with pytest.raises(AttributeError):
        found.optim = None
    with pytest.raises(AttributeError):
        found.optim.lr = 1.0
    with pytest.raises(AttributeError, match="no attribute 'optm'"):
        _ = found.optm
    found.flat()["optim.lr"] = 1.0
    assert found.optim.lr == 9.0
    assert read(*TRAIN).optim.lr == 0.4
    assert not set(PREPARE.entries) & {("optim", "lr"), ("run", "name")}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--optim.lrr", "1"], ["unknown setting --optim.lrr", "--optim.lr?"]),
        (["--optim.temperature", "1"], ["did you mean --objective.temperature?"]),
        (["--momentun", "1"], ["did you mean --optim.momentum?"]),
        (["--config", "x"], ["did you mean --cfg?"]),
        (["--temp", "1"], ["unknown setting --temp"]),  # fastargs would take the prefix
        (["--batch_size", "1"], ["--optim.batch_size", "--eval.batch_size"]),
        (["--optim.epochs", "0.5"], ["optim.epochs must be a whole number at least 1, not '0.5'"]),
        (["--views.flip_prob", "1.5"], ["numbers from 0 to 1"]),
        (["--optim.lr", "null"], ["a number above 0"]),
        (["--run.resume"], ["--run.resume needs a value"]),
        (["--run.resume", "--debug"], ["--run.resume needs a value"]),
        (["--model.encoder", "vgg"], ["resnet18 | resnet34 | resnet50 | resnet_small"]),
        (["0.3"], ["'0.3' follows no option"]),
        (["--cfg", "a", "--cfg", "b"], ["--cfg takes one file, once"]),
    ],
)
def test_bad_command_line(argv, words):
    with pytest.raises(SettingError) as error:
        read(*TRAIN, *argv)
    assert all(word in str(error.value) for word in ["command line", *words]), error.value


def test_missing_required_setting():
    with pytest.raises(SettingError, match="data.train is missing: give --data.train"):
        read()


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("optim:\n  lr: 1\n  epohs: 3\n", 3, "unknown setting 'optim.epohs'; did you mean 'optim."),
        ("lr: 1\n", 1, "unknown setting 'lr'; did you mean 'optim.lr'?"),
        ("optm:\n  lr: 1\n", 1, "unknown setting 'optm'"),
        ("optim:\n  lr: fast\n", 2, "optim.lr must be a number above 0, not 'fast'"),
        ("optim:\n  lr:\n", 2, "optim.lr must be a number above 0, not null"),
        ("optim:\n  lr: [1, 2]\n", 2, "optim.lr must be a number above 0, not ['1', '2']"),
        ("optim:\n  lr:\n    a: 1\n", 2, "one value or one flat list"),
        ("optim:\n  lr: 1\n  lr: 2\n", 3, "optim.lr is already set on line 2"),
        ("optim:\n  lr: 1\noptim:\n  epochs: 2\n", 3, "optim is already set on line 1"),
        ("optim: 3\n", 1, "optim is a section"),
        ("optim: &a\n  lr: *a\n", 2, "one value or one flat list"),
        ("optim: &a\n  optim: *a\n", 2, "unknown setting 'optim.optim'"),
        ("? [a]\n: 1\n", 1, "plain text"),
    ],
)
def test_bad_file(tmp_path, text, line, words):
    with pytest.raises(SettingError) as error:
        from_file(tmp_path, text)
    assert f"recipe.yaml, line {line}: " in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is empty"), ("# only\n", "is empty"), ("- 1\n", "no sections"), ("a: [", "is not YAML")],
)
def test_file_without_settings(tmp_path, text, words):
    with pytest.raises(InputError, match=words) as error:
        from_file(tmp_path, text)
    assert error.value.exit_code == 1


def test_unreadable_file(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match="cannot read") as error:
            read("--cfg", str(path), *TRAIN)
        assert error.value.exit_code == 1
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="is not YAML"):
        read("--cfg", str(tmp_path / "binary.yaml"), *TRAIN)


def recipes(folder: Path, **files: str) -> str:
    """Writes each as ``<name>.yaml``, ``folder__name`` into a folder; returns the first's path."""
    paths = [folder / f"{name.replace('__', '/')}.yaml" for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return str(paths[0])


def test_a_recipe_goes_before_its_base_wherever_it_names_it(tmp_path):
    """Oracle: the chain written out by hand. A base is found from the folder of who names it."""
    top = recipes(
        tmp_path,
        a__top="optim:\n  lr: 1\nviews:\n  flip_prob: null\nbase: ../b/middle.yaml\n",
        b__middle="base: bottom.yaml\noptim:\n  lr: 2\n  epochs: 20\n",
        b__bottom="optim: {lr: 3, epochs: 30, momentum: 0.3}\nviews: {flip_prob: 0.5}\n",
    )
    found = read("--cfg", top, *TRAIN, "--optim.weight_decay", "0")
    assert (found.optim.lr, found.optim.epochs, found.optim.options["momentum"]) == (1, 20, 0.3)
    assert found.views.flip_prob is None
    assert found.run.name == "top"
    middle, bottom = tmp_path / "a/../b/middle.yaml", tmp_path / "a/../b/bottom.yaml"
    optim = {n.removeprefix("optim."): s for n, s in found.sources().items() if "optim." in n}
    assert optim == {
        **dict.fromkeys(optim, "default"),
        "lr": f"file {top}",
        "epochs": f"file {middle}",
        "momentum": f"file {bottom}",
        "weight_decay": "command line",
    }
    assert f"  epochs: 20  # file {middle}" in found.to_yaml().splitlines()
    again = read("--cfg", recipes(tmp_path, config=found.to_yaml()))
    assert again.flat() == found.flat()  # config.yaml needs no base


def test_a_base_is_read_as_strictly_as_a_recipe(tmp_path):
    """Even where the recipe overrides it: a base is a recipe of its own."""
    for text, words in [
        ("optim:\n  lr: fast\n", "base.yaml, line 2: optim.lr must be a number above 0"),
        ("optim:\n  lr: 1\n  lr: 2\n", "base.yaml, line 3: optim.lr is already set on line 2"),
        ("optm:\n  lr: 1\n", "base.yaml, line 1: unknown setting 'optm'"),
    ]:
        top = recipes(tmp_path, top="base: base.yaml\noptim:\n  lr: 1\n", base=text)
        with pytest.raises(SettingError) as error:
            read("--cfg", top, *TRAIN)
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base:\n", "top.yaml, line 1: base must be the path of a YAML file"),
        ("optim: {}\nbase: [a, b]\n", "top.yaml, line 2: base must be the path"),
        ("base: ''\n", "line 1: base must be the path"),
        ("base: {a: b}\n", "line 1: a setting takes one value"),
        ("base: a.yaml\nbase: b.yaml\n", "line 2: base is already set on line 1"),
        ("optim:\n  base: a.yaml\n", "line 2: unknown setting 'optim.base'"),
        ("bas: a.yaml\n", "did you mean 'base'?"),
    ],
)
def test_a_base_is_one_path_at_the_top(tmp_path, text, words):
    with pytest.raises(SettingError) as error:
        read("--cfg", recipes(tmp_path, top=text), *TRAIN)
    assert words in str(error.value)


def test_a_missing_base_is_named_beside_the_recipe_that_wants_it(tmp_path):
    top = recipes(tmp_path, top="base: middle.yaml\n", middle="optim:\n  lr: 1\nbase: none.yaml\n")
    with pytest.raises(InputError) as error:
        read("--cfg", top, *TRAIN)
    assert str(error.value) == (
        f"cannot read {tmp_path / 'none.yaml'}: No such file or directory; "
        f"{tmp_path / 'middle.yaml'}, line 3, names it as its base"
    )
    assert error.value.exit_code == 1


def test_a_recipe_that_is_its_own_base_is_one_error(tmp_path, monkeypatch):
    top = recipes(tmp_path, a="base: b.yaml\n", b="base: c.yaml\n", c="base: sub/../b.yaml\n")
    (tmp_path / "sub").mkdir()
    a, b, c = (tmp_path / f"{name}.yaml" for name in "abc")
    with pytest.raises(InputError) as error:
        read("--cfg", top, *TRAIN)
    assert str(error.value) == (
        f"{a} -> {b} -> {c} -> {tmp_path}/sub/../b.yaml: a recipe cannot be its own base; "
        f"{c}, line 1, names it as its base"
    )
    recipes(tmp_path, own="base: own.yaml\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^own.yaml -> own.yaml: a recipe cannot be its own base"):
        read("--cfg", "own.yaml", *TRAIN)


@pytest.mark.parametrize("schema", [RUN, PREPARE])
def test_every_default_passes_its_own_checker(schema, tmp_path):
    argv = TRAIN if schema is RUN else []
    found = read(*argv, schema=schema)
    path = tmp_path / "run.yaml"
    path.write_text(found.to_yaml(), encoding="utf-8")
    assert read("--cfg", str(path), schema=schema).flat() == found.flat()


@pytest.mark.parametrize("schema", [RUN, PREPARE])
def test_help_names_every_setting_with_default_and_choices(schema, capsys):
    with pytest.raises(SystemExit) as end:
        read("--help", "--unknown", schema=schema)
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for path, param in schema.entries.items():
        (line,) = (line for line in lines if line.startswith(f"  --{'.'.join(path)} "))
        assert param.desc and param.desc in line
        assert param.checker.help() in line
        if isinstance(param.default, str | int) and not isinstance(param.default, bool):
            assert f" {param.default} " in line


def values(checker) -> st.SearchStrategy:
    """What a setting may hold, by its checker; bounds are the checker's own."""
    if isinstance(checker, OrNull):
        return st.none() | values(checker.inner).filter(lambda v: v not in ("null", "none"))
    if isinstance(checker, Bool):
        return st.booleans()
    if isinstance(checker, Keys):
        return st.lists(st.sampled_from(checker.choices), min_size=1, unique=True).map(tuple)
    if isinstance(checker, Texts):
        return st.lists(st.text("abz/._-", min_size=1), min_size=1, max_size=3).map(tuple)
    if isinstance(checker, Choice):
        return st.sampled_from(checker.choices)
    if isinstance(checker, Text):
        printable = st.characters(exclude_categories=["C", "Z"], include_characters=" ")
        text = st.text(printable, min_size=1)
        return text.filter(lambda t: not t.startswith("~") and t.lower() not in ("null", "none"))
    low = max(checker.low, -1e9)
    high = min(checker.high, 1e9)
    if isinstance(checker, Ints):
        whole = st.integers(math.ceil(low), math.floor(high))
        return st.lists(whole, min_size=1, max_size=4).map(tuple)
    if isinstance(checker, Int):
        return st.integers(math.ceil(low), math.floor(high))
    number = st.floats(max(low, checker.above), high, exclude_min=math.isfinite(checker.above))
    if isinstance(checker, Floats):
        most = 2 if isinstance(checker, Schedule) else 4
        return st.lists(number, min_size=1, max_size=most).map(tuple)
    return number


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_round_trip_through_command_line_and_config_yaml(data, tmp_path_factory):
    """What the drawn choices leave unread is not given; the refusals have their own tests."""
    chosen = {
        name: data.draw(values(param.checker), label=name)
        for name, param in PARAMS.items()
        if param.required or data.draw(st.booleans())
    }

    def argv():
        return [
            f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
            for name, value in chosen.items()
        ]

    for name in [n for n, p in PARAMS.items() if RUN.is_option(n) or p.needs]:
        if name in chosen:
            try:
                read(*argv())
            except SettingError as error:
                refused = re.match(r"command line: (\S+) is read (by|only where) ", str(error))
                assert refused, error
                del chosen[refused[1]]
    first = read(*argv())
    expected = {n: chosen.get(n, PARAMS[n].default) for n in PARAMS if n in first.flat()}
    assert chosen.keys() <= expected.keys()
    assert first.flat() == expected
    path = tmp_path_factory.mktemp("run") / "config.yaml"
    path.write_text(first.to_yaml(), encoding="utf-8")
    again = read("--cfg", str(path))
    assert again.flat() == expected
    assert set(again.sources().values()) == {f"file {path}"}
    # Other YAML readers see the same numbers, not text (YAML 1.1 wants the dot of 3.0e-05).
    lr = yaml.safe_load(first.to_yaml())["optim"]["lr"]
    assert isinstance(lr, float) and lr == expected["optim.lr"]


def test_config_yaml_says_where_each_value_came_from():
    lines = read(*TRAIN, "--lr", "1e-5").to_yaml().splitlines()
    assert "  lr: 1.0e-05  # command line" in lines
    assert "  epochs: 200  # default" in lines
    sections = {line for line in lines if not line.startswith(" ")}
    assert sections == {f"{section}:" for section in RUN.groups}
    assert len(lines) == len(read(*TRAIN).flat()) + len(sections)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--data.train", "x"], 0, ""),
        (["--data.trian", "x"], 2, "did you mean --data.train?"),
        (["--cfg", "none.yaml"], 1, "cannot read none.yaml"),
        (["--help"], 0, ""),
    ],
)
def test_exit_codes_of_a_command(argv, code, words, tmp_path):
    script = tmp_path / "command.py"
    script.write_text(
        "from fastproj import settings\nfrom fastproj.core import errors\n"
        "def main(argv):\n    settings.load(settings.RUN, argv, 'command', 'nothing')\n"
        "errors.run_command(main)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, script, *argv],
        env={"PYTHONPATH": str(root)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == code
    if code:
        assert done.stderr.startswith("error: ") and words in done.stderr
        assert done.stderr.count("\n") == 1
    else:
        assert done.stderr == ""
