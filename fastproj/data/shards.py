"""A set that was written as several files: their names, and what they have in common.

``train-{00000..00063}.beton`` names 64 files, which are read as one: the arrays of one beton, whose
``data`` is one range of addresses into which the system maps all files, one after another. So
everything that reads a beton reads them, in the same order.
"""

import base64
import ctypes
import hashlib
import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastproj.core.errors import InputError
from fastproj.core.native import library
from fastproj.data.manifest import Manifest, Shard, mean_and_std

SAME = ("dataset", "split", "classes", "store", "quality", "max_resolution", "side")
MAP_FIXED = 0x10  # of Linux, macOS and the BSDs; Python's mmap has no name for it


class File(NamedTuple):
    """One file of a beton: where it begins in ``data``, and its size, both in bytes."""

    path: Path
    start: int
    size: int


def expand(path: Path) -> list[Path]:
    """The files that ``path`` names: of ``{00000..00063}`` each, otherwise itself alone."""
    named = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path.name)
    if not named:
        return [path]
    before, first, last, after = named.groups()
    numbers = range(int(first), int(last) + 1)
    if not numbers:
        raise InputError(f"{path}: names no file: give {{FIRST..LAST}} with FIRST at most LAST")
    return [path.with_name(f"{before}{i:0{len(first)}}{after}") for i in numbers]


def shard_name(split: str, number: int) -> str:
    """``train-00003.beton``"""
    return f"{split}-{number:05d}.beton"


def set_name(split: str, of: int) -> str:
    """``train-{00000..00063}.beton``"""
    return f"{split}-{{{0:05d}..{of - 1:05d}}}.beton"


def refuse_alone(path: Path, shard: Shard) -> InputError:
    """The error for a file that is read as if it were the set."""
    return InputError(
        f"{path}: shard {shard.number} of {shard.of}, not the whole set: give all of them as "
        f"'{_set_of(path, shard)}' (in quotes, or the shell takes the braces)"
    )


def _set_of(path: Path, shard: Shard) -> Path:
    """What names all files of the set that ``path`` belongs to."""
    return path.with_name(set_name(path.stem.rpartition("-")[0], shard.of))


def join(files: Sequence[Path], manifests: Sequence[Manifest | None]) -> Manifest:
    """The manifest of the set of these files; None stands for a file that is missing.

    Raises ``InputError`` for one that is missing, is no shard, or belongs to another set.
    """
    first: tuple[Path, Manifest, Shard] | None = None
    for number, (path, manifest) in enumerate(zip(files, manifests, strict=True)):
        if manifest is None:
            continue
        shard = manifest.shard
        if shard is None:
            raise InputError(
                f"{path}: no shard: it was written as a set of one file; name it alone"
            )
        if first is None:
            first = path, manifest, shard
        _check_same(path, manifest, shard, *first)
        if shard.of != len(files):
            raise InputError(
                f"{path}: shard {shard.number} of {shard.of}, but {len(files)} files are named: "
                f"the set is '{_set_of(path, shard)}'"
            )
        if shard.number != number:
            raise InputError(
                f"{path}: shard {shard.number} of its set, not {number}: a file was renamed"
            )
    missing = [number for number, manifest in enumerate(manifests) if manifest is None]
    if missing:
        also = f" ({len(missing)} of {len(files)} are)" if len(missing) > 1 else ""
        raise InputError(
            f"{files[missing[0]]}: shard is missing{also}: write it with fastproj prepare "
            f"--data.shard {missing[0]}/{len(files)} and the settings of the others"
        )
    there = [manifest for manifest in manifests if manifest]
    return _joined(there, [manifest.shard for manifest in there if manifest.shard])


def _check_same(
    path: Path, manifest: Manifest, shard: Shard, first: Path, theirs: Manifest, of_first: Shard
) -> None:
    """Raises ``InputError`` unless the shard is of the same set as the first one."""
    if shard.set == of_first.set:
        return
    differ = [name for name in SAME if getattr(manifest, name) != getattr(theirs, name)]
    if shard.of != of_first.of:
        differ.append("shards")
    raise InputError(
        f"{path} (shard {shard.number} of {shard.of}) and {first.name} (shard {of_first.number} of "
        f"{of_first.of}) are of different sets: they differ in {', '.join(differ) or 'images'}; "
        "write the older one again, or remove it"
    )


def _joined(manifests: Sequence[Manifest], shards: Sequence[Shard]) -> Manifest:
    mean, std = mean_and_std(np.sum([shard.counts() for shard in shards], 0))
    content, sha256 = hashlib.sha256(), hashlib.sha256()
    for manifest, shard in zip(manifests, shards, strict=True):
        content.update(shard.sample_digests())
        sha256.update(manifest.sha256.encode())
    hashes = b"".join(manifest.sample_hashes().tobytes() for manifest in manifests)
    return replace(
        manifests[0],
        samples=sum(manifest.samples for manifest in manifests),
        mean=mean,
        std=std,
        file_bytes=sum(manifest.file_bytes for manifest in manifests),
        sha256=sha256.hexdigest(),
        content=content.hexdigest(),
        skipped=tuple(skipped for manifest in manifests for skipped in manifest.skipped),
        hashes=base64.b64encode(hashes).decode(),
        sources=" ".join(manifest.sources for manifest in manifests),
        shard=None,
    )


def map_files(paths: Sequence[Path]) -> tuple[np.ndarray, tuple[File, ...]]:
    """One read-only array, uint8, of all files, each from the next page on.

    Raises ``OSError`` for a file that cannot be read, and ``InputError`` without the native part.
    """
    library()  # raises where the system is neither Linux nor macOS; says why a cut file ends it
    page, start, files = mmap.ALLOCATIONGRANULARITY, 0, []
    for path in paths:
        files.append(File(path, start, path.stat().st_size))
        start += -(-files[-1].size // page) * page
    # The range is taken as a whole and given back with the array; each file replaces its part.
    whole = mmap.mmap(-1, start, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
    data = np.frombuffer(whole, np.uint8)
    system = ctypes.CDLL(None, use_errno=True).mmap
    system.restype = ctypes.c_void_p
    system.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    for file in files:
        at, flags = data.ctypes.data + file.start, mmap.MAP_SHARED | MAP_FIXED
        with file.path.open("rb") as opened:
            if system(at, file.size, mmap.PROT_READ, flags, opened.fileno(), 0) != at:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(file.path))
    return data, tuple(files)
