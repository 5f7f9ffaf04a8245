"""A grid of linear heads trained by SGD in one pass."""

import math
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastproj.core.linear import linear
from fastproj.evaluation.features import Features
from fastproj.evaluation.probes.common import (
    SELECTION,
    STANDARDIZATION,
    ProbeResult,
    check,
    choice,
    design,
    hold_out,
    score,
    statistics,
    top,
)

MOMENTUM = 0.9


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
    lies. ``protocol["chosen"]`` holds what ``choice`` says about the pair. A grid of one pair is
    trained on all of ``train``, nothing is held out.

    Raises ``InputError`` for labels outside 0..num_classes-1, fewer than two classes, different
    widths, features that are not finite, and where no class has two training images.
    """
    start = time.perf_counter()
    num_classes = check(train, val, num_classes)
    device = train.features.device if device is None else torch.device(device)
    mean, std = statistics(train.features)
    x, y = design(train.features, mean, std, device), train.labels.to(device)
    lists = {"learning_rate": sorted(learning_rates), "weight_decay": sorted(weight_decays)}
    grid = list(product(lists["learning_rate"], lists["weight_decay"]))
    chosen: dict[str, Any] = dict(zip(lists, grid[0], strict=True))
    if len(grid) > 1:
        kept, held = hold_out(y, holdout, seed)
        heads = fit(x, y, kept, num_classes, grid, epochs, batch_size, seed)
        found = score(heads, x, y, held)
        zero = ["weight_decay"] if lists["weight_decay"][0] == 0 else []
        best, chosen = choice(lists, *found, y, held, zero)
        grid = [grid[best]]
    everything = torch.arange(len(x), device=device)
    head = fit(x, y, everything, num_classes, grid, epochs, batch_size, seed)[0]
    scores = design(val.features, mean, std, device) @ head.T
    protocol = {
        "standardization": STANDARDIZATION,
        "optimizer": "SGD, momentum 0.9, half cosine per step, from zero, bias not decayed",
        "selection": SELECTION if "holdout_top1" in chosen else "none: one pair was given",
        "holdout": holdout,
        "learning_rates": list(learning_rates),
        "weight_decays": list(weight_decays),
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "chosen": chosen,
    }
    seconds = time.perf_counter() - start
    return ProbeResult(top(scores, val.labels.to(device)), protocol, seconds, scores.argmax(-1))


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
    batch = torch.arange(batch_size, device=device)
    for step in range(epochs * per_epoch):
        at = step % per_epoch
        if at == 0:
            order = rows[torch.randperm(len(rows), generator=generator).to(device)]
        chosen = order[at * batch_size : (at + 1) * batch_size]
        inputs = x[chosen]
        # The gradient of the mean cross-entropy in closed form: (softmax - target)' x / B.
        logits = linear(inputs, heads.flatten(0, 1)).view(batch_size, len(grid), classes)
        error = logits.softmax(-1)
        error[batch, :, y[chosen]] -= 1
        error.div_(batch_size)
        gradient = linear(error.flatten(1).T, inputs.T).view_as(heads).addcmul_(decay, heads)
        velocity.mul_(MOMENTUM).add_(gradient)
        cosine = (1 + math.cos(math.pi * step / (epochs * per_epoch))) / 2
        heads.addcmul_(rate, velocity, value=-cosine)
    return heads
