"""Features -> accuracy: a grid of linear heads trained in one pass, and nearest neighbours.

Every function takes ``Features`` (float32 (N, d), labels int64 (N,)) and runs on ``device``, or
where the features lie. Accuracies are shares in [0, 1].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from fastproj.errors import InputError
from fastproj.features import Features

MOMENTUM = 0.9
SIMILARITIES = 2**24  # entries of the similarity matrix held at once (64 MiB of float32)


@dataclass(frozen=True)
class LinearResult:
    """Accuracies on the validation set, and how the one head that saw it was chosen.

    ``edge`` names the settings whose best value is the first or last of its list, by more than the
    holdout's standard error: a wider grid might do better. A decay of zero ends the scale, so it
    is no edge.
    """

    top1: float
    top5: float
    learning_rate: float
    weight_decay: float
    holdout_top1: float
    edge: tuple[str, ...]


@dataclass(frozen=True)
class KnnResult:
    top1: float
    top5: float


def linear_probe(
    train: Features,
    val: Features,
    classes: int,
    *,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    epochs: int,
    batch_size: int,
    holdout: float,
    seed: int,
    device: torch.device,
) -> LinearResult:
    """Accuracy of a linear classifier on frozen features, its settings chosen without ``val``.

    Every (learning rate, weight decay) is trained on a stratified 1 - ``holdout`` of ``train``; the
    one with the best accuracy on the rest (ties: the lower cross-entropy) is trained again on all
    of ``train`` and scored once on ``val``. Features are standardised by the mean and standard
    deviation of ``train``: an affine-free batch norm, as MAE's probe has (He et al. 2022,
    appendix A.1), frozen at the training set's statistics.
    Raises ``InputError`` for labels outside 0..classes-1, for fewer than two classes, and for
    widths that differ.
    """
    check(train, val, classes)
    mean, std = _statistics(train.features)
    x, y = _design(train.features, mean, std, device), train.labels.to(device)
    kept, held = (rows.to(device) for rows in stratified_split(train.labels, holdout, seed))
    rates, decays = sorted(learning_rates), sorted(weight_decays)
    grid = list(product(rates, decays))
    heads = fit(x, y, kept, classes, grid, epochs, batch_size, seed)
    accuracy, entropy = _score(x[held], y[held], heads)
    best = max(range(len(grid)), key=lambda g: (accuracy[g].item(), -entropy[g].item()))
    everything = torch.arange(len(x), device=device)
    head = fit(x, y, everything, classes, [grid[best]], epochs, batch_size, seed)[0]
    scores = _design(val.features, mean, std, device) @ head.T
    rank = ranks(scores, val.labels.to(device))
    return LinearResult(
        top1=(rank < 1).float().mean().item(),
        top5=(rank < 5).float().mean().item(),
        learning_rate=grid[best][0],
        weight_decay=grid[best][1],
        holdout_top1=accuracy[best].item(),
        edge=_edge(accuracy.view(len(rates), len(decays)), len(held), decays[0] == 0),
    )


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
    """Softmax regression by SGD, one head a (learning rate, weight decay), all on the same batches.

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


def knn(train: Features, val: Features, classes: int, k: int, temperature: float) -> KnnResult:
    """Weighted nearest neighbours: votes exp(cosine similarity / temperature) of the ``k`` nearest.

    Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
    section 3.4. Equally near neighbours are taken in the order of ``train``, equal votes go to the
    lower class, and a class without a vote is never a hit. Memory is bounded by ``SIMILARITIES``.
    """
    check(train, val, classes)
    if not 1 <= k <= len(train):
        raise InputError(f"kNN with k = {k} needs as many training images, there are {len(train)}")
    bank = functional.normalize(train.features, dim=1)
    target = functional.one_hot(train.labels, classes).float()
    hits = torch.zeros(2, dtype=torch.int64, device=bank.device)
    chunk = max(1, SIMILARITIES // len(bank))
    for queries, labels in zip(val.features.split(chunk), val.labels.split(chunk), strict=True):
        near, rows = _nearest(functional.normalize(queries, dim=1) @ bank.T, k)
        # Relative to the nearest, so that no temperature overflows: a common factor of all votes.
        weight = ((near - near[:, :1]) / temperature).exp()
        votes = (weight.unsqueeze(-1) * target[rows]).sum(1)
        rank = ranks(votes, labels)
        voted = votes.gather(1, labels.unsqueeze(1)).squeeze(1) > 0
        hits += torch.stack([(rank < n).logical_and(voted).sum() for n in (1, 5)])
    top1, top5 = (hits.double() / len(val)).tolist()
    return KnnResult(top1, top5)


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the true one, int64 (..., N): 0 is top-1, below 5 top-5.

    ``scores`` (..., N, C); equal scores come in class order; a NaN is a miss.
    """
    at = labels.unsqueeze(-1).expand(*scores.shape[:-1], 1)
    true = scores.gather(-1, at)
    before = torch.arange(scores.shape[-1], device=scores.device) < at
    return ((~(scores <= true)) | ((scores == true) & before)).sum(-1)


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted row numbers (kept, held out), on the CPU: ``share`` of each class is held out.

    At least one image of every class that has two; a class of one image is kept.
    """
    labels = labels.cpu()
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    grouped = shuffled[labels[shuffled].sort(stable=True).indices]
    counts = torch.bincount(labels)
    held = (counts * share).round().long().clamp(min=1).minimum((counts - 1).clamp(min=0))
    first = (counts.cumsum(0) - counts)[labels[grouped]]
    out = torch.arange(len(labels)) - first < held[labels[grouped]]
    return grouped[~out].sort().values, grouped[out].sort().values


def check(train: Features, val: Features, classes: int) -> None:
    """Raise ``InputError`` unless both sets are labelled 0..classes-1 and equally wide."""
    if train.features.shape[1] != val.features.shape[1]:
        widths = f"{train.features.shape[1]} and {val.features.shape[1]}"
        raise InputError(f"training and validation features are {widths} wide: use one encoder")
    for name, part in (("training", train), ("validation", val)):
        low, high = (int(bound) for bound in part.labels.aminmax())
        if low < 0 or high >= classes:
            raise InputError(
                f"{name} labels run from {low} to {high}, outside 0..{classes - 1}: "
                "a probe needs a labelled split whose manifest names its classes"
            )
    if classes < 2 or bool((train.labels == train.labels[0]).all()):
        raise InputError("the training images are all of one class: a probe needs at least two")


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, (d,); a constant column has deviation 1."""
    std, mean = torch.std_mean(features, dim=0, correction=0)
    constant = std <= 1e-6 * std.max()
    return mean, std.masked_fill(constant, 1.0)


def _design(features: Tensor, mean: Tensor, std: Tensor, device: torch.device) -> Tensor:
    """Standardised features and a last column of ones, float32 (N, d+1) on ``device``."""
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
