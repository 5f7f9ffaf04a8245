"""Oracles: the definitions in float64 loops, scipy's matrix functions, and finite differences."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastproj.core.errors import InputError
from fastproj.models.noise import SIGMA_RANGE, Noise
from fastproj.objective.penalties import (
    NEAR_ZERO,
    activation_sparsity,
    gaussian_kl,
    gram,
    group_sparsity,
    matrix_entropy,
    matrix_information,
    near_zero_share,
    proximal_step_,
)

ALPHAS = [0.5, 0.9, 1, 1.5, 2, 2.5, 3, 5]
few = settings(max_examples=25, deadline=None)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Matrix information


def unit_rows(x):
    return [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in x.tolist()]


def loop_gram(x):
    rows = unit_rows(x)
    return np.array([[sum(u * v for u, v in zip(a, b, strict=True)) for b in rows] for a in rows])


def scipy_entropy(k, alpha):
    """S_alpha by powers of matrices; of a singular one scipy has no other than whole powers."""
    a = k / len(k)
    spectrum = [v for v in scipy.linalg.eigvalsh(a) if v > 1e-12]
    if alpha == 1:
        return -sum(v * math.log(v) for v in spectrum)
    if alpha == int(alpha):
        trace = np.trace(np.linalg.matrix_power(a, int(alpha)))
    elif len(spectrum) == len(k):
        trace = np.trace(scipy.linalg.fractional_matrix_power(a, alpha)).real
    else:
        trace = sum(v**alpha for v in spectrum)
    return math.log(trace) / (1 - alpha)


def scipy_information(h, z, alpha):
    one, other = loop_gram(h), loop_gram(z)
    joint = scipy_entropy(one * other, alpha)
    return scipy_entropy(one, alpha) + scipy_entropy(other, alpha) - joint


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("width", [2, 5, 12], ids=["rank 2", "rank 5", "full rank"])
def test_entropy_equals_scipys_matrix_functions(alpha, width):
    rows = draw(8, width)
    wanted = scipy_entropy(loop_gram(rows), alpha)
    assert matrix_entropy(gram(rows), alpha).item() == pytest.approx(wanted, abs=1e-10)
    single = matrix_entropy(gram(rows.float()), alpha)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(wanted, abs=1e-4)


@few
@given(
    alpha=st.sampled_from(ALPHAS),
    n=st.integers(1, 9),
    widths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 999),
)
def test_information_equals_its_definition(alpha, n, widths, seed):
    h, z = draw(n, widths[0], seed=seed), draw(n, widths[1], seed=seed + 1000)
    assert matrix_information(h, z, alpha).item() == pytest.approx(
        scipy_information(h, z, alpha), abs=1e-8
    )


@few
@given(n=st.integers(1, 9), seed=st.integers(0, 999))
def test_order_two_is_the_closed_form(n, seed):
    """And the closed form, the trace of a matrix product and the eigenvalues agree."""
    h, z = draw(n, 3, seed=seed), draw(n, 4, seed=seed + 1000)
    a, b = loop_gram(h) ** 2, loop_gram(z) ** 2
    closed = math.log((a * b).mean() / (a.mean() * b.mean()))
    assert matrix_information(h, z, 2).item() == pytest.approx(closed, abs=1e-12)
    near = matrix_information(h, z, 2 + 1e-9).item()  # takes the way over eigenvalues
    assert near == pytest.approx(closed, abs=1e-7)


@pytest.mark.parametrize("step", [1e-3, -1e-3])
def test_order_near_one_tends_to_von_neumann(step):
    h, z = draw(9, 4), draw(9, 3, seed=1)
    at_one = matrix_information(h, z, 1).item()
    one, half = (matrix_information(h, z, 1 + s).item() - at_one for s in (step, step / 2))
    assert 0 < abs(one) < 1e-2
    assert one == pytest.approx(2 * half, rel=1e-2)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_known_entropies(alpha):
    """All alike: 0. All orthogonal: log n. Two groups of two thirds and one third: by hand."""
    assert matrix_entropy(torch.ones(6, 6), alpha).item() == pytest.approx(0, abs=1e-5)
    assert matrix_entropy(torch.eye(6), alpha).item() == pytest.approx(math.log(6), rel=1e-5)
    groups = torch.block_diag(torch.ones(4, 4), torch.ones(2, 2)).double()
    shares = np.array([2 / 3, 1 / 3])
    wanted = (
        -(shares * np.log(shares)).sum()
        if alpha == 1
        else math.log((shares**alpha).sum()) / (1 - alpha)
    )
    assert matrix_entropy(groups, alpha).item() == pytest.approx(wanted)


def test_a_large_order_does_not_underflow():
    """Min-entropy: the limit is -log of the largest eigenvalue; (1/512)^60 is no float32."""
    assert matrix_entropy(torch.eye(512), 60).item() == pytest.approx(math.log(512), rel=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1, 2, 3])
def test_information_of_independent_copies_and_of_one(alpha):
    labels = torch.eye(3, dtype=torch.float64).repeat(4, 1)  # 12 views in 3 groups of 4
    others = torch.eye(2, dtype=torch.float64).repeat_interleave(6, 0)  # independent of them
    assert matrix_information(labels, others, alpha).item() == pytest.approx(0, abs=1e-9)
    assert matrix_information(labels, labels, alpha).item() == pytest.approx(math.log(3))
    constant = torch.ones(12, 4, dtype=torch.float64)
    assert matrix_information(labels, constant, alpha).item() == pytest.approx(0, abs=1e-9)


@few
@given(alpha=st.sampled_from([0.5, 1, 2, 3]), n=st.integers(2, 9), seed=st.integers(0, 999))
def test_order_length_and_rotation_of_rows_change_nothing(alpha, n, seed):
    h, z = draw(n, 4, seed=seed), draw(n, 3, seed=seed + 1000)
    wanted = matrix_information(h, z, alpha).item()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(draw(4, 4, seed=seed)).Q
    for one, other in (
        (h[order], z[order]),
        (z, h),
        (h * torch.linspace(0.1, 100, n)[:, None], z * 7),
        (h @ rotation, z),
    ):
        assert matrix_information(one, other, alpha).item() == pytest.approx(wanted, abs=1e-8)


def test_which_rows_belong_together_matters():
    h, z = draw(9, 2), draw(9, 2, seed=1)
    assert abs(matrix_information(h, z.roll(1, 0), 2) - matrix_information(h, z, 2)) > 1e-3


@pytest.mark.parametrize("alpha", [0.5, 1, 1.5, 2, 3])
@pytest.mark.parametrize("widths", [(2, 3), (9, 8)], ids=["rank deficient", "full rank"])
def test_information_gradient_is_the_finite_difference(alpha, widths):
    """Rank deficient: 7 rows of width 2 and 3 give a joint Gram matrix of rank 6."""
    pair = [draw(7, width, seed=width).requires_grad_() for width in widths]
    assert torch.autograd.gradcheck(lambda h, z: matrix_information(h, z, alpha), pair)


@pytest.mark.parametrize("alpha", [0.5, 1, 1.5, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_finite_where_eigenvalues_are_equal(alpha, dtype):
    """Orthogonal groups of equal rows: eigenvalues 1/3 three times and 0 nine times. By symmetry
    a row's gradient is along the row, which normalizing it takes away: nothing may be left."""
    h = torch.eye(3, dtype=dtype).repeat(4, 1).requires_grad_()
    z = torch.eye(4, dtype=dtype).repeat(3, 1).requires_grad_()
    matrix_information(h, z, alpha).backward()
    for x in (h, z):
        assert x.grad.isfinite().all()
        assert (x.grad * x.detach()).abs().max() < 1e-5
    noisy = draw(12, 2, dtype=dtype).requires_grad_()
    matrix_information(noisy, h.detach(), alpha).backward()
    assert noisy.grad.isfinite().all() and noisy.grad.norm() > 1e-4


