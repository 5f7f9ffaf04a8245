"""Ridge regression on one-hot targets, in closed form."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastproj.core.errors import InputError
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


def ridge(
    train: Features,
    val: Features,
    num_classes: int | None = None,
    *,
    strengths: Sequence[float] = decades(-4),
    holdout: float = 0.1,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> ProbeResult:
    """Accuracy of least squares on one-hot targets, its L2 strength chosen without ``val``.

    The objective is the mean of |W x + b - onehot(y)|² + strength |W|², the intercept not
    penalized: scikit-learn's ``Ridge`` with alpha = strength n, and the same classes as its
    ``RidgeClassifier``. One float64 eigendecomposition serves all strengths. Standardization,
    choice, arguments and errors as in ``logistic``.
    """
    start = time.perf_counter()
    num_classes = check(train, val, num_classes)
    if min(strengths) <= 0:
        raise InputError("strengths must be above 0: without a penalty there may be no optimum")
    device = train.features.device if device is None else torch.device(device)
    mean, std = statistics(train.features)
    x, y = design(train.features, mean, std, device), train.labels.to(device)
    path = sorted(strengths)
    chosen: dict[str, Any] = {"strength": path[0]}
    if len(path) > 1:
        kept, held = hold_out(y, holdout, seed)
        heads = least_squares(x[kept, :-1], y[kept], num_classes, path)
        found = score(heads, x, y, held)
        _, chosen = choice({"strength": path}, *found, y, held)
    head = least_squares(x[:, :-1], y, num_classes, [chosen["strength"]])[0]
    scores = design(val.features, mean, std, device) @ head.T
    protocol = {
        "standardization": STANDARDIZATION,
        "objective": "mean |W x + b - onehot|^2 + strength |W|^2, intercept not penalized",
        "optimizer": "closed form, float64",
        "selection": SELECTION if len(path) > 1 else "none: one strength was given",
        "strengths": list(strengths),
        "holdout": holdout if len(path) > 1 else None,
        "seed": seed,
        "chosen": chosen,
    }
    seconds = time.perf_counter() - start
    return ProbeResult(top(scores, val.labels.to(device)), protocol, seconds, scores.argmax(-1))


def least_squares(x: Tensor, y: Tensor, classes: int, strengths: Sequence[float]) -> Tensor:
    """One head per strength, float32 (S, classes, d+1), the last column is the intercept.

    ``x``: float32 (N, d); ``y``: int64 (N,). A class without a row gets the target 0 everywhere.
    """
    n = len(x)
    center = x.mean(0, dtype=torch.float64)
    share = torch.bincount(y, minlength=classes).double() / n
    second = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    cross = torch.zeros(classes, x.shape[1], dtype=torch.float64, device=x.device)
    for rows, labels in zip(x.split(2**13), y.split(2**13), strict=True):
        rows = rows.double() - center
        second += rows.T @ rows
        cross.index_add_(0, labels, rows)
    values, basis = torch.linalg.eigh(second / n)
    turned = cross / n @ basis
    heads = []
    for strength in strengths:
        weight = turned / (values.clamp(min=0) + strength) @ basis.T
        heads.append(torch.cat([weight, (share - weight @ center).unsqueeze(1)], dim=1))
    return torch.stack(heads).float()
