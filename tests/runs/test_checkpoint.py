"""Checkpoints: what a kill, a full disk or a flipped byte may and may not do to them."""

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastproj.core.errors import InputError
from fastproj.runs import checkpoint

FORK = multiprocessing.get_context("fork")


def state(step: int, width: int = 100) -> dict:
    """What train keeps: a module, an optimizer, a random state, plain values."""
    model = nn.Linear(width, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():  # no backward pass: autograd refuses in a forked process
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "settings": {"optim.lr": 0.1, "data.val": None, "views.flip_prob": (0.5, 0.0)},
    }


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_forked(target, *args) -> int:
    process = FORK.Process(target=target, args=args)
    process.start()
    process.join(60)
    return process.exitcode


def test_what_is_saved_is_loaded(tmp_path):
    saved = state(7)
    path = checkpoint.step_path(tmp_path / "new", 7)
    checkpoint.save(path, saved, keep=1)
    assert path.name == "step-00000007.pt"
    assert equal(checkpoint.load(path), saved)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_keeps_the_newest(tmp_path, keep):
    steps = [1, 2, 9, 99_999_999, 100_000_000]  # by number: as text the last is smaller
    for step in steps:
        checkpoint.save(checkpoint.step_path(tmp_path, step), {"step": step}, keep)
    kept = sorted(checkpoint.load(path)["step"] for path in tmp_path.iterdir())
    assert kept == steps[-keep:]
    assert checkpoint.load(checkpoint.latest(tmp_path))["step"] == steps[-1]


def test_keeps_what_it_just_saved_and_files_of_others(tmp_path):
    (tmp_path / "step-best.pt").touch()
    checkpoint.save(checkpoint.step_path(tmp_path, 20), {}, keep=1)
    checkpoint.save(checkpoint.step_path(tmp_path, 10), {}, keep=1)
    assert names(tmp_path) == ["step-00000010.pt", "step-best.pt"]


def test_latest_of_nothing(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "none") is None


def test_a_writer_keeps_the_state_at_the_call(tmp_path):
    """The file is written after the weights have moved, and is as one that was written at once."""
    saved, path = state(7), checkpoint.step_path(tmp_path, 7)
    saved["conv"] = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    checkpoint.save(tmp_path / "step-1.pt", saved, keep=5)
    go = threading.Event()
    with held_back(go), checkpoint.Writer() as writer:
        writer.save(path, saved, 5, lambda: None)
        for tensor in [*saved["model"].values(), saved["conv"], saved["random"]]:
            tensor.zero_()
        saved["optimizer"]["param_groups"][0]["lr"] = 9.0
        saved["step"] = 8
        go.set()
    at_once, later = checkpoint.load(tmp_path / "step-1.pt"), checkpoint.load(path)
    assert equal(later, at_once) and later["conv"].stride() == at_once["conv"].stride()
    assert later["model"]._metadata == at_once["model"]._metadata


@contextlib.contextmanager
def held_back(go: threading.Event):
    """Within it, ``save`` of other threads begins when ``go`` is set."""
    save = checkpoint.save
    with mock.patch.object(checkpoint, "save", lambda *given: (go.wait(30), save(*given))):
        yield


def test_a_writer_has_one_checkpoint_under_way_and_tells_what_is_written(tmp_path):
    told, go = [], threading.Event()

    def save(step):
        path = checkpoint.step_path(tmp_path, step)
        writer.save(path, {"step": step}, 5, lambda: told.append((step, path.exists())))

    with held_back(go), checkpoint.Writer() as writer:
        save(1)
        writer.check()
        assert not told and names(tmp_path) == []
        threading.Timer(0.05, go.set).start()
        save(2)  # waits for the first
        assert told == [(1, True)]
        writer.wait()
        assert told == [(1, True), (2, True)]
        save(3)
    assert told[2:] == [(3, True)]


def fails(path, state, keep):
    raise InputError("no room")


def test_an_error_of_a_writer_comes_at_the_next_check_and_once(tmp_path):
    with mock.patch.object(checkpoint, "save", fails), checkpoint.Writer() as writer:
        writer.save(tmp_path / "step-1.pt", {}, 1, lambda: pytest.fail("written"))
        with pytest.raises(InputError, match="no room"):
            while True:
                writer.check()
        writer.check()
        writer.wait()


def test_an_error_of_a_writer_comes_at_the_end_but_hides_no_other(tmp_path):
    with mock.patch.object(checkpoint, "save", fails):
        with pytest.raises(InputError, match="no room"), checkpoint.Writer() as writer:
            writer.save(tmp_path / "step-1.pt", {}, 1, lambda: None)
        with pytest.raises(ZeroDivisionError), checkpoint.Writer() as writer:
            writer.save(tmp_path / "step-1.pt", {}, 1, lambda: None)
            raise ZeroDivisionError


def save_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)  # OpenMP's threads, if there were any, did not survive the fork
    for step in range(10**6):
        checkpoint.save(checkpoint.step_path(folder, step), state(step, 20_000), keep=2)