@pytest.mark.parametrize("alpha", [0.5, 1, 2, 3])
def test_single_precision_gradient_of_a_real_batch(alpha):
    """512 views of width 64: rounding errors of 448 eigenvalues of zero must not be amplified."""
    h, z = draw(512, 64), draw(512, 16, seed=1)
    double = [x.clone().requires_grad_() for x in (h, z)]
    single = [x.float().requires_grad_() for x in (h, z)]
    matrix_information(*double, alpha).backward()
    matrix_information(*single, alpha).backward()
    for one, other in zip(single, double, strict=True):
        error = (one.grad - other.grad).norm() / other.grad.norm()
        assert error < 2e-3


@pytest.mark.parametrize("alpha", [0.5, 1, 2, 3])
def test_rows_of_zeros_are_harmless(alpha):
    """A discretized projector gives them; all of them zero is its collapse."""
    h, z = draw(8, 4, dtype=torch.float32), draw(8, 3, dtype=torch.float32)
    for zeros in (slice(0, 2), slice(0, 8)):
        sparse = z.clone()
        sparse[zeros] = 0
        pair = [h.clone().requires_grad_(), sparse.requires_grad_()]
        value = matrix_information(*pair, alpha)
        value.backward()
        assert value.isfinite() and all(x.grad.isfinite().all() for x in pair)
        assert all(x.grad.norm() < 100 for x in pair)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1, 2])
