"""Objectives: pure functions from projected views to a scalar loss.

Computed in float32 whatever autocast says (float64 stays float64), and world-size invariant: see
``nt_xent``. An objective is one function ``(z1, z2, **settings)`` and one line in ``OBJECTIVES``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastproj import dist
from fastproj.errors import InputError

NORM_FLOOR = 1e-6


def normalise(z: Tensor) -> Tensor:
    """Rows of ``z`` (N, d) at unit L2 norm; rows shorter than ``NORM_FLOOR`` stay as they are.

    A discretised projector can give a row of zeros: dividing it by a tiny floor would multiply its
    gradient by a million.
    """
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return z / torch.where(norm < NORM_FLOOR, 1.0, norm)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent, the normalised temperature-scaled cross entropy of SimCLR.

    ``z1``, ``z2``: (B, d), any floating dtype, row i of both from the same image. Returns a
    scalar, float32 (float64 for float64 input). With unit rows z, s = z·zᵀ / temperature, and j(i)
    the other view of anchor i's image,

        loss = mean_i( -log( exp(s_i,j(i)) / sum_{k != i} exp(s_ik) ) )

    over the 2B views of the batch [Chen et al. 2020, arXiv 2002.05709, equation 1].

    On W ranks the anchors are this rank's 2B views and k runs over all 2BW views, so the *mean over
    ranks* of the returned values is the loss of the global batch. ``dist.gather`` sums gradients
    over ranks; DDP's mean of parameter gradients divides by W again: the result is the global
    loss's gradient. Memory: one 2B × 2BW matrix and its gradient. Every rank must give the same B.
    """
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise InputError(f"nt_xent needs two views (B, d) alike, not {z1.shape} and {z2.shape}")
    with torch.autocast(z1.device.type, enabled=False):
        dtype = torch.promote_types(z1.dtype, torch.float32)
        views = normalise(torch.cat([z1, z2]).to(dtype))
        logits = views @ dist.gather(views).T / temperature
        first = dist.rank() * len(views)  # where this rank's views lie among the gathered
        logits.diagonal(first).fill_(-torch.inf)  # an anchor is not its own negative
        positives = first + torch.arange(len(views), device=views.device).roll(len(z1))
        return F.cross_entropy(logits, positives)


OBJECTIVES: dict[str, Callable[..., Tensor]] = {"simclr": nt_xent}
