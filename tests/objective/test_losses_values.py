"""Every loss equals its paper's formula in loops, its finite differences, and lightly's."""

import math

import lightly.loss as peer
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss.swav_loss import sinkhorn as peer_sinkhorn

from fastproj.objective import losses

TAU = 0.2
EXACT = {"rtol": 1e-9, "atol": 1e-11}
PEER = {"rtol": 1e-5, "atol": 1e-6}


def rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def codes_like(scores, seed=5):
    return rows(2, *scores.shape[1:], seed=seed).softmax(-1)


# The formulas, in float64 loops over NumPy rows.


def unit(a):
    return a / math.sqrt(a @ a)


def cosine(a, b):
    return unit(a) @ unit(b)


def barlow_loop(z1, z2, off_diagonal, scale):
    """Equations 1 and 2: Pearson's correlation of feature i of view 1 and j of view 2."""
    n, d = z1.shape
    loss = 0.0
    for i in range(d):
        for j in range(d):
            a, b = z1[:, i] - sum(z1[:, i]) / n, z2[:, j] - sum(z2[:, j]) / n
            spread = math.sqrt((sum(a * a) / n + 1e-5) * (sum(b * b) / n + 1e-5))
            c = sum(a * b) / n / spread
            loss += (1 - c) ** 2 if i == j else off_diagonal * c**2
    return scale * loss


def byol_loop(p1, p2, t1, t2):
    """Equation 2: squared distances of unit vectors, both directions added."""

    def distance(p, t):
        gap = unit(p) - unit(t)
        return gap @ gap

    pairs = [*zip(p1, t2, strict=True), *zip(p2, t1, strict=True)]
    return sum(distance(p, t) for p, t in pairs) / len(p1)


def simsiam_loop(p1, p2, z1, z2):
    return sum(
        -0.5 * cosine(p1[i], z2[i]) - 0.5 * cosine(p2[i], z1[i]) for i in range(len(p1))
    ) / len(p1)


def info_nce_loop(queries, keys, queue, temperature):
    loss = 0.0
    for q, k in zip(queries, keys, strict=True):
        own = math.exp(cosine(q, k) / temperature)
        loss -= math.log(own / (own + sum(math.exp(cosine(q, n) / temperature) for n in queue)))
    return loss / len(queries)


def moco_v3_loop(q1, q2, k1, k2, temperature):
    """Algorithm 1: the negatives of a query are the other images' keys of the other view."""
    n, loss = len(q1), 0.0
    for queries, keys in ((q1, k2), (q2, k1)):
        for i in range(n):
            others = np.array([keys[j] for j in range(n) if j != i]).reshape(n - 1, -1)
            loss += info_nce_loop(queries[i : i + 1], keys[i : i + 1], others, temperature) / n
    return 2 * temperature * loss


def vicreg_loop(z1, z2, invariance, variance, covariance):
    """Equations 1 to 4 and 6; equation 5 over d, as in algorithm 1."""
    n, d = z1.shape
    loss = invariance * sum((z1[i, j] - z2[i, j]) ** 2 for i in range(n) for j in range(d)) / n / d
    for z in (z1, z2):
        for i in range(d):
            a = z[:, i] - sum(z[:, i]) / n
            loss += variance * max(0, 1 - math.sqrt(sum(a * a) / (n - 1) + 1e-4)) / d
            for j in range(d):
                b = z[:, j] - sum(z[:, j]) / n
                loss += covariance * (sum(a * b) / (n - 1)) ** 2 / d if i != j else 0
    return loss


def swav_loop(scores, codes, temperature):
    """Equation 2 for every crop and code that are not of one view."""
    crops, batch, _ = scores.shape
    loss = 0.0
    for i in range(2):
        for v in range(crops):
            for b in range(batch if v != i else 0):
                p = np.exp(scores[v, b] / temperature)
                p /= p.sum()
                loss -= sum(codes[i, b] * np.log(p)) / (2 * (crops - 1) * batch)
    return loss


