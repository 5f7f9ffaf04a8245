"""Robustness: a probe trained on clean features, scored on corrupted images.

The corruptions are the 15 of ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261) at their
five severities, as the package ``imagecorruptions`` computes them (the maintained distribution is
``imagecorruptions-imaug``; Michaelis et al. 2019, arXiv 1907.07484, made them work for any image
size). CIFAR-10-C uses weaker severities of its own, so its accuracies are not comparable.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastproj.core.errors import InputError
from fastproj.core.machine import cores
from fastproj.core.progress import Progress
from fastproj.evaluation.features import Features, features
from fastproj.evaluation.probes.common import ProbeResult, check, decades, top
from fastproj.evaluation.probes.regression import fit
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


def corruptions(
    encoder: nn.Module,
    train_features: Features,
    val: Loader,
    num_classes: int | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    strengths: Sequence[float] = decades(-5),
    holdout: float = 0.1,
    seed: int = 0,
) -> ProbeResult:
    """Accuracy of ``logistic``, trained on clean features, on every corruption of val's images.

    ``train_features``: of center crops. ``val``: a loader of every image's ``Center`` in the order
    of the set; its crops are corrupted, as ImageNet-C's are. Its ``workers`` processes corrupt.
    ``names``: of ``CORRUPTIONS``; None: all. ``strengths``, ``holdout`` and ``seed`` are those of
    ``logistic``; val and its corruptions choose nothing.

    ``top1`` and ``top5`` are means over corruptions and severities of plain accuracies;
    ImageNet-C's mCE divides errors by AlexNet's. ``top1_clean`` and ``top5_clean`` are clean val's,
    ``top1_fog`` is the mean over the severities of fog. ``protocol["accuracies"]`` holds the top-1
    of each corruption at each severity. ``predictions`` are those for clean val.

    Raises ``InputError`` as ``check_corruptions``, ``logistic`` and ``features`` do.
    """
    begun = time.perf_counter()
    names = CORRUPTIONS if names is None else names
    check_corruptions(min(crop.size for crop in val.crops), names, severities)
    clean = features(encoder, val, mean=mean, std=std)
    num_classes = check(train_features, clean, num_classes)
    head = fit(train_features, num_classes, strengths=strengths, holdout=holdout, seed=seed)
    scores = head.scores(clean.features)
    accuracies, grid = [], list(product(names, severities))
    with (
        Progress(len(grid) * len(clean), "corruptions") as bar,
        closing(Workers(val.workers)) if val.workers > 1 else nullcontext() as pool,
    ):
        for name, severity in grid:
            found = corrupted_features(encoder, val, name, severity, mean=mean, std=std, pool=pool)
            accuracies.append(top(head.scores(found.features), found.labels))
            bar.update(len(found))
    top1, top5 = (np.array([found[metric] for found in accuracies]) for metric in ("top1", "top5"))
    metrics = {"top1": float(top1.mean()), "top5": float(top5.mean())}
    metrics |= {f"{name}_clean": value for name, value in top(scores, clean.labels).items()}
    by_name = top1.reshape(len(names), len(severities)).mean(1).tolist()
    metrics |= {f"top1_{name}": value for name, value in zip(names, by_name, strict=True)}
    protocol = {
        **head.protocol,
        "corrupted": "the center crops of val",
        "corruptions": list(names),
        "severities": list(severities),
        "package": _package(),
        "accuracies": {f"{n} {s}": a for (n, s), a in zip(grid, top1.tolist(), strict=True)},
    }
    return ProbeResult(metrics, protocol, time.perf_counter() - begun, scores.argmax(-1))


def check_corruptions(
    size: int,
    names: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    **others: Any,
) -> None:
    """Raise ``InputError`` where crops of ``size`` pixels cannot be corrupted so.

    The arguments are those of ``corruptions``: the package is missing, crops are below 32 pixels,
    or there is no such corruption or severity.
    """
    for name in names or ():
        if name not in CORRUPTIONS:
            raise InputError(f"no corruption {name!r}: choose from {', '.join(CORRUPTIONS)}")
    for severity in severities:
        if severity not in SEVERITIES:
            raise InputError(f"severity {severity}: choose from 1 to 5")
    if size < SMALLEST:
        raise InputError(
            f"crops of {size} pixels: the corruptions need {SMALLEST} or more; use larger crops"
        )
    _package()


def corrupted_features(
    encoder: nn.Module,
    loader: Loader,
    corruption: str,
    severity: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pool: Workers | None = None,
) -> Features:
    """``features`` of the loader's crops after ``corruption`` at ``severity`` (1 to 5).

    The random numbers of an image depend on its index alone: every encoder and every run sees the
    same images, with any number of workers. ``mean`` and ``std`` None: those of the loader's beton.
    ``pool``: processes that share the work; None: this one does it. Raises ``InputError`` as
    ``check_corruptions`` and ``features`` do.
    """
    check_corruptions(min(crop.size for crop in loader.crops), [corruption], [severity])
    if mean is None and std is None:
        mean, std = loader.beton.manifest.mean, loader.beton.manifest.std
    return features(encoder, _Corrupted(loader, corruption, severity, pool), mean=mean, std=std)


class _Corrupted:
    """Batches of (images, labels) of a loader that reads the set in order, corrupted."""

    def __init__(
        self, loader: Loader, corruption: str, severity: int, pool: Workers | None
    ) -> None:
        if len(loader.crops) != 1 or loader.order.shuffle or loader.order.drop_last:
            raise InputError(
                "corrupted features need every image in order: open the loader with one Center, "
                "shuffle=False and drop_last=False"
            )
        self.loader, self.how, self.pool = loader, (corruption, severity), pool

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


def _corrupt(images: np.ndarray, index: np.ndarray, corruption: str, severity: int) -> np.ndarray:
    """uint8 (n, h, w, 3) to the same, each image with its own random numbers."""
    from imagecorruptions import corrupt

    state = np.random.get_state()  # the package draws from numpy's global generator
    try:
        done = []
        for image, number in zip(images, index.tolist(), strict=True):
            np.random.seed(np.random.SeedSequence(number).generate_state(4))
            done.append(corrupt(image, severity=severity, corruption_name=corruption))
        return np.stack(done)
    finally:
        np.random.set_state(state)


def _package() -> str:
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
