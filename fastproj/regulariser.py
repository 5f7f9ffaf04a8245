"""Penalties on a pair of encoder and projector, beside the objective.

Matrix information of features and projections, sparsity of the projector's groups, and what one
view says beyond the other. Computed in float32 whatever autocast says (float64 stays float64).
Every one is of this rank's own rows, never gathered: the authors of the first compute it so (per
device), and the second and third are means over rows or functions of weights alone, for which the
mean over ranks is already the value of the global batch. The first is not world-size invariant.
"""

import math

import torch
from torch import Tensor, nn

from fastproj.errors import InputError
from fastproj.objective.losses import in_float32, normalise

NEAR_ZERO = 0.01  # of the largest group's norm: what ``near_zero_share`` counts as nothing
SIGMA_RANGE = 10.0  # a learned sigma stays within this factor of the given one, either way


# Matrix information [arXiv 2503.00507; PKU-ML/Projector_Theory]


def gram(rows: Tensor) -> Tensor:
    """Cosines of all pairs of ``rows`` (n, d): (n, n), one on the diagonal.

    A row of zeros has zeros, on the diagonal as well.
    """
    rows = normalise(rows)
    return rows @ rows.T


@in_float32
def matrix_entropy(gram: Tensor, alpha: float) -> Tensor:
    """Rényi's entropy of order ``alpha`` > 0 of the eigenvalues of a Gram matrix over its size.

    ``gram``: K (n, n), symmetric, positive semi-definite, with a unit diagonal. Returns, in nats,

        S_α(K) = log tr[(K/n)^α] / (1 - α),  and for α = 1 its limit -tr[(K/n) log(K/n)],

    von Neumann's entropy: between 0 (all rows alike) and log n (all orthogonal) [Giraldo et al.
    2015, arXiv 1211.2459, equation 7; arXiv 2503.00507 uses α = 2]. For α = 2 the trace is a sum
    of squares; another α takes eigenvalues, for which a GPU makes the step wait. Close to 1 a
    rounding error is divided by 1 - α: give 1 itself (at 0.999 in float32, 512 rows of width 64
    and 16, the information was off by 2e-4 and its gradient by 0.6 %; at 1 by 5e-7 and 2e-5).

    The gradient of tr f(K/n) is f'(K/n)/n: ``eigvalsh`` gives V f'(Λ) Vᵀ and no differences of
    eigenvalues, so equal ones are harmless. Eigenvalues below n·eps of the largest are rounding
    errors of zeros: they add nothing, and no gradient (f' is infinite there for α ≤ 1). The
    largest is taken as 1/n at least, which is exact unless every row is zero.

    Raises ``InputError`` for an ``alpha`` or a shape that cannot be, and where the eigenvalues
    cannot be had because K is not finite.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise InputError(f"matrix_entropy needs a Gram matrix (n, n), not {tuple(gram.shape)}")
    if not 0 < alpha < math.inf:
        raise InputError(f"matrix_entropy needs alpha above 0 and finite, not {alpha}")
    n = len(gram)
    if alpha == 2:
        return -gram.square().mean().clamp(min=1 / n**2).log()
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
    # Over the largest: λ^α of a large α would underflow.
    powers = torch.where(kept, torch.where(kept, spectrum / top, 1.0) ** alpha, 0.0).sum()
    return (powers.clamp(min=1).log() + alpha * top.log()) / (1 - alpha)


@in_float32
def matrix_information(features: Tensor, projections: Tensor, alpha: float) -> Tensor:
    """Matrix information of order ``alpha`` between ``features`` (N, d) and ``projections`` (N, o).

    Row i of both is of the same view; the caller concatenates the views. With K1 and K2 the Gram
    matrices of the rows at unit length and ∘ the entrywise product,

        I_α = S_α(K1) + S_α(K2) - S_α(K1 ∘ K2)      (nats, see ``matrix_entropy``)

    [arXiv 2503.00507; PKU-ML/Projector_Theory, which takes α = 2]. For α = 2, with a and b the
    entrywise squares, it is log(mean(a·b) / (mean a · mean b)). A surrogate: it can be negative and
    does not grow with every dependence, so it is no mutual information. The gradient reaches both
    arguments. Rows of zeros are harmless. Memory: a few N × N matrices.

    Of this rank's rows alone, as the authors compute it: two ranks' mean differs from the value of
    their rows together. Raises ``InputError`` for shapes that do not match.
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


# SparseHead-style: the paper asks for a sparse projection head [arXiv 2307.08913]; its formula was
# not to be had, so these are the group lasso's [Yuan and Lin 2006] and ours.


def _norms(weight: Tensor, groups: str) -> Tensor:
    """L2 norms of the columns (one a feature) or rows (one a unit) of ``weight`` (units, d)."""
    if groups not in ("columns", "rows"):
        raise InputError(f"sparsehead.groups: a weight has columns and rows, no {groups!r}")
    return torch.linalg.vector_norm(weight, dim=0 if groups == "columns" else 1)


@in_float32
def group_sparsity(weight: Tensor, groups: str, scale_free: bool) -> Tensor:
    """Group lasso on the projector's first weight (units, d), SparseHead-style.

    ``groups``: ``columns`` (what a feature is given, so that features are selected) or ``rows``
    (units). With G groups w_j it is Σ_j ‖w_j‖₂ / √G or, ``scale_free``,

        Σ_j ‖w_j‖₂ / (√G ‖W‖_F),  in [1/√G, 1]: one group alone, all of one length.

    [derived, after arXiv 2307.08913]. The first can be made small by a scale that the next layer
    undoes and BatchNorm ignores; the second cannot. A scalar; 0 for a weight of zeros, and no
    gradient in groups of zeros. Raises ``InputError`` for other ``groups``.
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

    The mean absolute activation or, ``scale_free``, the mean over rows a of ‖a‖₁ / (√w ‖a‖₂), in
    [1/√w, 1]: one unit active, all alike [derived, after arXiv 2307.08913; Hoyer 2004's measure,
    before it is turned round]. Rows of zeros count 0 and have no gradient.
    """
    if not scale_free:
        return hidden.abs().mean()
    return normalise(hidden).abs().sum(1).mean() / hidden.shape[1] ** 0.5


