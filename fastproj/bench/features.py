"""Features of a frozen encoder from stored images, beside the same encoder as it was trained."""

from collections.abc import Callable
from contextlib import closing
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms as tv

from fastproj.bench import Engine, Plan, Row, compare, timed
from fastproj.bench.alone import alone
from fastproj.bench.endtoend import RawImages
from fastproj.bench.images import drawn
from fastproj.data.beton import Beton, open_beton
from fastproj.data.layout import RAW
from fastproj.evaluation.features import CACHED_IMAGES, features
from fastproj.evaluation.fold import folded
from fastproj.loaders import Center, Loader, open_loader
from fastproj.models.encoders import build_encoder

BATCH = 512  # images that the loaders give at once; the eager encoder takes all of them


def run(
    plan: Plan, images: int = 10_240, size: int = 32, encoder: str = "resnet_small"
) -> list[Row]:
    """Features of ``images`` of ``plan.small``, in float32; the unit is an image.

    Ours is what ``evaluate`` does: batch norm folded, few images at once, freed memory kept. The
    peers run the encoder as it was trained, on batches of ``BATCH``: on our batches in
    channels-last, and as plain torch does, with a DataLoader. They have processes of their own, in
    which the C library is as a user finds it. The limit is our encoder alone, on ready images.
    """
    if plan.small is None or not (plan.small.mode == RAW).all():
        return []
    beton = drawn(plan.small, images)
    module = built(encoder).to(plan.device)
    given = {"path": str(plan.small.path), "images": images, "encoder": encoder,
             "device": plan.device.type, "workers": plan.workers}  # fmt: skip
    engines = [
        Engine("ours", "ours", len(beton), partial(_ours, plan, beton, module, size),
               f"batch norm folded, {CACHED_IMAGES} images at once on a CPU"),
        Engine("our batches, the encoder eager", "peer", len(beton),
               lambda: lambda: alone(eager, size=size, **given), warm=True),
        Engine("torch DataLoader + torchvision, eager", "peer", len(beton),
               lambda: lambda: alone(plain, **given), warm=True),
        Engine("our encoder alone", "limit", len(beton),
               partial(encoding, plan, module, size, len(beton))),
    ]  # fmt: skip
    case = f"{encoder}, {size} px, {len(beton):,} images"
    return compare("features", case, "images", engines, 1, plan.repeats)


def built(encoder: str) -> nn.Module:
    """The frozen encoder of that name, for small images, with random weights."""
    torch.manual_seed(0)
    return build_encoder(encoder, "cifar").eval().requires_grad_(False)


def _loader(beton: Beton, size: int, device: torch.device, workers: int) -> Loader:
    return open_loader(
        beton, [Center(size)], min(BATCH, len(beton)), device=device, workers=workers,
        shuffle=False, drop_last=False,
    )  # fmt: skip


def _ours(plan: Plan, beton: Beton, encoder: nn.Module, size: int) -> Callable[[], object]:
    loader = _loader(beton, size, plan.device, plan.workers)
    module = folded(encoder).to(memory_format=torch.channels_last)
    return lambda: features(module, loader, device=plan.device)


def eager(path: str, images: int, encoder: str, size: int, device: str, workers: int) -> float:
    """Seconds of the second of two epochs, on our batches."""
    beton, place = drawn(open_beton(path), images), torch.device(device)
    module = built(encoder).to(place).to(memory_format=torch.channels_last)
    mean, std = (
        torch.tensor(values, device=place).view(1, 3, 1, 1)
        for values in (beton.manifest.mean, beton.manifest.std)
    )

    @torch.no_grad()
    def epoch() -> None:
        for batch in loader:
            crops = batch.crops[0].to(torch.float32, memory_format=torch.channels_last)
            module((crops.div_(255) - mean) / std)

    with closing(_loader(beton, size, place, workers)) as loader:
        epoch()
        return timed(epoch)


def plain(path: str, images: int, encoder: str, device: str, workers: int) -> float:
    """Seconds of the second of two epochs, with torch's DataLoader."""
    beton, place = drawn(open_beton(path), images), torch.device(device)
    module = built(encoder).to(place)
    normalize = tv.Normalize(beton.manifest.mean, beton.manifest.std)
    loader = DataLoader(
        RawImages(beton, tv.Compose([tv.ToTensor(), normalize])),
        batch_size=BATCH, num_workers=workers, persistent_workers=True,
        pin_memory=place.type == "cuda",
    )  # fmt: skip

    @torch.no_grad()
    def epoch() -> None:
        for crops, _ in loader:
            module(crops.to(place, non_blocking=True))

    epoch()
    return timed(epoch)


def encoding(plan: Plan, encoder: nn.Module, size: int, images: int) -> Callable[[], object]:
    """A call that runs ``encoder``, folded as ours, on so many ready images."""
    module = folded(encoder).to(memory_format=torch.channels_last)
    at_once = CACHED_IMAGES if plan.device.type == "cpu" else BATCH
    ready = torch.randn(at_once, 3, size, size, device=plan.device)
    ready = ready.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def call() -> None:
        for _ in range(-(-images // at_once)):
            module(ready)

    return call
