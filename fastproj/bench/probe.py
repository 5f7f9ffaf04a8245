"""A grid of linear probes trained by SGD, in one pass and one by one."""

from collections.abc import Callable
from itertools import product

import torch

from fastproj.bench import Engine, Plan, Row, compare, limits
from fastproj.evaluation.probes.sgd import fit

RATES, DECAYS = (0.01, 0.03, 0.1, 0.3), (1e-4, 1e-3, 1e-2, 1e-1)
BATCH = 256


def run(
    plan: Plan, images: int = 10_000, features: int = 512, classes: int = 10, epochs: int = 20
) -> list[Row]:
    """Train on ``images`` random rows, one Gaussian per class; the unit is one trained probe.

    One by one a call trains only two probes of the grid.
    """
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(images) % classes
    centers = torch.randn(classes, features, generator=generator)
    x = torch.randn(images, features + 1, generator=generator) * 4
    x[:, :-1] += centers[y]
    x[:, -1] = 1  # the bias column
    x, y = x.to(plan.device), y.to(plan.device)
    pairs = list(product(RATES, DECAYS))
    rows, few = torch.arange(images, device=plan.device), pairs[::8]

    def one_pass() -> Callable[[], object]:
        return lambda: fit(x, y, rows, classes, pairs, epochs, BATCH, 0)

    def one_by_one() -> Callable[[], object]:
        return lambda: [fit(x, y, rows, classes, [each], epochs, BATCH, 0) for each in few]

    engines = [
        Engine("the grid in one pass", "ours", len(pairs), one_pass),
        Engine("one by one", "peer", len(few), one_by_one, "the same code"),
        limits.products(2 * epochs * (images // BATCH), BATCH, features + 1, len(pairs) * classes,
                        plan.device, len(pairs)),
    ]  # fmt: skip
    case = f"{len(pairs)} probes, {images:,} x {features}, {classes} classes, {epochs} epochs"
    return compare("probe", case, "probes", engines, 1, plan.repeats)
