"""What the papers plot beside the loss, once an epoch, of the rows the last steps have seen.

Each measure is a function of tensors; ``Diagnostics`` keeps the rows and puts the measures
together. None is trained on. In float32 (rankme in float64), whatever autocast says.
"""

import math
from collections import deque

import torch
from torch import Tensor

from fastproj import dist
from fastproj.errors import InputError
from fastproj.objective.losses import barlow_twins, in_float32, normalise, nt_xent
from fastproj.projector import Discretise, Projector
from fastproj.regulariser import gram, matrix_entropy, matrix_information, near_zero_share
from fastproj.sparse import Sparse

ROWS = 4096  # views kept, over all ranks
CHUNK = 256  # rows that go through a sparse layer at once: 100 MB of 100,000 latents


@in_float32
def alignment(one: Tensor, other: Tensor) -> Tensor:
    """How near two views of an image lie: mean_i ‖x_i - y_i‖², rows (N, d) at unit length.

    In [0, 4], the lower the better [Wang and Isola 2020, arXiv 2005.10242, equation 2, α = 2].
    """
    return (normalise(one) - normalise(other)).square().sum(1).mean()


@in_float32
def uniformity(rows: Tensor) -> Tensor:
    """How evenly ``rows`` (N, d), N > 1, cover the unit sphere: log mean_{i≠j} exp(-2‖x_i - x_j‖²).

    In [-8, 0], the lower the better; a uniform sphere of many dimensions has about -4 [Wang and
    Isola 2020, arXiv 2005.10242, equation 3, t = 2; distinct pairs, as in the authors' code].
    """
    n = len(rows)
    rows = normalise(rows)
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
    """Share of the ``levels`` values of a coordinate that occur in ``codes`` (N, o), a mean over o.

    In [1/levels, 1], float32. Codes are compared exactly: give a discretised projector's output.
    """
    ordered = codes.sort(0).values
    distinct = 1 + (ordered[1:] != ordered[:-1]).sum(0)
    return distinct.float().mean() / levels


@torch.no_grad()
def active_latents(projector: Projector, features: Tensor) -> Tensor:
    """Which latents of the projector's sparse layer some row of ``features`` (N, d) keeps.

    bool (latents,). In eval mode: nothing dropped, and batch norm's own statistics, not touched.
    As much work as one forward pass of these rows, in chunks.
    """
    assert isinstance(projector.last, Sparse)
    modes = [(module, module.training) for module in projector.trunk.modules()]
    projector.trunk.eval()
    try:
        parts = [projector.last.active(projector.hidden(rows)) for rows in features.split(CHUNK)]
    finally:
        for module, training in modes:
            module.training = training
    return torch.stack(parts).any(0)


class Diagnostics:
    """Keeps the last rows of an epoch and measures them at its end.

    ``objective`` is the run's, by name. The lower bound takes its loss on the features: for
    ``barlow`` Barlow Twins' with ``off_diagonal`` and ``scale``, for any other NT-Xent at
    ``temperature``, which the authors plot for SimCLR. ``groups`` of the projector's first weight
    are ``columns`` (features) or ``rows``. The projector is read, never changed.
    """

    def __init__(
        self,
        projector: Projector,
        objective: str,
        temperature: float = 0.2,
        off_diagonal: float = 0.0051,
        scale: float = 0.1,
        groups: str = "columns",
    ) -> None:
        self.projector, self.objective, self.groups = projector, objective, groups
        self.temperature, self.off_diagonal, self.scale = temperature, off_diagonal, scale
        self._kept: deque[tuple[Tensor, Tensor]] = deque()

    def watch(self, features: Tensor, projections: Tensor) -> None:
        """Keep a step's ``features`` (2, B, d) and ``projections`` (2, B, o): both large crops.

        References alone, detached, where they are: nothing is computed, copied or waited for. The
        last step is kept whole, and of those before it as many as make ``ROWS`` rows over all
        ranks. Every rank must give the same shapes.
        """
        self._kept.append((features.detach(), projections.detach()))
        room = ROWS // dist.world()
        while len(self._kept) > 1 and sum(f.shape[:2].numel() for f, _ in self._kept) > room:
            self._kept.popleft()

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """The measures, by name, of what was watched since the last report; empty if nothing was.

        Every rank must call it, and gets the same. The kept rows are then let go.

        Of the last step: ``matrix_information`` is I₂(h; z) of all ranks' rows, and

            lower_bound_surrogate = -loss(h) - I₂(h; z)
            upper_bound_surrogate = S₂(h) - I₂(h; z)

        as the authors plot them [PKU-ML/Projector_Theory, after arXiv 2503.00507's bounds on
        I(Y; Z1)]: surrogates, since matrix entropies are not Shannon's and the terms with labels
        are left out. They depend on the number of rows: compare runs of one batch size.

        Of all kept rows, which earlier weights may have made: ``alignment``, ``uniformity`` (mean
        of both views) and ``rankme``, each of ``_features`` and ``_projections``; of a sparse last
        layer ``dead_latents``, the share that no kept row activates; of a discretised output
        ``used_codes``. Of the first weight, where there is one: ``near_zero_groups``, a share.
        """
        if not self._kept:
            return {}
        told = self._information()
        features, projections = (
            _pairs(torch.cat(parts, dim=1)) for parts in zip(*self._kept, strict=True)
        )
        for name, rows in (("features", features), ("projections", projections)):
            one, other = rows.unbind(1)
            told[f"alignment_{name}"] = alignment(one, other)
            told[f"uniformity_{name}"] = (uniformity(one) + uniformity(other)) / 2
            told[f"rankme_{name}"] = rankme(rows.flatten(0, 1))
        if isinstance(self.projector.last, Sparse):
            told["dead_latents"] = 1 - self._active().float().mean()
        if isinstance(self.projector.output, Discretise):
            told["used_codes"] = used_codes(projections.flatten(0, 1), self.projector.output.levels)
        try:
            weight = self.projector.first_weight()
        except InputError:  # kinds none and direct
            pass
        else:
            told["near_zero_groups"] = near_zero_share(weight, self.groups)
        values = torch.stack([value.double() for value in told.values()])
        self._kept.clear()
        return dict(zip(told, values.tolist(), strict=True))

    def _information(self) -> dict[str, Tensor]:
        """The information and both bounds, of the last step."""
        one, other = self._kept[-1][0]
        if self.objective == "barlow":
            loss = barlow_twins(one, other, self.off_diagonal, self.scale)
        else:
            loss = nt_xent(one, other, self.temperature)
        features, projections = (_pairs(x).flatten(0, 1) for x in self._kept[-1])
        information = matrix_information(features, projections, 2)
        return {
            "matrix_information": information,
            "lower_bound_surrogate": -dist.mean(loss) - information,
            "upper_bound_surrogate": matrix_entropy(gram(features.float()), 2) - information,
        }

    def _active(self) -> Tensor:
        """``active_latents`` of every rank's kept features: each passes its own."""
        mine = torch.cat([features.flatten(0, 1) for features, _ in self._kept])
        return dist.total(active_latents(self.projector, mine.float()).float()) > 0


def _pairs(rows: Tensor) -> Tensor:
    """This rank's (2, B, d) to all ranks' (B·W, 2, d)."""
    return dist.gather(rows.transpose(0, 1))