def test_kill_leaves_only_whole_checkpoints(tmp_path):
    delays = random.Random(0)
    half_written = 0
    for attempt in range(100):
        folder = tmp_path / str(attempt)
        process = FORK.Process(target=save_for_ever, args=(folder,))
        process.start()
        while checkpoint.latest(folder) is None:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(delays.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        newest = checkpoint.latest(folder)
        for path in folder.glob("step-*.pt"):
            assert equal(checkpoint.load(path)["step"], int(path.stem[5:]))
        half_written += len(list(folder.glob("*.tmp")))
        following = checkpoint.step_path(folder, int(newest.stem[5:]) + 1)
        checkpoint.save(following, state(0), keep=2)
        assert names(folder) == [newest.name, following.name]
        if half_written >= 3 and attempt >= 10:
            return
    pytest.fail("hardly a kill hit a save: the test shows nothing")


def save_with_room_for(size: int, folder: Path, message: Path) -> None:
    """A file may grow to ``size`` bytes and no further: what a full disk does to one."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        checkpoint.save(checkpoint.step_path(folder, 2), state(2, 20_000), keep=1)
    except InputError as error:
        message.write_text(str(error))


@pytest.mark.parametrize("size", [0, 1000, 300_000])
def test_full_disk_costs_no_older_checkpoint(tmp_path, size):
    folder, message = tmp_path / "checkpoints", tmp_path / "message"
    checkpoint.save(checkpoint.step_path(folder, 1), state(1), keep=1)
    message.touch()
    # The message is written under the same limit, so it must fit where the state does not.
    assert run_forked(save_with_room_for, max(size, 400), folder, message) == 0
    assert "cannot write" in message.read_text() and "File too large" in message.read_text()
    assert names(folder) == ["step-00000001.pt"]
    assert checkpoint.load(checkpoint.latest(folder))["step"] == 1


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write .* fix the permissions"):
        checkpoint.save(checkpoint.step_path(tmp_path / "file", 1), {}, keep=1)


def test_a_removed_run_folder_does_not_come_back_in_half(tmp_path):
    path = checkpoint.step_path(tmp_path / "removed" / "checkpoints", 1)
    with pytest.raises(InputError, match="cannot write .*No such file or directory"):
        checkpoint.save(path, {}, keep=1)
    assert not (tmp_path / "removed").exists()


def save_as_nobody(folder: Path) -> None:
    if os.geteuid() == 0:  # Root may write everywhere.
        os.setuid(65534)
    with pytest.raises(InputError, match="cannot write .*Permission denied"):
        checkpoint.save(checkpoint.step_path(folder, 2), {}, keep=1)


def test_folder_without_write_permission():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        checkpoint.save(checkpoint.step_path(folder, 1), {}, keep=1)
        folder.chmod(0o555)
        assert run_forked(save_as_nobody, folder) == 0
        assert names(folder) == ["step-00000001.pt"]
        folder.chmod(0o755)


def test_cut_file_names_the_one_to_resume_from(tmp_path):
    for step in (1, 2):
        checkpoint.save(checkpoint.step_path(tmp_path, step), state(step), keep=2)
    path = checkpoint.latest(tmp_path)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError) as error:
            checkpoint.load(path)
        assert f"{path} is damaged" in str(error.value)
        assert f"delete it and resume from {checkpoint.step_path(tmp_path, 1)}" in str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = checkpoint.step_path(tmp_path_factory.mktemp("saved"), 1)
    written = state(1)
    checkpoint.save(path, written, keep=1)
    return path, path.read_bytes(), written


@settings(max_examples=300, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_flipped_byte_is_refused_or_changes_nothing(saved, place, flip):
    path, whole, written = saved
    damaged = bytearray(whole)
    damaged[int(place * len(whole))] ^= flip
    path.write_bytes(damaged)
    # Padding between the records is nobody's: a flip there may pass, but then the state is whole.
    with contextlib.suppress(InputError):
        assert equal(checkpoint.load(path), written)


def test_flipped_byte_of_a_weight_is_refused(saved):
    path, whole, written = saved
    weight = written["model"]["weight"].numpy().tobytes()
    damaged = bytearray(whole)
    damaged[whole.index(weight) + 5] ^= 1
    path.write_bytes(damaged)
    with zipfile.ZipFile(path) as records:
        assert records.testzip() is not None  # the case is what it says it is
    with pytest.raises(InputError, match="damaged .*checksum.* holds no other, so train again"):
        checkpoint.load(path)


def test_record_marked_as_a_folder_is_refused(saved):
    path, whole, _ = saved
    with zipfile.ZipFile(path) as records:
        start = records.start_dir
    damaged = bytearray(whole)
    entry = whole.index(b"data/0", start) - len("archive/") - 46  # a central header's fixed part
    assert whole[entry : entry + 4] == b"PK\x01\x02"
    damaged[entry + 38] ^= 0x10  # the external attributes' low byte
    path.write_bytes(damaged)
    with zipfile.ZipFile(path) as records:
        assert records.testzip() is None  # zipfile itself takes no notice
    with pytest.raises(InputError, match="damaged .*data/0 is marked as a folder"):
        checkpoint.load(path)


class Code:
    def __reduce__(self):
        return (os.system, ("true",))


def test_file_with_code_a_tensor_or_nothing_is_refused(tmp_path):
    torch.save({"model": Code()}, tmp_path / "code.pt")
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoint.load(tmp_path / "code.pt")
    for text in ("{}", "name,label", "c", "text"):  # torch advises to load some without its check
        (tmp_path / "text.pt").write_text(f"{text}\n")
        with pytest.raises(InputError, match="no checkpoint") as said:
            checkpoint.load(tmp_path / "text.pt")
        assert "weights_only" not in str(said.value) and "Weights only" not in str(said.value)
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(InputError, match="no checkpoint of ours"):
        checkpoint.load(tmp_path / "tensor.pt")
    with pytest.raises(InputError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "none.pt")
    with pytest.raises(InputError, match="there is no checkpoint"):
        checkpoint.load(tmp_path)
