"""The study of a real, tiny set: in this process, by killed processes, and with bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fastproj.__main__ import dispatch
from fastproj.core.errors import InputError, SettingError
from fastproj.objective import OBJECTIVES
from fastproj.prepare.encode import Store
from fastproj.runs import journal
from fastproj.runs.folder import RunFolder
from fastproj.settings import RUN, STUDY, Settings, load
from fastproj.settings.study import COMMANDS, read_blocks
from fastproj.studies import running
from fastproj.studies.running import Log
from fastproj.study import build_plan, main
from fastproj.training.build import build_crops, build_groups, build_learner
from tests.support.betons import half_drawn, write
from tests.support.studies import contents

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "rcfg" / "study").glob("*.yaml"))

RECIPE = """
run: {device: cpu}
views: {size: 8, blur_prob: 0}
model: {encoder: resnet_small}
projector: {hidden: 32, out: 16}
optim: {batch_size: 16, epochs: 2, warmup_epochs: 0, optimizer: adamw, lr: 1e-3}
train: {precision: float32, log_every: 1}
eval: {logistic_strengths: [1e-3, 1e-1], knn_k: 3}
"""
FILE = """
study: {{recipe: {root}/recipe.yaml, seeds: [0, 1], controls: false, name: tiny}}
sets:
  s: {{data: {{train: {root}/train.beton, val: {root}/val.beton, engine: resident}}}}
