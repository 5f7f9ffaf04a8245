"""Products with the inverse of the Hessian, or of its blocks, against dense matrices in float64."""

import pytest
import torch
from torch import Tensor

from fastproj.evaluation.probes import preconditioners, softmax
from fastproj.evaluation.probes.preconditioners import Blocks, Kronecker

STRENGTHS = torch.tensor([0.3, 1e-3], dtype=torch.float64)


def problem(rows: int, width: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standardized rows, labels of a noisy linear model, and a head (C, d+1)."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator)
    x = torch.randn(rows, width, generator=generator) @ mixing
    x = (x - x.mean(0)) / x.std(0, correction=0)
    head = torch.randn(classes, width + 1, generator=generator, dtype=torch.float64)
    logits = x.double() @ head[:, :-1].T + head[:, -1]
    noise = torch.rand(logits.shape, generator=generator).log_().neg_().log_().neg_()
    return x, (logits + noise).argmax(1), head / 2


def gradients(*shape: int) -> Tensor:
    """Random (S, C, d+1); they sum to 0 over the classes, as all of the cross-entropy do."""
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return gradient - gradient.mean(1, keepdim=True)


def hessian(x: Tensor, y: Tensor, head: Tensor) -> Tensor:
    """Of the mean cross-entropy, by autograd: (C, d+1, C, d+1)."""
    rows = torch.cat([x.double(), x.new_ones(len(x), 1)], 1)
    return torch.autograd.functional.hessian(
        lambda h: torch.nn.functional.cross_entropy(rows @ h.T, y), head
    )


def test_at_zero_it_is_the_hessian():
    x, y, head = problem(200, 5, 4)
    prior = torch.bincount(y, minlength=4).double() / len(y)
    head = torch.zeros_like(head)
    head[:, -1] = prior.log()
    dense = hessian(x, y, head).flatten(0, 1).flatten(1)
    gradient = gradients(2, 4, 6)
    found = Kronecker.at_zero(x, prior)(gradient, STRENGTHS)
    for strength, given, product in zip(STRENGTHS, gradient, found, strict=True):
        penalty = torch.full((4, 6), strength, dtype=torch.float64)
        penalty[:, -1] = 0
        expected = torch.linalg.pinv(dense + penalty.flatten().diag()) @ given.flatten()
        torch.testing.assert_close(product.flatten(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alone", [0, 1024])
def test_the_blocks_are_those_of_the_hessian(monkeypatch, alone):
    monkeypatch.setattr(preconditioners, "SAMPLED", 20_000)  # so that sampling is no error
    monkeypatch.setattr(preconditioners, "ALONE", alone)
    x, y, head = problem(300, 5, 4)
    dense = hessian(x, y, head)
    gradient = gradients(2, 4, 6)
    found = Blocks(x, head)(gradient, STRENGTHS)
    for strength, given, product in zip(STRENGTHS, gradient, found, strict=True):
        penalty = torch.eye(6, dtype=torch.float64) * strength
        penalty[-1] = 0
        expected = torch.stack(
            [torch.linalg.solve(dense[c, :, c] + penalty, given[c]) for c in range(4)]
        )
        expected -= expected.mean(0)
        torch.testing.assert_close(product, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("made", [Kronecker.at, Blocks])
def test_products_are_symmetric_and_go_downhill(made, kind):
    x, _, head = problem(400, 12, 6)
    head[0, -1] = -40  # a class that no row has
    inverse = made(x, head)
    first, second = gradients(2, 6, 13).to(kind).unsqueeze(1)
    first[..., -1], second[..., -1] = 0, 0  # that class's intercept has no curvature
    l2 = STRENGTHS[1:]
    one, two = (first * inverse(second, l2)).sum(), (second * inverse(first, l2)).sum()
    assert one.dtype == kind
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    assert (first * inverse(first, l2)).sum() > 0


def test_with_many_classes_blocks_save_half_of_the_passes(monkeypatch):
    x, y, _ = problem(4000, 24, 40)
    strengths = torch.tensor([1e-4, 1e-5], dtype=torch.float64)
    found = softmax.solve(x, y, 40, strengths)
    monkeypatch.setattr(preconditioners, "LARGEST", 0)
    without = softmax.solve(x, y, 40, strengths)
    assert (found.iterations < 0.5 * without.iterations).all()
    assert found.suboptimality.max() <= 1e-6 and without.suboptimality.max() <= 1e-6
    torch.testing.assert_close(found.objective, without.objective, rtol=1e-6, atol=0)
