"""Decoding: stored JPEGs to host batches that a device can crop (pinned memory for a GPU)."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from fastproj.bench import Engine, Plan, Row, compare, limits
from fastproj.bench.images import are_jpegs, several_times
from fastproj.data.beton import Beton
from fastproj.loaders import Crop
from fastproj.loaders.boxes import draw
from fastproj.loaders.fill import Fill
from fastproj.loaders.order import Order
from fastproj.loaders.stream import AHEAD


def run(plan: Plan, images: int = 3000, size: int = 224, batch: int = 64) -> list[Row]:
    """The host's part of the engine ``stream`` when a device crops two boxes per image.

    Every batch has its own memory, padded to its largest image.
    """
    if plan.photos is None or not are_jpegs(plan.photos):
        return []
    epoch = several_times(plan.photos, images)
    engines = [
        Engine("stream", "ours", len(epoch), lambda: _ours(plan, epoch, size, batch),
               "the smallest box that holds both crops"),
        limits.decode(epoch, plan.workers),
    ]  # fmt: skip
    case = f"padded batches of {batch}, {epoch.manifest.store} store"
    return compare("decode", case, "images", engines, 1, plan.repeats)


def _ours(plan: Plan, beton: Beton, size: int, batch: int) -> Callable[[], object]:
    order = Order(len(beton), batch, drop_last=False)

    def start(pool: ThreadPoolExecutor, step: int) -> list[Future[None]]:
        positions = order.batch(0, step)
        height, width = int(beton.height[positions].max()), int(beton.width[positions].max())
        pinned = plan.device.type == "cuda"
        padded = torch.empty(
            (len(positions), height, width, 3), dtype=torch.uint8, pin_memory=pinned
        )
        fill = Fill(beton, positions, draw([Crop(size, 2)], beton, positions, 0, 0), padded=padded)
        return [pool.submit(fill.run) for _ in range(plan.workers)]

    def finish(jobs: list[Future[None]]) -> None:
        for job in jobs:
            job.result()  # raises what the thread raised

    def call() -> None:
        under_way: deque[list[Future[None]]] = deque()
        with ThreadPoolExecutor(plan.workers) as pool:
            for step in range(order.steps):
                under_way.append(start(pool, step))
                if len(under_way) > AHEAD:
                    finish(under_way.popleft())
            while under_way:
                finish(under_way.popleft())

    return call
