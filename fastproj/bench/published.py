"""An epoch of a linear probe on new crops: ours, and plain torch with a DataLoader."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms as tv

from fastproj.bench import Engine, Plan, Row, compare, timed
from fastproj.bench.alone import alone
from fastproj.bench.endtoend import RawImages
from fastproj.bench.features import built, encoding
from fastproj.bench.images import drawn
from fastproj.core.device import choose_precision
from fastproj.data.beton import Beton, open_beton
from fastproj.data.layout import RAW
from fastproj.evaluation.crops import crops_probe
from fastproj.evaluation.features import Features
from fastproj.loaders import Crop, open_loader
from fastproj.models.encoders import num_features

RATES = (1.0, 0.1, 0.15, 0.3, 3.0, 30.0)  # as many as solo-learn's protocols have


def run(
    plan: Plan,
    images: int = 2_560,
    batch: int = 256,
    size: int = 32,
    encoders: Sequence[str] = ("resnet_small", "resnet18"),
) -> list[Row]:
    """One epoch of ``images`` of ``plan.small``; the unit is an image, whatever the learning rates.

    It is the second of two, ours and the peer's: a protocol has a hundred, and one set-up.
    The peer trains one learning rate in eager float32 with as many worker processes as we have
    threads; further rates would each take it as long again. Its images lie in memory as Pillow gets
    them. It has a process of its own, in which the C library is as a user finds it. The limit is
    our encoder alone in float32, on ready images.
    """
    if plan.small is None or not (plan.small.mode == RAW).all():
        return []
    beton = drawn(plan.small, images)
    batch = min(batch, len(beton))
    work = len(beton) // batch * batch
    rows = []
    for name in encoders:
        encoder = built(name).to(plan.device)
        fast = choose_precision("auto", plan.device)
        variants = [(RATES[:1], torch.float32), (RATES, torch.float32)]
        variants += [(RATES[:1], fast), (RATES, fast)] if fast != torch.float32 else []
        engines = [
            Engine(
                f"ours, {len(rates)} learning rate(s), {str(precision).removeprefix('torch.')}",
                "ours", work, partial(_ours, plan, beton, encoder, batch, size, rates, precision),
                warm=True,
            )
            for rates, precision in variants
        ]  # fmt: skip
        given = {"path": str(plan.small.path), "images": images, "encoder": name, "batch": batch,
                 "size": size, "device": plan.device.type, "workers": plan.workers}  # fmt: skip
        engines += [
            Engine("torch DataLoader + torchvision, 1 learning rate", "peer", work,
                   partial(_plain_alone, given), warm=True),
            Engine("our encoder alone", "limit", work,
                   partial(encoding, plan, encoder, size, work)),
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
    begun = 0.0  # the second epoch
    seek = loader.seek

    def noted(epoch: int, step: int) -> None:
        nonlocal begun
        if (epoch, step) == (1, 0):
            begun = time.perf_counter()
        seek(epoch, step)

    def call() -> float:
        crops_probe(
            encoder, loader, val, classes, learning_rates=rates, epochs=2, precision=precision
        )
        return time.perf_counter() - begun

    loader.seek = noted  # type: ignore[method-assign]
    return call


def _plain_alone(given: Mapping[str, object]) -> Callable[[], object]:
    return lambda: alone(plain, **given)


def plain(
    path: str, images: int, encoder: str, batch: int, size: int, device: str, workers: int
) -> float:
    """Seconds of the second of two epochs, with torch's DataLoader."""
    beton, place = drawn(open_beton(path), images), torch.device(device)
    transform = tv.Compose(
        [
            tv.RandomResizedCrop(size),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            tv.Normalize(beton.manifest.mean, beton.manifest.std),
        ]
    )
    loader = DataLoader(
        RawImages(beton, transform), batch_size=batch, shuffle=True, drop_last=True,
        num_workers=workers, persistent_workers=True, pin_memory=place.type == "cuda",
    )  # fmt: skip
    module = built(encoder).to(place)
    head = nn.Linear(num_features(module), len(beton.classes)).to(place)
    optimizer = torch.optim.SGD(head.parameters(), RATES[0], momentum=0.9)

    def epoch() -> None:
        for crops, labels in loader:
            with torch.no_grad():
                found = module(crops.to(place, non_blocking=True))
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(found), labels.to(place)).backward()
            optimizer.step()

    epoch()
    return timed(epoch)
