"""The journal: what a kill, a divergence or a full disk leaves in it, and what it shows."""

import fcntl
import json
import multiprocessing
import os
import pty
import re
import resource
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastproj
from fastproj.core.errors import InputError
from fastproj.runs import journal
from fastproj.runs.environment import write_environment
from fastproj.runs.journal import Journal, RunClock, StepMeter

FORK = multiprocessing.get_context("fork")
ROOT = Path(__file__).parents[2]


def test_a_removed_journal_ends_the_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Journal(path, main=True, total=20) as book:
        book.event("start")
        path.unlink()
        with pytest.raises(InputError, match="was removed while the run wrote to it"):
            book.event("step", step=10, epoch=0.5, loss=1.25, lr=0.1)


def test_one_json_object_a_line(tmp_path):
    before = time.time()
    with Journal(tmp_path / "metrics.jsonl", main=True, total=20) as book:
        book.event("start", settings={"optim.lr": 0.1, "data.val": None})
        book.event("step", step=10, epoch=0.5, loss=1.25, lr=0.1)
        book.event("end", step=20)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "step", "end"]
    assert all(before <= line.pop("time") <= time.time() for line in lines)
    assert lines[0] == {
        "event": "start",
        "step": 0,
        "settings": {"optim.lr": 0.1, "data.val": None},
    }
    assert lines[1] == {"event": "step", "step": 10, "epoch": 0.5, "loss": 1.25, "lr": 0.1}
    with pytest.raises(ValueError, match="unknown event"):
        Journal(tmp_path / "metrics.jsonl", main=False, total=1).event("stop")


def test_line_is_there_before_the_journal_is_closed(tmp_path):
    book = Journal(tmp_path / "metrics.jsonl", main=True, total=1)
    book.event("step", step=1, loss=0.5)
    assert journal.read(tmp_path / "metrics.jsonl")[0]["loss"] == 0.5
    book.close()


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"loss": float("nan")}, "loss is nan"),
        ({"loss": 1.0, "lr": float("-inf")}, "lr is -inf"),
        ({"probe": {"top1": [0.5, float("inf")]}}, "probe.top1.1 is inf"),
    ],
)
@pytest.mark.parametrize("main", [True, False])
def test_not_finite(tmp_path, fields, name, main):
    with (
        pytest.raises(InputError, match=f"{name} at step 30: .*lower --optim.lr"),
        Journal(tmp_path / "metrics.jsonl", main=main, total=100) as book,
    ):
        book.event("step", step=30, **fields)
    if main:
        (line,) = journal.read(tmp_path / "metrics.jsonl")
        assert line["event"] == "error" and name in line["message"]


def test_not_finite_before_the_first_update_is_not_the_learning_rates_fault(tmp_path):
    book = Journal(tmp_path / "metrics.jsonl", main=False, total=100)
    with pytest.raises(InputError, match="at step 1: no update came before it, so look at the da"):
        book.event("step", step=1, loss=float("nan"))


