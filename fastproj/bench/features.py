"""Features of a frozen encoder from stored images, beside the same encoder as it was trained."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms as tv

from fastproj.bench import Engine, Plan, Row, compare
from fastproj.bench.endtoend import RawImages
from fastproj.bench.images import drawn
from fastproj.data.beton import Beton
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

    Ours is what ``evaluate`` does: batch norm folded, few images at once. The peers run the encoder
    as it was trained, on batches of ``BATCH``: on our batches in channels-last, and as plain torch
    does, with a DataLoader. The limit is our encoder alone, on ready images.
    """
    if plan.small is None or not (plan.small.mode == RAW).all():
        return []
    beton = drawn(plan.small, images)
    torch.manual_seed(0)
    plain = build_encoder(encoder, "cifar").eval().requires_grad_(False)
    fast, eager = (
        module.to(plan.device).to(memory_format=torch.channels_last)
        for module in (folded(plain), copy.deepcopy(plain))
    )
    plain.to(plan.device)
    engines = [
        Engine("ours", "ours", len(beton), partial(_ours, plan, beton, fast, size),
               f"batch norm folded, {CACHED_IMAGES} images at once on a CPU"),
        Engine("our batches, the encoder eager", "peer", len(beton),
               partial(_eager, plan, beton, eager, size)),
        Engine("torch DataLoader + torchvision, eager", "peer", len(beton),
               partial(_plain, plan, beton, plain)),
        Engine("our encoder alone", "limit", len(beton),
               partial(_alone, plan, fast, size, len(beton))),
    ]  # fmt: skip
    case = f"{encoder}, {size} px, {len(beton):,} images"
    return compare("features", case, "images", engines, 1, plan.repeats)


def _loader(plan: Plan, beton: Beton, size: int) -> Loader:
    return open_loader(
        beton, [Center(size)], min(BATCH, len(beton)), device=plan.device, workers=plan.workers,
        shuffle=False, drop_last=False,
    )  # fmt: skip


def _ours(plan: Plan, beton: Beton, encoder: nn.Module, size: int) -> Callable[[], object]:
    loader = _loader(plan, beton, size)
    return lambda: features(encoder, loader, device=plan.device)


def _eager(plan: Plan, beton: Beton, encoder: nn.Module, size: int) -> Callable[[], object]:
    loader = _loader(plan, beton, size)
    mean, std = (
        torch.tensor(values, device=plan.device).view(1, 3, 1, 1)
        for values in (beton.manifest.mean, beton.manifest.std)
    )

    @torch.no_grad()
    def call() -> None:
        for batch in loader:
            images = batch.crops[0].to(torch.float32, memory_format=torch.channels_last)
            encoder((images.div_(255) - mean) / std)

    return call


def _plain(plan: Plan, beton: Beton, encoder: nn.Module) -> Callable[[], object]:
    normalize = tv.Normalize(beton.manifest.mean, beton.manifest.std)
    loader = DataLoader(
        RawImages(beton, tv.Compose([tv.ToTensor(), normalize])),
        batch_size=BATCH, num_workers=plan.workers, persistent_workers=True,
        pin_memory=plan.device.type == "cuda",
    )  # fmt: skip

    @torch.no_grad()
    def call() -> None:
        for images, _ in loader:
            encoder(images.to(plan.device, non_blocking=True))

    return call


def _alone(plan: Plan, encoder: nn.Module, size: int, images: int) -> Callable[[], object]:
    at_once = CACHED_IMAGES if plan.device.type == "cpu" else BATCH
    ready = torch.randn(at_once, 3, size, size, device=plan.device)
    ready = ready.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def call() -> None:
        for _ in range(-(-images // at_once)):
            encoder(ready)

    return call
