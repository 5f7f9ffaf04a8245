"""The papers' diagnostic curves: some measured in every step, others once on an epoch's last rows.

Each measure is a function of tensors; ``Diagnostics`` keeps the rows and computes all measures.
They have no gradient. They are float32 even under autocast (``singular_values``: float64).
"""

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproj.core import dist
from fastproj.core.errors import InputError
from fastproj.models.frozen import frozen
from fastproj.models.projector import Discretize, Projector
from fastproj.models.sparse import Sparse
from fastproj.objective.losses import in_float32, normalize, nt_xent
from fastproj.objective.penalties import entropy_of_squares, near_zero_share

ROWS = 4096  # views kept, over all ranks
SPECTRUM = 64  # singular values written of a spectrum
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


@in_float32
def squared_cosines(features: Tensor, projections: Tensor) -> Tensor:
    """Means of a, b and a·b, float32 (3,): a, b the squared entries of both rows' Gram matrices.

    ``features`` (n, d) and ``projections`` (n, o): this rank's rows; the matrices' columns are all
    ranks' rows. So the mean over ranks is that of the whole matrices, and each rank computes only
    its own part of them. The matrix entropies of order 2 are ``entropy_of_squares`` of these.
    """
    a, b = (
        (rows @ dist.gather(rows).T).square()
        for rows in (normalize(features), normalize(projections))
    )
    return torch.stack([a.mean(), b.mean(), (a * b).mean()])


def singular_values(rows: Tensor) -> Tensor:
    """The min(N, d) singular values of ``rows`` (N, d), not centered; float64, largest first.

    They come from the eigenvalues of the smaller Gram matrix in float64: squares, so that values
    below 1e-8 of the largest are noise. NaN where a row is not finite.
    """
    rows = rows.double()
    small = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    if not small.isfinite().all():
        return small.new_full((len(small),), math.nan)
    return torch.linalg.eigvalsh(small).clamp(min=0).sqrt().flip(0)


def _fractions(sigma: Tensor) -> Tensor:
    """σ_k/Σσ; zeros where all are."""
    return sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny)


def effective_rank(sigma: Tensor) -> Tensor:
    """RankMe of singular values: exp(-Σ_k p_k log p_k), p_k = σ_k/Σσ + 1e-7.

    Between 1 and their number [Garrido et al. 2023, arXiv 2210.02885, equations 1 and 2].
    """
    p = _fractions(sigma) + 1e-7
    return (-(p * p.log()).sum()).exp()


def rankme(rows: Tensor) -> Tensor:
    """RankMe, the effective rank of ``rows`` (N, d); it cannot exceed the number of rows.

    float64; NaN where a row is not finite.
    """
    return effective_rank(singular_values(rows))


