"""Penalties on encoder and projector, added to the objective.

They are the matrix information of features and projections, group sparsity of the projector, and
the superfluous information of one view beyond the other. They are computed in float32 even under
autocast (float64 stays float64) and use only this rank's rows. Matrix information therefore depends
on the world size (as in the authors' code); the others do not, as means over rows or functions of
weights.
"""

import math

import torch
from torch import Tensor

from fastproj.core.errors import InputError
from fastproj.objective.losses import in_float32, normalize

NEAR_ZERO = 0.01  # fraction of the largest group's norm that ``near_zero_share`` counts as zero


# Matrix information [arXiv 2503.00507; PKU-ML/Projector_Theory]


def gram(rows: Tensor) -> Tensor:
    """Cosines of all pairs of ``rows`` (n, d): (n, n), with a unit diagonal.

    A row of zeros gives zeros, also on the diagonal.
    """
    rows = normalize(rows)
    return rows @ rows.T


def entropy_of_squares(mean: Tensor, rows: int | Tensor) -> Tensor:
    """S₂ of a Gram matrix K from the ``mean`` of K's squared entries: -log mean, in nats.

    K is (rows, rows) with a unit diagonal, so S₂(K) = -log tr[(K/n)²] = -log mean(K²). A mean of 0
    (every row is zero) gives 2 log(rows).
    """
    return -mean.clamp(min=rows**-2).log()


