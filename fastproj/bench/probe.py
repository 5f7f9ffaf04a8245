"""A grid of linear probes: all in one pass, one by one, and with scikit-learn."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from fastproj.bench import Engine, Plan, Row, compare, limits
from fastproj.evaluation.probes.sgd import fit

RATES, DECAYS = (0.01, 0.03, 0.1, 0.3), (1e-4, 1e-3, 1e-2, 1e-1)
BATCH = 256


def run(
    plan: Plan, images: int = 10_000, features: int = 512, classes: int = 10, epochs: int = 20
) -> list[Row]:
    """Train on ``images`` random rows, one Gaussian per class; the unit is one trained probe.

    One by one, and with scikit-learn, a call trains only two probes of the grid. scikit-learn's
    ``LogisticRegression`` uses lbfgs, not SGD, and stops when it has converged.
    """
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(images) % classes
    centers = torch.randn(classes, features, generator=generator)
    x = torch.randn(images, features + 1, generator=generator) * 4
    x[:, :-1] += centers[y]
    x[:, -1] = 1  # the bias column
    x, y = x.to(plan.device), y.to(plan.device)
    grid = list(product(RATES, DECAYS))
    rows, few = torch.arange(images, device=plan.device), grid[::8]

    def one_pass() -> Callable[[], object]:
        return lambda: fit(x, y, rows, classes, grid, epochs, BATCH, 0)

    def one_by_one() -> Callable[[], object]:
        return lambda: [fit(x, y, rows, classes, [each], epochs, BATCH, 0) for each in few]

    engines = [
        Engine("the grid in one pass", "ours", len(grid), one_pass),
        Engine("one by one", "peer", len(few), one_by_one, "the same code"),
        Engine("scikit-learn", "peer", len(DECAYS[::2]), _scikit_learn(x.cpu(), y.cpu()),
               "LogisticRegression, lbfgs to convergence"),
        limits.products(2 * epochs * (images // BATCH), BATCH, features + 1, len(grid) * classes,
                        plan.device, len(grid)),
    ]  # fmt: skip
    case = f"{len(grid)} probes, {images:,} x {features}, {classes} classes, {epochs} epochs"
    return compare("probe", case, "probes", engines, 1, plan.repeats)


def _scikit_learn(x: Tensor, y: Tensor) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        from sklearn.linear_model import LogisticRegression

        inputs, target = x[:, :-1].numpy(), y.numpy()

        def call() -> None:
            for decay in DECAYS[::2]:  # a mean loss's weight decay d is C = 1 / (N d)
                LogisticRegression(C=1 / (len(x) * decay), max_iter=1000).fit(inputs, target)

        return call

    return prepare
