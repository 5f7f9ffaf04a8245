"""A probe with few labels: logistic regression on small stratified draws of train."""

import time
from collections.abc import Sequence
from statistics import mean, stdev

import torch
from torch import Tensor

from fastproj.core.errors import InputError
from fastproj.evaluation.features import Features
from fastproj.evaluation.probes.common import ProbeResult, check
from fastproj.evaluation.probes.regression import logistic


def few_shot(
    train: Features,
    val: Features,
    num_classes: int | None = None,
    *,
    labels: Sequence[float] = (0.01, 0.1),
    draws: int = 5,
    strength: float = 0.01,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> ProbeResult:
    """Accuracy of ``logistic`` at one fixed ``strength`` on a few labels of ``train``.

    Each of ``labels`` is a fraction of every class if below 1 (rounded, at least one image), else a
    number of images per class. Each is drawn ``draws`` times, with seeds ``seed``, ``seed`` + 1, …;
    the draws of one seed are nested: a larger one holds the smaller ones. Features are standardized
    by the drawn images alone.

    ``metrics``: ``top1`` and ``top5`` are means over the draws of the first of ``labels``, and
    ``top1_std`` the standard deviation; those of the others are named ``top1_10%`` or ``top1_5``
    (images per class). ``predictions`` are those of the first draw of the first.

    Raises ``InputError`` as ``logistic`` does, and where a class has too few images.
    """
    start = time.perf_counter()
    num_classes = check(train, val, num_classes)
    metrics: dict[str, float] = {}
    predictions: Tensor | None = None
    images: dict[str, int] = {}
    for position, size in enumerate(labels):
        found = []
        for number in range(draws):
            rows = draw(train.labels, size, seed + number).to(train.labels.device)
            subset = Features(train.features[rows], train.labels[rows])
            result = logistic(subset, val, num_classes, strengths=[strength], device=device)
            predictions = result.predictions if predictions is None else predictions
            found.append(result.metrics)
        name = f"{size:.4g}" if size >= 1 else f"{100 * size:.4g}%"
        images[name] = len(rows)
        name = f"_{name}" if position else ""
        for metric in ("top1", "top5"):
            values = [each[metric] for each in found]
            metrics[f"{metric}{name}"] = mean(values)
            metrics[f"{metric}{name}_std"] = stdev(values) if draws > 1 else 0.0
    assert predictions is not None
    protocol = {
        "probe": "logistic regression, see logistic; standardized by the drawn images",
        "selection": "none: one strength was given",
        "strength": strength,
        "labels": list(labels),
        "images": images,
        "draws": draws,
        "sampling": "stratified, without replacement; the draws of one seed are nested",
        "seed": seed,
    }
    return ProbeResult(metrics, protocol, time.perf_counter() - start, predictions)


def draw(labels: Tensor, size: float, seed: int) -> Tensor:
    """Sorted rows, int64 on the CPU: ``size`` of each class, as ``few_shot`` says."""
    labels = labels.cpu()
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    grouped = shuffled[labels[shuffled].sort(stable=True).indices]
    counts = torch.bincount(labels)
    if size > 1 and size % 1:
        raise InputError(f"few_shot cannot take {size} images of each class: give a whole number")
    if size < 1:
        taken = (counts * size).round().long().clamp(min=1)
    else:
        taken = torch.full_like(counts, int(size))
        if int(counts[counts > 0].min()) < size:
            raise InputError(
                f"few_shot takes {int(size)} images of each class, but class "
                f"{int(torch.where(counts > 0, counts, len(labels)).argmin())} has "
                f"{int(counts[counts > 0].min())}: give a smaller number, or a fraction below 1"
            )
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[grouped]]
    return grouped[place < taken[labels[grouped]]].sort().values
