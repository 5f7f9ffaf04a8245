"""Linear probes: logistic regression along a path of strengths, and a grid of SGD heads."""

import warnings
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from fastproj.bench import Engine, Plan, Row, compare, limits
from fastproj.evaluation.probes.common import decades
from fastproj.evaluation.probes.sgd import fit
from fastproj.evaluation.probes.softmax import certify, solve

RATES, DECAYS = (0.01, 0.03, 0.1, 0.3), (1e-4, 1e-3, 1e-2, 1e-1)
BATCH = 256
EXCESS = 1e-5  # of the objective, relative, that both may stop with


def run(
    plan: Plan, images: int = 50_000, features: int = 512, classes: tuple[int, ...] = (10,)
) -> list[Row]:
    """The path with each number of classes, then the grid."""
    rows = []
    for count in classes:
        rows += path(plan, images, features, count)
    return rows + grid(plan, images // 5, features, classes[0])


def path(
    plan: Plan, images: int, features: int, classes: int, strengths: tuple[float, ...] = decades(-5)
) -> list[Row]:
    """Solve all strengths on ``images`` correlated rows; the unit is one solved strength.

    scikit-learn runs lbfgs in float32, each strength from the last one's solution, with the loosest
    tolerance of 1e-4, 1e-5, … that brings each objective within ``EXCESS`` of the optimum. The
    limit are the matrix products of our passes. Ours are certified to lie within ``EXCESS`` too.
    """
    x, y = correlated(images, features, classes)
    x, y = x.to(plan.device), y.to(plan.device)
    order = torch.tensor(sorted(strengths, reverse=True), dtype=torch.float64)
    best = solve(x, y, classes, order).objective
    found = solve(x, y, classes, order, EXCESS)
    engines = [
        Engine("all strengths together", "ours", len(order),
               lambda: lambda: solve(x, y, classes, order, EXCESS),
               f"certified: {found.suboptimality.max():.0e} of the objective"),
        _path_of_scikit_learn(x.cpu(), y.cpu(), order, best.cpu()),
        limits.products(2 * int(found.iterations.sum()), images, features, classes, plan.device,
                        len(order)),
    ]  # fmt: skip
    case = f"{len(order)} strengths, {images:,} x {features}, {classes} classes"
    return compare("probe", case, "probes", engines, 0, plan.repeats)


def correlated(images: int, features: int, classes: int) -> tuple[Tensor, Tensor]:
    """Standardized float32 rows and labels: ReLU features whose variances fall as 1 / rank.

    The labels are those of a linear model with noise.
    """
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, features + 1).rsqrt()
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    hidden = torch.randn(images, features, generator=generator) * scale
    x = (hidden @ mixing).relu_()
    std, mean = torch.std_mean(x, dim=0, correction=0)
    x.sub_(mean).div_(std)
    teacher = torch.randn(features, classes, generator=generator) * 2 / features**0.5
    noise = torch.rand(images, classes, generator=generator).log_().neg_().log_().neg_()
    return x, (x @ teacher + noise).argmax(1)


def _path_of_scikit_learn(x: Tensor, y: Tensor, strengths: Tensor, best: Tensor) -> Engine:
    def prepare() -> Callable[[], object]:
        from sklearn.linear_model import LogisticRegression

        inputs, target = x.numpy(), y.numpy()

        def solved(tolerance: float) -> list[Tensor]:
            model = LogisticRegression(tol=tolerance, max_iter=10_000, warm_start=True)
            heads = []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for strength in strengths.tolist():
                    model.C = 1 / (strength * len(x))
                    model.fit(inputs, target)
                    parts = (torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_))
                    heads.append(torch.cat([parts[0], parts[1].unsqueeze(1)], 1).double())
            return heads

        for tolerance in (1e-4, 1e-5, 1e-6, 1e-7):
            _, values, _ = certify(x, y, torch.stack(solved(tolerance)), strengths)
            if ((values - best) / best).max() <= EXCESS:
                break
        return lambda: solved(tolerance)

    note = f"LogisticRegression, lbfgs, warm start, objective within {EXCESS:.0e}"
    return Engine("scikit-learn", "peer", len(strengths), prepare, note)


def grid(plan: Plan, images: int, features: int, classes: int, epochs: int = 20) -> list[Row]:
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
