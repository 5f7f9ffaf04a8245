"""Scaling: rate and peak memory against workers, batch, crop size, latents; memory against epochs.

Every point runs in a new process, so that its peak memory is not another point's.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastproj.augment.views import Augmentation
from fastproj.bench import Engine, Plan, Row, heads, rates, timed
from fastproj.bench.alone import alone, memory
from fastproj.bench.chain import SIMCLR
from fastproj.bench.images import several_times
from fastproj.bench.peers import MEAN, STD
from fastproj.core.device import prepare_device
from fastproj.data.beton import Beton, open_beton
from fastproj.loaders import Crop, open_loader

WORKERS = (1, 2, 4)
BATCHES = (64, 256, 1024, 4096)
PIXELS = (64, 112, 160, 224, 288)
LATENTS = (1_000, 10_000, 100_000)
EPOCHS = 3


def run(
    plan: Plan,
    images: int = 2000,
    workers: Sequence[int] = WORKERS,
    batches: Sequence[int] = BATCHES,
    pixels: Sequence[int] = PIXELS,
    latents: Sequence[int] = LATENTS,
    photo: int = 224,
    small: int = 32,
) -> list[Row]:
    """One row per point. ``engine`` is the point's place on the axis that ``case`` begins with.

    ``peak_bytes`` is the peak resident memory minus that before the loader was opened, mapped files
    included. For the axis ``epochs`` it is the memory after each epoch, without mapped files.
    """
    rows = []
    if plan.photos is not None:
        given: dict[str, Any] = {
            "engine": "stream",
            "augment": False,
            "images": images,
            "batch": 64,
        }
        store = f"{plan.photos.manifest.store} store, stream"
        for count in workers:
            result = _read(plan, plan.photos, **given, size=photo, workers=count)
            rows.append(_point(f"workers: two crops of {photo} px, {store}", count, result))
        for size in pixels:
            result = _read(plan, plan.photos, **given, size=size)
            rows.append(_point(f"pixels: two crops, {store}", size, result))
        case = f"epochs: two crops of {photo} px, {store}"
        rows += _epochs(case, _read(plan, plan.photos, **given, size=photo, repeats=EPOCHS - 1))
    if plan.small is not None:
        given = {"engine": "auto", "augment": True, "size": small}
        views = f"two SimCLR views of {small} px, engine auto"
        for batch in batches:
            result = _read(plan, plan.small, **given, images=max(images, batch), batch=batch)
            rows.append(_point(f"batch: {views}", batch, result))
        result = _read(plan, plan.small, **given, images=images, batch=min(batches[-1], 512),
                     repeats=EPOCHS - 1)  # fmt: skip
        rows += _epochs(f"epochs: {views}", result)
    for count in latents:
        result = alone(heads.measured, name="sparse head", rows=512, device=plan.device.type,
                     sizes=[512, count, 512, max(1, count // 100)],
                     repeats=plan.repeats)  # fmt: skip
        case = "latents: a step of the sparse head, 512 rows, 512 -> latents -> 512, k 1 %"
        rows.append(_point(case, count, result, "rows"))
    return rows


def _point(case: str, place: int, result: dict[str, Any], unit: str = "images") -> Row:
    """The row of one process's result: all its calls except the first, a warm-up."""
    print(f"growth, {case}: {place}", file=sys.stderr)
    engine = Engine(str(place), "ours", result["work"], lambda: lambda: None)
    row = rates("growth", case, engine, unit, result["seconds"][1:])
    return replace(row, peak_bytes=result["peak_bytes"])


def _epochs(case: str, result: dict[str, Any]) -> list[Row]:
    return [
        _point(case, epoch, result | {"seconds": [0.0, seconds], "peak_bytes": held})
        for epoch, (seconds, held) in enumerate(
            zip(result["seconds"], result["held"], strict=True), 1
        )
    ]


def _read(plan: Plan, beton: Beton, **given: Any) -> dict[str, Any]:
    given = {"workers": plan.workers, "repeats": plan.repeats, **given}
    return alone(read, path=str(beton.path), device=plan.device.type, **given)


def read(
    path: str, engine: str, images: int, batch: int, augment: bool, size: int, workers: int,
    device: str, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Read 1 + ``repeats`` epochs of two crops per image in this process, augmented if ``augment``.

    Returns ``seconds`` per epoch, ``held`` (bytes after each epoch), ``work`` (images per epoch)
    and ``peak_bytes``.
    """
    prepare_device(torch.device(device), tf32=True)
    beton = several_times(open_beton(path), images)
    before = memory("VmRSS")
    loader = open_loader(
        beton, [Crop(size, 2)], batch, device=device, engine=engine, workers=workers
    )
    views = Augmentation(SIMCLR, MEAN, STD).to(device)
    generator = torch.Generator(device).manual_seed(0)

    def epoch() -> None:
        for drawn in loader:
            if augment:
                views(drawn.crops[0], views.sample(batch, generator))

    seconds, held = [], []
    for _ in range(1 + repeats):
        seconds.append(timed(epoch))
        held.append(memory("RssAnon"))
    return {"seconds": seconds, "held": held, "peak_bytes": memory("VmHWM") - before,
            "work": len(loader) * batch}  # fmt: skip
