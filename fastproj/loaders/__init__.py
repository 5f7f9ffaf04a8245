"""Beton in, uint8 crops on the device out: one contract, several engines.

Which samples, in which order and with which boxes depends on (seed, epoch, sample index, view)
alone, so the engines draw the same crops, two ranks never overlap, a resumed run continues on the
next sample and the number of workers changes nothing. Crops match torchvision's antialiased
bilinear ``resized_crop`` of the same box within 2/255 on average (measured: 0.3/255 and less).
"""

from collections.abc import Sequence

import torch

from fastproj.errors import InputError
from fastproj.loaders.base import Batch, Loader
from fastproj.loaders.boxes import Center, Crop
from fastproj.loaders.dali import DaliLoader
from fastproj.loaders.order import Order
from fastproj.loaders.reference import ReferenceLoader
from fastproj.loaders.resident import ResidentLoader, is_uniform
from fastproj.loaders.stream import StreamLoader
from fastproj.machine import cores
from fastproj.manifest import Beton

__all__ = ["ENGINES", "Batch", "Center", "Crop", "Loader", "open_loader"]

ENGINES = ("auto", "resident", "stream", "dali", "reference")


def open_loader(
    beton: Beton,
    groups: Sequence[Crop | Center],
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    engine: str = "auto",
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = True,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    memory_share: float = 0.5,
) -> Loader:
    """Open a loader of ``batch_size`` images a step on this rank, every crop group of each.

    ``engine`` auto takes resident where the set is raw, of one size and fits ``memory_share`` of
    the GPU's free memory, else stream (on a CPU always: there the set is resident in the page
    cache); never dali. ``workers`` 0 is one for each core this process may use, and there are never
    more. Raises InputError when a batch is larger than the set, the engine cannot read this beton,
    or what it needs is missing.
    """
    device = torch.device(device)
    order = Order(len(beton), batch_size, seed, shuffle, drop_last, rank, world)
    workers = min(workers or cores(), cores())
    reason = f"{engine}: as asked"
    if engine == "auto":
        engine, reason = _choose(beton, device, memory_share)
    loader: Loader
    if engine == "resident":
        loader = ResidentLoader(beton, groups, order, device, workers)
    elif engine == "stream":
        loader = StreamLoader(beton, groups, order, device, workers)
    elif engine == "dali":
        loader = DaliLoader(beton, groups, order, device, workers)
    elif engine == "reference":
        loader = ReferenceLoader(beton, groups, order, device, workers)
    else:
        raise InputError(f"unknown engine {engine!r}: one of {', '.join(ENGINES)}")
    if isinstance(loader, StreamLoader):
        reason += f"; at most {loader.memory / 1e6:,.0f} MB under way"
    loader.reason = reason
    return loader


def _choose(beton: Beton, device: torch.device, memory_share: float) -> tuple[str, str]:
    """The engine for this set on this device, and why in one line."""
    if device.type == "cpu":
        return "stream", "stream: the device is a CPU"
    if not is_uniform(beton):
        return "stream", "stream: JPEGs or images of several sizes"
    free = torch.cuda.mem_get_info(device)[0]
    size = len(beton) * 3 * int(beton.width[0]) * int(beton.height[0])
    fits = f"{size / 1e9:.2f} GB of {free / 1e9:.0f} GB free"
    if size > memory_share * free:
        return "stream", f"stream: {fits} is more than the share of {memory_share:.0%}"
    return "resident", f"resident: {fits}"