def spectrum(sigma: Tensor) -> list[tuple[int, float]]:
    """(k, σ_k/Σσ) of singular values σ, the largest first and k from 1, to four digits.

    Up to ``SPECTRUM`` values are given whole; of more, as many k at most, evenly spaced on a log
    scale from the first to the last.
    """
    places = np.arange(1, len(sigma) + 1)
    if len(places) > SPECTRUM:
        places = np.unique(np.geomspace(1, len(places), SPECTRUM).round().astype(int))
    fractions = _fractions(sigma).tolist()
    return [(k, float(f"{fractions[k - 1]:.4g}")) for k in places.tolist()]


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
    """Measures every step of an epoch, keeps its last rows, and reports both at its end.

    ``loss``: a function of two views' features (B, d), whose negative value is plotted; None:
    NT-Xent at ``temperature``. The authors plot NT-Xent for SimCLR and Barlow Twins' loss for
    Barlow Twins. ``groups`` of the projector's first weight are ``columns`` (one per feature) or
    ``rows``. The projector is never changed.
    """

    def __init__(
        self,
        projector: Projector,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        temperature: float = 0.2,
        groups: str = "columns",
    ) -> None:
        self.projector, self.groups = projector, groups
        self.contrastive = loss is None
        self.loss = loss or partial(nt_xent, temperature=temperature)
        self._kept: deque[tuple[Tensor, Tensor]] = deque()
        self._steps: list[tuple[int, Tensor]] = []  # views over all ranks; what was measured

    def clear(self) -> None:
        """Forget what was watched, before an epoch begins."""
        self._kept.clear()
        self._steps.clear()

    @torch.no_grad()
    def watch(self, features: Tensor, projections: Tensor) -> None:
        """Measure a step's ``features`` (2, B, d) and ``projections`` (2, B, o) of the large crops.

        Values stay on the device and the host waits for none of them. Of the rows it keeps detached
        references: the whole last step and as many earlier ones as fit into ``ROWS`` rows over all
        ranks. Every rank must give the same shapes.
        """
        features, projections = features.detach(), projections.detach()
        means = squared_cosines(features.flatten(0, 1), projections.flatten(0, 1))
        loss = self.loss(*features.unbind()).detach().to(means.dtype)
        views = features.shape[:2].numel()
        self._steps.append((views * dist.world_size(), torch.cat([loss.view(1), means])))
        self._kept.append((features, projections))
        room = ROWS // dist.world_size()
        while len(self._kept) > 1 and sum(f.shape[:2].numel() for f, _ in self._kept) > room:
            self._kept.popleft()

    @torch.no_grad()
    def report(self) -> dict[str, Any]:
        """The measures by name, of what was watched since the last report; empty if nothing was.

        Every rank must call it and gets the same values. It then forgets what was watched.

        The authors' curves, in nats: the mean over the steps and, as ``…_std``, their standard
        deviation (of the steps themselves: 0 for one step). h and z are features and projections
        of all ranks' views in a step [PKU-ML/Projector_Theory]:

            negative_loss_features            -NCE(h); the loss is Barlow Twins' for Barlow Twins
            log_n_minus_nce_features          log N - NCE(h), N = views - 1 candidates; 0: by chance
            matrix_information                I₂(h; z)
            matrix_entropy_features           S₂(h)
            negative_loss_minus_information   -NCE(h) - I₂(h; z)
            entropy_minus_information         S₂(h) - I₂(h; z)

        Only their trends mean something: matrix entropies are not Shannon's, and the authors leave
        out the terms with labels. They depend on the number of views, so compare runs of one batch
        size. ``log_n_minus_nce_features`` is there where the loss is NT-Xent.

        From all kept rows, some from earlier weights: ``alignment``, ``uniformity`` (mean of both
        views), ``rankme`` and ``spectrum`` (a list of (k, σ_k/Σσ)), each for ``_features`` and
        ``_projections``; for a sparse last layer ``dead_latents``, the fraction of latents that no
        kept row activates; for a discretized output ``used_codes``. From the first weight, if there
        is one: ``near_zero_groups``, a fraction.
        """
        if not self._kept:
            return {}
        metrics = self._curves()
        spectra: dict[str, list[tuple[int, float]]] = {}
        features, projections = (
            _pairs(torch.cat(parts, dim=1)) for parts in zip(*self._kept, strict=True)
        )
        for name, rows in (("features", features), ("projections", projections)):
            one, other = rows.unbind(1)
            metrics[f"alignment_{name}"] = alignment(one, other)
            metrics[f"uniformity_{name}"] = (uniformity(one) + uniformity(other)) / 2
            sigma = singular_values(rows.flatten(0, 1))
            metrics[f"rankme_{name}"] = effective_rank(sigma)
            spectra[f"spectrum_{name}"] = spectrum(sigma)
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
        self.clear()
        return dict(zip(metrics, values.tolist(), strict=True)) | spectra

    def _curves(self) -> dict[str, Tensor]:
        """Mean and standard deviation over the steps of the authors' curves."""
        measured = torch.stack([values for _, values in self._steps])
        loss, *squares = dist.mean(measured.double()).unbind(1)
        views = loss.new_tensor([views for views, _ in self._steps])
        entropy, of_projections, joint = (entropy_of_squares(mean, views) for mean in squares)
        information = entropy + of_projections - joint
        curves = {
            "negative_loss_features": -loss,
            "matrix_information": information,
            "matrix_entropy_features": entropy,
            "negative_loss_minus_information": -loss - information,
            "entropy_minus_information": entropy - information,
        }
        if self.contrastive:
            curves["log_n_minus_nce_features"] = (views - 1).log() - loss
        spread = {f"{name}_std": values.std(correction=0) for name, values in curves.items()}
        return {name: values.mean() for name, values in curves.items()} | spread

    def _active(self) -> Tensor:
        """``active_latents`` over all ranks; each rank computes those of its own rows."""
        mine = torch.cat([features.flatten(0, 1) for features, _ in self._kept])
        return dist.total(active_latents(self.projector, mine.float()).float()) > 0


def _pairs(rows: Tensor) -> Tensor:
    """Gather this rank's (2, B, d) to all ranks' (B·W, 2, d)."""
    return dist.gather(rows.transpose(0, 1))
