"""Adopt an FFCV file that another program wrote: a manifest beside it; the file is not touched."""

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from fastproj import __version__
from fastproj.core.errors import InputError
from fastproj.core.files import sha256
from fastproj.core.machine import cores
from fastproj.core.native import jpeg_damage
from fastproj.core.progress import Progress
from fastproj.data.beton import Beton, adopted_beton, open_beton
from fastproj.data.foreign import choose_fields, read_fields, read_rows
from fastproj.data.layout import HASH_BYTES, HEADER, JPEG, sample_digest
from fastproj.data.manifest import (
    FORMAT,
    Adopted,
    Manifest,
    mean_and_std,
    pack_hashes,
    pack_names,
    write_manifest,
)
from fastproj.prepare.sources import numbered

CHUNK = 64  # samples that one thread reads at a time


def adopt(
    path: Path,
    fields: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    command: str = "fastproj.prepare.adopt",
) -> Beton:
    """Write the manifest of an FFCV file with an RGB image field and an int label, and open it.

    ``fields``: the names of the image and of the label; needed only where there are several and
    none is called so. ``classes``: their names; by default the labels as text. A label of -1 means
    none. Every image is read and decoded once. Raises ``InputError`` for a file that cannot be
    adopted, or has a manifest.
    """
    described = path.with_suffix(".json")
    if not path.is_file() or path.stat().st_size < HEADER.itemsize:
        raise InputError(f"{path}: no FFCV file")
    if described.exists():
        raise InputError(
            f"{path}: has a manifest already; if {described.name} is not its own, move it away"
        )
    data = np.memmap(path, np.uint8, mode="r")
    found = read_fields(path, data)
    image, label = choose_fields(path, found, fields)
    rows = read_rows(path, data, found, image, label)
    named = tuple(classes) if classes is not None else numbered(rows.label, path)
    modes = {bool(mode == JPEG) for mode in rows.image["mode"]}
    manifest = Manifest(
        format=FORMAT,
        fastproj=__version__,
        command=command,
        dataset=path.name,
        split=path.stem,
        samples=len(rows.label),
        classes=named,
        store="mixed" if len(modes) > 1 else "jpeg" if True in modes else "raw",
        quality=None,
        max_resolution=None,
        side=None,
        mean=(),
        std=(),
        file_bytes=len(data),
        sha256="",
        content="",
        skipped=(),
        hashes="",
        sources=pack_names([f"{path.stem}[{i}]" for i in range(len(rows.label))]),
        adopted=Adopted(image, label, rows.digest),
    )
    beton = adopted_beton(path, manifest, data, rows)
    content, hashes, histogram = hashlib.sha256(), bytearray(), np.zeros((3, 256), np.int64)
    chunks = [range(i, min(i + CHUNK, len(beton))) for i in range(0, len(beton), CHUNK)]
    with ThreadPoolExecutor(cores() + 1) as pool, Progress(len(beton), "adopt") as progress:
        whole = pool.submit(sha256, path)
        for chunk, (digests, counts) in zip(
            chunks, pool.map(lambda chunk: _read(beton, chunk), chunks), strict=True
        ):
            for digest in digests:
                content.update(digest)
                hashes += digest[:HASH_BYTES]
            histogram += counts
            progress.update(len(chunk))
        file_digest = whole.result()
    mean, std = mean_and_std(histogram)
    complete = replace(
        manifest,
        mean=mean,
        std=std,
        sha256=file_digest,
        content=content.hexdigest(),
        hashes=pack_hashes(bytes(hashes)),
    )
    write_manifest(complete, described)
    return open_beton(path)


def _read(beton: Beton, chunk: range) -> tuple[list[bytes], np.ndarray]:
    """Each sample's digest, and the histogram of all their pixels, int64 (3, 256)."""
    digests, histogram = [], np.zeros((3, 256), np.int64)
    for sample, row in zip(chunk, beton.rows(np.asarray(chunk)), strict=True):
        stored = beton.stored(sample).tobytes()
        size = (int(beton.width[sample]), int(beton.height[sample]))
        digests.append(sample_digest(stored, *row))
        if beton.mode[sample] == JPEG:
            image = _decoded(beton, sample, stored, size)
        else:
            image = Image.frombytes("RGB", size, stored)
        histogram += np.array(image.histogram(), np.int64).reshape(3, 256)
    return digests, histogram


def _decoded(beton: Beton, sample: int, stored: bytes, size: tuple[int, int]) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(stored)).convert("RGB")
        wrong = jpeg_damage(stored, *size)
        if image.size != size:
            wrong = f"it has {image.size} pixels, its row says {size}"
    except Exception as error:  # PIL raises nearly anything on a broken file
        wrong = str(error) or type(error).__name__
    if wrong:
        raise InputError(
            f"{beton.path}: sample {sample} is damaged ({wrong}), and a file is adopted whole or "
            "not at all: write it again from its images"
        )
    return image
