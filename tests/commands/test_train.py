"""Training: same numbers whatever happens to the process, and one line for what is wrong."""

import dataclasses
import fcntl
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.loaders import Batch
from fastproj.prepare.encode import Store
from fastproj.runs import checkpoint, journal
from fastproj.settings import RUN, load
from fastproj.train import main, train
from fastproj.training.trainer import Trainer
from tests.support.betons import digit_like, photographs, write

BASE = {
    "run.device": "cpu",
    "model.encoder": "resnet_small",
    "views.size": 8,
    "views.blur_prob": 0,
    "projector.hidden": 32,
    "projector.out": 16,
    "optim.batch_size": 16,
    "optim.epochs": 4,
    "optim.warmup_epochs": 0.5,
    "train.log_every": 1,
    "train.precision": "float32",
}
STEPS = 20  # 4 epochs of 80 samples
# The loss of steps 1 to 5: Intel Xeon (family 6, model 167, AVX-512, AMX), torch 2.15. With the
# instructions of an older processor (SSE 4) the same but for 2e-6, so 1e-4 is room for others.
GOLDEN = [3.63842, 3.68582, 3.65358, 3.52989, 3.52369]  # cropped by stream, or torchvision
GOLDEN_BY_PRODUCTS = [3.65090, 3.70390, 3.53660, 3.55476, 3.48663]  # by resident


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
    resume = {"run__resume": tmp_path / "r"}
    run(beton, tmp_path, data__engine=engine, train__stop_after=2, **resume)
    broken = run(beton, tmp_path, data__engine=engine, **resume)
    assert_same_run(whole, broken)


def test_kill_9_at_a_random_moment_three_times_changes_nothing(
    beton: Beton, whole: Path, tmp_path: Path
) -> None:
    pause = random.Random(0)
    arguments = options(beton, tmp_path, data__engine="resident")
    killed, metrics = 0, tmp_path / "r" / "metrics.jsonl"
    while True:
        again = ["--run.resume", str(tmp_path / "r")]  # and nothing is repeated
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # A step takes milliseconds: without a brake the run would end before it is killed.
        process = command(again if killed else arguments, env=environment)
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_leaves(
    beton: Beton, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = options(beton, tmp_path, optim__epochs=4000)
    # These tests may have been started by nohup, and what that ignores stays ignored.
    process = command(arguments, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    metrics = tmp_path / "r" / "metrics.jsonl"
    while not metrics.exists() or b'"step": 3,' not in metrics.read_bytes():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert f"{number.name}: finishing the step under way" in errors
    last = journal.read(metrics)[-1]
    assert last["event"] == "checkpoint"
    newest = checkpoint.latest(tmp_path / "r" / "checkpoints")
    assert newest and newest.name == last["file"]
    assert checkpoint.load(newest)["step"] == last["step"] >= 3


def test_a_terminal_that_closes_loses_nothing(beton: Beton, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()

    def lead() -> None:  # a session of its own, which the terminal belongs to
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-m", "fastproj.train", *options(beton, tmp_path, optim__epochs=4000)],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=lead,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )  # fmt: skip
    os.close(theirs)
    metrics = tmp_path / "r" / "metrics.jsonl"
    try:
        while not metrics.exists() or b'"step": 3,' not in metrics.read_bytes():
            assert process.poll() is None
            os.read(ours, 10_000)
        os.close(ours)
        assert process.wait(60) == 128 + signal.SIGHUP
    finally:
        process.kill()
    last = journal.read(metrics)[-1]
    assert last["event"] == "checkpoint" and last["step"] >= 3


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


def test_the_loss_of_the_first_steps_is_golden(whole: Path, rounded_twice: Path) -> None:
    """Committed values: a change of the arithmetic has to be seen and said.

    The crops are the same bits on every processor; float32 sums of the network are not.
    """
    for folder, golden in ((whole, GOLDEN_BY_PRODUCTS), (rounded_twice, GOLDEN)):
        losses = [e["loss"] for e in journal.read(folder / "metrics.jsonl") if e["event"] == "step"]
        assert losses[:5] == pytest.approx(golden, abs=1e-4)


def test_the_online_probe_learns_and_teaches_nothing(beton: Beton, tmp_path: Path) -> None:
    """The classes are columns of light, easy to see; the probe's rate must not touch the rest."""
    with_probe = run(beton, tmp_path / "a", views__jitter_prob=0, views__flip_prob=0)
    without = run(
        beton, tmp_path / "b", views__jitter_prob=0, views__flip_prob=0, optim__probe_lr=1e-9
    )
    a, b = weights(with_probe), weights(without)
    for name in a:
        if name.startswith(("/encoder", "/projector")):
            assert torch.equal(a[name], b[name]), name
    assert not torch.equal(a["/probe/weight"], b["/probe/weight"])


def test_an_unlabeled_set_trains_as_a_labeled_one(beton: Beton, tmp_path: Path) -> None:
    source = digit_like(np.random.default_rng(0), 83, 12, 4)  # the fixture's images
    unlabeled = dataclasses.replace(source, labels=np.full(83, -1))
    bare = write(unlabeled, tmp_path / "bare", Store("raw"))
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
    arguments = options(beton, tmp_path)
    place = arguments.index("--run.name")  # left out: the ranks agree on a name
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         "-m", "fastproj.train", *arguments[:place], *arguments[place + 2 :]],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("run-seed0-")
    events = journal.read(folder / "metrics.jsonl")
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, STEPS + 1))
    assert events[-1]["event"] == "end"


