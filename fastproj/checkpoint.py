"""Checkpoints: written whole or not at all, checked when read, the last few kept."""

import contextlib
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastproj.errors import InputError

# Of a record with this bit torch reads nothing, and its tensor is whatever the memory held.
DOS_FOLDER = 0x10


def step_path(folder: str | Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimiser steps lies: ``folder/step-00001234.pt``."""
    return Path(folder) / f"step-{step:08d}.pt"


def latest(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in ``folder``; None if there is none."""
    return max(_all(folder), key=_step, default=None)


def save(path: str | Path, state: dict[str, Any], keep: int) -> None:
    """Write ``state`` to ``path`` (a ``step_path``), then keep the newest ``keep`` of its folder.

    ``state`` holds what ``torch.load(weights_only=True)`` reads: tensors, plain numbers and text,
    and dicts, lists and tuples of them. A reader never sees half a file: it is written under
    another name, synced to the disk and renamed. Raises ``InputError`` if that fails (full disk, no
    permission); then the older checkpoints are all still there and the unfinished file is not.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:
        # Where a write falls short, torch's zip writer raises RuntimeError over the OSError.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(
            f"cannot save {path}: {reason}; make room or mend the permissions, then resume: "
            "older checkpoints are untouched"
        ) from error
    others = sorted(set(_all(path.parent)) - {path}, key=_step, reverse=True)
    left_by_a_kill = path.parent.glob("step-*.pt.tmp")
    for other in [*others[keep - 1 :], *left_by_a_kill]:
        other.unlink()


def load(path: str | Path) -> dict[str, Any]:
    """The state that ``save`` wrote, its tensors on the CPU.

    Every record's CRC-32 is compared first and its mark as a folder looked for, as torch itself
    does neither, and ``weights_only=True`` lets a file hold no code. Raises ``InputError`` if the
    file is missing, damaged, or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}: {_others(path, 'give')}")
    try:
        with zipfile.ZipFile(path) as records:
            if damaged := records.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
            for record in records.infolist():
                if record.external_attr & DOS_FOLDER:
                    raise zipfile.BadZipFile(f"{record.filename} is marked as a folder")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # zipfile, zlib and the unpickler meet damage with a dozen types.
        reason = str(error).partition("\n")[0] or type(error).__name__
        mend = _others(path, "delete it and resume from")
        raise InputError(f"{path} is damaged or no checkpoint ({reason}): {mend}") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} is no checkpoint of ours: {_others(path, 'give')}")
    return state


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


def _sync(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
