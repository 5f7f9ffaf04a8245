"""Robustness: a probe trained on clean features, scored on corrupted images.

The corruptions are the 15 of ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261) at their
five severities, as the package ``imagecorruptions`` computes them (the maintained distribution is
``imagecorruptions-imaug``; Michaelis et al. 2019, arXiv 1907.07484, made them work for any image
size). CIFAR-10-C uses weaker severities of its own, so its accuracies are not comparable.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from fastproj.core.errors import InputError
from fastproj.core.machine import cores
from fastproj.evaluation.features import Features, features
from fastproj.evaluation.probes.common import ProbeResult
from fastproj.loaders import Loader
from fastproj.prepare.workers import Workers
from fastproj.runs.environment import installed

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression",
)  # fmt: skip
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 32  # pixels: smaller images imagecorruptions refuses
Probe = Callable[[Features, Features, int | None], ProbeResult]


def corruption_probe(
    encoder: nn.Module,
    train: Features,
    val: Loader,
    num_classes: int | None = None,
    *,
    probe: Probe,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    workers: int = 0,
) -> ProbeResult:
    """Accuracy on corrupted val images of a probe that is trained once, on clean ``train``.

    ``probe(train, val, num_classes)`` is any probe of features, for example ``linear_probe``; its
    val is clean val and every corruption at every severity, one after the other: (1 + 75) · N rows
    of d float32. ``val``: a loader of every image's ``Center`` in the order of the set; its crops
    are corrupted, as in ImageNet-C. ``top1`` is the mean over corruptions and severities, as a
    plain accuracy (ImageNet-C's mCE divides errors by AlexNet's); ``clean_top1`` is the same
    probe's on clean val, ``top1_NAME`` a corruption's mean over severities. ``predictions`` are
    those for clean val. ``workers``: processes that corrupt; 0 means one per core.

    Raises ``InputError`` where the package is missing, for crops below 32 pixels, for a corruption
    or severity that does not exist, and as ``features`` does.
    """
    begun = time.perf_counter()
    for severity in severities:
        if severity not in SEVERITIES:
            raise InputError(f"severity {severity}: choose from 1 to 5")
    parts = [features(encoder, val, mean=mean, std=std)]
    grid = list(product(corruptions, severities))
    count = min(workers or cores(), cores())
    with closing(Workers(count)) if count > 1 else nullcontext() as pool:
        parts += [
            corrupted_features(
                encoder, val, corruption, severity, mean=mean, std=std, seed=seed, pool=pool
            )
            for corruption, severity in grid
        ]
    every = Features(*(torch.cat([getattr(p, n) for p in parts]) for n in ("features", "labels")))
    found = probe(train, every, num_classes)
    hits = (found.predictions == every.labels.to(found.predictions.device)).double()
    accuracy = hits.view(len(parts), -1).mean(1).tolist()
    by_name: dict[str, list[float]] = {name: [] for name in corruptions}
    for (corruption, _), score in zip(grid, accuracy[1:], strict=True):
        by_name[corruption].append(score)
    metrics = {"top1": float(np.mean(accuracy[1:])), "clean_top1": accuracy[0]}
    metrics |= {f"top1_{name}": float(np.mean(scores)) for name, scores in by_name.items()}
    protocol = {
        "corruptions": list(corruptions),
        "severities": list(severities),
        "accuracies": {f"{n} {s}": a for (n, s), a in zip(grid, accuracy[1:], strict=True)},
        "package": _version(),
        "corrupted": "the center crops of val",
        "seed": seed,
        "probe": found.protocol,
    }
    predictions = found.predictions[: len(parts[0])]
    return ProbeResult(metrics, protocol, time.perf_counter() - begun, predictions)


def corrupted_features(
    encoder: nn.Module,
    loader: Loader,
    corruption: str,
    severity: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    pool: Workers | None = None,
) -> Features:
    """``features`` of the loader's crops after ``corruption`` at ``severity`` (1 to 5).

    The random numbers of an image depend on ``seed`` and its index alone, so they are the same for
    every encoder and every number of workers. ``mean`` and ``std`` None: those of the loader's
    beton. ``pool``: processes that share the work; None: this one does it.
    """
    if corruption not in CORRUPTIONS:
        raise InputError(f"no corruption {corruption!r}: choose one of {', '.join(CORRUPTIONS)}")
    _version()
    if mean is None and std is None:
        mean, std = loader.beton.manifest.mean, loader.beton.manifest.std
    batches = _Corrupted(loader, corruption, severity, seed, pool)
    return features(encoder, batches, mean=mean, std=std)


class _Corrupted:
    """Batches of (images, labels) of a loader that reads the set in order, corrupted."""

    def __init__(
        self, loader: Loader, corruption: str, severity: int, seed: int, pool: Workers | None
    ) -> None:
        size = min(crop.size for crop in loader.crops)
        if size < SMALLEST:
            raise InputError(
                f"crops of {size} pixels: the corruptions need {SMALLEST} or more; use larger crops"
            )
        if len(loader.crops) != 1 or loader.order.shuffle or loader.order.drop_last:
            raise InputError(
                "corrupted features need every image in order: open the loader with one Center, "
                "shuffle=False and drop_last=False"
            )
        self.loader, self.how, self.pool = loader, (corruption, severity, seed), pool

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            images = batch.crops[0].permute(0, 2, 3, 1).cpu().numpy()
            index = batch.index.cpu().numpy()
            if self.pool is None:
                done = [_corrupt(images, index, *self.how)]
            else:
                parts = min(len(images), 4 * cores())
                split = (np.array_split(array, parts) for array in (images, index))
                jobs = [
                    self.pool.submit(_corrupt, some, numbers, *self.how)
                    for some, numbers in zip(*split, strict=True)
                ]
                done = [job.result() for job in jobs]
            corrupted = torch.from_numpy(np.concatenate(done)).permute(0, 3, 1, 2)
            yield corrupted.to(batch.crops[0].device), batch.labels


def _corrupt(
    images: np.ndarray, index: np.ndarray, corruption: str, severity: int, seed: int
) -> np.ndarray:
    """uint8 (n, h, w, 3) to the same, each image with its own random numbers."""
    from imagecorruptions import corrupt

    state = np.random.get_state()  # the package draws from numpy's global generator
    try:
        done = []
        for image, number in zip(images, index.tolist(), strict=True):
            np.random.seed(np.random.SeedSequence([seed, number]).generate_state(4))
            done.append(corrupt(image, severity=severity, corruption_name=corruption))
        return np.stack(done)
    finally:
        np.random.set_state(state)


def _version() -> str:
    """The package's name and version. Raises ``InputError`` where it is missing."""
    try:
        import imagecorruptions  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"corruptions need the package imagecorruptions ({error}): "
            "pip install 'fastproj-ssl[corruptions]'"
        ) from None
    names = ("imagecorruptions-imaug", "imagecorruptions")
    return next((f"{name} {found}" for name in names if (found := installed(name))), names[1])