arms:
  default:
  discretized:
    settings: {{projector: {{levels: 5}}}}
    published: 0.5
    acted: used_codes above 0.3
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two betons, of a recipe and of a study."""
    folder = tmp_path_factory.mktemp("study")
    for split, count in (("train", 80), ("val", 40)):
        write(half_drawn(split, count), folder, Store("raw"))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "study.yaml").write_text(FILE.format(root=folder))
    return folder


class Here:
    """A command as ``subprocess.Popen`` would run it, in this process."""

    pid = 2**22 + 1  # no process has it

    def __init__(self, argv: Sequence[str], **rest: Any) -> None:
        assert list(argv[1:3]) == ["-m", "fastproj"]
        try:
            self.returncode = dispatch(argv[3:]) or 0
        except InputError as error:
            rest["stdout"].write(f"error: {error}\n".encode())
            rest["stdout"].flush()
            self.returncode = error.exit_code

    def poll(self) -> int:
        return self.returncode

    wait = poll


@pytest.fixture(scope="module")
def unkilled(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study, run without a break."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "Popen", Here)
        main(["--cfg", f"{root}/study.yaml", "--study.dir", str(runs)])
    return runs / "tiny"


def start(root: Path, runs: Path, *more: str) -> None:
    main(["--cfg", f"{root}/study.yaml", "--study.dir", str(runs), *more])


def test_every_arm_and_seed_is_an_ordinary_run_and_a_row(unkilled: Path) -> None:
    report = json.loads((unkilled / "study.json").read_text())
    assert [run["job"] for run in report["runs"]] == [
        f"s/{arm}-seed{seed}" for seed in (0, 1) for arm in ("default", "discretized")
    ]
    for run in report["runs"]:
        folder = RunFolder.open(unkilled / run["job"])
        evaluation = json.loads(folder.evaluation.read_text())
        assert evaluation["rows"][0]["metrics"]["top1"] == run["metrics"]["logistic.top1"]
        assert {row["encoder"] for row in evaluation["rows"]} == {"pre-trained"}
    default, discretized = report["sets"][0]["rows"]
    assert discretized["acted"] is True and discretized["published"] == 0.5
    assert discretized["gain_mean"] == pytest.approx(discretized["mean"] - default["mean"])
    assert len(report["environment"]["cpu"]) == 1 and report["problems"] == {}


def test_a_second_start_runs_nothing_and_writes_the_same(
    root: Path, unkilled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(unkilled)
    monkeypatch.setattr(running, "Popen", None)
    start(root, unkilled.parent)
    assert contents(unkilled) == before
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:2] == ["arm", "n"] and out[-1].startswith("written: ")


def test_runs_of_other_settings_are_foreign_and_left_as_they_are(
    root: Path, unkilled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.read_bytes() for p in (unkilled / "s").rglob("*") if p.is_file()}
    monkeypatch.setattr(running, "Popen", None)
    with pytest.raises(InputError, match=r"no run has a result: .*is another run: it has optim.lr"):
        start(root, unkilled.parent, "--settings.optim.lr", "0.5")
    with pytest.raises(InputError, match="2 runs have no result, the first: s/discretized-seed0: "):
        start(root, unkilled.parent, "--arms.discretized.settings.projector.levels", "7")
    assert before == {p: p.read_bytes() for p in (unkilled / "s").rglob("*") if p.is_file()}
    start(root, unkilled.parent)  # the table is whole again


@pytest.mark.slow
def test_a_sweep_runs_first_and_its_choice_is_every_seeds(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "Popen", Here)
    more = ["--sweep.optim.lr", "1e-3,1e12", "--study.seeds", "0", "--settings.optim.epochs", "1",
            "--settings.optim.optimizer", "sgd"]  # fmt: skip
    with pytest.raises(InputError, match="2 runs have no result, the first: s/sweep/default-try1-"):
        start(root, tmp_path, *more)  # the second learning rate diverges, which loses
    report = json.loads((tmp_path / "tiny" / "study.json").read_text())
    assert [sweep["chosen"] for sweep in report["sweeps"]] == [{"optim.lr": "1e-3"}] * 2
    finals = [run for run in report["runs"] if run["trial"] is None]
    assert [run["overrides"]["optim.lr"] for run in finals] == ["1e-3", "1e-3"]
    out = capsys.readouterr().out
    assert "s, default: best of 2 tries on the holdout of train: optim.lr 1e-3." in out
    assert "with one seed, which has no interval" in out


def test_a_metric_that_no_probe_gives_ends_the_study(root: Path, unkilled: Path) -> None:
    with pytest.raises(InputError, match=r"'logistic.top9', which no probe gives"):
        start(root, unkilled.parent, "--study.primary", "logistic.top9")


def test_the_noise_alone_and_the_no_op_are_added(root: Path) -> None:
    more = ["--study.controls", "true", "--arms.x.settings.superfluous.noise", "fixed",
            "--arms.x.settings.superfluous.lambda_a", "1"]  # fmt: skip
    plan = build_plan(load(STUDY, ["--cfg", f"{root}/study.yaml", *more], "study", ""))
    assert [(arm.name, arm.control) for arm in plan.arms[3:]] == [
        ("no-op", "no-op"), ("x noise only", "x"),
    ]  # fmt: skip


def test_plugins_of_the_study_are_every_runs(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from fastproj.objective import OBJECTIVES\n"
        "def product(z1, z2, factor=1.0):\n    return -factor * (z1 * z2).mean()\n"
        "OBJECTIVES['product'] = product\n"
    )
    more = ["--plugins", f"{tmp_path}/mine.py", "--arms.x.settings.objective.name", "product",
            "--arms.x.settings.objective.factor", "2"]  # fmt: skip
    plan = build_plan(load(STUDY, ["--cfg", f"{root}/study.yaml", *more], "study", ""))
    jobs = plan.jobs({(arm.name, "s"): {} for arm in plan.arms})
    (plugins,) = {word for job in jobs for word in job.argv() if word.startswith("--plugins=")}
    assert plugins.startswith(f"--plugins={tmp_path}/mine.py#sha256=")
    assert load(RUN, jobs[2].argv(), "train", "").objective.options == {"factor": 2.0}
    del OBJECTIVES["product"]  # other tests go through the table


@pytest.mark.parametrize(
    ("argv", "kind", "words"),
    [
        (["--study.primary", "svm.top1"], SettingError, "no probe is called 'svm'"),
        (
            ["--study.primary", "knn.top1", "--sweep.optim.lr", "1,2"],
            SettingError,
            "holdout of knn.top1, which has none in the arm",
        ),
        (
            ["--settings.eval.logistic_strengths", "0.01", "--sweep.optim.lr", "1,2"],
            SettingError,
            "holdout of logistic.top1, which has none in the arm",
        ),
        (["--study.primary", "ridge.top1"], SettingError,
         "the arm default on s has the probes logistic, knn: name one of them, or add ridge to"),
        (["--settings.optim.lrr", "1"], SettingError,
         r"arm default on s: unknown setting --optim.lrr; did you mean --optim.lr\?"),
        (["--arms.discretized.settings.projector.levels", "1"], SettingError,
         "arm discretized on s: projector.levels must be a whole number at least 2"),
        (["--arms.discretized.recipe", "nowhere.yaml"], InputError,
         "arm discretized on s: cannot read nowhere.yaml"),
        (["--arms.discretized.settings.data.val", "other"], InputError,
         "the arms default and discretized have different data on s"),
        (["--sets.s.data.val", "null"], InputError, "arm default on s: data.val is missing"),
        (["--sets.s.data.val", "nowhere.beton"], InputError, "no such beton"),
        (["--study.recipe", "null"], SettingError, "the arm default has no recipe"),
        (["--arms.discretized.published.t", "1"], SettingError, "names 't', and the sets are s"),
        (["--arms.discretized.acted", "much"], InputError, "acted must be"),
        (["--arms.discretized.sweep.optim.lr", "1,2"], InputError, "the same number of tries"),
        (["--study.baseline", "defualt"], InputError, "study.baseline is 'defualt'"),
        (["--study.executor", "cluster"], SettingError, "study.executor must be"),
        (["--study.processes", "0"], SettingError, "study.processes must be"),
        (["--submitit.a.b", "1"], SettingError, "write submitit's parameters below submitit"),
        (["--study.dir", "/proc/nowhere"], InputError, "cannot write /proc/nowhere/tiny"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_runs(
    root: Path, tmp_path: Path, argv: list[str], kind: type[InputError], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        start(root, tmp_path, *argv)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_submitits_parameters_of_the_command_line(root: Path) -> None:
    more = ["--submitit.timeout_min", "30", "--submitit.slurm_partition", "gpu",
            "--submitit.slurm_use_srun", "false", "--submitit.name", "null"]  # fmt: skip
    blocks = read_blocks(load(STUDY, ["--cfg", f"{root}/study.yaml", *more], "study", ""))
    assert blocks.submitit == {
        "timeout_min": 30, "slurm_partition": "gpu", "slurm_use_srun": False, "name": None
    }  # fmt: skip


def test_without_submitit_or_slurm_it_is_one_line_before_anything_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--cfg", f"{root}/study.yaml", "--study.dir", str(tmp_path), "--study.executor"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match='study.executor slurm: submitit says: .*"srun"'):
        main([*argv, "slurm"])
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.delitem(sys.modules, "fastproj.studies.scheduler", raising=False)
    with pytest.raises(InputError, match=r"fastproj study needs submitit: run ./setup.sh slurm"):
        dispatch(["study", *argv, "local"])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_is_a_plan_and_its_head_names_it(path: Path) -> None:
    plan = build_plan(load(STUDY, ["--cfg", str(path)], "study", ""))
    first = next(iter(plan.sets))
    for arm in plan.arms:  # each part of the run is built, without memory for its numbers
        job = plan.job(arm, first, plan.seeds[0], arm.tries()[-1])
        settings = load(COMMANDS[job.command], job.argv(), job.command, "")
        if not isinstance(settings, Settings):
            continue
        with torch.device("meta"):
            learner = build_learner(settings, 10)
        assert build_groups(settings, learner) and len(build_crops(settings, 0)) == 1
    assert plan.folder == Path("runs") / path.stem
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"#   python -m fastproj.study --cfg rcfg/study/{path.name}" in [
        line.replace("# Command: ", "#   ") for line in head
    ]
    assert "no-op" in [arm.name for arm in plan.arms]
    assert all(len(line) <= 100 for line in path.read_text().splitlines())


# Points over the default projector [the paper; its reviews], typed from there.
PUBLISHED = {
    "simclr": {"regularized": {"cifar10": 0.26},
               "discretized": {"cifar10": 1.03, "cifar100": 2.04, "in100": 1.02},
               "sparse": {"cifar10": 0.69, "cifar100": 3.87, "in100": 1.12}},
    "barlow": {"regularized": {"cifar10": 0.32}, "discretized": {}, "sparse": {"cifar100": 3.99}},
}  # fmt: skip


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_papers_table_has_its_recipes_and_gains(method: str) -> None:
    path = ROOT / "rcfg" / "study" / f"iclr2025_{method}.yaml"
    plan = build_plan(load(STUDY, ["--cfg", str(path)], "study", ""))
    assert {a.name: dict(a.published) for a in plan.arms[1:4]} == PUBLISHED[method]
    middle = {"simclr": "", "barlow": "_barlow"}[method]
    jobs = plan.jobs({(arm.name, name): {} for arm in plan.arms for name in plan.sets})
    recipes = {(job.dataset, job.arm): job.recipe for job in jobs}
    assert len(jobs) == 3 * 5 * 5
    for name in ("cifar10", "cifar100", "in100"):
        assert recipes[name, "default"] == recipes[name, "no-op"] == f"{name}{middle}"
        assert recipes[name, "sparse"] == f"{name}{middle}_sparse"


@pytest.mark.slow
@pytest.mark.soak
def test_jobs_of_a_scheduler_give_the_same_tables_also_where_one_is_requeued(
    root: Path, unkilled: Path, tmp_path: Path
) -> None:
    """submitit's local executor; SIGUSR2 is what it and Slurm send before they preempt a job."""
    argv = [sys.executable, "-m", "fastproj", "study", "--cfg", f"{root}/study.yaml",
            "--study.dir", str(tmp_path), "--study.executor", "local", "--study.processes", "2",
            "--submitit.timeout_min", "30"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    run = RunFolder(tmp_path / "tiny" / "s" / "default-seed0")
    log = Log(tmp_path / "tiny" / "study.jsonl")
    while not (run.metrics.exists() and b'"event": "step"' in run.metrics.read_bytes()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    number = next(event["id"] for event in log.events() if event["job"] == "s/default-seed0")
    (task,) = psutil.Process(int(number)).children()  # the local executor's number is a process
    task.send_signal(signal.SIGUSR2)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    starts = [event for event in journal.read(run.metrics) if event["event"] == "start"]
    printed = (tmp_path / "tiny" / "submitit" / f"{number}_0_log.err").read_text()
    assert len(starts) == 2 and "this job is preempted" in printed
    assert contents(tmp_path / "tiny") == contents(unkilled)
    report = json.loads((tmp_path / "tiny" / "study.json").read_text())
    assert {one["images_per_second"] for one in report["runs"]} == {None}
