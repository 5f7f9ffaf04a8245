"""The whole input pipeline: stored JPEGs to two SimCLR views per image, as floats for the model."""

from collections.abc import Callable

import numpy as np
import torch

from fastproj.augment.draw import PRESETS
from fastproj.augment.views import Augmentation
from fastproj.bench import Engine, Plan, Row, compare, limits, peers
from fastproj.bench.images import are_jpegs, several_times
from fastproj.data.beton import Beton
from fastproj.data.subset import subset
from fastproj.loaders import Crop, open_loader

SIMCLR = PRESETS["simclr"]


def run(
    plan: Plan, images: int = 1500, rounds: int = 3, size: int = 224, batch: int = 64
) -> list[Row]:
    """The preset ``simclr``, including blur, at ``size`` pixels.

    Our engine and the limit process ``images`` images per call, the slow peers only ``rounds``
    batches per worker, as many for each.
    """
    if plan.photos is None or not are_jpegs(plan.photos):
        return []
    few = rounds * plan.workers * batch
    many = several_times(plan.photos, images)
    some = subset(several_times(plan.photos, few), np.arange(few))
    decoded, pillow = peers.torchvision_decode, peers.pillow
    workers, read = plan.workers, len(many) // batch * batch
    engines = [
        Engine("stream + views", "ours", read, lambda: _ours(plan, many, size, batch)),
        Engine("torch DataLoader + torchvision v2, tensors", "peer", len(some),
               lambda: peers.data_loader(some, peers.torchvision_views(SIMCLR[0], size), decoded,
                                         batch, workers)),
        Engine("torch DataLoader + torchvision v2, Pillow", "peer", len(some),
               lambda: peers.data_loader(some, peers.pillow_views(SIMCLR[0], size), pillow,
                                         batch, workers)),
        Engine("torch DataLoader + lightly", "peer", len(some),
               lambda: peers.data_loader(some, peers.lightly_views(size), pillow, batch, workers)),
        limits.decode(many, workers),
    ]  # fmt: skip
    case = f"two SimCLR views of {size} px, {many.manifest.store} store, batch {batch}"
    return compare("chain", case, "images", engines, 1, plan.repeats)


def _ours(plan: Plan, beton: Beton, size: int, batch: int) -> Callable[[], object]:
    loader = open_loader(
        beton, [Crop(size, len(SIMCLR))], batch, device=plan.device, engine="stream",
        workers=plan.workers,
    )  # fmt: skip
    views = Augmentation(SIMCLR, peers.MEAN, peers.STD).to(plan.device)
    views.compile()  # for a GPU; a CPU uses native code
    generator = torch.Generator(plan.device).manual_seed(0)

    def call() -> None:
        for drawn in loader:
            views(drawn.crops[0], views.sample(batch, generator))

    return call