def sinkhorn_loop(scores, epsilon, steps):
    """The authors' iteration on exp(scores / epsilon), prototypes first."""
    q = [[math.exp(s / epsilon) for s in row] for row in scores]
    n, k = len(q), len(q[0])
    for _ in range(steps):
        used = [sum(q[i][j] for i in range(n)) for j in range(k)]
        q = [[q[i][j] / used[j] / k for j in range(k)] for i in range(n)]
        q = [[x / sum(row) / n for x in row] for row in q]
    return np.array(q) * n


def sup_con_loop(views, labels, temperature):
    """Equation 2, L_out; i = (view, image)."""
    every = [(v, b) for v in range(views.shape[0]) for b in range(views.shape[1])]

    def similarity(i, j):
        return cosine(views[i], views[j]) / temperature

    loss = 0.0
    for i in every:
        denominator = sum(math.exp(similarity(i, a)) for a in every if a != i)
        positives = [
            p for p in every
            if p != i and (p[1] == i[1] or labels[p[1]] == labels[i[1]] != -1)
        ]  # fmt: skip
        terms = [math.log(math.exp(similarity(i, p)) / denominator) for p in positives]
        loss -= sum(terms) / len(positives) / len(every)
    return loss


def agrees(ours, loop, tensors, *numbers):
    expected = loop(*(x.numpy() for x in tensors), *numbers)
    exact = ours(*tensors, *numbers)
    assert exact.dtype == torch.float64
    np.testing.assert_allclose(exact.numpy(), expected, **EXACT)
    single = ours(*(x.float() if x.is_floating_point() else x for x in tensors), *numbers)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=2e-4, atol=2e-5)


sizes = given(
    batch=st.integers(2, 5),
    width=st.integers(1, 5),
    seed=st.integers(0, 299),  # 339 draws a row below the floor of ``normalize``
    temperature=st.sampled_from([0.1, 0.2, 1.0, 3.0]),
)
few = settings(max_examples=15, deadline=None)


@few
@sizes
def test_losses_of_rows_equal_their_formulas(batch, width, seed, temperature):
    a, b, c, d, queue = rows(5, batch, width, seed=seed)
    agrees(losses.byol, byol_loop, (a, b, c, d))
    agrees(losses.simsiam, simsiam_loop, (a, b, c, d))
    agrees(losses.info_nce, info_nce_loop, (a, b, queue), temperature)
    agrees(losses.moco_v3, moco_v3_loop, (a, b, c, d), temperature)


@few
@sizes
def test_losses_of_features_equal_their_formulas(batch, width, seed, temperature):
    z1, z2 = rows(2, batch, width, seed=seed) * temperature  # here a spread about the hinge
    z1 = z1 + 3
    agrees(losses.barlow_twins, barlow_loop, (z1, z2), 0.3, 0.7)
    agrees(losses.vicreg, vicreg_loop, (z1, z2), 2.5, 7.0, 0.4)


@few
@sizes
def test_losses_of_crops_equal_their_formulas(batch, width, seed, temperature):
    for crops in (2, 3, 5):
        views = rows(crops, batch, width, seed=seed)
        labels = torch.randint(-1, 3, (batch,), generator=torch.Generator().manual_seed(seed))
        agrees(losses.sup_con, sup_con_loop, (views, labels), temperature)
        agrees(losses.swav, swav_loop, (views, codes_like(views)), temperature)


@few
@given(
    count=st.integers(1, 7), prototypes=st.integers(1, 5), steps=st.integers(1, 5),
    epsilon=st.sampled_from([0.05, 0.5]), seed=st.integers(0, 299),
)  # fmt: skip
def test_sinkhorn_equals_its_iteration(count, prototypes, steps, epsilon, seed):
    scores = rows(count, prototypes, seed=seed).tanh()
    agrees(losses.sinkhorn, sinkhorn_loop, (scores,), epsilon, steps)