BAD = {
    "batch larger than the set": ({"optim__batch_size": 84}, "larger than the set of 83"),
    "unsplittable batch": ({"optim__accumulate": 3}, "cannot be split"),
    "crop range": ({"views__scale_min": 0.9, "views__scale_max": 0.5}, "above views.scale_max"),
    "values a view": ({"views__blur_prob": "0.1,0.2,0.3"}, "views.blur_prob has 3 values"),
    "values a view and crop size": (
        {
            "objective__name": "swav",
            "views__local_crops": 2,
            "views__local_size": 8,
            "views__blur_prob": "0.1,0.2,0.3,0.4",
        },
        "one for each of the 2 views, or a third one for the small crops",
    ),
    "nothing to resume": ({"run__resume": "nowhere"}, "no checkpoint to resume from"),
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
    for resume in (whole, "null"):
        with pytest.raises(InputError, match="holds a finished run"):
            run(beton, whole.parent, run__resume=resume)
    assert before == {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    unfinished = run(beton, tmp_path, train__stop_after=1)
    with pytest.raises(InputError, match="holds an unfinished run"):
        run(beton, tmp_path)
    with pytest.raises(InputError, match=r"made with optim.lr = 0.4, now it is 0.5"):
        run(beton, tmp_path, run__resume=unfinished, optim__lr=0.5)
    other = write(digit_like(np.random.default_rng(1), 83, 12, 4), tmp_path / "o", Store("raw"))
    with pytest.raises(InputError, match="was trained on other data"):
        run(other, tmp_path, run__resume=unfinished)
    newest = checkpoint.latest(unfinished / "checkpoints")
    assert newest
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    with pytest.raises(InputError, match="is damaged .* delete it and resume from"):
        run(beton, tmp_path, run__resume=unfinished)


@pytest.mark.parametrize("lost", [1, 2])
def test_a_finished_run_that_lost_its_last_lines_is_resumed_to_its_end(
    beton: Beton, whole: Path, tmp_path: Path, lost: int
) -> None:
    """A kill came between the last checkpoint and the events ``end`` and ``checkpoint``."""
    copy = shutil.copytree(whole, tmp_path / "r")
    metrics = copy / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(True)[:-lost]))
    with pytest.raises(InputError, match="holds a finished run"):
        run(beton, tmp_path)
    run(beton, tmp_path, data__engine="resident", run__resume=copy)
    assert_same_run(whole, copy)
    end = journal.read(metrics)[-1]
    assert end["event"] == "end" and end["step"] == STEPS and end["images_per_second"] > 0
    with pytest.raises(InputError, match="holds a finished run"):
        run(beton, tmp_path, run__resume=copy)


