"""Read a whole beton and name every damaged sample."""

import hashlib
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastproj.core.errors import InputError
from fastproj.core.files import sha256
from fastproj.core.machine import cores
from fastproj.data.beton import Beton, open_beton
from fastproj.data.layout import HASH_BYTES

CHUNK = 256  # samples that one thread verifies at a time


@dataclass(frozen=True)
class Damage:
    """One finding of ``verify``; ``index`` is None if the damage lies outside the samples."""

    index: int | None
    source: str
    reason: str


def verify(
    path: str | os.PathLike, progress: Callable[[int], Any] = lambda samples: None
) -> list[Damage]:
    """Read the whole beton, compare it with its manifest and return every damaged sample.

    Several threads read the samples while one hashes the whole file. ``progress`` is called with
    the number of samples just read. Raises ``InputError`` if the beton cannot be opened.
    """
    beton = open_beton(path)
    manifest = beton.manifest
    try:
        hashes, sources = manifest.sample_hashes(), manifest.source_names()
    except (ValueError, zlib.error) as error:
        raise InputError(
            f"{beton.path.with_suffix('.json')}: damaged ({error}); write the beton again"
        ) from None
    found: list[Damage] = []
    digests = hashlib.sha256()
    with ThreadPoolExecutor(cores() + 1) as pool:
        whole = pool.submit(sha256, beton.path)
        chunks = [range(i, min(i + CHUNK, len(beton))) for i in range(0, len(beton), CHUNK)]
        for chunk, results in zip(
            chunks, pool.map(lambda chunk: _chunk_digests(beton, chunk), chunks), strict=True
        ):
            for sample, result in zip(chunk, results, strict=True):
                if isinstance(result, str):
                    found.append(Damage(sample, sources[sample], result))
                    continue
                digests.update(result)
                if result[:HASH_BYTES] != hashes[sample].tobytes():
                    reason = "stored bytes, size or label differ from what was written"
                    found.append(Damage(sample, sources[sample], reason))
            progress(len(chunk))
        intact = whole.result() == manifest.sha256
    if found and intact and digests.hexdigest() == manifest.content:
        raise InputError(
            f"{beton.path.with_suffix('.json')}: damaged, the beton itself is intact; write again"
        )
    if not found and not intact:
        found.append(Damage(None, "", "bytes outside the samples differ: header, rows or padding"))
    return found


def _chunk_digests(beton: Beton, chunk: range) -> list[bytes | str]:
    """Each sample's digest, or why it cannot be read.

    It reads with pread, because a disk error under a memory map ends the process (SIGBUS).
    """
    results: list[bytes | str] = []
    with beton.path.open("rb") as file:
        for i in chunk:
            try:
                stored = os.pread(file.fileno(), int(beton.length[i]), int(beton.pointer[i]))
            except OSError as error:
                results.append(f"cannot be read: {error.strerror}")
                continue
            results.append(beton.digest(i, stored))
    return results