def test_gradients_are_finite_differences():
    z1, z2, t1, t2 = rows(4, 4, 3)
    views, labels = rows(3, 4, 3, seed=1), torch.tensor([0, -1, 0, -1])
    codes = codes_like(views)
    functions = {
        "barlow_twins": (lambda a, b: losses.barlow_twins(a, b, 0.3, 0.7), (z1, z2)),
        "vicreg": (lambda a, b: losses.vicreg(a, b, 2.0, 3.0, 0.5), (z1, z2)),
        "byol": (lambda a, b: losses.byol(a, b, t1, t2), (z1, z2)),
        "simsiam": (lambda a, b: losses.simsiam(a, b, t1, t2), (z1, z2)),
        "info_nce": (lambda a: losses.info_nce(a, t1, t2, TAU), (z1,)),
        "moco_v3": (lambda a, b: losses.moco_v3(a, b, t1, t2, TAU), (z1, z2)),
        "swav": (lambda x: losses.swav(x, codes, TAU), (views,)),
        "sup_con": (lambda x: losses.sup_con(x, labels, TAU), (views,)),
    }
    for name, (function, inputs) in functions.items():
        inputs = tuple(x.clone().requires_grad_() for x in inputs)
        assert torch.autograd.gradcheck(function, inputs), name


# The peer. Its parameters are matched, in float64, with gradients.


def same(ours, theirs, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    values = [f(*inputs).squeeze() for f in (ours, theirs)]
    torch.testing.assert_close(*values, **PEER)
    torch.testing.assert_close(*(torch.autograd.grad(v, inputs) for v in values), **PEER)


@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 3, 20)])
def test_lightly_agrees_on_two_views(shape):
    z1, z2 = rows(*shape)
    same(lambda a, b: losses.nt_xent(a, b, TAU), peer.NTXentLoss(TAU), z1, z2)
    # Both standardize with BatchNorm's eps of 1e-5; lightly has no scale.
    same(
        lambda a, b: losses.barlow_twins(a, b, 0.0051, 1.0), peer.BarlowTwinsLoss(0.0051),
        z1 + 2, 3 * z2,
    )  # fmt: skip
    # lightly halves the hinge of each view, as the authors' code does; the paper's equation 6 and
    # solo-learn add them up. Both: variance unbiased, eps 1e-4.
    same(
        lambda a, b: losses.vicreg(a, b, 25.0, 12.5, 1.0), peer.VICRegLoss(25.0, 25.0, 1.0),
        0.7 * z1, 0.9 * z2,
    )  # fmt: skip


def test_lightly_agrees_on_predicted_targets():
    p1, p2, t1, t2 = rows(4, 6, 5)
    cosine = peer.NegativeCosineSimilarity()
    same(
        lambda a, b: losses.byol(a, b, t1, t2),
        lambda a, b: 4 + 2 * (cosine(a, t2) + cosine(b, t1)), p1, p2,
    )  # fmt: skip
    same(
        lambda a, b: losses.simsiam(a, b, t1, t2),
        lambda a, b: (cosine(a, t2) + cosine(b, t1)) / 2, p1, p2,
    )  # fmt: skip


def test_lightly_agrees_on_a_queue():
    queries, keys = rows(2, 6, 5)
    queue = losses.normalize(rows(9, 5, seed=2))

    def theirs(q):
        criterion = peer.NTXentLoss(TAU, memory_bank_size=(9, 5))
        criterion.memory_bank.bank = queue.clone()
        return criterion(q, keys)

    same(lambda q: losses.info_nce(q, keys, queue, TAU), theirs, queries)


