"""Training: same numbers whatever happens to the process, and one line for what is wrong."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from betons import digit_like, photographs, write

from data_prep.encode import Store
from fastproj import checkpoint, journal
from fastproj.errors import InputError
from fastproj.manifest import Beton
from fastproj.settings import RUN, load
from fastproj.train import train

BASE = {
    "run.device": "cpu",
    "model.encoder": "resnet_small",
    "views.size": 8,
    "views.blur": 0,
    "projector.hidden": 32,
    "projector.out": 16,
    "optim.batch_size": 16,
    "optim.epochs": 4,
    "optim.warmup_epochs": 0.5,
    "train.log_every": 1,
}
STEPS = 20  # 4 epochs of 80 samples
GOLDEN = [3.6535, 3.7031, 3.5734, 3.5005, 3.4666]  # the loss of steps 1 to 5; torch 2.15


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    source = digit_like(np.random.default_rng(0), 83, 12, 4)
    return write(source, tmp_path_factory.mktemp("data"), Store("raw"))


def options(beton: Beton, folder: Path, **changes: object) -> list[str]:
    given = {"data.train": beton.path, "run.dir": folder, "run.name": "r", **BASE}
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def run(beton: Beton, folder: Path, **changes: object) -> Path:
    """Train in this process; returns the run folder."""
    return train(load(RUN, options(beton, folder, **changes), "test", ""))


def command(arguments: list[str], **more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastproj.train", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, by its path in the state."""
    newest = checkpoint.latest(run / "checkpoints")
    assert newest
    found: dict[str, torch.Tensor] = {}

    def collect(prefix: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[prefix] = value
        elif isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in items:
                collect(f"{prefix}/{key}", inner)

    collect("", checkpoint.load(newest))
    return found


def assert_same_run(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    steps = [
        [(e["step"], e["loss"]) for e in journal.read(r / "metrics.jsonl") if e["event"] == "step"]
        for r in (a, b)
    ]
    assert steps[0] == steps[1]
    assert [number for number, _ in steps[0]] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def whole(beton: Beton, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps without a break."""
    return run(beton, tmp_path_factory.mktemp("whole"), data__engine="resident")


@pytest.fixture(scope="module")
def rounded_twice(beton: Beton, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with torchvision's bits, which round between the two passes of the resize."""
    return run(beton, tmp_path_factory.mktemp("rounded_twice"), data__engine="reference")


@pytest.mark.parametrize("engine", ["resident", "stream", "reference"])
def test_ten_steps_and_ten_more_are_twenty(
    beton: Beton, whole: Path, rounded_twice: Path, tmp_path: Path, engine: str
) -> None:
    # 8 steps end inside epoch 1 (5 steps an epoch).
    if engine != "resident":
        whole = rounded_twice
    run(beton, tmp_path, data__engine=engine, train__stop_after=8)
    run(beton, tmp_path, data__engine=engine, train__stop_after=2, run__resume="true")
    broken = run(beton, tmp_path, data__engine=engine, run__resume="true")
    assert_same_run(whole, broken)


def test_kill_9_at_a_random_moment_three_times_changes_nothing(
    beton: Beton, whole: Path, tmp_path: Path
) -> None:
    pause = random.Random(0)
    arguments = options(beton, tmp_path, data__engine="resident")
    killed, metrics = 0, tmp_path / "r" / "metrics.jsonl"
    while True:
        resume = ["--run.resume", "true"] if killed else []
        # A step takes milliseconds: without a brake the run would end before it is killed.
        process = command(arguments + resume, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if killed == 3:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            break
        before = metrics.stat().st_size if metrics.exists() else 0
        while not metrics.exists() or metrics.stat().st_size < before + 600 * (killed + 1):
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        time.sleep(pause.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    assert_same_run(whole, tmp_path / "r")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(
    beton: Beton, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = options(beton, tmp_path, optim__epochs=4000)
    process = command(arguments)
    metrics = tmp_path / "r" / "metrics.jsonl"
    while not metrics.exists() or b'"step": 3,' not in metrics.read_bytes():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    last = journal.read(metrics)[-1]
    assert last["event"] == "checkpoint"
    newest = checkpoint.latest(tmp_path / "r" / "checkpoints")
    assert newest and newest.name == last["file"]
    assert checkpoint.load(newest)["step"] == last["step"] >= 3


def test_the_run_folder_says_what_was_done(whole: Path, beton: Beton) -> None:
    events = journal.read(whole / "metrics.jsonl")
    assert [e["event"] for e in events][:2] == ["start", "checkpoint"]
    assert events[-1]["event"] == "end"
    assert len([e for e in events if e["event"] == "epoch"]) == 4
    step = next(e for e in events if e["event"] == "step")
    assert set(step) >= {"step", "epoch", "loss", "lr", "images_per_second", "data_wait"}
    # lr of the first update: the warm-up starts at optim.warmup_lr.
    assert step["lr"] == pytest.approx(3e-5)
    assert len(list((whole / "checkpoints").iterdir())) == 2  # train.keep
    environment = json.loads((whole / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])
    again = load(RUN, ["--cfg", str(whole / "config.yaml")], "test", "")
    assert again.optim.batch_size == 16 and again.data.train == str(beton.path)


def test_the_loss_of_the_first_steps_is_golden(whole: Path) -> None:
    """Committed values: a change of the arithmetic has to be seen and said."""
    losses = [e["loss"] for e in journal.read(whole / "metrics.jsonl") if e["event"] == "step"]
    assert losses[:5] == pytest.approx(GOLDEN, abs=1e-3)  # room for another CPU's rounding


def test_the_online_probe_learns_and_teaches_nothing(beton: Beton, tmp_path: Path) -> None:
    """The classes are columns of light, easy to see; the probe's rate must not touch the rest."""
    with_probe = run(beton, tmp_path / "a", views__jitter=0, views__flip=0)
    without = run(beton, tmp_path / "b", views__jitter=0, views__flip=0, optim__probe_lr=1e-9)
    a, b = weights(with_probe), weights(without)
    for name in a:
        if name.startswith(("/encoder", "/projector")):
            assert torch.equal(a[name], b[name]), name
    assert not torch.equal(a["/probe/weight"], b["/probe/weight"])


def test_an_unlabelled_set_trains_as_a_labelled_one(beton: Beton, tmp_path: Path) -> None:
    source = digit_like(np.random.default_rng(0), 83, 12, 4)  # the fixture's images
    unlabelled = dataclasses.replace(source, labels=np.full(83, -1))
    bare = write(unlabelled, tmp_path / "bare", Store("raw"))
    a = weights(run(beton, tmp_path / "a", train__stop_after=3))
    b = weights(run(bare, tmp_path / "b", train__stop_after=3))
    for name in a:
        if name.startswith(("/encoder", "/projector")):
            assert torch.equal(a[name], b[name]), name
    assert any(not torch.equal(a[f"/probe/{n}"], b[f"/probe/{n}"]) for n in ("weight", "bias"))


def test_accumulation_splits_a_step_and_keeps_its_data(beton: Beton, tmp_path: Path) -> None:
    """Four parts of 4 samples: each anchor of a part sees 7 others, so the loss is near log 7."""
    parts = run(beton, tmp_path, optim__accumulate=4, train__stop_after=5)
    events = [e for e in journal.read(parts / "metrics.jsonl") if e["event"] == "step"]
    assert [e["step"] for e in events] == [1, 2, 3, 4, 5]
    assert events[0]["loss"] == pytest.approx(np.log(7), abs=0.4)
    state = checkpoint.load(checkpoint.latest(parts / "checkpoints"))
    assert state["cursor"] == [1, 0]


@pytest.mark.slow
def test_two_ranks_make_one_run(beton: Beton, tmp_path: Path) -> None:
    """With torchrun and gloo: as many steps as one rank, each logged once, in one run folder."""
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--standalone", "-m", "fastproj.train", *options(beton, tmp_path)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    events = journal.read(tmp_path / "r" / "metrics.jsonl")
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, STEPS + 1))
    assert events[-1]["event"] == "end"


BAD = {
    "batch larger than the set": ({"optim__batch_size": 84}, "larger than the set of 83"),
    "unsplittable batch": ({"optim__accumulate": 3}, "cannot be split"),
    "crop range": ({"views__scale_min": 0.9, "views__scale_max": 0.5}, "above views.scale_max"),
    "values a view": ({"views__blur": "0.1,0.2,0.3"}, "views.blur has 3 values"),
    "nothing to resume": ({"run__resume": "true"}, "no checkpoint to resume from"),
    "no beton": ({"data__train": "nowhere.beton"}, "nowhere.beton: no such beton"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_no_folder(
    beton: Beton, tmp_path: Path, name: str
) -> None:
    changes, message = BAD[name]
    with pytest.raises(InputError, match=message):
        run(beton, tmp_path, **changes)
    assert not (tmp_path / "r").exists()


def test_a_finished_or_unfinished_run_is_not_written_over(
    beton: Beton, whole: Path, tmp_path: Path
) -> None:
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    for resume in ("true", "false"):
        with pytest.raises(InputError, match="holds a finished run"):
            run(beton, whole.parent, run__resume=resume)
    assert before == {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    unfinished = run(beton, tmp_path, train__stop_after=1)
    with pytest.raises(InputError, match="holds an unfinished run"):
        run(beton, tmp_path)
    with pytest.raises(InputError, match=r"made with optim.lr = 0.4, now it is 0.5"):
        run(beton, tmp_path, run__resume="true", optim__lr=0.5)
    other = write(digit_like(np.random.default_rng(1), 83, 12, 4), tmp_path / "o", Store("raw"))
    with pytest.raises(InputError, match="was trained on other data"):
        run(other, tmp_path, run__resume="true")
    newest = checkpoint.latest(unfinished / "checkpoints")
    assert newest
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    with pytest.raises(InputError, match="is damaged .* delete it and resume from"):
        run(beton, tmp_path, run__resume="true")


def test_a_diverging_run_names_the_metric_and_keeps_its_checkpoints(
    beton: Beton, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"loss is nan at step .* lower --optim.lr"):
        run(beton, tmp_path, optim__optimiser="sgd", optim__lr=1e12, optim__warmup_epochs=0)
    assert journal.read(tmp_path / "r" / "metrics.jsonl")[-1]["event"] == "error"
    newest = checkpoint.latest(tmp_path / "r" / "checkpoints")
    assert newest and checkpoint.load(newest)["step"] == 0


def test_photographs_stream_at_imagenet_sizes(tmp_path: Path) -> None:
    source = photographs(np.random.default_rng(0), tmp_path / "files", 24)
    beton = write(source, tmp_path / "beton", Store("jpeg", quality=90))
    done = run(
        beton, tmp_path, views__size=64, views__blur=0.5, model__stem="imagenet",
        optim__batch_size=8, optim__epochs=1, data__engine="stream",
    )  # fmt: skip
    assert journal.read(done / "metrics.jsonl")[-1]["event"] == "end"


@pytest.mark.slow
def test_eager_and_compiled_steps_agree(beton: Beton, whole: Path, tmp_path: Path) -> None:
    compiled = run(beton, tmp_path, train__compile="true", train__stop_after=3,
                   data__engine="resident")  # fmt: skip
    ours, theirs = (
        [e["loss"] for e in journal.read(r / "metrics.jsonl") if e["event"] == "step"][:3]
        for r in (compiled, whole)
    )
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert all("_orig_mod" not in name for name in weights(compiled))