def test_half_precision_is_lifted_and_autocast_changes_nothing(dtype, alpha):
    h, z = (x.to(dtype) for x in (draw(32, 16), draw(32, 8, seed=1)))
    wanted = matrix_information(h.float(), z.float(), alpha)
    assert wanted.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(matrix_information(h, z, alpha), wanted)
        assert torch.equal(matrix_information(h.float(), z.float(), alpha), wanted)
        mean_1, mean_2 = h[:, :8], z
        kl = gaussian_kl(mean_1, 0.5, mean_2, 2.0)
        assert torch.equal(kl, gaussian_kl(mean_1.float(), 0.5, mean_2.float(), 2.0))
        assert activation_sparsity(h, True).dtype == torch.float32
        assert group_sparsity(h, "rows", True).dtype == torch.float32


@pytest.mark.slow
def test_it_is_compiled_to_the_same_number():
    """The whole of it, as a graph without breaks; a matrix entropy may break at eigenvalues."""
    h, z = (x.requires_grad_() for x in (draw(8, 4), draw(8, 3, seed=1)))
    compiled = torch.compile(matrix_information, backend="aot_eager", fullgraph=True)
    got, wanted = compiled(h, z, 2.0), matrix_information(h, z, 2.0)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, h), torch.autograd.grad(wanted, h))
    compiled = torch.compile(matrix_information, backend="aot_eager")
    torch.testing.assert_close(compiled(h, z, 1.5), matrix_information(h, z, 1.5))


@pytest.mark.gpu
def test_the_gpu_agrees_and_is_not_waited_for():
    h, z = draw(64, 16, dtype=torch.float32), draw(64, 8, seed=1, dtype=torch.float32)
    weight, seen = z.cuda(), [h.cuda().requires_grad_(), z.cuda().requires_grad_()]
    noise = Noise(16, "learned", 0.1).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.float16):
            value = matrix_information(*seen, 2)
            kl = gaussian_kl(seen[0], 0.1, *noise(seen[0]))
            others = group_sparsity(weight, "rows", True) + activation_sparsity(weight, True)
        (value + kl + others).backward()
        proximal_step_(weight, "columns", 0.01)
        near_zero_share(weight, "columns")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.item() == pytest.approx(matrix_information(h, z, 2).item(), rel=1e-3)


def test_what_cannot_be_is_an_input_error():
    with pytest.raises(InputError, match="alpha above 0"):
        matrix_entropy(torch.eye(3), 0)
    with pytest.raises(InputError, match="alpha above 0"):
        matrix_entropy(torch.eye(3), math.inf)
    with pytest.raises(InputError, match=r"\(n, n\), not \(3, 2\)"):
        matrix_entropy(torch.ones(3, 2), 2)
    with pytest.raises(InputError, match="same views"):
        matrix_information(draw(3, 2), draw(4, 2), 2)
    with pytest.raises(InputError, match="diverged"):
        matrix_entropy(torch.full((3, 3), math.nan), 1)
    with pytest.raises(InputError, match="sparsehead.groups.*'units'"):
        group_sparsity(torch.eye(3), "units", True)
    with pytest.raises(InputError, match="means of equal shape"):
        gaussian_kl(draw(3, 2), 1.0, draw(3, 1), 1.0)
    with pytest.raises(InputError, match="superfluous.noise.*'none'"):
        Noise(3, "none", 0.1)
    with pytest.raises(InputError, match="superfluous.sigma"):
        Noise(3, "fixed", 0.0)


# SparseHead-style