def test_a_run_is_named_by_recipe_seed_and_time_and_resumed_by_its_folder_alone(
    beton: Beton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    given = {"data.train": beton.path, "run.dir": tmp_path / "runs", "run.seed": 3, **BASE}
    sections: dict[str, dict[str, object]] = defaultdict(dict)
    for name, value in given.items():
        section, key = name.split(".")
        sections[section][key] = str(value)
    recipe.write_text(json.dumps(sections))
    main(["--cfg", str(recipe), "--train.stop_after", "2"])
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"mine-seed3-\d{8}-\d{6}", folder.name)
    assert f"run folder: {folder}\n" in capsys.readouterr().err
    main(["--run.resume", str(folder)])
    assert journal.read(folder / "metrics.jsonl")[-1]["event"] == "end"
    assert list((tmp_path / "runs").iterdir()) == [folder]
    with pytest.raises(InputError, match="none: no such run folder"):
        main(["--run.resume", str(tmp_path / "none")])
    with pytest.raises(InputError, match="takes no --cfg"):
        main(["--run.resume", str(folder), "--cfg", str(recipe)])


def test_what_does_not_fit_the_images_is_noted_in_one_line(
    beton: Beton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(beton, tmp_path / "a", train__stop_after=1)
    assert "note" not in capsys.readouterr().err
    run(beton, tmp_path / "b", train__stop_after=1, views__size=40)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("note: ")]
    assert line.endswith("consider --views.size 12 --model.stem cifar")


def test_a_diverging_run_names_the_metric_and_keeps_its_checkpoints(
    beton: Beton, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"loss is nan at step .* lower --optim.lr"):
        run(beton, tmp_path, optim__optimizer="sgd", optim__lr=1e12, optim__warmup_epochs=0)
    assert journal.read(tmp_path / "r" / "metrics.jsonl")[-1]["event"] == "error"
    newest = checkpoint.latest(tmp_path / "r" / "checkpoints")
    assert newest and checkpoint.load(newest)["step"] == 0


def test_a_checkpoint_that_cannot_be_written_stops_the_run_at_the_next_step(
    beton: Beton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first epoch's last checkpoint fails while the second epoch is under way."""
    save, failed = checkpoint.save, threading.Event()

    def full(path: Path, state: dict, keep: int) -> None:
        if state["step"] > 0:
            failed.set()
            raise InputError("no room")
        save(path, state, keep)

    step = Trainer.train_step

    def after_it(trainer: Trainer, batch: Batch) -> dict:
        assert trainer.step <= 5 or failed.wait(30)
        return step(trainer, batch)

    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.setattr(Trainer, "train_step", after_it)
    with pytest.raises(InputError, match="no room"):
        run(beton, tmp_path)
    events = journal.read(tmp_path / "r" / "metrics.jsonl")
    assert events[-1]["event"] == "error" and "no room" in events[-1]["message"]
    assert 5 <= [e["step"] for e in events if e["event"] == "step"][-1] <= 7
    monkeypatch.undo()
    assert [e["step"] for e in events if e["event"] == "checkpoint"] == [0]
    newest = checkpoint.latest(tmp_path / "r" / "checkpoints")
    assert newest and checkpoint.load(newest)["step"] == 0


def test_photographs_stream_at_imagenet_sizes(tmp_path: Path) -> None:
    source = photographs(np.random.default_rng(0), tmp_path / "files", 24)
    beton = write(source, tmp_path / "beton", Store("jpeg", quality=90))
    done = run(
        beton, tmp_path, views__size=64, views__blur_prob=0.5, model__stem="imagenet",
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
