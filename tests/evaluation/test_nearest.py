"""The nearest rows, by bfloat16 and exact products, in C and in torch, against a stable sort."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastproj.core.errors import InputError
from fastproj.evaluation.probes import nearest
from fastproj.evaluation.probes.nearest import Bank, largest


def of_levels(levels: int, queries: int, rows: int) -> Tensor:
    """Similarities of few values, negative ones too: few levels have equals in every row."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(-levels, levels, (queries, rows), generator=generator).float()


@pytest.mark.parametrize("levels", [1, 3, 40, 10**6])
@pytest.mark.parametrize("k", [1, 5, 40, 96, 97])
def test_torch_takes_the_largest_and_of_equals_the_first(k: int, levels: int) -> None:
    similarity = of_levels(levels, 50, 97)
    values, columns = largest(similarity.clone(), k)
    expected = np.argsort(-similarity.numpy(), axis=1, kind="stable")[:, :k]
    assert np.array_equal(columns.numpy(), expected)
    assert torch.equal(similarity.gather(1, columns), values)


@pytest.mark.parametrize("levels", [1, 3, 40, 10**6])
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 97, 4000])
def test_c_takes_the_largest_and_of_equals_the_first(rows: int, levels: int) -> None:
    similarity, bank = of_levels(levels, 20, rows), Bank(torch.randn(rows, 3))
    expected = np.argsort(-similarity.numpy(), axis=1, kind="stable")
    for k in sorted({1, min(5, rows), rows // 2 or 1, rows}):
        values, columns, _ = bank._found(similarity, k)
        assert np.array_equal(columns.numpy(), expected[:, :k])
        assert torch.equal(similarity.gather(1, columns), values)


def clustered(count: int, width: int, spread: float) -> Tensor:
    """Rows around one direction: the smaller ``spread``, the closer are all similarities to 1."""
    generator = torch.Generator().manual_seed(width)
    return torch.ones(width) + spread * torch.randn(count, width, generator=generator)


@pytest.fixture(params=["C, bfloat16", "C", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a ``Bank`` made in this test computes, whatever the processor prefers."""
    quick = torch.bfloat16 if request.param == "C, bfloat16" else torch.float32
    monkeypatch.setattr(nearest, "choose_precision", lambda name, device: quick)
    if request.param == "torch":
        monkeypatch.setattr(nearest, "library", lambda: (_ for _ in ()).throw(InputError("none")))
    return request.param


@pytest.mark.parametrize("k", [1, 20, 300])
@pytest.mark.parametrize("spread", [100.0, 0.3, 0.01])
def test_every_way_finds_the_nearest(way: str, spread: float, k: int) -> None:
    rows = clustered(2000, 40, spread)
    queries = clustered(150, 40, spread) * torch.linspace(0.1, 50, 150).unsqueeze(1)
    bank = Bank(rows)
    assert (bank.native, bank.rounded is not None) == (way != "torch", way == "C, bfloat16")
    near, found = bank.nearest(queries, k)
    unit = [functional.normalize(x.double(), dim=1) for x in (queries, rows)]
    exact = unit[0] @ unit[1].T
    values = exact.sort(dim=1, descending=True).values[:, :k]
    torch.testing.assert_close(near.double(), values, rtol=0, atol=1e-6)
    torch.testing.assert_close(exact.gather(1, found), values, rtol=0, atol=1e-6)
    assert (near[:, 1:] <= near[:, :-1]).all() and all(len(set(r)) == k for r in found.tolist())


def test_of_equally_near_rows_the_first_come_first(way: str) -> None:
    rows = clustered(30, 33, 1.0).repeat(20, 1)
    near, found = Bank(rows).nearest(rows[:30], 45)
    assert torch.equal(found[:, :20], torch.arange(30).unsqueeze(1) + torch.arange(0, 600, 30))
    assert (near[:, :20] == near[:, :1]).all() and (found[:, 20:40].diff() == 30).all()
    nowhere = torch.zeros(1, 33)  # all rows are equally far from it
    assert Bank(rows).nearest(nowhere, 5)[1].tolist() == [[0, 1, 2, 3, 4]]


def test_only_queries_in_doubt_are_sought_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "choose_precision", lambda name, device: torch.bfloat16)
    sought: list[int] = []
    product = nearest.linear

    def counted(queries: Tensor, rows: Tensor) -> Tensor:
        if queries.dtype == torch.float32:
            sought.append(len(queries))
        return product(queries, rows)

    monkeypatch.setattr(nearest, "linear", counted)
    far, close = torch.randn(1000, 64), clustered(1000, 64, 1e-3)
    Bank(torch.cat([far, close])).nearest(torch.cat([far[:70], close[:30]]), 5)
    assert 30 <= sum(sought) < 45  # those among which bfloat16 cannot tell