def lengths(weight, groups):
    table = weight.tolist() if groups == "rows" else list(zip(*weight.tolist(), strict=True))
    return [math.sqrt(sum(v * v for v in group)) for group in table]


@few
@given(
    groups=st.sampled_from(["columns", "rows"]),
    units=st.integers(1, 6),
    width=st.integers(1, 6),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 999),
)
def test_group_sparsity(groups, units, width, scale, seed):
    weight = draw(units, width, seed=seed)
    norms = lengths(weight, groups)
    plain = sum(norms) / math.sqrt(len(norms))
    free = plain / math.sqrt(sum(v * v for v in norms))
    assert group_sparsity(weight, groups, False).item() == pytest.approx(plain)
    assert group_sparsity(weight, groups, True).item() == pytest.approx(free)
    assert group_sparsity(weight * scale, groups, False).item() == pytest.approx(plain * scale)
    assert group_sparsity(weight * scale, groups, True).item() == pytest.approx(free)
    assert 1 / math.sqrt(len(norms)) - 1e-12 <= free <= 1 + 1e-12


def test_the_bounds_of_the_scale_free_forms_are_reached():
    one = torch.zeros(3, 16)
    one[:, 4] = 2
    assert group_sparsity(one, "columns", True).item() == pytest.approx(1 / 4)
    assert group_sparsity(one, "rows", True).item() == pytest.approx(1)
    assert activation_sparsity(one, True).item() == pytest.approx(1 / 4)
    assert activation_sparsity(torch.ones(3, 16), True).item() == pytest.approx(1)


@few
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 8),
    scale=st.sampled_from([1e-2, 1.0, 50.0]),
    seed=st.integers(0, 999),
)
def test_activation_sparsity(rows, width, scale, seed):
    hidden = draw(rows, width, seed=seed)
    plain = sum(abs(v) for row in hidden.tolist() for v in row) / (rows * width)
    free = (
        sum(
            sum(abs(v) for v in row) / (math.sqrt(width) * math.sqrt(sum(v * v for v in row)))
            for row in hidden.tolist()
        )
        / rows
    )
    assert activation_sparsity(hidden, False).item() == pytest.approx(plain)
    assert activation_sparsity(hidden * scale, True).item() == pytest.approx(free)
    assert 1 / math.sqrt(width) - 1e-12 <= free <= 1 + 1e-12


@pytest.mark.parametrize("scale_free", [True, False])
def test_sparsity_gradients_are_the_finite_differences(scale_free):
    x = draw(4, 5).requires_grad_()
    for groups in ("columns", "rows"):
        assert torch.autograd.gradcheck(lambda w, g=groups: group_sparsity(w, g, scale_free), x)
    assert torch.autograd.gradcheck(lambda a: activation_sparsity(a, scale_free), x)


@pytest.mark.parametrize("scale_free", [True, False])
def test_groups_and_rows_of_zeros_are_harmless(scale_free):
    for zeros in ((slice(None), 1), (2, slice(None)), slice(None)):
        x = draw(4, 5, dtype=torch.float32)
        x[zeros] = 0
        for measure in (
            lambda w: group_sparsity(w, "columns", scale_free),
            lambda w: group_sparsity(w, "rows", scale_free),
            lambda a: activation_sparsity(a, scale_free),
        ):
            leaf = x.clone().requires_grad_()
            value = measure(leaf)
            value.backward()
            assert value.isfinite() and leaf.grad.isfinite().all()
            assert (leaf.grad[x == 0] == 0).all()
    assert group_sparsity(torch.zeros(3, 2), "rows", scale_free) == 0
    assert activation_sparsity(torch.zeros(3, 2), scale_free) == 0


def test_the_scale_free_form_selects_features():
    """Descent on it removes the weak columns, and not by shrinking the whole."""
    weight = (draw(6, 8) * torch.tensor([1.0] * 4 + [0.1] * 4)).requires_grad_()
    for _ in range(300):
        (gradient,) = torch.autograd.grad(group_sparsity(weight, "columns", True), weight)
        weight.data -= 0.05 * gradient
    norms = torch.linalg.vector_norm(weight.detach(), dim=0)
    assert norms[4:].max() < 0.05 < 1 < norms[:4].max()


