"""A split in several files, each written by a process of its own or all by one."""

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fastproj.core.errors import InputError
from fastproj.prepare.encode import Store
from fastproj.prepare.sources import Source


def part(source: Source, number: int, of: int) -> Source:
    """The images of file ``number`` (from 0) of ``of``: a run of the split's order.

    Sizes differ by at most one. Raises ``InputError`` for more files than images.
    """
    count = len(source.labels)
    if of > count:
        raise InputError(
            f"split {source.split} has {count} images, too few for {of} shards: give at most "
            f"--data.shards {count}"
        )
    return source.at(np.arange(number * count // of, (number + 1) * count // of))


def identity(source: Source, store: Store, *settings: str | int) -> str:
    """SHA-256 of what all files of a set must share: its images' names and labels, the settings."""
    shared = [source.split, source.classes, asdict(store), *settings]
    digest = hashlib.sha256(json.dumps(shared).encode())
    digest.update(source.labels.tobytes())
    digest.update("\0".join(source.names).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def left_behind(out: Path, split: str, of: int) -> list[Path]:
    """The files of a set of more files that was written to ``out`` before."""
    first = of if of > 1 else 0  # a set of one file has no number in its name
    found = (re.fullmatch(rf"{split}-(\d{{5}})\.beton", path.name) for path in out.iterdir())
    return sorted(out / match[0] for match in found if match and int(match[1]) >= first)
