"""Training among other processes: a second trainer, requeues, ranks that differ, die or hang."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from fastproj.core.errors import InputError, SettingError
from fastproj.data.beton import Beton
from fastproj.prepare.encode import Store
from fastproj.runs import checkpoint, journal
from fastproj.settings import RUN, load
from fastproj.train import main, train
from fastproj.training.trainer import Trainer
from tests.support.betons import digit_like, write

BASE = {
    "run.name": "r",
    "run.device": "cpu",
    "model.encoder": "resnet_small",
    "views.size": 8,
    "projector.hidden": 32,
    "projector.out": 16,
    "optim.batch_size": 16,
    "optim.epochs": 2,
    "optim.warmup_epochs": 0.5,
    "train.log_every": 1,
    "train.precision": "float32",
}


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    source = digit_like(np.random.default_rng(0), 64, 12, 4)
    return write(source, tmp_path_factory.mktemp("data"), Store("raw"))


@pytest.fixture(scope="module")
def unfinished(beton: Beton, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(beton, tmp_path_factory.mktemp("unfinished"), train__stop_after=3)


def options(beton: Beton, folder: Path, **changes: object) -> list[str]:
    given = {"data.train": beton.path, "run.dir": folder, **BASE}
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def run(beton: Beton, folder: Path, **changes: object) -> Path:
    return train(load(RUN, options(beton, folder, **changes), "test", ""))


def command(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastproj.train", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def ranks(*arguments: list[str]) -> list[subprocess.Popen[str]]:
    """One process per rank, each with arguments of its own, as torchrun on several hosts starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        command(
            own, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(arguments)),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank, own in enumerate(arguments)
    ]  # fmt: skip


