"""Checkpoints: written whole or not at all, checked when read, the last few kept."""

import argparse
import contextlib
import copy
import errno
import re
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fastproj.core.errors import InputError
from fastproj.core.files import replacing, writing

# torch reads nothing of a record with this bit; its tensor is then whatever the memory held.
DOS_FOLDER = 0x10
DISK = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT)  # not the file's fault
ZIP = b"PK\x03\x04"  # how every file of torch.save begins, since torch 1.6


def step_path(folder: str | Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lies: ``folder/step-00001234.pt``."""
    return Path(folder) / f"step-{step:08d}.pt"


def latest(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in ``folder``; None if there is none."""
    return max(_all(folder), key=_step, default=None)


def save(path: str | Path, state: dict[str, Any], keep: int) -> None:
    """Write ``state`` to ``path`` (a ``step_path``), then keep the newest ``keep`` of its folder.

    ``state`` holds what ``torch.load(weights_only=True)`` reads: tensors, plain numbers and text,
    and dicts, lists and tuples of them. A reader never sees half a file. Raises ``InputError`` when
    the file cannot be written (full disk, no permission); the older checkpoints are then all still
    there and the unfinished file is not. The folder is made, but not the one above it: half of a
    run's folder that was removed would come back.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        torch.save(state, file)
    others = sorted(set(_all(path.parent)) - {path}, key=_step, reverse=True)
    left_by_a_kill = path.parent.glob("step-*.pt.*.tmp")
    for other in [*others[keep - 1 :], *left_by_a_kill]:
        other.unlink()


class Writer:
    """Saves in a thread of its own, one checkpoint at a time, while training goes on.

    What is saved is the state at the call: its tensors are copied first, those of a GPU into pinned
    memory without a wait for the device. A context manager: at its end the last file is complete.
    Errors of ``save`` are raised by the next ``check``, ``wait`` or ``save`` and at the end.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "fastproj-checkpoint")
        self._job: tuple[Future[None], Callable[[], None]] | None = None

    def save(
        self, path: str | Path, state: dict[str, Any], keep: int, written: Callable[[], None]
    ) -> None:
        """``save`` in the thread, after the one under way has ended.

        The caller's thread calls ``written`` when the file is complete, in one of these methods.
        """
        self.wait()
        copied, copying = snapshot(state)
        self._job = self._pool.submit(_save_copy, path, copied, copying, keep), written

    def check(self) -> None:
        """Raise what the thread raised, or call ``written``, if it has ended; do not wait."""
        if self._job is not None and self._job[0].done():
            self.wait()

    def wait(self) -> None:
        """The same, after the thread has ended."""
        if self._job is not None:
            (job, written), self._job = self._job, None
            job.result()
            written()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An exception that is leaving already is the one to be told.
        with contextlib.suppress(Exception) if error else contextlib.nullcontext():
            self.wait()
        self._pool.shutdown()


def snapshot(state: Any) -> tuple[Any, torch.cuda.Event | None]:
    """A copy of nested dicts, lists and tuples and of their tensors, on the CPU.

    The second result, if there is one, has to be waited for: the device then has copied all.
    """
    on_gpu = False

    def copied(value: Any) -> Any:
        nonlocal on_gpu
        if isinstance(value, Tensor):
            on_gpu = on_gpu or value.is_cuda
            host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            return host.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            same = copy.copy(value)  # a module's state dict holds versions beside its entries
            same.update((name, copied(inner)) for name, inner in value.items())
            return same
        if type(value) in (list, tuple):
            return type(value)(copied(inner) for inner in value)
        return value

    result = copied(state)
    event = None
    if on_gpu:
        event = torch.cuda.Event()
        event.record()
    return result, event


def _save_copy(
    path: str | Path, state: dict[str, Any], copying: torch.cuda.Event | None, keep: int
) -> None:
    if copying is not None:
        copying.synchronize()
    save(path, state, keep)


def load(path: str | Path) -> dict[str, Any]:
    """The state that ``save`` wrote, its tensors on the CPU.

    We first verify each record's CRC-32 and refuse records that are marked as folders: torch checks
    neither. ``weights_only=True`` refuses a file that holds code. Raises ``InputError`` if the file
    is missing, damaged, or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}: {_others(path, 'give')}")
    try:
        state = read(path)
    except DamagedError as error:
        fix = _others(path, "delete it and resume from")
        raise InputError(f"{path} is damaged or no checkpoint ({error}): {fix}") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} is no checkpoint of ours: {_others(path, 'give')}")
    return state


class DamagedError(Exception):
    """A file that cannot be read whole; the message is the reason alone."""


class CodeError(DamagedError):
    """A file that holds more than tensors, numbers and text, so that reading it might run code."""


def read(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``, its tensors on the CPU, checked as ``load`` says.

    Also reads torch's format before 1.6, which has no checksums, and ``argparse.Namespace``
    (DINO's checkpoints hold one). Raises ``DamagedError``, of which ``CodeError`` is a kind, and
    ``PermissionError``.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(len(ZIP)) == ZIP
        if zipped:
            with zipfile.ZipFile(path) as records:
                if damaged := records.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
                for record in records.infolist():
                    if record.external_attr & DOS_FOLDER:
                        raise zipfile.BadZipFile(f"{record.filename} is marked as a folder")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib and the unpickler meet damage with a dozen types.
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        if code := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
            reason = f"it holds {code[1]}, which is more than tensors, numbers and text"
            raise CodeError(reason) from error
        if "weights_only" in str(error):  # torch's advice is to load it without that check
            reason = "not what torch.save writes"
        raise DamagedError(reason) from error


def _others(path: Path, verb: str) -> str:
    """What to do instead: the newest other checkpoint beside ``path``, if there is one."""
    other = max(set(_all(path.parent)) - {path}, key=_step, default=None)
    if other is None:
        return f"{path.parent} holds no other, so train again"
    return f"{verb} {other}"


def _all(folder: str | Path) -> list[Path]:
    return [path for path in Path(folder).glob("step-*.pt") if re.fullmatch(r"step-\d+", path.stem)]


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
