"""The images to measure on: a beton repeated to be long enough, or its JPEGs as files."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from fastproj.data.beton import Beton
from fastproj.data.layout import JPEG
from fastproj.data.subset import subset
from fastproj.evaluation.probes.common import stratified_split


def several_times(beton: Beton, images: int) -> Beton:
    """The beton with its samples repeated until there are at least ``images``.

    Every repetition has its own index and therefore its own crops.
    """
    times = -(-images // len(beton))
    return subset(beton, np.tile(np.arange(len(beton)), times))


def drawn(beton: Beton, images: int) -> Beton:
    """At most ``images`` samples, drawn by class."""
    if images >= len(beton):
        return beton
    labels = torch.from_numpy(beton.label)
    return subset(beton, stratified_split(labels, images / len(beton), seed=1)[1].numpy())


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
