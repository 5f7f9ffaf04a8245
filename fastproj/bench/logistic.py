"""Logistic regression along a path of strengths: ours, and scikit-learn's to the same objective."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastproj.bench import Engine, Plan, Row, compare, limits
from fastproj.core.machine import cores
from fastproj.evaluation.probes.common import decades
from fastproj.evaluation.probes.softmax import certify, solve

EXCESS = 1e-5  # of the objective, relative, that both may stop with
TOLERANCES = (1e-4, 1e-5, 1e-6, 1e-7)  # of scikit-learn, the loosest first


def run(
    plan: Plan,
    images: int = 50_000,
    held_out: int = 10_000,
    features: int = 512,
    classes: Sequence[int] = (10, 100),
    strengths: Sequence[float] = decades(-5),
) -> list[Row]:
    """Solve all strengths on ``images`` correlated rows; the unit is one solved strength.

    scikit-learn runs lbfgs in float32, each strength from the last one's solution, with the loosest
    of ``TOLERANCES`` that brings each objective within ``EXCESS`` of the optimum, on one thread or
    one per core, whichever took less. Ours are certified to lie within ``EXCESS`` too. The limit
    are the matrix products of our passes. Notes give the best strength's accuracy on ``held_out``
    other rows, and the largest difference between both libraries' accuracies at one strength.
    """
    rows = []
    for count in classes:
        x, y = (part.to(plan.device) for part in correlated(images + held_out, features, count))
        train, others = (x[:images], y[:images]), (x[images:], y[images:])
        order = torch.tensor(sorted(strengths, reverse=True), dtype=torch.float64)
        rows += _path(plan, train, others, count, order)
    return rows


def _path(
    plan: Plan,
    train: tuple[Tensor, Tensor],
    others: tuple[Tensor, Tensor],
    classes: int,
    strengths: Tensor,
) -> list[Row]:
    best = solve(*train, classes, strengths).objective
    found = solve(*train, classes, strengths, EXCESS)
    peer = ScikitLearn(train[0].cpu(), train[1].cpu(), strengths, best.cpu())
    count, passes = len(strengths), 2 * int(found.iterations.sum())
    images, features = train[0].shape
    engines = [
        Engine("all strengths together", "ours", count,
               lambda: lambda: solve(*train, classes, strengths, EXCESS)),
        Engine("scikit-learn", "peer", count, peer.prepare),
        limits.products(passes, images, features, classes, plan.device, count),
    ]  # fmt: skip
    case = f"{count} strengths, {images:,} x {features}, {classes} classes"
    ours, theirs, limit = compare("logistic", case, "strengths", engines, 0, plan.repeats)
    accuracy = _accuracy(found.heads, *others)
    bound = f"certified: {found.suboptimality.max():.0e} of the objective"
    ours = replace(ours, note=f"{bound}; {accuracy.max():.2f} % of {len(others[0]):,} others")
    if not theirs.missing:
        apart = (accuracy - _accuracy(peer.heads, *others)).abs().max()
        theirs = replace(
            theirs, note=f"{peer.how}; accuracies at most {apart:.2f} points from ours"
        )
    return [ours, theirs, limit]


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


class ScikitLearn:
    """scikit-learn's path on ``x`` and ``y``; ``best`` (S,) are the optima of ``strengths``.

    After ``prepare``, ``heads`` float64 (S, C, d+1) are its solutions and ``how`` says how it runs.
    """

    def __init__(self, x: Tensor, y: Tensor, strengths: Tensor, best: Tensor) -> None:
        self.x, self.y, self.strengths, self.best = x, y, strengths, best
        self.heads, self.how = torch.empty(0), ""

    def prepare(self) -> Callable[[], object]:
        """Choose the tolerance, then the threads."""
        import sklearn  # noqa: F401  # ImportError here: reported as missing

        for tolerance in TOLERANCES:
            found, seconds = self.solve(tolerance, 1, closely=True)
            if found is not None:
                break
        if found is None:
            raise AssertionError(f"scikit-learn does not come within {EXCESS:.0e} of the optimum")
        self.heads, threads = found, 1
        if cores() > 1 and self.solve(tolerance, cores())[1] < seconds:
            threads = cores()
        self.how = (
            f"LogisticRegression, lbfgs, warm start, tol {tolerance:.0e}, {threads} thread(s), "
            f"objective within {EXCESS:.0e}"
        )
        return lambda: self.solve(tolerance, threads)

    def solve(
        self, tolerance: float, threads: int, closely: bool = False
    ) -> tuple[Tensor | None, float]:
        """Heads and seconds of the path; with ``closely`` None where one ends too far away."""
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits

        inputs, target = self.x.numpy(), self.y.numpy()
        model = LogisticRegression(tol=tolerance, max_iter=10_000, warm_start=True)
        heads, seconds = [], 0.0
        for strength, best in zip(self.strengths, self.best, strict=True):
            model.C = 1 / (strength.item() * len(inputs))
            start = time.perf_counter()
            with warnings.catch_warnings(), threadpool_limits(threads):
                warnings.simplefilter("ignore")
                model.fit(inputs, target)
            seconds += time.perf_counter() - start
            parts = (torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_))
            heads.append(torch.cat([parts[0], parts[1].unsqueeze(1)], 1).double())
            if closely:
                _, value, _ = certify(self.x, self.y, heads[-1][None], strength[None])
                if value > best * (1 + EXCESS):
                    return None, seconds
        return torch.stack(heads), seconds


def _accuracy(heads: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Per cent of the rows that each head (S, C, d+1) classifies correctly, (S,)."""
    heads = heads.to(x)
    scores = heads[..., :-1] @ x.T + heads[..., -1:]
    return 100 * (scores.argmax(1) == y).double().mean(1)