def test_only_the_main_rank_writes_and_shows(tmp_path, capsys):
    with Journal(tmp_path / "metrics.jsonl", main=False, total=10) as book:
        book.event("step", step=1, loss=0.5)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_exception_is_logged_and_leaves(tmp_path):
    with pytest.raises(KeyError), Journal(tmp_path / "metrics.jsonl", main=True, total=10):
        raise KeyError("label")
    (line,) = journal.read(tmp_path / "metrics.jsonl")
    assert line["event"] == "error" and line["message"] == "KeyError: 'label'"
    with pytest.raises(KeyboardInterrupt), Journal(tmp_path / "metrics.jsonl", main=True, total=10):
        raise KeyboardInterrupt  # no error: train saves and leaves
    assert len(journal.read(tmp_path / "metrics.jsonl")) == 1


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_step_counts_once_after_kills_and_resumes(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    path = folder / "metrics.jsonl"
    expected: dict[int, str] = {}
    reached = 0
    for process in "abc":
        start = data.draw(st.integers(0, reached))  # the checkpoint it resumes from
        reached = start + data.draw(st.integers(1, 8))
        with Journal(folder / "metrics.jsonl", main=True, total=100, start=start) as book:
            book.event("start")
            for step in range(start + 1, reached + 1):
                book.event("step", step=step, process=process)
        expected = {step: old for step, old in expected.items() if step <= start}
        expected |= dict.fromkeys(range(start + 1, reached + 1), process)
        written = path.read_bytes()
        last_line = written[written.rindex(b"\n", 0, -1) + 1 :]
        lost = min(data.draw(st.integers(0, 100)), len(last_line))  # bytes a kill took from its end
        if lost:
            path.write_bytes(written[:-lost])
            del expected[reached]
            reached -= 1
        steps = [(e["step"], e["process"]) for e in journal.read(path) if e["event"] == "step"]
        assert steps == sorted(expected.items())


def write_for_ever(folder: Path) -> None:
    with Journal(folder / "metrics.jsonl", main=True, total=10**9) as book:
        for step in range(10**9):
            book.event("step", step=step, loss=1.0)


def test_kill_loses_no_line_that_was_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    seen = 0
    for _ in range(5):
        process = FORK.Process(target=write_for_ever, args=(tmp_path,))
        process.start()
        deadline = time.monotonic() + 30
        while not path.exists() or path.read_bytes().count(b"\n") < seen + 100:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        seen = path.read_bytes().count(b"\n")
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert len(journal.read(path)) >= seen


def test_read_names_what_it_cannot_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(InputError, match="is this a run folder"):
        journal.read(path)
    path.write_text('{"event": "start", "step": 0}\n[1]\n')
    with pytest.raises(InputError, match="line 2 is no JSON object"):
        journal.read(path)
    path.write_bytes(b'{"event": "st\xff\n{}\n')
    with pytest.raises(InputError, match="line 1 is no JSON object"):
        journal.read(path)
    path.write_text("")
    assert journal.read(path) == []


WHOLE = {
    "event": "epoch", "step": 3, "epoch": 0, "steps": 3, "loss": 1.5, "diagnostics": {"a": 1.0},
    "seconds": {"data_wait": 1.0, "step": 2.0, "pause": 0.0},
}  # fmt: skip
NOT_OURS = [
    {}, {"event": None}, {"event": []}, {"event": "start"}, {"event": "start", "step": "0"},
    {"event": "stop", "step": 1}, {"event": "probe", "step": 1}, {"event": "end", "step": None},
    {"event": "step", "loss": 1.5},
    *({**WHOLE, name: value} for name, value in (
        ("loss", "1.5"), ("loss", [1.5]), ("loss", None), ("loss", True), ("loss", float("nan")),
        ("loss", 10**400), ("epoch", "0"), ("steps", {}), ("seconds", 3.0), ("seconds", {}),
        ("seconds", {**WHOLE["seconds"], "step": "2"}), ("diagnostics", "x"), ("step", [1]),
        ("terms", [1.0]), ("terms", {"objective": "x"}),
    )),
    *({key: WHOLE[key] for key in WHOLE if key != name} for name in ("epoch", "steps")),
    {"event": "probe", "step": 1, "epoch": 0, "seconds": WHOLE["seconds"]},
]  # fmt: skip


@pytest.mark.parametrize("line", [json.dumps(line) for line in NOT_OURS] + ["[" * 100_000])
def test_a_line_that_no_run_writes_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(WHOLE)}\n{line}\n")
    with pytest.raises(InputError, match="metrics.jsonl, line 2 is no JSON object of a run"):
        journal.read(path)
    path.write_text(f"{json.dumps(WHOLE)}\n")
    assert journal.read(path) == [WHOLE]
    path.write_text('{"event": "probe", "epoch": 0, "seconds": 1.5}\n')
    assert journal.read(path)[0]["seconds"] == 1.5


