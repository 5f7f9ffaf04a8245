"""Features -> accuracy: a grid of linear heads trained in one pass, and nearest neighbors.

A probe is a function of ``Features`` of train and val and plain arguments that returns a
``ProbeResult``; ``PROBES`` names them. A probe chooses its settings without ``val``. Accuracies are
fractions in [0, 1].
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastproj.core.errors import InputError
from fastproj.evaluation.features import Features

MOMENTUM = 0.9
SIMILARITIES = 2**24  # entries of the similarity matrix held at once (64 MiB of float32)


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    ``metrics``: name -> score on val, such as ``top1`` and ``top5``. ``protocol``: every argument,
    and what was chosen from them, as JSON holds it. ``seconds``: duration of the probe.
    ``predictions``: the predicted class of each val image, int64 (N,).
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    seconds: float
    predictions: Tensor


def linear_probe(
    train: Features,
    val: Features,
    num_classes: int | None = None,
    *,
    learning_rates: Sequence[float] = (0.01, 0.03, 0.1, 0.3),
    weight_decays: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1),
    epochs: int = 100,
    batch_size: int = 256,
    holdout: float = 0.1,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> ProbeResult:
    """Accuracy of a linear classifier on frozen features, its settings chosen without ``val``.

    Each pair of a learning rate and a weight decay is trained by SGD on a stratified 1 -
    ``holdout`` of ``train``. The pair with the best accuracy on the rest (ties: the lower
    cross-entropy) is trained again on all of ``train`` and scored once on ``val``. Features are
    standardized by the mean and standard deviation of ``train``: an affine-free batch norm, as
    MAE's probe has (He et al. 2022, appendix A.1), frozen at the training set's statistics.

    ``num_classes`` None: the highest label of ``train`` and 1. ``device`` None: where ``train``
    lies. ``protocol["chosen"]`` holds the pair, its accuracy on the holdout (``holdout_top1``), the
    holdout's size, the number of classes without an image in it (those of one training image), and
    ``edge``: the settings whose best value is the first or last of its list by more than the
    holdout's standard error, so that a wider grid might do better. A decay of zero ends the scale
    and is no edge.

    Raises ``InputError`` for labels outside 0..num_classes-1, fewer than two classes, different
    widths, features that are not finite, and where no class has two training images.
    """
    start = time.perf_counter()
    num_classes = check(train, val, num_classes)
    device = train.features.device if device is None else torch.device(device)
    mean, std = _statistics(train.features)
    x, y = _design(train.features, mean, std, device), train.labels.to(device)
    kept, held = (rows.to(device) for rows in stratified_split(train.labels, holdout, seed))
    if not len(held):
        raise InputError(
            "every class has one training image: the linear probe holds some out to choose its "
            "settings, so one class at least needs two"
        )
    rates, decays = sorted(learning_rates), sorted(weight_decays)
    grid = list(product(rates, decays))
    heads = fit(x, y, kept, num_classes, grid, epochs, batch_size, seed)
    accuracy, entropy = _score(x[held], y[held], heads)
    best = max(range(len(grid)), key=lambda g: (accuracy[g].item(), -entropy[g].item()))
    everything = torch.arange(len(x), device=device)
    head = fit(x, y, everything, num_classes, [grid[best]], epochs, batch_size, seed)[0]
    scores = _design(val.features, mean, std, device) @ head.T
    rank = ranks(scores, val.labels.to(device))
    protocol = {
        "standardization": "mean and standard deviation of each training feature",
        "optimizer": "SGD, momentum 0.9, half cosine per step, from zero, bias not decayed",
        "selection": "stratified holdout of train, then trained again on all of train",
        "holdout": holdout,
        "learning_rates": list(learning_rates),
        "weight_decays": list(weight_decays),
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "chosen": {
            "learning_rate": grid[best][0],
            "weight_decay": grid[best][1],
            "holdout_top1": accuracy[best].item(),
            "holdout_images": len(held),
            "classes_not_held_out": len(y.unique()) - len(y[held].unique()),
            "edge": list(_edge(accuracy.view(len(rates), len(decays)), len(held), decays[0] == 0)),
        },
    }
    metrics = {"top1": (rank < 1).float().mean().item(), "top5": (rank < 5).float().mean().item()}
    return ProbeResult(metrics, protocol, time.perf_counter() - start, scores.argmax(-1))


def fit(
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    classes: int,
    grid: Sequence[tuple[float, float]],
    epochs: int,
    batch_size: int,
    seed: int,
) -> Tensor:
    """Softmax regression by SGD: one head per (learning rate, weight decay), on the same batches.

    ``x`` float32 (N, d+1) ends in a column of ones, so that a head's last column is its bias, which
    is not decayed; ``rows`` are the samples to train on. Returns the heads, float32
    (G, classes, d+1). From zero; momentum 0.9; the rate falls to zero along a half cosine, per
    step; each epoch has its own order, the same on every device, and drops its last partial batch.
    """
    device, width = x.device, x.shape[1]
    rate, decay = torch.tensor(grid, dtype=torch.float32, device=device).view(-1, 2, 1, 1).unbind(1)
    decay = decay.expand(-1, 1, width).clone()
    decay[..., -1] = 0
    heads = torch.zeros(len(grid), classes, width, device=device)
    velocity = torch.zeros_like(heads)
    batch_size = min(batch_size, len(rows))
    per_epoch = len(rows) // batch_size
    generator = torch.Generator().manual_seed(seed)
    target = functional.one_hot(y, classes).float()
    for step in range(epochs * per_epoch):
        at = step % per_epoch
        if at == 0:
            order = rows[torch.randperm(len(rows), generator=generator).to(device)]
        chosen = order[at * batch_size : (at + 1) * batch_size]
        inputs = x[chosen]
        # The gradient of the mean cross-entropy in closed form: (softmax - target)' x / B.
        logits = (inputs @ heads.flatten(0, 1).T).view(batch_size, len(grid), classes)
        error = logits.softmax(-1).sub_(target[chosen].unsqueeze(1)).div_(batch_size)
        gradient = (error.flatten(1).T @ inputs).view_as(heads).addcmul_(decay, heads)
        velocity.mul_(MOMENTUM).add_(gradient)
        cosine = (1 + math.cos(math.pi * step / (epochs * per_epoch))) / 2
        heads.addcmul_(rate, velocity, value=-cosine)
    return heads


def knn(
    train: Features,
    val: Features,
    num_classes: int | None = None,
    k: int = 20,
    temperature: float = 0.07,
) -> ProbeResult:
    """Weighted nearest neighbors: votes exp(cosine similarity / temperature) of the ``k`` nearest.

    Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
    section 3.4. Equally near neighbors are taken in the order of ``train``, equal votes go to the
    lower class, and a class without a vote is never a hit. ``num_classes`` None: the highest label
    of ``train`` and 1. Memory is bounded by ``SIMILARITIES``. Raises ``InputError`` as
    ``linear_probe`` does, and for ``k`` above the number of training images.
    """
    start = time.perf_counter()
    num_classes = check(train, val, num_classes)
    if not 1 <= k <= len(train):
        raise InputError(f"kNN with k = {k} needs as many training images, there are {len(train)}")
    bank = functional.normalize(train.features, dim=1)
    target = functional.one_hot(train.labels, num_classes).float()
    hits = torch.zeros(2, dtype=torch.int64, device=bank.device)
    predictions = []
    chunk = max(1, SIMILARITIES // len(bank))
    for queries, labels in zip(val.features.split(chunk), val.labels.split(chunk), strict=True):
        near, rows = _nearest(functional.normalize(queries, dim=1) @ bank.T, k)
        # Relative to the nearest, so that no temperature overflows: a common factor of all votes.
        weight = ((near - near[:, :1]) / temperature).exp()
        votes = (weight.unsqueeze(-1) * target[rows]).sum(1)
        rank = ranks(votes, labels)
        voted = votes.gather(1, labels.unsqueeze(1)).squeeze(1) > 0
        hits += torch.stack([(rank < n).logical_and(voted).sum() for n in (1, 5)])
        predictions.append(votes.argmax(1))  # the lower class of equals
    top1, top5 = (hits.double() / len(val)).tolist()
    protocol = {"similarity": "cosine", "k": k, "temperature": temperature}
    seconds = time.perf_counter() - start
    return ProbeResult({"top1": top1, "top5": top5}, protocol, seconds, torch.cat(predictions))


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the true one, int64 (..., N): 0 is top-1, below 5 top-5.

    ``scores`` (..., N, C); equal scores come in class order; a NaN is a miss.
    """
    at = labels.unsqueeze(-1).expand(*scores.shape[:-1], 1)
    true = scores.gather(-1, at)
    before = torch.arange(scores.shape[-1], device=scores.device) < at
    return ((~(scores <= true)) | ((scores == true) & before)).sum(-1)


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


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, (d,); a constant column has deviation 1."""
    std, mean = torch.std_mean(features, dim=0, correction=0)
    constant = std <= 1e-6 * std.max()
    return mean, std.masked_fill(constant, 1.0)


def _design(features: Tensor, mean: Tensor, std: Tensor, device: torch.device) -> Tensor:
    """Standardized features and a last column of ones, float32 (N, d+1) on ``device``."""
    x = torch.ones(len(features), features.shape[1] + 1, device=device)
    x[:, :-1] = features
    x[:, :-1].sub_(mean.to(device)).div_(std.to(device))
    return x


def _score(x: Tensor, y: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy and mean cross-entropy of each head, both (G,)."""
    logits = torch.stack([x @ head.T for head in heads])
    accuracy = (ranks(logits, y) < 1).double().mean(-1)
    log_likelihood = logits.log_softmax(-1).gather(-1, y.expand(len(heads), -1).unsqueeze(-1))
    return accuracy, -log_likelihood.squeeze(-1).mean(-1)


def _nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns, both (Q, k), of the ``k`` largest of each row, equals in column order."""
    values, columns = similarity.topk(k, dim=1)
    tied = (similarity >= values[:, -1:]).count_nonzero(1) > k
    if tied.any():  # rare: topk may have taken any of the equals
        order = similarity[tied].sort(dim=1, descending=True, stable=True).indices
        columns[tied] = order[:, :k]
    return values, columns


def _edge(accuracy: Tensor, held: int, zero_decay: bool) -> tuple[str, ...]:
    """Names of the settings that only the ends of their sorted lists serve well.

    ``accuracy`` (rates, decays) on ``held`` images: no value inside the list comes within a
    standard error of the best.
    """
    best = accuracy.max().item()
    enough = best - math.sqrt(best * (1 - best) / held)
    rates, decays = accuracy.amax(1), accuracy.amax(0)
    edge = []
    if len(rates) > 1 and not (rates[1:-1] >= enough).any():
        edge.append("learning rate")
    if len(decays) > 1 and not (decays[0 if zero_decay else 1 : -1] >= enough).any():
        edge.append("weight decay")
    return tuple(edge)