@pytest.mark.parametrize("steps", [1, 3])
def test_lightly_agrees_on_assignments_and_their_prediction(steps):
    scores = rows(5, 8, 6).tanh()  # two full crops and three small ones
    codes = torch.stack([losses.sinkhorn(s, 0.05, steps) for s in scores[:2]])
    for ours, full in zip(codes, scores, strict=False):
        torch.testing.assert_close(ours, peer_sinkhorn(full, steps, 0.05), **PEER)
    criterion = peer.SwaVLoss(0.1, sinkhorn_iterations=steps, sinkhorn_epsilon=0.05)
    same(
        lambda x: losses.swav(x, codes, 0.1), lambda x: criterion(list(x[:2]), list(x[2:])), scores
    )


# Known values and properties.


def test_barlow_twins_knows_the_identity():
    z = torch.linalg.qr(rows(8, 3) - rows(8, 3).mean(0)).Q  # centered columns at right angles
    near = {"rel": 1e-3, "abs": 1e-3}
    assert losses.barlow_twins(z, z, 1.0, 1.0).item() == pytest.approx(0, abs=1e-3)
    assert losses.barlow_twins(z, -z, 1.0, 0.1).item() == pytest.approx(0.1 * 3 * 4, **near)
    repeated = z[:, :1].expand(-1, 3)  # C is all ones: six off the diagonal
    assert losses.barlow_twins(repeated, repeated, 0.5, 2.0).item() == pytest.approx(6.0, **near)


def test_barlow_twins_ignores_each_features_place_and_size():
    z1, z2 = rows(2, 9, 4)
    size = torch.tensor([0.5, -3.0, 20.0, 100.0], dtype=torch.float64)  # -3: alike in both views
    loss = losses.barlow_twins(z1, z2, 0.5, 1.0)
    moved = losses.barlow_twins(z1 * size + 7, z2 * size - 5, 0.5, 1.0)
    torch.testing.assert_close(moved, loss, rtol=1e-4, atol=0)  # the eps of 1e-5
    torch.testing.assert_close(losses.barlow_twins(z2, z1, 0.5, 1.0), loss)


def test_barlow_twins_of_features_far_from_zero():
    """The variance is a mean of squares, not the difference of two large numbers."""
    z1, z2 = rows(2, 64, 4)
    far = losses.barlow_twins((z1 + 1000).float(), (z2 - 1000).float(), 0.5, 1.0)
    assert far.item() == pytest.approx(losses.barlow_twins(z1, z2, 0.5, 1.0).item(), rel=1e-3)


def test_vicreg_terms():
    collapsed = torch.ones(6, 4, dtype=torch.float64)
    assert losses.vicreg(collapsed, collapsed, 1.0, 1.0, 1.0).item() == pytest.approx(2 * 0.99)
    assert losses.vicreg(collapsed, collapsed + 3, 2.0, 0.0, 0.0).item() == pytest.approx(18.0)
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]]).double()
    assert losses.vicreg(signs, signs, 9.0, 9.0, 9.0).item() == 0  # wide enough, uncorrelated
    repeated = signs[:, :1].expand(-1, 2)  # Cov = 4/3 everywhere
    wanted = 2 * 2 * (4 / 3) ** 2 / 2
    assert losses.vicreg(repeated, repeated, 0.0, 0.0, 1.0).item() == pytest.approx(wanted)


def test_byol_and_simsiam_end_points():
    z = rows(5, 4)
    assert losses.byol(z, 2 * z, 3 * z, z).item() == pytest.approx(0, abs=1e-12)
    assert losses.byol(z, z, -z, -z).item() == pytest.approx(8)
    assert losses.simsiam(z, 2 * z, 3 * z, z).item() == pytest.approx(-1)
    assert losses.simsiam(z, z, -z, -z).item() == pytest.approx(1)
    zero = torch.zeros(5, 4)
    assert losses.byol(zero, zero, zero, zero).item() == 4  # cosine 0
    p1, p2, t1, t2 = rows(4, 5, 3)
    torch.testing.assert_close(losses.byol(p2, p1, t2, t1), losses.byol(p1, p2, t1, t2))
    assert abs(losses.byol(p1, p2, t2, t1) - losses.byol(p1, p2, t1, t2)) > 1e-3  # views swap


