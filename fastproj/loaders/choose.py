"""Open a loader: the engine that was asked for, or the one that fits set and device."""

from collections.abc import Sequence

import torch

from fastproj.core.machine import cores
from fastproj.data.beton import Beton
from fastproj.loaders import ENGINES
from fastproj.loaders.base import Loader
from fastproj.loaders.boxes import Center, Crop
from fastproj.loaders.order import Order
from fastproj.loaders.resident import is_uniform
from fastproj.loaders.stream import StreamLoader


def open_loader(
    beton: Beton,
    crops: Sequence[Crop | Center],
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    engine: str = "auto",
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = True,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    memory_share: float = 0.5,
) -> Loader:
    """Open a loader of ``batch_size`` images per step on this rank, with all ``crops`` of each.

    ``engine`` auto chooses resident if all images are stored raw in one size and fit into the
    fraction ``memory_share`` of the GPU's free memory, otherwise stream. On a CPU it always chooses
    stream, because the page cache keeps the set in memory. It never chooses dali or ffcv.
    ``workers``: 0 means one per core that this process may use, which is also the maximum. Raises
    InputError if a batch is larger than the set, there is no such engine, the engine cannot read
    this beton, or a dependency is missing.
    """
    device = torch.device(device)
    order = Order(len(beton), batch_size, seed, shuffle, drop_last, rank, world_size)
    workers = min(workers or cores(), cores())
    reason = f"{engine}: as requested"
    if engine == "auto":
        engine, reason = _choose(beton, device, memory_share)
    loader: Loader = ENGINES[engine](beton, crops, order, device, workers)
    if isinstance(loader, StreamLoader):
        reason += f"; {loader.cropping}; {loader.memory / 1e6:,.0f} MB for batches in progress"
        reason += f"; {loader.advice}" if loader.advice else ""
    loader.reason = reason
    return loader


def _choose(beton: Beton, device: torch.device, memory_share: float) -> tuple[str, str]:
    """The engine for this set on this device, and the reason in one line."""
    if device.type != "cuda":
        return "stream", f"stream: the device is {'a CPU' if device.type == 'cpu' else device.type}"
    if not is_uniform(beton):
        return "stream", "stream: JPEGs or images of several sizes"
    free = torch.cuda.mem_get_info(device)[0]
    size = len(beton) * 3 * int(beton.width[0]) * int(beton.height[0])
    fits = f"{size / 1e9:.2f} GB of {free / 1e9:.0f} GB free"
    if size > memory_share * free:
        return "stream", f"stream: {fits} is more than the limit of {memory_share:.0%}"
    return "resident", f"resident: {fits}"