@torch.no_grad()
def proximal_step_(weight: Tensor, groups: str, threshold: float | Tensor) -> None:
    """Shorten every group of ``weight`` (units, d) by ``threshold``, in place, at most to exact 0.

        w_j ← w_j · max(0, 1 - threshold / ‖w_j‖₂)

    minimises ½‖v - w_j‖² + threshold·‖v‖ over v [Parikh and Boyd 2014, section 6.5.1]: after an
    update at rate η, a threshold of ηλ is one step of proximal gradient descent on λ Σ_j ‖w_j‖
    (ηλ/√G on λ·``group_sparsity``); after LARS, AdamW or momentum it is only in their spirit. It
    gives the exact zeros that gradients do not.
    """
    norms = _norms(weight, groups)
    shrink = (norms - threshold).clamp(min=0) / torch.where(norms == 0, 1.0, norms)
    weight.mul_(shrink if groups == "columns" else shrink[:, None])


@torch.no_grad()
def near_zero_share(weight: Tensor, groups: str) -> Tensor:
    """Share of groups of ``weight`` (units, d) no longer than ``NEAR_ZERO`` of the longest.

    A scalar in [0, 1], float32: 1 for a weight of zeros. The longest and not the mean, which falls
    as groups vanish.
    """
    norms = _norms(weight, groups)
    return (norms <= NEAR_ZERO * norms.max()).float().mean()


# SuperInfo-style (MIB bound) [arXiv 2408.10292; Federici et al. 2020, arXiv 2002.07017]


@in_float32
def gaussian_kl(
    mean_1: Tensor, sigma_1: float | Tensor, mean_2: Tensor, sigma_2: float | Tensor
) -> Tensor:
    """KL(N(mean_1, sigma_1²) ‖ N(mean_2, sigma_2²)), a mean over rows *and dimensions*, in nats.

    Means (N, d); standard deviations positive, one number or (N, d). In each coordinate

        ½ [log(σ2²/σ1²) + (σ1² + (μ1 - μ2)²)/σ2² - 1]

    With z1 independent of v2 given v1 it bounds what z1 keeps of its view beyond the other:
    I(v1; z1 | v2) ≤ E KL(p(z1|v1) ‖ p(z2|v2)) [Federici et al. 2020, arXiv 2002.07017, section 3.2;
    SuperInfo's superfluous terms, arXiv 2408.10292, whose own bound was not to be had: derived].
    With one fixed σ both directions equal mean((μ1 - μ2)²)/(2σ²). Put it on the encoder's outputs,
    not normalised. Raises ``InputError`` for means that do not match.
    """
    if mean_1.shape != mean_2.shape:
        raise InputError(
            f"gaussian_kl needs means alike, not {tuple(mean_1.shape)} and {tuple(mean_2.shape)}"
        )
    # A number becomes a tensor on the device, where nothing is copied and waited for.
    one, other = (
        sigma if isinstance(sigma, Tensor) else mean_1.new_full((), sigma)
        for sigma in (sigma_1, sigma_2)
    )
    ratio = one / other
    distance = (mean_1 - mean_2) / other
    return (ratio.square() + distance.square() - 1 - 2 * ratio.log()).mean() / 2


class Noise(nn.Module):
    """Makes features stochastic while training: a Gaussian around each.

    ``kind`` ``fixed``: ``sigma`` everywhere. ``learned``: log σ is a linear function of the mean,
    bounded by a tanh, σ = sigma · ``SIGMA_RANGE`` ** tanh(W·mean + b) with W and b from zero: it
    starts at ``sigma`` and stays within a factor of ten of it [derived]. ``sigma`` is in the units
    of the features.

    With no divergence beside it this is the control: noise alone.
    """

    sigma: Tensor

    def __init__(self, features: int, kind: str, sigma: float) -> None:
        super().__init__()
        if kind not in ("fixed", "learned"):
            raise InputError(f"superfluous.noise: no {kind!r}; choose fixed or learned")
        if not 0 < sigma < math.inf:
            raise InputError(f"superfluous.sigma: {sigma} is not above 0 and finite")
        self.register_buffer("sigma", torch.tensor(float(sigma)), persistent=False)
        self.exponent: nn.Linear | None = None
        if kind == "learned":
            self.exponent = nn.Linear(features, features)
            nn.init.zeros_(self.exponent.weight)
            nn.init.zeros_(self.exponent.bias)

    def forward(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """``mean`` (N, d) to a sample (N, d) of its dtype, and σ: (N, d) if learned, or a scalar.

        σ is float32 (float64 of float64). The noise is drawn from torch's global generator; in eval
        mode the sample is the mean itself.
        """
        sigma = self._sigma(mean)
        if not self.training:
            return mean, sigma
        return mean + (sigma * torch.randn_like(mean)).to(mean.dtype), sigma

    def _sigma(self, mean: Tensor) -> Tensor:
        if self.exponent is None:
            return self.sigma
        dtype = torch.promote_types(mean.dtype, torch.float32)
        with torch.autocast(mean.device.type, enabled=False):
            return self.sigma * (math.log(SIGMA_RANGE) * self.exponent(mean.to(dtype)).tanh()).exp()
