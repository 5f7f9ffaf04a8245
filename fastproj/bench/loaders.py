"""Speed of each engine from beton to two uint8 crops an image, beside its peers and its limit."""

import dataclasses
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from fastproj.bench import measure
from fastproj.loaders import Crop, open_loader
from fastproj.machine import cores
from fastproj.manifest import JPEG, Beton, open_beton

IMAGES = 3000  # an epoch: long enough that starting workers hardly counts
VIEWS = 2


def run(
    path: str | Path, size: int, batch: int, workers: int = 0, repeats: int = 5
) -> list[dict[str, Any]]:
    """One row an engine that can read the beton: an epoch of two random resized crops of ``size``.

    A set smaller than IMAGES is gone through several times in one epoch. Peers: torch's DataLoader
    with torchvision (our ``reference``), and FFCV's own pipeline, which needs a pass a view. The
    limit, for JPEGs: libjpeg-turbo decoding the same bytes on all cores and nothing else.
    """
    workers = min(workers or cores(), cores())
    beton = open_beton(path)
    epoch = several_times(beton, max(1, IMAGES // len(beton)))
    jpegs = bool((beton.mode == JPEG).all())
    uniform = beton.manifest.store == "square" or not jpegs
    engines: dict[str, Callable[[], object]] = {}
    for engine in ("resident", "stream", "reference") if uniform else ("stream", "reference"):
        loader = open_loader(
            epoch, [Crop(size, VIEWS)], batch, engine=engine, workers=workers, drop_last=False
        )
        engines[engine] = lambda loader=loader: drain(loader)  # type: ignore[misc]
    ffcv = _ffcv(epoch, size, batch, workers)
    engines["FFCV, a pass a view"] = lambda: drain(chain(*[ffcv] * VIEWS))
    if jpegs:
        engines["limit: decode alone"] = lambda: _decode(epoch, workers)
    rows = []
    for engine, call in engines.items():
        timing = measure(call, warmup=1, repeats=repeats)
        rows.append(
            {"stage": "loaders", "engine": engine, "size": size, "batch": batch}
            | timing.rates(len(epoch))
            | {"note": f"{beton.manifest.store} store, {VIEWS} crops an image, {workers} workers"}
        )
    return rows


def several_times(beton: Beton, times: int) -> Beton:
    """The same file with each sample listed ``times`` times, each with an index of its own."""

    def tiled(array: np.ndarray) -> np.ndarray:
        return np.tile(array, times)

    return dataclasses.replace(
        beton,
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


def drain(batches: Iterable[object]) -> None:
    for _ in batches:
        pass


def _ffcv(beton: Beton, size: int, batch: int, workers: int) -> Iterable[object]:
    """FFCV 1.0.2 as its examples use it, without the copy that owning a batch would take."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    fields = {"image": [RandomResizedCropRGBImageDecoder((size, size))]}
    unread = {name: None for name in ("index", "width", "height")}
    square = beton.manifest.store == "square"
    return Loader(
        str(beton.path),
        batch_size=batch,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=False,
        indices=np.arange(len(beton)) % beton.manifest.samples,
        pipelines=fields | (unread if square else {"index": None}),
    )


def _decode(beton: Beton, workers: int) -> None:
    def part(positions: np.ndarray) -> None:
        size = int((beton.width * beton.height).max()) * 3
        buffer = np.empty(size, np.uint8)
        for position in positions.tolist():
            simplejpeg.decode_jpeg(beton.stored(position), buffer=buffer)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(part, np.array_split(np.arange(len(beton)), workers)))
