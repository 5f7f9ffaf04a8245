"""An epoch of a linear probe on new crops: ours, and plain torch with a DataLoader."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms as tv

from fastproj.bench import Engine, Plan, Row, compare
from fastproj.bench.endtoend import RawImages
from fastproj.bench.images import drawn
from fastproj.core.device import choose_precision
from fastproj.data.beton import Beton
from fastproj.data.layout import RAW
from fastproj.evaluation.crops import crops_probe
from fastproj.evaluation.features import Features
from fastproj.loaders import Crop, open_loader
from fastproj.models.encoders import build_encoder, num_features

RATES = (1.0, 0.1, 0.15, 0.3, 3.0, 30.0)  # as many as solo-learn's protocols have


def run(
    plan: Plan,
    images: int = 5_120,
    batch: int = 256,
    size: int = 32,
    encoders: Sequence[str] = ("resnet_small", "resnet18"),
) -> list[Row]:
    """One epoch of ``images`` of ``plan.small``; the unit is an image, whatever the learning rates.

    The peer trains one learning rate in eager float32 with as many worker processes as we have
    threads; further rates would each take it as long again. Its images lie in memory as Pillow gets
    them. The limit is the frozen encoder alone, on ready images in channels-last float32.
    """
    if plan.small is None or not (plan.small.mode == RAW).all():
        return []
    beton = drawn(plan.small, images)
    batch = min(batch, len(beton))
    rows = []
    for name in encoders:
        torch.manual_seed(0)
        encoder = build_encoder(name, "cifar").eval().requires_grad_(False).to(plan.device)
        plain = build_encoder(name, "cifar").eval().requires_grad_(False).to(plan.device)
        plain.load_state_dict(encoder.state_dict())
        encoder.to(memory_format=torch.channels_last)
        work = len(beton) // batch * batch
        fast = choose_precision("auto", plan.device)
        variants = [(RATES[:1], torch.float32), (RATES, torch.float32)]
        variants += [(RATES[:1], fast), (RATES, fast)] if fast != torch.float32 else []
        engines = [
            Engine(
                f"ours, {len(rates)} learning rate(s), {str(precision).removeprefix('torch.')}",
                "ours", work, partial(_ours, plan, beton, encoder, batch, size, rates, precision),
            )
            for rates, precision in variants
        ]  # fmt: skip
        engines += [
            Engine("torch DataLoader + torchvision, 1 learning rate", "peer", work,
                   partial(_plain, plan, beton, plain, batch, size)),
            Engine("the frozen encoder alone", "limit", work,
                   partial(_alone, plan, encoder, batch, size, work // batch)),
        ]  # fmt: skip
        case = f"{name}, {size} px, batch {batch}, {len(beton):,} images"
        rows += compare("published", case, "images", engines, 1, plan.repeats)
    return rows


def _ours(
    plan: Plan, beton: Beton, encoder: nn.Module, batch: int, size: int, rates: Sequence[float],
    precision: torch.dtype,
) -> Callable[[], object]:  # fmt: skip
    loader = open_loader(beton, [Crop(size)], batch, device=plan.device, workers=plan.workers)
    classes = len(beton.classes)
    val = Features(torch.zeros(classes, num_features(encoder)), torch.arange(classes))
    return lambda: crops_probe(
        encoder, loader, val, classes, learning_rates=rates, epochs=1, precision=precision
    )


def _plain(
    plan: Plan, beton: Beton, encoder: nn.Module, batch: int, size: int
) -> Callable[[], object]:
    device, manifest = plan.device, beton.manifest
    transform = tv.Compose(
        [
            tv.RandomResizedCrop(size),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            tv.Normalize(manifest.mean, manifest.std),
        ]
    )
    loader = DataLoader(
        RawImages(beton, transform), batch_size=batch, shuffle=True, drop_last=True,
        num_workers=plan.workers, persistent_workers=True, pin_memory=device.type == "cuda",
    )  # fmt: skip
    head = nn.Linear(num_features(encoder), len(beton.classes)).to(device)
    optimizer = torch.optim.SGD(head.parameters(), RATES[0], momentum=0.9)

    def epoch() -> None:
        for images, labels in loader:
            with torch.no_grad():
                found = encoder(images.to(device, non_blocking=True))
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(found), labels.to(device)).backward()
            optimizer.step()

    return epoch


def _alone(
    plan: Plan, encoder: nn.Module, batch: int, size: int, steps: int
) -> Callable[[], object]:
    images = torch.randn(batch, 3, size, size, device=plan.device)
    images = images.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def epoch() -> None:
        for _ in range(steps):
            encoder(images)

    return epoch
