"""NT-Xent in depth. All losses: test_losses_values.py and test_losses_contract.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastproj.core.errors import InputError
from fastproj.objective.losses import normalize, nt_xent

TAU = 0.2


def two_views(batch, width, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, width, generator=generator, dtype=dtype).unbind()


def loop(z1, z2, temperature):
    """SimCLR's equation 1 and algorithm 1 as they stand in the paper, in float64 loops."""
    views = [row for pair in zip(z1.tolist(), z2.tolist(), strict=True) for row in pair]
    n = len(views) // 2  # views 2k and 2k + 1 are of one image, as in the paper

    def s(i, j):
        a, b = np.array(views[i]), np.array(views[j])
        return a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b))

    def ell(i, j):
        others = sum(math.exp(s(i, k) / temperature) for k in range(2 * n) if k != i)
        return -math.log(math.exp(s(i, j) / temperature) / others)

    return sum(ell(2 * k, 2 * k + 1) + ell(2 * k + 1, 2 * k) for k in range(n)) / (2 * n)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 6),
    width=st.integers(1, 8),
    temperature=st.sampled_from([0.05, 0.2, 0.5, 1.0, 3.0]),
    seed=st.integers(0, 299),  # 339 draws a row below the floor of ``normalize``
)
def test_equals_the_paper_in_loops(batch, width, temperature, seed):
    z1, z2 = two_views(batch, width, seed)
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(
        loop(z1, z2, temperature), rel=1e-9, abs=1e-12
    )
    in_single = nt_xent(z1.float(), z2.float(), temperature)
    assert in_single.item() == pytest.approx(loop(z1, z2, temperature), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_gradient_is_the_finite_difference(temperature):
    z1, z2 = (z.requires_grad_() for z in two_views(4, 5))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, temperature), (z1, z2))


def test_known_values():
    same = torch.ones(5, 3)
    assert nt_xent(same, same, TAU).item() == pytest.approx(math.log(9))
    apart = torch.eye(5)
    wanted = math.log1p(8 * math.exp(-1 / TAU))
    assert nt_xent(apart, apart, TAU).item() == pytest.approx(wanted, rel=1e-5)
    assert nt_xent(same[:1], -same[:1], TAU).item() == 0  # one image: nothing to tell it from


def test_only_directions_and_pairs_matter():
    z1, z2 = two_views(6, 4)
    loss = nt_xent(z1, z2, TAU)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(nt_xent(z1[order], z2[order], TAU), loss)
    torch.testing.assert_close(nt_xent(z2, z1, TAU), loss)
    lengths = torch.linspace(0.01, 100, 6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(nt_xent(z1 * lengths, z2 * 7, TAU), loss)
    rotation = torch.linalg.qr(two_views(4, 4)[0]).Q
    torch.testing.assert_close(nt_xent(z1 @ rotation, z2 @ rotation, TAU), loss)
    assert abs(nt_xent(z1[order], z2, TAU) - loss) > 1e-3  # other pairs, another loss


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_lifted_to_float32(dtype):
    z1, z2 = (z.to(dtype) for z in two_views(64, 32))
    loss = nt_xent(z1, z2, 0.05)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, nt_xent(z1.float(), z2.float(), 0.05))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    z1, z2 = two_views(64, 32, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        inside = nt_xent(z1, z2, 0.05)
    assert torch.equal(inside, nt_xent(z1, z2, 0.05))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_at_low_temperature_with_long_rows(dtype):
    """Row norms beyond float16's 65,504, and exp(1/0.05) summed over 512 views beyond it too."""
    z1, z2 = (z.mul(1e4).to(dtype).requires_grad_() for z in two_views(256, 128))
    loss = nt_xent(z1, z2, 0.05)
    loss.backward()
    assert loss.isfinite() and z1.grad.isfinite().all() and z2.grad.isfinite().all()


@pytest.mark.gpu
def test_the_gpu_agrees_and_is_not_waited_for():
    z1, z2 = two_views(64, 32)
    on_gpu = [z.half().cuda().requires_grad_() for z in (z1, z2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.float16):
            loss = nt_xent(*on_gpu, 0.05)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.item() == pytest.approx(nt_xent(z1.half(), z2.half(), 0.05).item(), rel=1e-4)


def test_rows_of_zeros_stay_harmless():
    """A discretized projector gives them: finite loss, and a gradient no longer than the others'
    by orders of magnitude (dividing by a floor of 1e-12 would make it 1e9)."""
    z1, z2 = two_views(6, 4, dtype=torch.float32)
    z1[0], z1[3], z2[3] = 0, 0, 0
    z1.requires_grad_()
    loss = nt_xent(z1, z2, TAU)
    loss.backward()
    assert loss.isfinite()
    assert 0 < z1.grad[[0, 3]].norm() < 10
    assert torch.equal(normalize(z1.detach())[[0, 3]], torch.zeros(2, 4))


def test_views_that_do_not_match_are_an_input_error():
    with pytest.raises(InputError, match="two views"):
        nt_xent(torch.randn(4, 3), torch.randn(5, 3), TAU)
    with pytest.raises(InputError, match="two views"):
        nt_xent(torch.randn(4), torch.randn(4), TAU)
