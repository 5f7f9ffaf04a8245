"""A finished run that is given more epochs: how many, at which rate, and whatever is killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj import evaluate
from fastproj.core.errors import InputError, SettingError
from fastproj.data.beton import Beton
from fastproj.evaluation.results import read_evaluation
from fastproj.prepare.encode import Store
from fastproj.reporting.read import read_run
from fastproj.runs import checkpoint, journal, resume
from fastproj.runs.folder import RunFolder
from fastproj.studies.running import state
from fastproj.train import main
from fastproj.training.optim import warmup_cosine
from tests.support.betons import digit_like, write

BASE = {
    **{"run.device": "cpu", "run.name": "r", "model.encoder": "resnet_small", "views.size": 8},
    **{"views.blur_prob": 0, "projector.hidden": 32, "projector.out": 16, "optim.batch_size": 16},
    **{"optim.epochs": 1, "optim.lr": 0.4, "optim.warmup_epochs": 0.5, "train.log_every": 1},
    **{"train.precision": "float32", "data.engine": "stream"},
}
STEPS = 5  # an epoch of 80 samples


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    source = digit_like(np.random.default_rng(0), 83, 12, 4)
    return write(source, tmp_path_factory.mktemp("data"), Store("raw"))


@pytest.fixture(scope="module")
def finished(beton: Beton, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    given = {"data.train": beton.path, "data.val": beton.path, "run.dir": folder, **BASE}
    main([f"--{name}={value}" for name, value in given.items()])
    return folder / "r"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "r")


def extend(run: Path, epochs: int, *more: str) -> None:
    main(["--run.resume", str(run), "--run.extend", str(epochs), *more])


@pytest.fixture(scope="module")
def extended(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, extended to two epochs without a break."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("extended") / "r")
    extend(run, 2)
    return run


def assert_same_end(ours: Path, theirs: Path) -> None:
    """Both have the same losses of every step, and the same weights at the end."""
    found = []
    for run in (ours, theirs):
        events = journal.read(run / "metrics.jsonl")
        newest = checkpoint.latest(run / "checkpoints")
        assert newest
        learned = checkpoint.load(newest)
        steps = [(e["step"], e["loss"], e["lr"]) for e in events if e["event"] == "step"]
        found.append((steps, [e["step"] for e in events if e["event"] == "end"]))
        assert learned["cursor"] == [2, 0] and learned["settings"]["optim.epochs"] == 2
        found.append({n: t for part in ("encoder", "projector") for n, t in learned[part].items()})
    assert found[0] == found[2] and [step for step, *_ in found[0][0]] == list(range(1, 11))
    assert found[0][1] == [10]
    assert found[1].keys() == found[3].keys()
    assert all(torch.equal(found[1][name], found[3][name]) for name in found[1])


def test_one_more_epoch_is_trained_and_the_schedule_said(
    run: Path, extended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "config.yaml").read_text().splitlines()
    extend(run, 2)
    assert_same_end(run, extended)
    after = (run / "config.yaml").read_text().splitlines()
    (place,) = (i for i, line in enumerate(before) if line.startswith("  epochs: 1 "))
    assert after[place] == "  epochs: 2  # command line"
    assert after[:place] + after[place + 1 :] == before[:place] + before[place + 1 :]

    events = journal.read(run / "metrics.jsonl")
    assert [e["epoch"] for e in events if e["event"] == "epoch"] == [0, 1]
    rates = [e["lr"] for e in events if e["event"] == "step"]
    peak = 0.4 * 16 / 256
    whole = [warmup_cosine(step, 10, 2.5, peak, 3e-5) for step in range(10)]
    assert rates == pytest.approx([*(warmup_cosine(i, 5, 2.5, peak, 3e-5) for i in range(5)),
                                   *whole[5:]])  # fmt: skip
    said = capsys.readouterr().err
    assert (
        f"extended from 1 to 2 epochs: the learning rate goes from {rates[4]:.4g} to {rates[5]:.4g}"
        in said
    )


def test_a_kill_9_and_a_resume_change_nothing(run: Path, extended: Path) -> None:
    """Killed while it trains, then resumed as any run is."""
    metrics = run / "metrics.jsonl"
    size = metrics.stat().st_size
    process = subprocess.Popen(
        [sys.executable, "-m", "fastproj.train", "--run.resume", str(run), "--run.extend", "2"],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while b'"event": "step"' not in metrics.read_bytes()[size:]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert journal.read(metrics)[-1]["event"] != "end"
    main(["--run.resume", str(run)])
    assert_same_end(run, extended)


@pytest.mark.parametrize("reached", ["journal", "config", "checkpoint"])
def test_a_kill_while_it_begins_loses_nothing(run: Path, extended: Path, reached: str) -> None:
    """What lies there when the kill comes after each of the three writes of its beginning."""
    if reached == "checkpoint":
        extend(run, 2, "--train.stop_after", "1")
        newest = checkpoint.latest(run / "checkpoints")
        assert newest and newest.name == "step-00000006.pt"
        newest.unlink()
        kept = checkpoint.latest(run / "checkpoints")
        assert kept and kept.name == "step-00000005.pt"
        assert checkpoint.load(kept)["settings"]["optim.epochs"] == 2
    else:
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"event": "start", "time": 1.0, "step": 5, "steps": 10}\n')
    if reached == "config":
        resume.write_epochs(RunFolder(run), 2)
    if reached == "journal":  # nothing says 2 yet but the command
        extend(run, 2)
    else:
        main(["--run.resume", str(run)])
    assert_same_end(run, extended)


def test_an_extension_goes_on_by_the_same_command_and_can_come_again(
    run: Path, extended: Path
) -> None:
    extend(run, 2, "--train.stop_after", "2")
    with pytest.raises(InputError, match=r"made with optim.epochs = 2, now it is 3"):
        extend(run, 3)  # it is not finished
    extend(run, 2)
    assert_same_end(run, extended)
    extend(run, 3, "--train.stop_after", "1")
    assert journal.read(run / "metrics.jsonl")[-1]["step"] == 11


def test_evaluate_report_and_study_read_it(run: Path, finished: Path) -> None:
    folder = RunFolder(run)
    words = ["--eval.probes", "knn", "--eval.baselines", "false"]
    evaluate.main([str(run), *words])
    assert read_evaluation(folder).checkpoint["step"] == STEPS and state(folder) == "whole"
    extend(run, 2, "--train.stop_after", "2")
    assert state(folder) == "cut"
    assert read_run(folder).status().startswith("7 of 10 steps, no end")
    main(["--run.resume", str(run)])
    assert state(folder) == "trained"
    evaluate.main([str(run), *words])
    assert read_evaluation(folder).checkpoint["step"] == 2 * STEPS and state(folder) == "whole"
    found = read_run(folder)
    assert found.over and found.status() == "ended after 10 of 10 steps"
    (epochs,) = (item for item in found.settings if item.name == "optim.epochs")
    assert (epochs.value, epochs.source) == ("2", "command line")


def test_what_cannot_be_extended_is_refused(run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"run.extend 1: .* has 1 epochs: give more"):
        extend(run, 1)
    with pytest.raises(InputError, match=r"holds a finished run"):
        main(["--run.resume", str(run)])
    with pytest.raises(InputError, match=r"finished run"):
        main(["--run.resume", str(run), "--optim.epochs", "2"])
    for words in ([], ["--run.resume", "auto"]):
        with pytest.raises(SettingError, match="run.extend is read only where run.resume names"):
            main(["--data.train", "x", "--run.extend", "2", *words])
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
