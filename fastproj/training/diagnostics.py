"""The papers' diagnostic curves: measured once per epoch on the rows of its last steps.

Each measure is a function of tensors; ``Diagnostics`` keeps the rows and computes all measures.
They have no gradient. They are float32 even under autocast (``rankme``: float64).
"""

import math
from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastproj.core import dist
from fastproj.core.errors import InputError
from fastproj.models.frozen import frozen
from fastproj.models.projector import Discretize, Projector
from fastproj.models.sparse import Sparse
from fastproj.objective.losses import in_float32, normalize, nt_xent
from fastproj.objective.penalties import gram, matrix_entropy, matrix_information, near_zero_share

ROWS = 4096  # views kept, over all ranks
CHUNK = 256  # rows that go through a sparse layer at once: 100 MB with 100,000 latents


@in_float32
def alignment(one: Tensor, other: Tensor) -> Tensor:
    """Distance between two views of an image: mean_i ‖x_i - y_i‖², rows (N, d) normalized.

    In [0, 4], lower is better [Wang and Isola 2020, arXiv 2005.10242, equation 2, α = 2].
    """
    return (normalize(one) - normalize(other)).square().sum(1).mean()


@in_float32
def uniformity(rows: Tensor) -> Tensor:
    """How evenly ``rows`` (N, d), N > 1, cover the unit sphere: log mean_{i≠j} exp(-2‖x_i - x_j‖²).

    In [-8, 0], lower is better; uniform on a sphere of many dimensions is about -4 [Wang and
    Isola 2020, arXiv 2005.10242, equation 3, t = 2; distinct pairs, as in the authors' code].
    """
    n = len(rows)
    rows = normalize(rows)
    squares = rows.square().sum(1)
    exponents = 4 * rows @ rows.T - 2 * (squares[:, None] + squares)
    exponents.fill_diagonal_(-torch.inf)
    return exponents.flatten().logsumexp(0) - math.log(n * (n - 1))


def rankme(rows: Tensor) -> Tensor:
    """RankMe, the effective rank of ``rows`` (N, d): exp(-Σ_k p_k log p_k), p_k = σ_k/Σσ + 1e-7.

    σ are the min(N, d) singular values [Garrido et al. 2023, arXiv 2210.02885, equations 1 and 2].
    Between 1 and min(N, d): it cannot exceed the number of rows. They come from the eigenvalues of
    the smaller Gram matrix in float64: squares, so that σ below 1e-8 of the largest are noise,
    which p's own 1e-7 hides. float64; NaN where a row is not finite.
    """
    rows = rows.double()
    small = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    if not small.isfinite().all():
        return small.new_tensor(math.nan)
    sigma = torch.linalg.eigvalsh(small).clamp(min=0).sqrt()
    p = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny) + 1e-7
    return (-(p * p.log()).sum()).exp()


def used_codes(codes: Tensor, levels: int) -> Tensor:
    """Fraction of a coordinate's ``levels`` values that occur in ``codes`` (N, o), mean over o.

    In [1/levels, 1], float32. Codes are compared exactly: give a discretized projector's output.
    """
    ordered = codes.sort(0).values
    distinct = 1 + (ordered[1:] != ordered[:-1]).sum(0)
    return distinct.float().mean() / levels


@torch.no_grad()
def active_latents(projector: Projector, features: Tensor) -> Tensor:
    """Latents of the projector's sparse layer that any row of ``features`` (N, d) keeps.

    Returns bool (latents,). The trunk is in eval mode: no dropout, and batch norm uses its running
    statistics without updating them. It costs one forward pass of these rows, in chunks.
    """
    assert isinstance(projector.last, Sparse)
    with frozen(projector.trunk):
        parts = [projector.last.active(projector.hidden(rows)) for rows in features.split(CHUNK)]
    return torch.stack(parts).any(0)