def wait_for_step(folder: Path, step: int, *processes: subprocess.Popen[str]) -> None:
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or f'"step": {step},'.encode() not in metrics.read_bytes():
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code, and the lines on stderr that are no events."""
    _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors, errors
    return process.returncode, errors


def test_a_second_trainer_is_refused_and_death_frees_the_folder(
    beton: Beton, tmp_path: Path
) -> None:
    first = command(options(beton, tmp_path, optim__epochs=4000))
    wait_for_step(tmp_path / "r", 3, first)
    with pytest.raises(InputError, match="another process writes to .*metrics.jsonl"):
        main(["--run.resume", str(tmp_path / "r")])
    assert first.poll() is None
    first.kill()
    first.communicate()
    main(["--run.resume", str(tmp_path / "r"), "--train.stop_after", "1"])
    events = journal.read(tmp_path / "r" / "metrics.jsonl")
    assert [e["event"] for e in events].count("error") == 0


def test_a_run_that_another_has_started_meanwhile_is_not_written_over(
    beton: Beton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastproj import train as module

    build = module.build_trainer

    def slowly(*arguments):  # another starts and ends after this one has looked
        monkeypatch.setattr(module, "build_trainer", build)
        run(beton, tmp_path, train__stop_after=1)
        return build(*arguments)

    monkeypatch.setattr(module, "build_trainer", slowly)
    with pytest.raises(InputError, match="another process has trained in .* start again"):
        run(beton, tmp_path)


def test_resume_auto_starts_goes_on_and_is_content_with_a_finished_run(
    beton: Beton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(beton, tmp_path / "whole")
    again = options(beton, tmp_path, run__resume="auto")
    main([*again, "--train.stop_after", "3"])
    main(again)
    a, b = (checkpoint.latest(folder / "checkpoints") for folder in (whole, tmp_path / "r"))
    assert a and b and a.name == b.name == "step-00000008.pt"
    for name, tensor in checkpoint.load(a)["encoder"].items():
        assert torch.equal(tensor, checkpoint.load(b)["encoder"][name]), name
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    main(again)
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before
    assert "holds a finished run: nothing to do" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"was made with optim.lr = 0.4, now it is 0.5"):
        run(beton, tmp_path, run__resume="auto", train__stop_after=3, run__name="s")
        run(beton, tmp_path, run__resume="auto", optim__lr=0.5, run__name="s")
    place = again.index("--run.name")
    with pytest.raises(SettingError, match="run.resume auto needs --run.name"):
        main(again[:place] + again[place + 2 :])


def drop(*names):
    def change(state):
        for name in names:
            state.pop(name)

    return change


CRAFTED = {
    "no settings": (drop("settings"), "no checkpoint of this run"),
    "settings are text": (lambda s: s.update(settings="x"), "no checkpoint of this run"),
    "no encoder": (drop("encoder"), "no checkpoint of this run"),
    "no optimizer": (drop("optimizer"), "no checkpoint of this run"),
    "no cursor": (drop("cursor"), "no checkpoint of this run"),
    "another shape": (
        lambda s: s["probe"].update(bias=torch.zeros(5)), r"no checkpoint of this run \(Runtime"
    ),
    "step is text": (lambda s: s.update(step="3"), "is of another run, or damaged"),
    "step elsewhere": (lambda s: s.update(step=2), "step 2 of the state is not step 3 of epoch 0"),
    "negative": (lambda s: s.update(cursor=[-1, 7]), "is of another run, or damaged"),
    "beyond the end": (lambda s: s.update(step=9, cursor=[2, 1]), "of another run, or damaged"),
    "not finite": (
        lambda s: next(iter(s["projector"].values())).fill_(torch.nan),
        "projector: .* holds NaN or infinity",
    ),
    "newer setting": (
        lambda s: s["settings"].update({"optim.nesterov": True}),
        "was made with optim.nesterov = True, now it is not read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
def test_a_checkpoint_of_something_else_is_one_line(
    unfinished: Path, tmp_path: Path, name: str
) -> None:
    change, words = CRAFTED[name]
    copy = Path(shutil.copytree(unfinished, tmp_path / "r"))
    newest = checkpoint.latest(copy / "checkpoints")
    assert newest
    state = checkpoint.load(newest)
    change(state)
    checkpoint.save(newest, state, 2)
    before = (copy / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=words) as refused:
        main(["--run.resume", str(copy)])
    assert "\n" not in str(refused.value)
    assert (copy / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "differ",
    ["optim.lr", *(pytest.param(name, marks=pytest.mark.soak) for name in ("plugins", "data"))],
)
def test_ranks_started_differently_end_at_once_with_one_line(
    beton: Beton, tmp_path: Path, differ: str
) -> None:
    first = second = options(beton, tmp_path)
    if differ == "optim.lr":
        second = options(beton, tmp_path, optim__lr=0.7)
        words = "rank 1 was started with optim.lr = 0.7, rank 0 with 0.4"
    elif differ == "plugins":
        for name, text in (("a", "x = 1"), ("b", "x = 2")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "p.py").write_text(text)
        first = [*first, "--plugins", str(tmp_path / "a/p.py")]
        second = [*second, "--plugins", str(tmp_path / "b/p.py")]
        words = "rank 1 was started with plugins = "
    else:
        other = write(digit_like(np.random.default_rng(1), 64, 12, 4), tmp_path / "o", Store("raw"))
        second = options(other, tmp_path)
        words = "rank 1 was started with the content of data.train = "
    began = time.monotonic()
    for process in ranks(first, second):
        code, errors = end(process)
        assert code == 1 and errors.startswith(f"error: {words}") and errors.count("\n") == 1
    assert time.monotonic() - began < 60
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_rank_that_cannot_start_gives_the_others_its_line(beton: Beton, tmp_path: Path) -> None:
    nowhere = options(beton, tmp_path, data__train=tmp_path / "nowhere.beton")
    one, two = ranks(options(beton, tmp_path), nowhere)
    code, errors = end(one)
    assert code == 1 and errors.startswith("error: rank 1: ") and "no such beton" in errors
    code, errors = end(two)
    assert code == 1 and "no such beton" in errors


@pytest.mark.slow
def test_a_rank_that_dies_gives_its_partner_one_line(beton: Beton, tmp_path: Path) -> None:
    own = options(beton, tmp_path, optim__epochs=4000)
    one, two = ranks(own, own)
    wait_for_step(tmp_path / "r", 3, one, two)
    two.kill()
    code, errors = end(one)
    assert code == 1 and "error: rank 0 lost rank 1: it died" in errors.splitlines()[-1]
    two.communicate()


@pytest.mark.soak
def test_ranks_name_the_one_that_hangs_after_the_timeout(beton: Beton, tmp_path: Path) -> None:
    own = options(beton, tmp_path, optim__epochs=4000, run__timeout=8, optim__batch_size=15)
    one, two, three = ranks(own, own, own)
    wait_for_step(tmp_path / "r", 3, one, two, three)
    two.send_signal(signal.SIGSTOP)
    for number, process in ((0, one), (2, three)):
        code, errors = end(process)
        assert code == 1 and f"error: rank {number} lost rank 1: " in errors.splitlines()[-1]
        assert "Traceback" not in errors
    two.kill()
    two.communicate()


@pytest.mark.slow
def test_a_second_sigterm_ends_a_rank_that_waits_for_another(beton: Beton, tmp_path: Path) -> None:
    own = options(beton, tmp_path, optim__epochs=4000)
    one, two = ranks(own, own)
    wait_for_step(tmp_path / "r", 3, one, two)
    two.send_signal(signal.SIGSTOP)
    time.sleep(1)  # rank 0 now waits in a collective
    one.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    one.send_signal(signal.SIGTERM)  # torchrun's echo of the first
    time.sleep(7)
    assert one.poll() is None
    one.send_signal(signal.SIGTERM)
    assert end(one)[0] == 128 + signal.SIGTERM
    two.kill()
    two.communicate()


@pytest.mark.slow
@pytest.mark.soak
def test_a_resume_may_have_another_number_of_ranks(beton: Beton, tmp_path: Path) -> None:
    """2, then 1, then 4: the run of one rank but for rounding; views draw nothing by rank here."""
    same = {f"views__{name}_prob": 0 for name in ("flip", "jitter", "gray", "blur")}
    same |= {"model__sync_bn": True, "run__resume": "auto"}
    whole = run(beton, tmp_path, run__name="whole", **same)
    for world, more in ((2, {"train__stop_after": 3}), (1, {"train__stop_after": 2}), (4, {})):
        own = options(beton, tmp_path, run__name="changed", **same, **more)
        if world == 1:
            main(own)
            continue
        for process in ranks(*[own] * world):
            code, errors = end(process)
            assert code == 0, errors
    events = journal.read(tmp_path / "changed" / "metrics.jsonl")
    assert [e["step"] for e in events if e["event"] == "start"] == [0, 3, 5]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 9))
    a, b = (checkpoint.latest(place / "checkpoints") for place in (whole, tmp_path / "changed"))
    assert a and b and a.name == b.name
    for name, tensor in checkpoint.load(a)["encoder"].items():
        other = checkpoint.load(b)["encoder"][name]
        torch.testing.assert_close(other, tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.soak
def test_torchrun_restarts_a_run_whose_rank_was_killed(beton: Beton, tmp_path: Path) -> None:
    """With ``run.resume auto`` the weights end as in a run that nothing disturbed."""

    def torchrun(name: str) -> subprocess.Popen[str]:
        own = options(beton, tmp_path, run__name=name, run__resume="auto", optim__epochs=20)
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
             "--max-restarts=1", "-m", "fastproj.train", *own],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    whole = torchrun("whole")
    assert whole.wait(300) == 0, whole.communicate()
    broken = torchrun("broken")
    wait_for_step(tmp_path / "broken", 7, broken)
    (second,) = (
        child
        for child in psutil.Process(broken.pid).children()
        if child.environ().get("RANK") == "1"
    )
    second.kill()
    _, errors = broken.communicate(timeout=300)
    assert broken.returncode == 0 and "Traceback" not in errors, errors
    starts = [
        e for e in journal.read(tmp_path / "broken" / "metrics.jsonl") if e["event"] == "start"
    ]
    assert len(starts) == 2 and starts[1]["step"] > 0
    a, b = (checkpoint.latest(tmp_path / name / "checkpoints") for name in ("whole", "broken"))
    assert a and b and a.name == b.name == "step-00000080.pt"
    for name, tensor in checkpoint.load(a)["encoder"].items():
        assert torch.equal(tensor, checkpoint.load(b)["encoder"][name]), name


def test_what_was_trained_on_data_that_changed_is_not_kept(
    beton: Beton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(beton.path.parent, tmp_path / "data")) / beton.path.name
    step = Trainer.train_step

    def overwrite_after_five(self, batch):  # steps: in the second epoch, when all were read
        if self.step == 5:
            with copy.open("r+b") as file:
                file.seek(beton.pointer[7])
                file.write(bytes(100))
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", overwrite_after_five)
    with pytest.raises(InputError, match="was written to or cut since it was opened"):
        run(beton, tmp_path, data__train=copy)
    newest = checkpoint.latest(tmp_path / "r" / "checkpoints")
    assert newest and newest.name == "step-00000004.pt"


HANG = """
from fastproj.data.verify import FirstRead
from time import sleep

