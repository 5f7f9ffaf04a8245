"""What every probe shares: its result, checks of its input, the hold-out, standardization."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastproj.core.errors import InputError
from fastproj.evaluation.features import Features

STANDARDIZATION = "mean and standard deviation of each training feature"
SELECTION = "stratified holdout of train, then trained again on all of train"
ROWS = 4096  # scored at once


def decades(first: int) -> tuple[float, ...]:
    """Sixteen strengths from 10**first, three per decade."""
    return tuple(float(f"{10 ** (n / 3 + first):.4g}") for n in range(16))


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    ``metrics``: name -> score on val, such as ``top1`` and ``top5``. ``protocol``: every argument
    and, under ``chosen``, what came out of them on train, as JSON holds it. ``seconds``: how long
    the probe took. ``predictions``: the predicted class of each val image, int64 (N,).
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    seconds: float
    predictions: Tensor


def check(train: Features, val: Features, num_classes: int | None) -> int:
    """The number of classes; ``InputError`` unless both sets can be probed.

    They hold images, are equally wide and finite, and their labels lie in 0..num_classes-1 (None:
    up to the highest of ``train``).
    """
    if train.features.shape[1] != val.features.shape[1]:
        widths = f"{train.features.shape[1]} and {val.features.shape[1]}"
        raise InputError(f"training and validation features are {widths} wide: use one encoder")
    for name, part in (("training", train), ("validation", val)):
        if not len(part):
            raise InputError(f"there are no {name} images: a probe needs some of both")
        if not part.features.isfinite().all():
            raise InputError(f"the {name} features hold NaN or infinity: the encoder has diverged")
    if num_classes is None:
        num_classes = int(train.labels.max()) + 1
    for name, part in (("training", train), ("validation", val)):
        low, high = (int(bound) for bound in part.labels.aminmax())
        if low < 0 or high >= num_classes:
            raise InputError(
                f"{name} labels run from {low} to {high}, outside 0..{num_classes - 1}: "
                "a probe needs a labeled split whose manifest names its classes"
            )
    if num_classes < 2 or bool((train.labels == train.labels[0]).all()):
        raise InputError("the training images are all of one class: a probe needs at least two")
    return num_classes


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the true one, int64 (..., N): 0 is top-1, below 5 top-5.

    ``scores`` (..., N, C); equal scores come in class order; a NaN is a miss.
    """
    at = labels.unsqueeze(-1).expand(*scores.shape[:-1], 1)
    true = scores.gather(-1, at)
    before = torch.arange(scores.shape[-1], device=scores.device) < at
    return ((~(scores <= true)) | ((scores == true) & before)).sum(-1)


