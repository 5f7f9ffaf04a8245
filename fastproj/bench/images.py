"""The images to measure on: a beton repeated to be long enough, or its JPEGs as files."""

import base64
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fastproj.data.beton import Beton
from fastproj.data.layout import JPEG


def several_times(beton: Beton, images: int) -> Beton:
    """The beton with its samples repeated until there are at least ``images``.

    Every repetition has its own index and therefore its own crops.
    """
    times = -(-images // len(beton))

    def tiled(array: np.ndarray) -> np.ndarray:
        return np.tile(array, times)

    hashes = tiled(beton.manifest.sample_hashes().reshape(-1))
    return dataclasses.replace(
        beton,
        manifest=dataclasses.replace(
            beton.manifest,
            samples=times * len(beton),
            hashes=base64.b64encode(hashes.tobytes()).decode(),
        ),
        mode=tiled(beton.mode),
        width=tiled(beton.width),
        height=tiled(beton.height),
        pointer=tiled(beton.pointer),
        length=tiled(beton.length),
        label=tiled(beton.label),
        index=np.arange(times * len(beton)),
        source_width=tiled(beton.source_width),
        source_height=tiled(beton.source_height),
    )


def describe(beton: Beton) -> dict[str, Any]:
    """The properties of a beton that affect a measurement, without its path."""
    manifest = beton.manifest
    return {
        "dataset": manifest.dataset,
        "split": manifest.split,
        "images": len(beton),
        "store": manifest.store,
        "quality": manifest.quality,
        "longest_side": int(max(beton.width.max(), beton.height.max())),
        "mean_pixels": float((beton.width * beton.height).mean()),
        "mean_bytes": float(beton.length.mean()),
    }


def are_jpegs(beton: Beton) -> bool:
    return bool((beton.mode == JPEG).all())


@contextmanager
def as_files(beton: Beton) -> Iterator[list[str]]:
    """Write the stored JPEGs to a temporary folder, in order, for peers that read files."""
    with TemporaryDirectory(prefix="fastproj-") as folder:
        files = [Path(folder) / f"{position:06d}.jpg" for position in range(len(beton))]
        for position, file in enumerate(files):
            file.write_bytes(beton.stored(position).tobytes())
        yield [str(file) for file in files]


def drain(batches: Iterable[object]) -> None:
    for _ in batches:
        pass