@pytest.mark.parametrize("groups", ["columns", "rows"])
def test_proximal_step_is_the_argmin(groups):
    threshold = 1.3
    weight = draw(3, 4)
    before = weight.clone() if groups == "rows" else weight.T.clone()
    proximal_step_(weight, groups, threshold)
    after = weight if groups == "rows" else weight.T
    for w, v in zip(before.numpy(), after.numpy(), strict=True):

        def objective(u, w=w):
            return 0.5 * ((w - u) ** 2).sum() + threshold * math.sqrt((u**2).sum())

        # Powell's method needs no derivative, which is missing at 0.
        found = scipy.optimize.minimize(objective, w, method="Powell", tol=1e-12).x
        assert objective(v) <= objective(found) + 1e-12
        np.testing.assert_allclose(v, found, atol=1e-4)
        assert (v == 0).all() == (np.linalg.norm(w) <= threshold)
    assert 0 < sum((v == 0).all() for v in after.numpy()) < len(after)


@few
@given(
    groups=st.sampled_from(["columns", "rows"]),
    threshold=st.floats(0, 4),
    as_tensor=st.booleans(),
    seed=st.integers(0, 999),
)
def test_proximal_step_shortens_every_group(groups, threshold, as_tensor, seed):
    weight = torch.nn.Parameter(draw(5, 4, seed=seed))
    with torch.no_grad():
        weight[:, 2], weight[1] = 0, 0
    before = weight.detach().clone()
    proximal_step_(weight, groups, torch.tensor(threshold) if as_tensor else threshold)
    for old, new in zip(lengths(before, groups), lengths(weight, groups), strict=True):
        assert new == pytest.approx(max(0.0, old - threshold), abs=1e-6)
        assert old > threshold + 1e-6 or abs(old - threshold) < 1e-6 or new == 0
    assert weight.isfinite().all() and weight.requires_grad and weight.grad_fn is None
    if threshold == 0:
        assert torch.equal(weight.detach(), before)


def test_near_zero_share():
    weight = torch.diag(torch.tensor([3.0, 3 * NEAR_ZERO * 1.01, 3 * NEAR_ZERO * 0.99, 0.0]))
    assert near_zero_share(weight, "columns").item() == 0.5
    assert near_zero_share(weight, "rows").item() == 0.5
    wide = torch.ones(4, 8)
    wide[:, :6] = 0
    assert near_zero_share(wide, "columns").item() == 0.75
    assert near_zero_share(wide, "rows").item() == 0
    assert near_zero_share(torch.zeros(4, 8), "columns").item() == 1


# SuperInfo-style (MIB bound)


def loop_kl(mean_1, sigma_1, mean_2, sigma_2):
    total = 0.0
    for m1, s1, m2, s2 in zip(*(x.flatten().tolist() for x in (mean_1, sigma_1, mean_2, sigma_2)),
                              strict=True):  # fmt: skip
        total += 0.5 * (math.log(s2**2 / s1**2) + (s1**2 + (m1 - m2) ** 2) / s2**2 - 1)
    return total / mean_1.numel()


@few
@given(n=st.integers(1, 5), d=st.integers(1, 5), seed=st.integers(0, 999))
def test_kl_equals_the_formula_and_is_not_negative(n, d, seed):
    mean_1, mean_2, log_1, log_2 = draw(4, n, d, seed=seed).unbind()
    sigma_1, sigma_2 = log_1.exp(), log_2.exp()
    value = gaussian_kl(mean_1, sigma_1, mean_2, sigma_2).item()
    assert value == pytest.approx(loop_kl(mean_1, sigma_1, mean_2, sigma_2))
    assert value >= 0
    one, other = 0.7, 1.9
    wanted = loop_kl(mean_1, torch.full_like(mean_1, one), mean_2, torch.full_like(mean_1, other))
    assert gaussian_kl(mean_1, one, mean_2, other).item() == pytest.approx(wanted)
    scalars = torch.tensor(one).double(), torch.tensor(other).double()
    as_tensors = gaussian_kl(mean_1, scalars[0], mean_2, scalars[1])
    assert as_tensors.item() == pytest.approx(wanted, rel=1e-6)
    assert gaussian_kl(mean_1, sigma_1, mean_1, sigma_1).item() == 0
    assert gaussian_kl(mean_1.float(), 0.1, mean_1.float(), 0.1).item() == 0


