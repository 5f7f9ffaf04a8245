"""Logistic regression: the linear probe, solved instead of tuned."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastproj.evaluation.features import Features
from fastproj.evaluation.probes.common import (
    SELECTION,
    STANDARDIZATION,
    ProbeResult,
    check,
    choice,
    decades,
    design,
    hold_out,
    score,
    statistics,
    top,
)
from fastproj.evaluation.probes.softmax import TOLERANCE, Solution, solve


def logistic(
    train: Features,
    val: Features,
    num_classes: int | None = None,
    *,
    strengths: Sequence[float] = decades(-5),
    holdout: float = 0.1,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> ProbeResult:
    """Accuracy of multinomial logistic regression, its L2 strength chosen without ``val``.

    The objective is the mean cross-entropy + strength / 2 |W|², the intercept not penalized:
    scikit-learn's ``LogisticRegression`` with C = 1 / (strength n). It is convex, so it has no
    learning rate and no number of epochs: all strengths are solved together to a certified relative
    1e-6 of the objective (see ``softmax.py``). Features are standardized as in ``linear_probe``.

    The strength with the best accuracy on a stratified ``holdout`` of ``train`` (ties: the lower
    cross-entropy) is solved again on all of ``train`` and scored once on ``val``. With one strength
    nothing is held out: the way for an encoder that has seen the labels of ``train``, such as
    SupCon's, because such a hold-out tells nothing.

    ``num_classes`` None: the highest label of ``train`` and 1. A class without a training image is
    never predicted. ``device`` None: where ``train`` lies. ``protocol["chosen"]`` holds what
    ``choice`` says, ``suboptimality`` (the largest certified (f - min f) / f of all problems)
    and ``iterations`` (passes over the rows per strength).

    Raises ``InputError`` for labels outside 0..num_classes-1, fewer than two classes, different
    widths, features that are not finite, a strength that is not positive, and where no class has
    two training images (unless one strength is given).
    """
    start = time.perf_counter()
    num_classes = check(train, val, num_classes)
    head = fit(train, num_classes, strengths=strengths, holdout=holdout, seed=seed, device=device)
    scores = head.scores(val.features)
    metrics = top(scores, val.labels.to(scores.device))
    return ProbeResult(metrics, head.protocol, time.perf_counter() - start, scores.argmax(-1))


@dataclass(frozen=True)
class LinearHead:
    """A solved linear head: ``weights`` (C, d+1) of features standardized by ``mean``, ``std``.

    ``protocol``: how it was solved, as in ``ProbeResult``.
    """

    weights: Tensor
    mean: Tensor
    std: Tensor
    protocol: dict[str, Any]

    def scores(self, features: Tensor) -> Tensor:
        """``features`` (N, d) -> logits (N, C)."""
        return design(features, self.mean, self.std, self.weights.device) @ self.weights.T


def fit(
    train: Features,
    num_classes: int,
    *,
    strengths: Sequence[float],
    holdout: float,
    seed: int,
    device: torch.device | str | None = None,
) -> LinearHead:
    """The head of ``logistic``, whose arguments these are; ``train`` has passed ``check``."""
    device = train.features.device if device is None else torch.device(device)
    mean, std = statistics(train.features)
    x, y = design(train.features, mean, std, device), train.labels.to(device)
    path = sorted(strengths)
    chosen: dict[str, Any] = {"strength": path[0]}
    solved: list[Solution] = []
    if len(path) > 1:
        kept, held = hold_out(y, holdout, seed)
        solved.append(solve(x[kept, :-1], y[kept], num_classes, _tensor(path)))
        found = score(solved[0].heads.float(), x, y, held)
        _, chosen = choice({"strength": path}, *found, y, held)
    solved.append(solve(x[:, :-1], y, num_classes, _tensor([chosen["strength"]])))
    protocol = {
        "standardization": STANDARDIZATION,
        "objective": "mean cross-entropy + strength / 2 |W|^2, intercept not penalized",
        "optimizer": "preconditioned L-BFGS, float32, then float64 where needed",
        "tolerance": TOLERANCE,
        "selection": SELECTION if len(path) > 1 else "none: one strength was given",
        "strengths": list(strengths),
        "holdout": holdout if len(path) > 1 else None,
        "seed": seed,
        "chosen": chosen
        | {
            "suboptimality": max(part.suboptimality.max().item() for part in solved),
            "iterations": [n for part in solved for n in part.iterations.tolist()],
        },
    }
    return LinearHead(solved[-1].heads[0].float(), mean, std, protocol)


def _tensor(strengths: Sequence[float]) -> Tensor:
    return torch.tensor(strengths, dtype=torch.float64)
