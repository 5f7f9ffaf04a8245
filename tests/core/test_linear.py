"""Products of matrices: torch's own in float64, for every layout that the probes give."""

import pytest
import torch
from torch import Tensor

from fastproj.core.linear import linear, pack


def rows(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (64, 513, 160), (37, 3276, 512)])
def test_a_product_is_that_of_float64(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b = rows(m, k, 0), rows(n, k, 1)
    expected = a.double() @ b.double().T
    exact = {"rtol": 1e-5, "atol": 1e-6 * k}
    for left in (a, a.T.contiguous().T):
        for right in (b, b.T.contiguous().T):
            torch.testing.assert_close(linear(left, right).double(), expected, **exact)
    torch.testing.assert_close(linear(a.double(), b.double()), expected)


def test_a_product_of_a_part_of_a_larger_matrix() -> None:
    a, b = rows(40, 64, 2), rows(50, 96, 3)
    found = linear(a[5:9, :32], b[::2, 64:])
    expected = a[5:9, :32].double() @ b[::2, 64:].double().T
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_rows_give_no_rows() -> None:
    assert linear(rows(0, 8, 0), rows(3, 8, 0)).shape == (0, 3)


def test_a_product_of_bfloat16_is_rounded_once() -> None:
    a, b = rows(70, 512, 6).bfloat16(), rows(300, 512, 7).bfloat16()
    expected = a.double() @ b.double().T
    for weight in (b, pack(b)):
        found = linear(a, weight)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_packed_matrix_gives_the_same_product(kind: torch.dtype) -> None:
    a, b = rows(160, 512, 4).to(kind), rows(300, 512, 5).to(kind)
    for weight in (b, b.T.contiguous().T, b[::3]):
        torch.testing.assert_close(linear(a, pack(weight)), linear(a, weight))
