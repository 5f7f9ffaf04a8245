"""How cost grows: rates and peak memory over workers, batch, size and latents; memory over epochs.

Every point is a process of its own, so that its peak of memory is its own.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastproj.bench import Engine, Plan, Row, heads, rates, timed
from fastproj.bench.alone import alone, memory
from fastproj.bench.chain import SIMCLR
from fastproj.bench.images import several_times
from fastproj.bench.peers import MEAN, STD
from fastproj.loaders import Crop, open_loader
from fastproj.machine import keep_freed_memory
from fastproj.manifest import Beton, open_beton
from fastproj.views import Views

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
    """A row a point, whose ``engine`` is the number on the axis that ``case`` begins with.

    ``peak_bytes``: beyond what the process held before its loader; mapped files count. Over epochs
    it is what the process holds after each, without mapped files.
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
            told = _read(plan, plan.photos, **given, size=photo, workers=count)
            rows.append(_point(f"workers: two crops of {photo} px, {store}", count, told))
        for size in pixels:
            told = _read(plan, plan.photos, **given, size=size)
            rows.append(_point(f"pixels: two crops, {store}", size, told))
        case = f"epochs: two crops of {photo} px, {store}"
        rows += _epochs(case, _read(plan, plan.photos, **given, size=photo, repeats=EPOCHS - 1))
    if plan.small is not None:
        given = {"engine": "auto", "augment": True, "size": small}
        views = f"two SimCLR views of {small} px, engine auto"
        for batch in batches:
            told = _read(plan, plan.small, **given, images=max(images, batch), batch=batch)
            rows.append(_point(f"batch: {views}", batch, told))
        told = _read(plan, plan.small, **given, images=images, batch=min(batches[-1], 512),
                     repeats=EPOCHS - 1)  # fmt: skip
        rows += _epochs(f"epochs: {views}", told)
    for count in latents:
        told = alone(heads.measured, name="sparse head", rows=512, device=plan.device.type,
                     sizes=[512, count, 512, max(1, count // 100)],
                     repeats=plan.repeats)  # fmt: skip
        case = "latents: a step of the sparse head, 512 rows, 512 -> latents -> 512, k 1 %"
        rows.append(_point(case, count, told, "rows"))
    return rows


def _point(case: str, place: int, told: dict[str, Any], unit: str = "images") -> Row:
    """A row of what a process told: all its calls but the first, which warmed it up."""
    print(f"growth, {case}: {place}", file=sys.stderr)
    engine = Engine(str(place), "ours", told["work"], lambda: lambda: None)
    row = rates("growth", case, engine, unit, told["seconds"][1:])
    return replace(row, peak_bytes=told["peak_bytes"])


def _epochs(case: str, told: dict[str, Any]) -> list[Row]:
    return [
        _point(case, epoch, told | {"seconds": [0.0, seconds], "peak_bytes": held})
        for epoch, (seconds, held) in enumerate(zip(told["seconds"], told["held"], strict=True), 1)
    ]


def _read(plan: Plan, beton: Beton, **given: Any) -> dict[str, Any]:
    given = {"workers": plan.workers, "repeats": plan.repeats, **given}
    return alone(read, path=str(beton.path), device=plan.device.type, **given)


def read(
    path: str, engine: str, images: int, batch: int, augment: bool, size: int, workers: int,
    device: str, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Epochs of two crops an image, augmented or not, in this process: one and then ``repeats``.

    ``seconds`` of each epoch, ``held`` bytes after each, ``work``: images an epoch.
    """
    keep_freed_memory()  # as fastproj.train does on a CPU
    beton = several_times(open_beton(path), images)
    before = memory("VmRSS")
    loader = open_loader(
        beton, [Crop(size, 2)], batch, device=device, engine=engine, workers=workers
    )
    views = Views(SIMCLR, MEAN, STD).to(device)
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