check, calls = FirstRead.check, []

def check_for_ever(self, positions):
    calls.append(1)
    check(self, positions)
    if len(calls) == 6:  # as on a disk that does not answer any more
        sleep(1000)

FirstRead.check = check_for_ever
"""


def test_a_thread_that_hangs_ends_the_run_with_its_name_and_stack(
    beton: Beton, tmp_path: Path
) -> None:
    (tmp_path / "hang.py").write_text(HANG)
    arguments = options(beton, tmp_path, train__patience=5, data__engine="stream")
    process = command([*arguments, "--plugins", str(tmp_path / "hang.py")])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert "no batch came for 5 s, from thread fastproj-stream_" in line
    assert "(check_for_ever, " in line and "--run.resume" in line
    assert "most recent call first" in errors and "hang.py" in errors
    assert checkpoint.latest(tmp_path / "r" / "checkpoints")


@pytest.mark.slow
@pytest.mark.soak
def test_a_worker_process_that_hangs_ends_the_run_and_dies(beton: Beton, tmp_path: Path) -> None:
    arguments = options(beton, tmp_path, train__patience=5, optim__epochs=4000)
    process = command([*arguments, "--data.engine", "reference", "--data.workers", "1"])
    wait_for_step(tmp_path / "r", 3, process)
    worker = None
    while worker is None:  # each epoch has a new one
        for child in psutil.Process(process.pid).children():
            worker = child
            worker.suspend()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    line = next(line for line in errors.splitlines() if line.startswith("error: "))
    assert "no batch came for 5 s, from process " in line and "(stopped)" in line
    psutil.wait_procs([worker], 20)
    assert not worker.is_running()