class Diagnostics:
    """Keeps the last rows of an epoch and measures them at its end.

    ``loss``: a function of two views' features (B, d), from which the lower bound is computed;
    None: NT-Xent at temperature 0.2. The authors plot NT-Xent for SimCLR and Barlow Twins' loss for
    Barlow Twins. ``groups`` of the projector's first weight are ``columns`` (one per feature) or
    ``rows``. The projector is never changed.
    """

    def __init__(
        self,
        projector: Projector,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        groups: str = "columns",
    ) -> None:
        self.projector, self.groups = projector, groups
        self.loss = loss or partial(nt_xent, temperature=0.2)
        self._kept: deque[tuple[Tensor, Tensor]] = deque()

    def watch(self, features: Tensor, projections: Tensor) -> None:
        """Keep a step's ``features`` (2, B, d) and ``projections`` (2, B, o) of the large crops.

        It keeps detached references only, without computing, copying or synchronizing. It keeps the
        whole last step and as many earlier ones as fit into ``ROWS`` rows over all ranks. Every
        rank must give the same shapes.
        """
        self._kept.append((features.detach(), projections.detach()))
        room = ROWS // dist.world_size()
        while len(self._kept) > 1 and sum(f.shape[:2].numel() for f, _ in self._kept) > room:
            self._kept.popleft()

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """The measures by name, of the rows kept since the last report; empty if there are none.

        Every rank must call it and gets the same values. It then releases the rows.

        From the last step: ``matrix_information`` is I₂(h; z) of all ranks' rows, and

            lower_bound_surrogate = -loss(h) - I₂(h; z)
            upper_bound_surrogate = S₂(h) - I₂(h; z)

        as the authors plot them [PKU-ML/Projector_Theory, after arXiv 2503.00507's bounds on
        I(Y; Z1)]. They are surrogates: matrix entropies are not Shannon's, and terms with labels
        are left out. They depend on the number of rows, so compare runs of one batch size.

        From all kept rows, some from earlier weights: ``alignment``, ``uniformity`` (mean of both
        views) and ``rankme``, each for ``_features`` and ``_projections``; for a sparse last layer
        ``dead_latents``, the fraction of latents that no kept row activates; for a discretized
        output ``used_codes``. From the first weight, if there is one: ``near_zero_groups``, a
        fraction.
        """
        if not self._kept:
            return {}
        metrics = self._information()
        features, projections = (
            _pairs(torch.cat(parts, dim=1)) for parts in zip(*self._kept, strict=True)
        )
        for name, rows in (("features", features), ("projections", projections)):
            one, other = rows.unbind(1)
            metrics[f"alignment_{name}"] = alignment(one, other)
            metrics[f"uniformity_{name}"] = (uniformity(one) + uniformity(other)) / 2
            metrics[f"rankme_{name}"] = rankme(rows.flatten(0, 1))
        if isinstance(self.projector.last, Sparse):
            metrics["dead_latents"] = 1 - self._active().float().mean()
        if isinstance(self.projector.output, Discretize):
            metrics["used_codes"] = used_codes(
                projections.flatten(0, 1), self.projector.output.levels
            )
        try:
            weight = self.projector.first_weight()
        except InputError:  # kinds none and direct
            pass
        else:
            metrics["near_zero_groups"] = near_zero_share(weight, self.groups)
        values = torch.stack([value.double() for value in metrics.values()])
        self._kept.clear()
        return dict(zip(metrics, values.tolist(), strict=True))

    def _information(self) -> dict[str, Tensor]:
        """Matrix information and both bounds of the last step."""
        one, other = self._kept[-1][0]
        loss = self.loss(one, other)
        features, projections = (_pairs(x).flatten(0, 1) for x in self._kept[-1])
        information = matrix_information(features, projections, 2)
        return {
            "matrix_information": information,
            "lower_bound_surrogate": -dist.mean(loss) - information,
            "upper_bound_surrogate": matrix_entropy(gram(features.float()), 2) - information,
        }

    def _active(self) -> Tensor:
        """``active_latents`` over all ranks; each rank computes those of its own rows."""
        mine = torch.cat([features.flatten(0, 1) for features, _ in self._kept])
        return dist.total(active_latents(self.projector, mine.float()).float()) > 0


def _pairs(rows: Tensor) -> Tensor:
    """Gather this rank's (2, B, d) to all ranks' (B·W, 2, d)."""
    return dist.gather(rows.transpose(0, 1))
