"""Speed of the views chain, eager and compiled, beside torchvision and kornia doing the same."""

from collections.abc import Callable
from functools import partial
from typing import Any

import kornia.augmentation as kornia
import torch
from torch import Tensor
from torchvision.transforms import v2 as tv

from fastproj.bench import measure
from fastproj.views import PRESETS, Views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# (pixels, images a batch); torchvision goes one by one, so fewer images give the same rate.
SIZES = ((32, 512), (224, 32))
ONE_BY_ONE = {32: 64, 224: 8}


def run(device: str = "cpu", warmup: int = 2, repeats: int = 7) -> list[dict[str, Any]]:
    """Two views of a batch of uint8 crops with the preset ``simclr``: one row an engine and size.

    Rates count views, and each engine's time includes drawing its parameters.
    """
    rows = []
    for size, images in SIZES:
        generator = torch.Generator().manual_seed(0)
        crops = torch.randint(
            0, 256, (2 * images, 3, size, size), generator=generator, dtype=torch.uint8
        )
        crops = crops.to(device, memory_format=torch.channels_last)
        few = crops[: 2 * ONE_BY_ONE[size]]
        for engine, batch, call, note in (
            ("fastproj eager", crops, _ours(device, compiled=False), ""),
            ("fastproj compiled", crops, _ours(device, compiled=True), "compiled in the warm-up"),
            ("kornia", crops, _kornia(), "AugmentationSequential: one jitter order a batch"),
            ("torchvision", few, _torchvision(), "v2, one by one"),
        ):
            timing = measure(partial(call, batch), warmup, repeats)
            rows.append(
                {"stage": "views", "engine": engine, "size": size, "batch": len(batch) // 2}
                | timing.rates(len(batch))
                | {"note": note}
            )
    return rows


def _ours(device: str, compiled: bool) -> Callable[[Tensor], Tensor]:
    views = Views(PRESETS["simclr"], MEAN, STD).to(device)
    if compiled:
        views.compile()
    generator = torch.Generator(device).manual_seed(0)
    return lambda crops: views(crops, views.sample(len(crops) // 2, generator))


def _kornia() -> Callable[[Tensor], Tensor]:
    view, _ = PRESETS["simclr"]
    chain = kornia.AugmentationSequential(
        kornia.RandomHorizontalFlip(p=view.flip),
        kornia.ColorJitter(
            view.brightness, view.contrast, view.saturation, view.hue, p=view.jitter
        ),
        kornia.RandomGrayscale(p=view.gray),
        kornia.RandomGaussianBlur((13, 13), view.sigma, p=view.blur),
        kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        data_keys=["input"],
    )
    return lambda crops: chain(crops.float() / 255)


def _torchvision() -> Callable[[Tensor], Tensor]:
    view, _ = PRESETS["simclr"]
    jitter = tv.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    chain = tv.Compose(
        [
            tv.ToDtype(torch.float32, scale=True),
            tv.RandomHorizontalFlip(view.flip),
            tv.RandomApply([jitter], view.jitter),
            tv.RandomGrayscale(view.gray),
            tv.RandomApply([tv.GaussianBlur(13, view.sigma)], view.blur),
            tv.Normalize(MEAN, STD),
        ]
    )
    return lambda crops: torch.stack([chain(crop) for crop in crops])
