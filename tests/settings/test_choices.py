"""Tables, the hyperparameters of their entries, and the settings that nothing reads."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from fastproj.augment.draw import PRESETS
from fastproj.core.errors import InputError, SettingError
from fastproj.core.table import Table
from fastproj.evaluation import PROBES
from fastproj.loaders import ENGINES
from fastproj.models import ENCODERS, PROJECTORS
from fastproj.objective import OBJECTIVES
from fastproj.prepare.sources import DATASETS
from fastproj.settings import PREPARE, RUN, load
from fastproj.training import OPTIMIZERS

ROOT = Path(__file__).parents[2]
TRAIN = ["--data.train", "x"]
TABLES = [PROBES, ENGINES, DATASETS, ENCODERS, OPTIMIZERS, PRESETS, OBJECTIVES, PROJECTORS]


def read(*argv, schema=RUN, prog="test"):
    return load(schema, argv, prog, "")


def yaml(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.choice)
def test_every_entry_can_be_had_and_an_unknown_one_names_the_nearest(table: Table) -> None:
    assert len(dict(table)) == len(table)
    name = next(iter(table))
    with pytest.raises(SettingError) as error:
        table[f"{name}x"]
    assert str(error.value).startswith(f"{table.choice}: no '{name}x'; choose one of ")
    assert "did you mean" in str(error.value)
    assert f"{name}x" not in table and table.get(f"{name}x") is None


@pytest.mark.parametrize("section", RUN.choices)
def test_declared_defaults_are_the_functions_own(section: str) -> None:
    """Every hyperparameter of a built-in entry is declared, and every declared one is read."""
    options = [name for name in RUN.params if RUN.is_option(name)]
    declared = {n.split(".")[1] for n in options if n.startswith(f"{section}.")}
    named = set()
    several = isinstance(RUN.params[RUN.choices[section]].default, tuple)
    for entry in RUN.table(section):
        for name, parameter in RUN.named(section, (entry,) if several else entry).items():
            assert RUN.params[f"{section}.{name}"].default == parameter.default
            assert type(RUN.params[f"{section}.{name}"].default) is type(parameter.default)
            named.add(name)
    assert named == declared


def test_settings_are_typed_built_once_and_frozen() -> None:
    found = read(*TRAIN)
    assert found.optim is found.optim
    assert dataclasses.is_dataclass(found.optim)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.optim.lr = 1.0
    assert found.objective.options == {"temperature": 0.2}
    assert read(*TRAIN, "--objective.name=swav").objective.options["prototypes"] == 3000


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--projector.kind barlow --projector.depth 7",
         "projector.depth is read by mlp, not by barlow"),
        ("--optimizer adamw --optim.trust_coefficient 1",
         "optim.trust_coefficient is read by lars, not by adamw"),
        ("--objective.margin_x 1", "unknown setting --objective.margin_x"),
        ("--objective.name barlow --temperature 1",
         "read by simclr and mocov2plus and mocov3 and swav and supcon, not by barlow"),
        ("--projector.k 3", "projector.k is read only where projector.latents is a number"),
        ("--kind none --projector.out 3",
         "barlow, and where projector.latents is a number, not by none"),
        ("--eval.sgd_epochs 3", "eval.sgd_epochs is read by sgd, not by logistic or knn"),
        ("--probes knn,sgd --logistic_holdout 0.2", "by logistic, not by knn or sgd"),
        ("--probes knn,logistc", "eval.probes must be one or more of logistic | knn"),
        ("--probes knn,logistc", "did you mean 'logistic'?"),
        ("--probes knn,knn", "not 'knn,knn'"),
        ("--eval.knn_k 2.5", "eval.knn_k must be whole numbers at least 1"),
        ("--eval.knn_seed 1", "unknown setting --eval.knn_seed"),
        ("--sparsehead.groups rows", "only where sparsehead.weight is above 0"),
        ("--matrix_information.alpha 1", "only where matrix_information.weight is above 0"),
        ("--views.local_size 32", "only where views.local_crops is above 0"),
        ("--superfluous.sigma 1", "only where superfluous.noise is fixed or learned"),
        ("--objective.name swav --queue_epoch 1", "only where objective.queue is above 0"),
        ("--engine stream --memory_share 0.1", "only where data.engine is auto"),
        ("--warmup_epochs 0 --warmup_lr 1", "only where optim.warmup_epochs is above 0"),
    ],
)  # fmt: skip
def test_given_and_read_by_nothing_is_refused(argv: str, words: str) -> None:
    with pytest.raises(SettingError) as error:
        read(*TRAIN, *argv.split())
    assert words in str(error.value) and error.value.exit_code == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--dataset cifar10 --quality 80", "data.quality is read only where data.store is jpeg"),
        ("--store square --max_resolution 80", "only where data.store is jpeg"),
        ("--dataset folder --side 80", "only where data.store is square"),
    ],
)
def test_a_store_refuses_what_is_anothers(argv: str, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        read(*argv.split(), schema=PREPARE)
    assert read("--dataset=folder", "--quality=80", schema=PREPARE).data.quality == 80


def test_an_earlier_layers_setting_for_a_former_choice_is_left_out(tmp_path: Path) -> None:
    base = yaml(tmp_path, "base", "objective: {name: simclr, temperature: 0.5}\n")
    top = yaml(tmp_path, "top", "base: base.yaml\nobjective: {name: barlow, scale: 0.3}\n")
    for argv in (["--cfg", base, "--objective.name", "barlow"], ["--cfg", top]):
        found = read(*TRAIN, *argv)
        assert "temperature" not in found.objective.options
        assert "objective.temperature" not in found.flat()
        again = read("--cfg", yaml(tmp_path, "config", found.to_yaml()))
        assert again.flat() == found.flat() | {"run.name": again.run.name}
    same = yaml(tmp_path, "same", "objective: {name: barlow, temperature: 0.5}\n")
    later = yaml(tmp_path, "later", "base: top.yaml\nobjective: {temperature: 0.5}\n")
    for path in (same, later):
        with pytest.raises(SettingError, match="not by barlow"):
            read(*TRAIN, "--cfg", path)
    # what a later layer chooses anew is read again
    assert read(*TRAIN, "--cfg", same, "--objective.name=supcon").objective.options == {
        "temperature": 0.5
    }


def test_a_command_refuses_what_it_does_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingError) as error:
        read("--optim.lr", "1", prog="python -m fastproj.export")
    assert "--optim.lr is not read by export, but by train" in str(error.value)
    with pytest.raises(SettingError, match="not read by export, but by train and evaluate"):
        read("--eval.knn_k", "1", prog="fastproj export")
    assert read("--checkpoint", "a", prog="python -m fastproj.export").eval.checkpoint == "a"
    with pytest.raises(SystemExit):
        read("--help", prog="python -m fastproj.export")
    out = capsys.readouterr().out
    assert "--eval.checkpoint" in out and "--optim.lr" not in out


def test_help_of_the_settings_imports_no_torch() -> None:
    code = (
        "import sys; from fastproj.settings import RUN, load\n"
        "try: load(RUN, ['--help'], 'x', '')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'torchvision', 'sklearn'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_deep_yaml_and_a_long_chain_end_in_one_line_or_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nested too deeply"):
        read(*TRAIN, "--cfg", yaml(tmp_path, "deep", "a: " + "[" * 5000 + "]" * 5000))
    for n in range(1500):
        yaml(tmp_path, f"r{n}", f"base: r{n + 1}.yaml\n")
    yaml(tmp_path, "r1500", "optim: {lr: 7}\n")
    assert read(*TRAIN, "--cfg", str(tmp_path / "r0.yaml")).optim.lr == 7


def test_a_file_too_long_for_a_recipe_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    keys = "".join(f"key{n}: {{a: 1}}\n" for n in range(100_000))
    with pytest.raises(InputError, match="long.yaml is longer than 200,000 characters"):
        read(*TRAIN, "--cfg", yaml(tmp_path, "long", keys))
    with pytest.raises(InputError, match="/dev/zero is longer"):
        read(*TRAIN, "--cfg", "/dev/zero")


@pytest.mark.parametrize(
    "argument",
    ["--optim.lr=1e300", "--optim.lr=1e31", "--optim.batch_size=1e25", f"--optim.epochs={10**30}"],
)
def test_a_number_that_the_arithmetic_cannot_hold_is_refused(argument: str) -> None:
    with pytest.raises(SettingError, match="must be a"):
        read(*TRAIN, argument)