@in_float32
def matrix_entropy(gram: Tensor, alpha: float) -> Tensor:
    """Rényi entropy of order ``alpha`` > 0 of the eigenvalues of a Gram matrix divided by its size.

    ``gram``: K (n, n), symmetric, positive semi-definite, with a unit diagonal. Returns, in nats,

        S_α(K) = log tr[(K/n)^α] / (1 - α),  and for α = 1 its limit -tr[(K/n) log(K/n)],

    von Neumann's entropy: between 0 (all rows alike) and log n (all orthogonal) [Giraldo et al.
    2015, arXiv 1211.2459, equation 7; arXiv 2503.00507 uses α = 2]. For α = 2 the trace is a sum
    of squares; other α need eigenvalues, for which a GPU syncs with the host. Near α = 1 rounding
    errors are divided by 1 - α, so use exactly 1. (Error of the matrix information and of its
    gradient in float32 for 512 rows of width 64 and 16: 2e-4 and 0.6 % at α = 0.999, 5e-7 and 2e-5
    at α = 1.)

    The gradient of tr f(K/n) is f'(K/n)/n. ``eigvalsh`` computes it as V f'(Λ) Vᵀ, without
    differences of eigenvalues, so equal eigenvalues are harmless. Eigenvalues below n·eps of the
    largest are rounding errors of zeros and contribute neither value nor gradient (f' is infinite
    there for α ≤ 1). The largest is at least 1/n, unless every row is zero, and is clamped to it.

    Raises ``InputError`` for an impossible ``alpha`` or shape, and if K has no eigenvalues because
    it is not finite.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise InputError(f"matrix_entropy needs a Gram matrix (n, n), not {tuple(gram.shape)}")
    if not 0 < alpha < math.inf:
        raise InputError(f"matrix_entropy needs alpha above 0 and finite, not {alpha}")
    n = len(gram)
    if alpha == 2:
        return entropy_of_squares(gram.square().mean(), n)
    try:
        spectrum = torch.linalg.eigvalsh(gram / n)
    except torch.linalg.LinAlgError as error:
        raise InputError(
            "no eigenvalues of the Gram matrix: the run diverged; lower --optim.lr, or set "
            "--train.precision float32"
        ) from error
    top = spectrum.detach()[-1].clamp(min=1 / n)
    kept = spectrum > n * torch.finfo(gram.dtype).eps * top
    if alpha == 1:
        shares = torch.where(kept, spectrum, 1.0)  # 1·log 1 = 0
        return -(shares * shares.log()).sum()
    # Divide by the largest: λ^α would underflow for a large α.
    powers = torch.where(kept, torch.where(kept, spectrum / top, 1.0) ** alpha, 0.0).sum()
    return (powers.clamp(min=1).log() + alpha * top.log()) / (1 - alpha)


@in_float32
def matrix_information(features: Tensor, projections: Tensor, alpha: float = 2.0) -> Tensor:
    """Matrix information of order ``alpha`` between ``features`` (N, d) and ``projections`` (N, o).

    Row i of both belongs to the same view; the caller concatenates the views. With K1 and K2 the
    Gram matrices of the rows at unit norm and ∘ the entrywise product,

        I_α = S_α(K1) + S_α(K2) - S_α(K1 ∘ K2)      (nats, see ``matrix_entropy``)

    [arXiv 2503.00507; PKU-ML/Projector_Theory, which takes α = 2]. For α = 2, with a and b the
    entrywise squares, it is log(mean(a·b) / (mean a · mean b)). It is no Shannon information: it
    can be negative and does not grow with every dependence.
    Both arguments get a gradient. Rows of zeros are harmless. Memory: a few N × N matrices.

    It uses this rank's rows only, as the authors' code does: the mean over two ranks differs from
    the value for all rows. Raises ``InputError`` for shapes that do not match.
    """
    if features.ndim != 2 or projections.ndim != 2 or len(features) != len(projections):
        raise InputError(
            "matrix_information needs features (N, d) and projections (N, o) of the same views, "
            f"not {tuple(features.shape)} and {tuple(projections.shape)}"
        )
    one, other = gram(features), gram(projections)
    return (
        matrix_entropy(one, alpha)
        + matrix_entropy(other, alpha)
        - matrix_entropy(one * other, alpha)
    )


# SparseHead-style: the paper proposes a sparse projection head [arXiv 2307.08913]. Its formula was
# not available to us, so these are the group lasso [Yuan and Lin 2006] and variants of ours.


def _norms(weight: Tensor, groups: str) -> Tensor:
    """L2 norms of the columns (one per feature) or rows (one per unit) of ``weight`` (units, d)."""
    if groups not in ("columns", "rows"):
        raise InputError(f"sparsehead.groups: a weight has columns and rows, no {groups!r}")
    return torch.linalg.vector_norm(weight, dim=0 if groups == "columns" else 1)


@in_float32
def group_sparsity(weight: Tensor, groups: str, scale_free: bool) -> Tensor:
    """Group lasso on the projector's first weight (units, d), SparseHead-style.

    ``groups``: ``columns`` (each feature's weights, so that features are selected) or ``rows``
    (units). With G groups w_j it is Σ_j ‖w_j‖₂ / √G or, if ``scale_free``,

        Σ_j ‖w_j‖₂ / (√G ‖W‖_F),  from 1/√G (one group is nonzero) to 1 (all norms are equal)

    [derived, after arXiv 2307.08913]. A smaller scale of the weight, which the next layer undoes or
    BatchNorm removes, lowers the first but not the second. Returns a scalar, 0 for a weight of
    zeros; groups of zeros get no gradient. Raises ``InputError`` for other ``groups``.
    """
    norms = _norms(weight, groups)
    total = norms.sum() / len(norms) ** 0.5
    if not scale_free:
        return total
    length = torch.linalg.vector_norm(weight)
    return total / torch.where(length == 0, 1.0, length)


@in_float32
def activation_sparsity(hidden: Tensor, scale_free: bool) -> Tensor:
    """Sparsity of hidden activations (N, w), SparseHead-style.

    The mean absolute activation or, if ``scale_free``, the mean over rows a of ‖a‖₁ / (√w ‖a‖₂),
    from 1/√w (one unit is active) to 1 (all are equal) [derived, after arXiv 2307.08913; the ratio
    in Hoyer 2004's measure]. Rows of zeros count as 0 and get no gradient.
    """
    if not scale_free:
        return hidden.abs().mean()
    return normalize(hidden).abs().sum(1).mean() / hidden.shape[1] ** 0.5


@torch.no_grad()
def proximal_step_(weight: Tensor, groups: str, threshold: float | Tensor) -> None:
    """Reduce every group's norm in ``weight`` (units, d) by ``threshold``, at most to 0, in place.

        w_j ← w_j · max(0, 1 - threshold / ‖w_j‖₂)

    minimizes ½‖v - w_j‖² + threshold·‖v‖ over v [Parikh and Boyd 2014, section 6.5.1]. After a
    plain gradient step of rate η, a threshold of ηλ makes it proximal gradient descent on
    λ Σ_j ‖w_j‖ (ηλ/√G: on λ·``group_sparsity``); after LARS, AdamW or momentum it is a heuristic.
    It gives exact zeros, which gradients do not.
    """
    norms = _norms(weight, groups)
    shrink = (norms - threshold).clamp(min=0) / torch.where(norms == 0, 1.0, norms)
    weight.mul_(shrink if groups == "columns" else shrink[:, None])


@torch.no_grad()
def near_zero_share(weight: Tensor, groups: str) -> Tensor:
    """Fraction of groups of ``weight`` (units, d) with at most ``NEAR_ZERO`` of the largest norm.

    A scalar in [0, 1], float32; 1 for a weight of zeros. It compares with the largest norm because
    the mean norm falls as groups vanish.
    """
    norms = _norms(weight, groups)
    return (norms <= NEAR_ZERO * norms.max()).float().mean()


# SuperInfo-style (MIB bound) [arXiv 2408.10292; Federici et al. 2020, arXiv 2002.07017]


@in_float32
def gaussian_kl(
    mean_1: Tensor, sigma_1: float | Tensor, mean_2: Tensor, sigma_2: float | Tensor
) -> Tensor:
    """KL(N(mean_1, sigma_1²) ‖ N(mean_2, sigma_2²)), averaged over rows *and dimensions*, in nats.

    Means: (N, d). Standard deviations: positive, one number or (N, d). In each coordinate

        ½ [log(σ2²/σ1²) + (σ1² + (μ1 - μ2)²)/σ2² - 1]

    If z1 is independent of v2 given v1, it bounds the superfluous information, which z1 has about
    its own view only: I(v1; z1 | v2) ≤ E KL(p(z1|v1) ‖ p(z2|v2)) [Federici et al. 2020, arXiv
    2002.07017, section 3.2]. SuperInfo [arXiv 2408.10292] penalizes this; its own bound was not
    available to us [derived]. With one fixed σ both directions equal mean((μ1 - μ2)²)/(2σ²). Use it
    on the encoder's outputs, not normalized. Raises ``InputError`` for means of unequal shapes.
    """
    if mean_1.shape != mean_2.shape:
        raise InputError(
            "gaussian_kl needs means of equal shape, not "
            f"{tuple(mean_1.shape)} and {tuple(mean_2.shape)}"
        )
    # A number becomes a tensor created on the device, which needs no copy and no sync.
    one, other = (
        sigma if isinstance(sigma, Tensor) else mean_1.new_full((), sigma)
        for sigma in (sigma_1, sigma_2)
    )
    ratio = one / other
    distance = (mean_1 - mean_2) / other
    return (ratio.square() + distance.square() - 1 - 2 * ratio.log()).mean() / 2