def test_a_journal_has_one_writer(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Journal(path, main=True, total=1) as book:
        book.event("step", step=1, loss=0.5)
        with pytest.raises(InputError, match="another process writes to .*metrics.jsonl"):
            Journal(path, main=True, total=1)
        Journal(path, main=False, total=1)  # another rank
        assert len(journal.read(path)) == 1
    Journal(path, main=True, total=1).close()


def write_with_room_for(size: int, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with (
        pytest.raises(InputError, match="cannot write .*File too large.*make room"),
        Journal(folder / "metrics.jsonl", main=True, total=100) as book,
    ):
        for step in range(100):
            book.event("step", step=step)


def test_full_disk_is_one_line(tmp_path):
    process = FORK.Process(target=write_with_room_for, args=(1000, tmp_path))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert len(journal.read(tmp_path / "metrics.jsonl")) > 5


def write_with_room_for_half_a_line(folder: Path) -> None:
    """A disk is full for a moment: the line that did not fit is taken back."""
    path, limits = folder / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path, main=True, total=9) as book:
        book.event("step", step=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
        with pytest.raises(InputError, match="File too large"):
            book.event("step", step=2)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        book.event("step", step=3)
    assert [event["step"] for event in journal.read(path)] == [1, 3]


def test_a_disk_that_is_full_for_a_moment_leaves_no_half_line(tmp_path):
    process = FORK.Process(target=write_with_room_for_half_a_line, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_missing_run_folder_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot write .*No such file"):
        Journal(tmp_path / "none" / "metrics.jsonl", main=True, total=1)
    with pytest.raises(InputError, match="cannot write .*No such file"):
        write_environment(tmp_path / "none" / "environment.json")


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    began = time.monotonic()
    with Journal(tmp_path / "metrics.jsonl", main=True, total=40, start=20) as book:
        book.event("start")
        time.sleep(0.6)
        book.event("step", step=30, epoch=1.5, loss=0.123456, images_per_second=1234.5)
        book.event("checkpoint", step=30, top1=0.5, settings={"a": 1})
    out, err = capsys.readouterr()
    start, step, saved = err.splitlines()
    assert out == ""
    assert start.split() == ["start", "step", "20"]
    words = "step step 30/40 epoch 1.5 loss 0.1235 images_per_second 1234 left"
    assert step.split()[:-1] == words.split()
    minutes, seconds = step.split()[-1].split(":")
    # Ten steps of twenty are done, so what is left takes what they took.
    assert 1 <= 60 * int(minutes) + int(seconds) <= round(time.monotonic() - began)
    assert saved.split() == ["checkpoint", "step", "30", "top1", "0.5"]


SHOW = """
import sys
from fastproj.runs.journal import Journal
with Journal(sys.argv[1] + "/metrics.jsonl", main=True, total=156000, start=20) as book:
    book.event("step", step=123456, loss=5.123456, images_per_second=12345.6, lr=0.1, epoch=3)
    book.event("checkpoint", step=123456, file="x.pt")
"""


@pytest.mark.parametrize("columns", [80, 120])
def test_bar_on_a_terminal(tmp_path, columns):
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-c", SHOW, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stderr=child, stdout=subprocess.PIPE, check=True)
    os.close(child)
    shown = b""
    while part := read_terminal(parent):
        shown += part
    os.close(parent)
    assert done.stdout == b""
    assert b"checkpoint  step 123456  file x.pt" in shown
    bar = re.split(r"[\r\n]+", shown.decode().rstrip())[-1]
    assert columns - 2 <= len(bar) <= columns
    words = r" 79% +(\S.*?) +123456/156000  ([\d:]+) left, loss 5\.123, 12,346 images/s"
    found = re.fullmatch(words, bar)
    assert found and len(found[1]) >= 8, bar


def read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 10_000)
    except OSError:  # Linux' end of a terminal nobody writes to
        return b""


def test_run_clock_parts_add_up_to_the_time_on_the_wall():
    began = time.perf_counter()
    clock = RunClock()
    for _ in range(3):
        time.sleep(0.01)
        clock.lap("data_wait")
        time.sleep(0.03)
        clock.lap("step")
    first = clock.seconds()
    time.sleep(0.05)
    clock.lap("pause")
    wall = time.perf_counter() - began
    parts = clock.seconds()
    assert wall - 0.05 < sum(parts.values()) <= wall
    assert parts["data_wait"] >= 0.03 and parts["step"] >= 0.09 and parts["pause"] >= 0.05
    later = clock.seconds(since=first)
    assert later["data_wait"] == later["step"] == 0
    assert later["pause"] == parts["pause"]


def test_diagnostics_and_pauses_count_as_no_waiting_for_data(tmp_path, monkeypatch):
    """A clock that only moves where time is spent: 1 s for data, 2 s in a step, 5 s after them."""
    now = [0.0]
    monkeypatch.setattr(journal.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds
        return {}

    def batches():
        for number in range(3):
            spend(1.0)
            yield number

    with Journal(tmp_path / "metrics.jsonl", main=True, total=6) as book:
        meter = StepMeter(book, batch_size=10, every=100)
        for epoch in range(2):
            meter.begin_epoch(epoch, 3 * epoch)
            for number in meter.batches(batches()):
                spend(2.0)
                meter.step(3 * epoch + number + 1, {"loss": torch.tensor(1.0)}, lr=0.1)
            meter.end_epoch(3 * epoch + 3, lambda: spend(5.0))
    epochs = [e["seconds"] for e in journal.read(tmp_path / "metrics.jsonl")]
    assert epochs == [{"data_wait": 3.0, "step": 6.0, "pause": 0.0}] * 2


@pytest.mark.parametrize("kept", [1, 2, 256])
def test_the_meter_logs_rates_and_averages_an_epoch(tmp_path, monkeypatch, kept):
    """Two epochs of three steps, every second step logged; at most ``kept`` steps' metrics held."""
    monkeypatch.setattr(journal, "KEPT", kept)
    step = 0
    with Journal(tmp_path / "metrics.jsonl", main=True, total=6) as book:
        meter = StepMeter(book, batch_size=10, every=2)
        for epoch in range(2):
            meter.begin_epoch(epoch, step)
            for loss in meter.batches(torch.arange(3.0) + epoch):
                time.sleep(0.01)
                step += 1
                metrics = {"loss": loss, "online_probe": 1 - loss, "hits": loss / 2}
                assert meter.step(step, metrics, lr=0.1) == (step % 2 == 0)
                assert all(len(values) < kept for values in meter._metrics.values())
            meter.end_epoch(step, lambda: {"rankme": 2.5})
            time.sleep(0.02)
            meter.pause()
        meter.end(step)
    events = journal.read(tmp_path / "metrics.jsonl")
    assert [e["event"] for e in events] == ["step", "epoch", "step", "step", "epoch", "end"]
    steps, epochs = ([e for e in events if e["event"] == kind] for kind in ("step", "epoch"))
    assert [(e["step"], e["epoch"], e["loss"], e["lr"]) for e in steps] == [
        (2, 0, 1.0, 0.1), (4, 1, 1.0, 0.1), (6, 1, 3.0, 0.1),
    ]  # fmt: skip
    assert [e["terms"] for e in steps] == [{"hits": e["loss"] / 2} for e in steps]
    assert all(0 < e["images_per_second"] <= 1000 and 0 <= e["data_wait"] < 1 for e in steps)
    assert [(e["steps"], e["loss"], e["hits"]) for e in epochs] == [(3, 1.0, 0.5), (3, 2.0, 1.0)]
    assert all(e["diagnostics"] == {"rankme": 2.5} for e in epochs)
    assert all(0.03 <= e["seconds"]["step"] < 0.5 for e in epochs)
    busy = sum(e["seconds"]["step"] + e["seconds"]["data_wait"] for e in epochs)
    assert events[-1]["images_per_second"] == pytest.approx(60 / busy)
    assert events[-1]["seconds"]["pause"] >= 0.04


def test_environment(tmp_path):
    write_environment(tmp_path / "environment.json")
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["python"] == sys.version.split()[0]
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert found["packages"]["fastproj"] == fastproj.__version__
    assert found["cuda"] == torch.version.cuda
    assert found["cores"] >= 1 and found["cpu"]
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert shlex.split(found["command"]) == sys.orig_argv
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: its commit is not checked")
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    assert found["git"]["commit"] == subprocess.check_output(git, text=True).strip()
    assert isinstance(found["git"]["dirty"], bool)