def test_kl_equals_an_integral_of_the_densities():
    """KL of one pair of Gaussians by quadrature: from its definition, not from the formula."""
    m1, s1, m2, s2 = 0.3, 0.8, -0.4, 1.7
    x = np.linspace(-15, 15, 200_001)
    p, q = (np.exp(-((x - m) ** 2) / (2 * s * s)) / (s * math.sqrt(2 * math.pi))
            for m, s in ((m1, s1), (m2, s2)))  # fmt: skip
    integral = (p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300))).sum() * (x[1] - x[0])
    value = gaussian_kl(torch.full((1, 1), m1).double(), s1, torch.full((1, 1), m2).double(), s2)
    assert value.item() == pytest.approx(integral, rel=1e-6)


def test_kl_with_one_sigma_is_the_distance_both_ways():
    mean_1, mean_2 = draw(2, 6, 3).unbind()
    wanted = ((mean_1 - mean_2) ** 2).mean().item() / (2 * 0.3**2)
    assert gaussian_kl(mean_1, 0.3, mean_2, 0.3).item() == pytest.approx(wanted)
    assert gaussian_kl(mean_2, 0.3, mean_1, 0.3).item() == pytest.approx(wanted)


def test_kl_gradient_is_the_finite_difference():
    values = [*draw(2, 4, 3), *draw(2, 4, 3, seed=1).exp()]
    mean_1, mean_2, sigma_1, sigma_2 = (x.clone().requires_grad_() for x in values)
    assert torch.autograd.gradcheck(gaussian_kl, (mean_1, sigma_1, mean_2, sigma_2))


@pytest.mark.parametrize("kind", ["fixed", "learned"])
def test_noise_has_the_sigma_it_was_given(kind):
    noise, mean = Noise(16, kind, 0.3), draw(4000, 16, dtype=torch.float32)
    torch.manual_seed(0)
    sample, sigma = noise(mean)
    assert sigma.shape == ((4000, 16) if kind == "learned" else ())
    assert (sigma == sigma.new_tensor(0.3)).all()
    eps = (sample - mean) / 0.3
    assert eps.mean().item() == pytest.approx(0, abs=0.02)
    assert eps.std().item() == pytest.approx(1, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([eps[:, 0], eps[:, 1]]))[0, 1]) < 0.06
    assert not torch.equal(noise(mean)[0], sample)
    torch.manual_seed(0)
    assert torch.equal(noise(mean)[0], sample)  # the global generator, nothing else
    noise.eval()
    assert noise(mean)[0] is mean


def test_only_learned_noise_has_a_state():
    assert not Noise(4, "fixed", 0.1).state_dict()
    assert {p.shape for p in Noise(4, "learned", 0.1).parameters()} == {(4, 4), (4,)}


def test_learned_sigma_is_bounded_and_learns():
    noise = Noise(3, "learned", 0.2).double()
    mean = draw(5, 3).requires_grad_()
    _, sigma = noise(mean)
    sigma.sum().backward()
    assert noise.exponent.weight.grad.norm() > 1e-3 and noise.exponent.bias.grad.norm() > 1e-3
    with torch.no_grad():
        noise.exponent.weight.copy_(draw(3, 3, seed=1))
        noise.exponent.bias.copy_(torch.tensor([0.0, 100.0, -100.0]))
    _, sigma = noise(mean)
    exponent = [
        math.tanh(sum(w * m for w, m in zip(noise.exponent.weight[0].tolist(), row, strict=True)))
        for row in mean.tolist()
    ]
    wanted = [0.2 * SIGMA_RANGE**e for e in exponent]
    np.testing.assert_allclose(sigma[:, 0].tolist(), wanted, rtol=1e-6)
    np.testing.assert_allclose(sigma[:, 1].tolist(), 0.2 * SIGMA_RANGE, rtol=1e-6)
    np.testing.assert_allclose(sigma[:, 2].tolist(), 0.2 / SIGMA_RANGE, rtol=1e-6)
    (reached,) = torch.autograd.grad(sigma[:, 0].sum(), mean)
    assert reached.norm() > 1e-3  # sigma is a function of the view: the encoder learns of it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_keeps_the_dtype_of_the_features(dtype):
    mean = draw(4, 3).to(dtype)
    for kind in ("fixed", "learned"):
        with torch.autocast("cpu", dtype=dtype):
            sample, sigma = Noise(3, kind, 0.1)(mean)
        assert sample.dtype == dtype and sigma.dtype == torch.float32
