"""Checkpoints: written whole or not at all, checked when read, the last few kept."""

import argparse
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastproj.core.errors import InputError
from fastproj.core.files import replacing, writing

# torch reads nothing of a record with this bit; its tensor is then whatever the memory held.
DOS_FOLDER = 0x10
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
    there and the unfinished file is not.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(state, file)
    others = sorted(set(_all(path.parent)) - {path}, key=_step, reverse=True)
    left_by_a_kill = path.parent.glob("step-*.pt.*.tmp")
    for other in [*others[keep - 1 :], *left_by_a_kill]:
        other.unlink()


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


def read(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``, its tensors on the CPU, checked as ``load`` says.

    Also reads torch's format before 1.6, which has no checksums, and ``argparse.Namespace``
    (DINO's checkpoints hold one). Raises ``DamagedError``, and ``PermissionError``.
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
    except PermissionError:
        raise
    except Exception as error:  # zipfile, zlib and the unpickler meet damage with a dozen types.
        reason = str(error).partition("\n")[0] or type(error).__name__
        if code := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
            reason = f"it holds {code[1]}, which is more than tensors, numbers and text"
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