def test_contrastive_known_values():
    same, eye = torch.ones(5, 5), torch.eye(5)
    assert losses.info_nce(same, same, same[:3], TAU).item() == pytest.approx(math.log(4))
    wanted = math.log1p(3 * math.exp(-1 / TAU))
    assert losses.info_nce(eye[:2], eye[:2], eye[2:], TAU).item() == pytest.approx(wanted, rel=1e-4)
    wanted = 2 * 2 * TAU * math.log(5)
    assert losses.moco_v3(same, same, same, same, TAU).item() == pytest.approx(wanted)
    wanted = 2 * 2 * TAU * math.log1p(4 * math.exp(-1 / TAU))
    assert losses.moco_v3(eye, eye, eye, eye, TAU).item() == pytest.approx(wanted, rel=1e-4)


def test_sup_con_between_no_labels_and_one():
    views = rows(2, 6, 4)
    for alone in (torch.full((6,), -1), torch.arange(6), torch.tensor([-1, 4, -2, 2, -2, -7])):
        torch.testing.assert_close(
            losses.sup_con(views, alone, TAU), losses.nt_xent(*views, TAU), **EXACT
        )
    together = losses.sup_con(views, torch.zeros(6, dtype=torch.int64), TAU)
    assert abs(together - losses.nt_xent(*views, TAU)) > 1e-3
    names = torch.tensor([0, 1, 0, 2, 1, 0])
    renamed = torch.tensor([7, 3, 7, 0, 3, 7])
    assert torch.equal(losses.sup_con(views, names, TAU), losses.sup_con(views, renamed, TAU))


def test_swav_of_sure_codes_is_a_cross_entropy():
    scores = rows(2, 6, 4)
    picks = torch.randint(4, (2, 6), generator=torch.Generator().manual_seed(0))
    codes = torch.nn.functional.one_hot(picks, 4).double()
    swapped = [torch.nn.functional.cross_entropy(scores[v] / TAU, picks[1 - v]) for v in (0, 1)]
    torch.testing.assert_close(losses.swav(scores, codes, TAU), sum(swapped) / 2)
    uniform = torch.full((2, 6, 4), 0.25)
    assert losses.swav(torch.zeros(5, 6, 4), uniform, TAU).item() == pytest.approx(math.log(4))


@few
@given(
    count=st.integers(1, 12), prototypes=st.integers(1, 8), seed=st.integers(0, 99),
    steps=st.integers(1, 4), shift=st.floats(-50, 50),
)  # fmt: skip
def test_sinkhorn_rows_sum_to_one_and_only_differences_matter(
    count, prototypes, seed, steps, shift
):
    scores = rows(count, prototypes, seed=seed)
    codes = losses.sinkhorn(scores, 0.3, steps)
    torch.testing.assert_close(codes.sum(1), torch.ones(count, dtype=torch.float64))
    assert (codes >= 0).all()
    torch.testing.assert_close(losses.sinkhorn(scores + shift, 0.3, steps), codes)
    preferred = torch.linspace(-9, 9, prototypes, dtype=torch.float64)  # by every row alike
    torch.testing.assert_close(losses.sinkhorn(scores + preferred, 0.3, steps), codes)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(losses.sinkhorn(scores[order], 0.3, steps), codes[order])


def test_sinkhorn_uses_every_prototype_alike():
    codes = losses.sinkhorn(rows(12, 4), 0.5, 200)
    torch.testing.assert_close(codes.sum(0), torch.full((4,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sinkhorn_neither_overflows_nor_loses_a_prototype(dtype):
    """exp(1000) is infinite, and exp(-1000) of a prototype far from every row is 0."""
    scores = rows(8, 4).mul(50).to(dtype)
    scores[:, 2] -= 50
    scores.requires_grad_()
    codes = losses.sinkhorn(scores, 0.05, 3)
    assert codes.dtype == torch.float32 and not codes.requires_grad
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(8))
