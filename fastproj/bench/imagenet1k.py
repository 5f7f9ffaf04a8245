"""A set of ImageNet-1k's size: writing photographs, opening and reading 1.28 million rows."""

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fastproj.bench import Engine, Plan, Row, rates, timed
from fastproj.bench.alone import alone, memory
from fastproj.bench.images import are_jpegs, as_files, drain
from fastproj.data.beton import open_beton
from fastproj.loaders import Crop, open_loader
from fastproj.loaders.boxes import draw
from fastproj.loaders.order import permutation
from fastproj.prepare.encode import Store
from fastproj.prepare.sources import Source
from fastproj.prepare.splits import SplitWriter

IMAGES = 1_281_167  # ImageNet-1k's training set
LONGEST = 400  # pixels, as imagenet100's recipes store photographs
BATCH = 256


def run(plan: Plan, images: int = IMAGES, photographs: int = 12_000, side: int = 8) -> list[Row]:
    """Write ``photographs`` as a JPEG store, then ``images`` of ``side`` pixels as a raw one.

    Each row is one part of the work, in a new process per store; the unit is one image.
    ``peak_bytes`` of ``write`` is how much the writer's process grew at most, of the other parts
    what the process holds at their end beside its imports, without mapped files.
    """
    rows = []
    with TemporaryDirectory(prefix="fastproj-") as folder:
        if plan.photos is not None and are_jpegs(plan.photos):
            case = f"part: {photographs:,} photographs, JPEG store of at most {LONGEST} px"
            given = {"photos": str(plan.photos.path), "workers": plan.workers}
            rows.append(_written(case, folder, images=photographs, **given))
        case = f"part: {images:,} images of {side} px, raw store"
        rows.append(_written(case, folder, images=images, side=side, workers=plan.workers))
        print(f"imagenet1k, {case}: open and read", file=sys.stderr)
        given = {"path": f"{folder}/train.beton", "workers": plan.workers}
        rows += [
            _row(case, part, images, seconds, held)
            for part, seconds, held in alone(opened, repeats=plan.repeats, **given)
        ]
    return rows


def _written(case: str, folder: str, **given: Any) -> Row:
    print(f"imagenet1k, {case}: write", file=sys.stderr)
    found = alone(written, folder=folder, **given)
    row = _row(case, "write", given["images"], [found["seconds"]], found["peak_bytes"])
    each = found["file_bytes"] / given["images"], found["manifest_bytes"] / given["images"]
    return replace(row, note=f"{each[0]:,.0f} bytes an image, {each[1]:.1f} in the manifest")


def _row(case: str, part: str, images: int, seconds: list[float], held: int) -> Row:
    engine = Engine(part, "ours", images, lambda: lambda: None)
    return replace(rates("imagenet1k", case, engine, "images", seconds), peak_bytes=held)


def written(
    folder: str, images: int, workers: int, photos: str | None = None, side: int = 0
) -> dict[str, Any]:
    """Write ``folder``'s train.beton: the files of the beton ``photos`` over and over, or noise.

    Returns ``seconds``, ``peak_bytes``, and the bytes of the file and of the manifest.
    """
    labels = np.arange(images) % 1000
    classes = tuple(f"class {i}" for i in range(1000))
    if photos is None:
        noise = np.random.default_rng(0).integers(0, 256, (images, side, side, 3), np.uint8)
        before = memory("VmRSS")
        source = Source("train", classes, noise, labels)
        return _write(source, folder, Store("raw"), workers, before)
    with as_files(open_beton(photos)) as files:
        before = memory("VmRSS")
        repeated = [files[i % len(files)] for i in range(images)]
        store = Store("jpeg", quality=90, max_resolution=LONGEST)
        source = Source("train", classes, repeated, labels)
        return _write(source, folder, store, workers, before)


def _write(source: Source, folder: str, store: Store, workers: int, before: int) -> dict[str, Any]:
    with SplitWriter(store, workers, skip=False) as writer:
        out, about = Path(folder), ("imagenet1k", "fastproj.bench")
        seconds = timed(lambda: writer.write(source, out, *about))
    sizes = {f"{name}_bytes": (Path(folder) / f"train.{suffix}").stat().st_size
             for name, suffix in (("file", "beton"), ("manifest", "json"))}  # fmt: skip
    return {"seconds": seconds, "peak_bytes": memory("VmHWM") - before, **sizes}


def opened(path: str, workers: int, repeats: int) -> list[tuple[str, list[float], int]]:
    """Open the beton, draw orders and boxes, read it twice: (part, seconds of each turn, bytes).

    The first turn of each part but reading is a warm-up. Bytes are held, beside mapped files.
    """
    gc.collect()
    before = memory("RssAnon")
    parts = []

    def measure(part: str, call: Callable[[int], object], turns: int, warmup: int = 1) -> None:
        seconds = [timed(partial(call, turn)) for turn in range(warmup + turns)]
        gc.collect()
        parts.append((part, seconds[warmup:], memory("RssAnon") - before))

    beton = open_beton(path)
    measure("open", lambda _: open_beton(path), repeats)
    measure("order of an epoch", lambda epoch: permutation(len(beton), 1, epoch), repeats)
    crops = [Crop(8, 2)]

    def boxes(epoch: int) -> None:
        order = permutation(len(beton), 0, epoch)
        for start in range(0, len(order), BATCH):
            draw(crops, beton, order[start : start + BATCH], 0, epoch)

    measure("boxes of an epoch, two crops", boxes, 1, warmup=0)
    with open_loader(beton, crops, BATCH, engine="stream", workers=workers) as loader:
        for epoch in ("first epoch, stream", "second epoch, stream"):
            measure(epoch, lambda _: drain(loader), 1, warmup=0)
    return parts
