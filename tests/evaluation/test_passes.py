"""Passes over the rows: autograd's in float64, whatever the type, packed or not."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from fastproj.evaluation.probes import passes
from fastproj.evaluation.probes.passes import Rows


@pytest.fixture
def problem(monkeypatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, labels and five heads, in several parts and groups of heads."""
    monkeypatch.setattr(passes, "ROWS", 64)
    monkeypatch.setattr(passes, "HEADS", 8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    y = torch.randint(4, (200,), generator=generator)
    return x, y, torch.randn(5, 4, 7, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_objective_and_gradient_are_autograds(problem, kind, many):
    x, y, heads = problem
    l2 = torch.tensor([1.0, 0.1, 0.01, 1e-3, 1e-5], dtype=torch.float64)
    leaf = heads.clone().requires_grad_()
    logits = torch.einsum("nd,scd->snc", x.double(), leaf[..., :-1]) + leaf[..., -1].unsqueeze(1)
    expected = torch.stack([cross_entropy(each, y) for each in logits])
    expected = expected + l2 / 2 * leaf[..., :-1].square().sum((1, 2))
    expected.sum().backward()
    value, gradient, away = Rows(x, y, many).evaluate(heads.to(kind), l2)
    near = {"rtol": 1e-5, "atol": 1e-6} if kind == torch.float32 else {}
    torch.testing.assert_close(value, expected.detach(), **near)
    torch.testing.assert_close(gradient.double(), leaf.grad, **near)
    slopes, off = leaf.grad[..., :-1].square().sum((1, 2)), leaf.grad[..., -1].square()
    about = slopes / (2 * l2) + (off / (2 * torch.bincount(y) / 200)).sum(1)
    torch.testing.assert_close(away, about, **near)
    assert gradient.dtype == kind


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_mean_probabilities_and_their_covariance(problem, kind):
    x, y, heads = problem
    logits = torch.einsum("nd,scd->snc", x.double(), heads[..., :-1]) + heads[..., -1].unsqueeze(1)
    p = logits.softmax(2)
    mean, covariance = Rows(x, y).probabilities(heads.to(kind))
    near = {"rtol": 1e-5, "atol": 1e-7} if kind == torch.float32 else {}
    torch.testing.assert_close(mean, p.mean(1), **near)
    expected = p.mean(1).diag_embed() - torch.einsum("snc,snk->sck", p, p) / len(x)
    torch.testing.assert_close(covariance, expected, **near)


def test_rows_too_many_to_pack_give_the_same(problem, monkeypatch):
    x, y, heads = problem
    packed = Rows(x, y, many=True)
    monkeypatch.setattr(passes, "PACKED", 0)
    plain = Rows(x, y, many=True)
    assert packed.packed and not plain.packed
    l2 = torch.full((5,), 0.1, dtype=torch.float64)
    for one, other in zip(
        packed.evaluate(heads.float(), l2), plain.evaluate(heads.float(), l2), strict=True
    ):
        torch.testing.assert_close(one, other)