def top(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """``top1`` and ``top5`` of ``scores`` (N, C). Raises ``InputError`` where none is finite."""
    if not scores.isfinite().any():
        raise InputError(
            "no score of the probe is finite, so it diverged: give it lower learning rates, or "
            "another probe (--eval.probes)"
        )
    rank = ranks(scores, labels).masked_fill(~_possible(scores, labels), scores.shape[-1] + 5)
    return {f"top{n}": (rank < n).double().mean().item() for n in (1, 5)}


def _possible(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether the true class has a finite score, bool (N,): a class without one is never a hit."""
    return scores.gather(-1, labels.unsqueeze(-1)).squeeze(-1).isfinite()


def score(heads: Tensor, x: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy and mean cross-entropy of each head on ``rows`` of ``x``, both float64 (G,).

    ``heads`` (G, C, d+1), ``x`` (N, d+1), ``labels`` (N,). One head and ``ROWS`` rows at a time: a
    tenth of ImageNet-1k has 128 million logits of each head.
    """
    right, loss = torch.zeros(2, len(heads), dtype=torch.float64, device=x.device)
    for part in rows.split(ROWS):
        inputs, targets = x[part], labels[part]
        for number, head in enumerate(heads):
            logits = inputs @ head.T
            right[number] += (ranks(logits, targets) < 1).sum()
            log_p = logits.double().log_softmax(-1)
            loss[number] -= log_p.gather(-1, targets.unsqueeze(-1)).sum()
    return right / len(rows), loss / len(rows)


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, (d,); a constant column has deviation 1."""
    std, mean = torch.std_mean(features, dim=0, correction=0)
    constant = std <= 1e-6 * std.max()
    return mean, std.masked_fill(constant, 1.0)


def design(features: Tensor, mean: Tensor, std: Tensor, device: torch.device) -> Tensor:
    """Standardized features and a last column of ones, float32 (N, d+1) on ``device``."""
    x = torch.ones(len(features), features.shape[1] + 1, device=device)
    x[:, :-1] = features
    x[:, :-1].sub_(mean.to(device)).div_(std.to(device))
    return x


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted row numbers (kept, held out) on the CPU; ``fraction`` of each class is held out.

    At least one image of every class that has two; a class of one image is kept.
    """
    labels = labels.cpu()
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    grouped = shuffled[labels[shuffled].sort(stable=True).indices]
    counts = torch.bincount(labels)
    held = (counts * fraction).round().long().clamp(min=1).minimum((counts - 1).clamp(min=0))
    first = (counts.cumsum(0) - counts)[labels[grouped]]
    out = torch.arange(len(labels)) - first < held[labels[grouped]]
    return grouped[~out].sort().values, grouped[out].sort().values


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """``stratified_split``; ``InputError`` where nothing can be held out."""
    kept, held = stratified_split(labels, fraction, seed)
    if not len(held):
        raise InputError(
            "every class has one training image: this probe holds some out to choose its "
            "settings, so one class at least needs two; or give it one value of each setting"
        )
    return kept.to(labels.device), held.to(labels.device)


def choice(
    settings: Mapping[str, Sequence[float]],
    accuracy: Tensor,
    entropy: Tensor,
    labels: Tensor,
    held: Tensor,
    ends: Sequence[str] = (),
) -> tuple[int, dict[str, Any]]:
    """The best entry of a grid, and what the protocol says about it.

    ``settings``: name -> its sorted values; ``accuracy``, ``entropy`` (their product,) on the rows
    ``held`` of ``labels``. The highest accuracy wins, ties go to the lower cross-entropy. Says
    ``holdout_top1``, ``holdout_images``, ``classes_not_held_out`` (those of one image), ``tie``
    (all entries have the same accuracy) and ``edge``: the settings whose best value is the first or
    last of its list by more than the holdout's standard error, so that a wider grid might do
    better. Of the settings in ``ends`` the first value ends the scale and is no edge.
    """
    best = max(range(len(accuracy)), key=lambda g: (accuracy[g].item(), -entropy[g].item()))
    shape = [len(values) for values in settings.values()]
    position = torch.unravel_index(torch.tensor(best), shape)
    tie = len(accuracy) > 1 and bool((accuracy == accuracy[0]).all())
    chosen = {
        **{
            name: values[int(at)]
            for (name, values), at in zip(settings.items(), position, strict=True)
        },
        "holdout_top1": accuracy[best].item(),
        "holdout_images": len(held),
        "classes_not_held_out": len(labels.unique()) - len(labels[held].unique()),
        "edge": [] if tie else list(edges(settings, accuracy.view(shape), len(held), ends)),
        "tie": tie,
    }
    return best, chosen


def edges(
    settings: Mapping[str, Sequence[float]], accuracy: Tensor, held: int, ends: Sequence[str]
) -> tuple[str, ...]:
    """Names of the settings that only the ends of their sorted lists serve well.

    ``accuracy`` (one dimension per setting) on ``held`` images: no value inside the list comes
    within a standard error of the best.
    """
    best = accuracy.max().item()
    enough = best - math.sqrt(best * (1 - best) / held)
    found = []
    for axis, name in enumerate(settings):
        line = accuracy.movedim(axis, 0).reshape(accuracy.shape[axis], -1).amax(1)
        if len(line) > 1 and not (line[0 if name in ends else 1 : -1] >= enough).any():
            found.append(name.rstrip("s").replace("_", " "))
    return tuple(found)
