"""Losses: pure functions from projected views to a scalar.

Row i of every argument belongs to image i; τ is ``temperature``. Every loss is computed in float32
even under autocast (float64 stays float64), does not sync with the host, sends no gradient into
targets (momentum keys, codes, SimSiam's z), and is world-size invariant:

    the mean over ranks of the returned values is the loss of the global batch.

``dist.gather`` and ``dist.total`` sum gradients over ranks, and DDP's mean of parameter gradients
divides by the number of ranks again, so the result is the gradient of the global loss. Every rank
must give the same shapes. A wrong shape raises ``InputError``.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastproj.core import dist
from fastproj.core.errors import InputError

NORM_FLOOR = 1e-6
BARLOW_EPS = 1e-5  # of BatchNorm, with which the authors' code standardizes
VICREG_EPS = 1e-4  # section 4.1 of the paper

Function = TypeVar("Function", bound=Callable[..., Tensor])


def in_float32(function: Function) -> Function:
    """Run ``function`` without autocast, its floating tensors cast to float32 or the widest dtype.

    The cast is part of the graph, so gradients of half-precision tensors are half precision.
    """

    @functools.wraps(function)
    def lifted(*args: Any, **kwargs: Any) -> Tensor:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        dtypes = (x.dtype for x in tensors if x.is_floating_point())
        dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)

        def lift(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*map(lift, args), **{name: lift(x) for name, x in kwargs.items()})

    return cast(Function, lifted)


def _need(right: bool, what: str, *given: Tensor) -> None:
    if not right:
        raise InputError(f"{what}, not {' and '.join(str(tuple(x.shape)) for x in given)}")


def _rows_alike(*tensors: Tensor) -> bool:
    return all(x.ndim == 2 and x.shape == tensors[0].shape for x in tensors)


def _global_batch(name: str, z: Tensor) -> int:
    images = len(z) * dist.world_size()
    _need(images >= 2, f"{name} needs the variance over 2 images or more", z)
    return images


def normalize(z: Tensor) -> Tensor:
    """Rows of ``z`` (N, d) at unit L2 norm; rows with a norm below ``NORM_FLOOR`` are unchanged.

    A discretized projector can give rows of zeros; division by a tiny floor would multiply their
    gradient by a million.
    """
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return z / torch.where(norm < NORM_FLOOR, 1.0, norm)


# Contrastive: distinguish an image's views from those of other images.


def _similarities(views: Tensor, temperature: float) -> Tensor:
    """Cosines / τ of this rank's rows (N, d) with all ranks': (N, N·W); -inf with itself."""
    rows = normalize(views)
    logits = rows @ dist.gather(rows).T / temperature
    logits.diagonal(dist.rank() * len(rows)).fill_(-torch.inf)
    return logits


@in_float32
def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.2) -> Tensor:
    """NT-Xent, the normalized temperature-scaled cross entropy of SimCLR.

    ``z1``, ``z2``: (B, d), any floating dtype, row i of both from the same image. Returns a
    scalar, float32 (float64 for float64 input). With unit rows z, s = z·zᵀ / temperature, and j(i)
    the other view of anchor i's image,

        loss = mean_i( -log( exp(s_i,j(i)) / sum_{k != i} exp(s_ik) ) )

    over the 2B views of the batch [Chen et al. 2020, arXiv 2002.05709, equation 1].

    On W ranks the anchors are this rank's 2B views and k runs over all 2BW views. Memory: one
    2B × 2BW matrix and its gradient.
    """
    _need(_rows_alike(z1, z2), "nt_xent needs two views (B, d) alike", z1, z2)
    logits = _similarities(torch.cat([z1, z2]), temperature)
    first = dist.rank() * len(logits)  # where this rank's views lie among the gathered
    positives = first + torch.arange(len(logits), device=z1.device).roll(len(z1))
    return F.cross_entropy(logits, positives)


@in_float32
def sup_con(views: Tensor, labels: Tensor, temperature: float = 0.2) -> Tensor:
    """SupCon: every view of the anchor's class is a positive.

    ``views``: (V, B, d) with V >= 2; ``labels``: (B,) integer, negative for an unlabeled image,
    whose only positives are its own other views. With s as in ``nt_xent`` and P(i) the other views
    of anchor i's class, over all W·V·B views of the global batch,

        loss = mean_i( -1/|P(i)| sum_{p in P(i)} log( exp(s_ip) / sum_{k != i} exp(s_ik) ) )

    [Khosla et al. 2020, arXiv 2004.11362, equation 2, "out"; the paper sums over i, its code takes
    the mean]. The code's factor τ / 0.07 is neither in the paper nor here. With no labels and V = 2
    it equals ``nt_xent``. Memory: V·B × W·V·B logits, their gradient, and a mask.
    """
    _need(
        views.ndim == 3 and len(views) >= 2 and labels.shape == views.shape[1:2],
        "sup_con needs views (V, B, d), V >= 2, and labels (B,)", views, labels,
    )  # fmt: skip
    logits = _similarities(views.flatten(0, 1), temperature)
    images = dist.rank() * len(labels) + torch.arange(len(labels), device=labels.device)
    # Each unlabeled image is its own class, with a negative number.
    classes = torch.where(labels < 0, -1 - images, labels).repeat(len(views))
    positive = classes[:, None] == dist.gather(classes)
    positive.diagonal(dist.rank() * len(logits)).fill_(False)
    pull = torch.where(positive, logits, 0).sum(1) / positive.sum(1)
    return (logits.logsumexp(1) - pull).mean()


@in_float32
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over views and images of -log softmax(logits)[label].

    ``logits``: (V, B, classes); ``labels``: (B,) integer, each a class.
    """
    _need(
        logits.ndim == 3 and labels.shape == logits.shape[1:2],
        "cross_entropy needs logits (V, B, classes) and labels (B,)", logits, labels,
    )  # fmt: skip
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))


@in_float32
def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE of MoCo v1 to v2+: classify a query's own key against the keys in the queue.

    ``queries``, ``keys``: (B, d); ``queue``: (K, d), keys of earlier batches, the same on every
    rank. Rows are normalized here. With q, k, n their unit rows,

        loss = mean_i( -log( exp(q_i·k_i/τ) / (exp(q_i·k_i/τ) + sum_j exp(q_i·n_j/τ)) ) )

    [He et al. 2020, arXiv 1911.05722, equation 1]. v2+ takes the mean of this for both directions,
    each with a queue of its own view [solo-learn]. Gradient for the queries alone.
    """
    _need(
        _rows_alike(queries, keys) and queue.ndim == 2 and queue.shape[1] == keys.shape[1],
        "info_nce needs queries and keys (B, d) and a queue (K, d)", queries, keys, queue,
    )  # fmt: skip
    _need(len(queue) > 0, "info_nce needs negatives: a queue (K, d) with K > 0", queue)
    queries = normalize(queries)
    own = (queries * normalize(keys.detach())).sum(1, keepdim=True)
    others = queries @ normalize(queue.detach()).T
    logits = torch.cat([own, others], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64))


@in_float32
def moco_v3(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, temperature: float) -> Tensor:
    """MoCo v3: classify a query's own key among those of the global batch, in both directions.

    Predictions ``q1``, ``q2`` and momentum keys ``k1``, ``k2`` of views 1 and 2: (B, d). With unit
    rows q, k,

        loss = ctr(q1, k2) + ctr(q2, k1)
        ctr(q, k) = 2τ · mean_i( -log( exp(q_i·k_i/τ) / sum_j exp(q_i·k_j/τ) ) )

    with j over all ranks [Chen, Xie, He 2021, arXiv 2104.02057, algorithm 1; the sum of directions,
    not their mean]. The factor 2τ makes the gradient's norm nearly independent of τ. Gradient for
    the queries alone.
    """
    _need(
        _rows_alike(q1, q2, k1, k2),
        "moco_v3 needs two views' queries and keys (B, d) alike", q1, q2, k1, k2,
    )  # fmt: skip
    own = dist.rank() * len(q1) + torch.arange(len(q1), device=q1.device)

    def contrast(queries: Tensor, keys: Tensor) -> Tensor:
        keys = dist.gather(normalize(keys.detach()))
        logits = normalize(queries) @ keys.T / temperature
        return 2 * temperature * F.cross_entropy(logits, own)

    return contrast(q1, k2) + contrast(q2, k1)


# Without negatives: predict the other view.


def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """-mean_i( p_i·t_i / (‖p_i‖ ‖t_i‖) ) of (B, d) and (B, d), without gradient for targets.

    Rows with a norm below ``NORM_FLOOR`` have a cosine of nearly 0.
    """
    return -(normalize(predictions) * normalize(targets.detach())).sum(1).mean()


@in_float32
def byol(p1: Tensor, p2: Tensor, t1: Tensor, t2: Tensor) -> Tensor:
    """BYOL: online predictions ``p1``, ``p2`` and momentum targets ``t1``, ``t2``, each (B, d).

        loss = mean_i( 2 - 2 cos(p1_i, t2_i) ) + mean_i( 2 - 2 cos(p2_i, t1_i) )

    in [0, 8]: the *sum* of directions, as in the paper [Grill et al. 2020, arXiv 2006.07733,
    equation 2 and the line after it] and solo-learn; others take half. Gradient for p alone.
    """
    _need(
        _rows_alike(p1, p2, t1, t2),
        "byol needs two views' predictions and targets (B, d) alike", p1, p2, t1, t2,
    )  # fmt: skip
    return 4 + 2 * (negative_cosine(p1, t2) + negative_cosine(p2, t1))


@in_float32
def simsiam(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """SimSiam: predictions ``p1``, ``p2`` of the other view's projections ``z1``, ``z2``, (B, d).

        loss = -mean_i( cos(p1_i, z2_i) ) / 2 - mean_i( cos(p2_i, z1_i) ) / 2

    in [-1, 1], without gradient for z [Chen and He 2021, arXiv 2011.10566, equation 4].
    """
    _need(
        _rows_alike(p1, p2, z1, z2),
        "simsiam needs two views' predictions and projections (B, d) alike", p1, p2, z1, z2,
    )  # fmt: skip
    return (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2


# Redundancy reduction: dimensions that vary and are not correlated.


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix - torch.diag(matrix.diagonal())


@in_float32
def barlow_twins(
    z1: Tensor, z2: Tensor, off_diagonal: float = 0.0051, scale: float = 0.1
) -> Tensor:
    """Barlow Twins: the cross-correlation of two views' projections should be the identity.

    ``z1``, ``z2``: (B, d). With every dimension standardized over the n images of the global batch,
    x̂ = (x - mean x) / sqrt(var x + 1e-5), var biased as BatchNorm's,

        C = x̂1ᵀ x̂2 / n        loss = scale · ( sum_i (1 - C_ii)² + off_diagonal · sum_{i≠j} C_ij² )

    [Zbontar et al. 2021, arXiv 2103.03230, equations 1 and 2; scale as in the authors' and
    solo-learn's code]. Every rank returns the global loss. It all-reduces (2, d) twice and
    (d, d) once. The all-reduce in the authors' and solo-learn's code has no gradient: on W ranks
    theirs is 1/W of the loss's, which LARS undoes for matrices, but for the share of the decay, and
    not for biases and norms; other optimizers do not undo it.
    """
    _need(_rows_alike(z1, z2), "barlow_twins needs two views (B, d) alike", z1, z2)
    n = _global_batch("barlow_twins", z1)
    z = torch.stack([z1, z2])
    z = z - dist.total(z.sum(1, keepdim=True)) / n
    variance = dist.total(z.square().sum(1, keepdim=True)) / n
    x1, x2 = z / (variance + BARLOW_EPS).sqrt()
    correlation = dist.total(x1.T @ x2) / n
    on = (1 - correlation.diagonal()).square().sum()
    off = _off_diagonal(correlation).square().sum()
    return scale * (on + off_diagonal * off)


@in_float32
def vicreg(
    z1: Tensor,
    z2: Tensor,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Tensor:
    """VICReg: views close to each other, dimensions that vary, dimensions that do not covary.

    ``z1``, ``z2``: (B, d). Over the n images of the global batch,

        loss = invariance · s(z1, z2) + variance · (v(z1) + v(z2)) + covariance · (c(z1) + c(z2))
        s(x, y) = mean_ij (x_ij - y_ij)²
        v(x) = mean_j max(0, 1 - sqrt(Cov_jj + 1e-4))
        c(x) = sum_{i≠j} Cov_ij² / d,        Cov = sum_i (x_i - mean)(x_i - mean)ᵀ / (n - 1)

    [Bardes et al. 2022, arXiv 2105.04906, equations 1 to 6]. Sources differ in two points. Here s
    is a mean over dimensions too, as in every code and the paper's algorithm 1 (its equation 5 is d
    times that); v is summed over views, as in equation 6 and solo-learn (the authors' code and
    lightly take the mean: their coefficient 25 is 12.5 here).

    The projections are gathered, as in the authors' code. That sends 2·n·d numbers; to all-reduce
    both covariances would send 4·d², more as long as n < 2d. Each rank computes the whole v and c.
    """
    _need(_rows_alike(z1, z2), "vicreg needs two views (B, d) alike", z1, z2)
    n = _global_batch("vicreg", z1)
    loss = invariance * F.mse_loss(z1, z2)
    for z in dist.gather(torch.stack([z1, z2], dim=1)).unbind(1):
        centered = z - z.mean(0)
        matrix = centered.T @ centered / (n - 1)
        hinge = F.relu(1 - (matrix.diagonal() + VICREG_EPS).sqrt()).mean()
        repeated = _off_diagonal(matrix).square().sum() / len(matrix)
        loss = loss + variance * hinge + covariance * repeated
    return loss


# Clustering: predict the other view's assignment to prototypes.


@in_float32
def swav(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """SwAV: every crop predicts the codes of the two full crops, except its own.

    ``scores``: (V, B, K), of V >= 2 crops for K prototypes, the two full crops first; ``codes``:
    (2, B, K), the full crops' assignments from ``sinkhorn``, rows of sum 1. With
    p_v = softmax(scores_v / τ),

        loss = mean_{i in 1,2}( 1/(V-1) sum_{v != i} mean_b( -sum_k codes_ibk log p_vbk ) )

    [Caron et al. 2020, arXiv 2006.09882, equations 2 and 6; the paper sums over i and v, its code
    takes means]. Only the codes need other ranks' rows. Gradient for the scores alone.
    """
    _need(
        scores.ndim == 3 and len(scores) >= 2 and codes.shape == (2, *scores.shape[1:]),
        "swav needs scores (V, B, K), V >= 2, and codes (2, B, K)", scores, codes,
    )  # fmt: skip
    crops, batch, _ = scores.shape
    # Full crop 1 predicts code 2, full crop 2 predicts code 1, and small crops predict both.
    both = codes.sum(0, keepdim=True).expand(crops - 2, -1, -1)
    swapped = torch.cat([codes.flip(0), both]).detach()
    logits = scores.flatten(0, 1) / temperature
    total = F.cross_entropy(logits, swapped.flatten(0, 1), reduction="sum")
    return total / (2 * (crops - 1) * batch)


@torch.no_grad()
@in_float32
def sinkhorn(scores: Tensor, epsilon: float, steps: int) -> Tensor:
    """Assign N rows evenly to K prototypes: scores (N, K) -> codes (N, K), without gradient.

    exp(scores / epsilon) is divided ``steps`` >= 1 times by its column sums (all prototypes get
    the same total) and then by its row sums (every row sums to 1) [Caron et al. 2020, arXiv
    2006.09882, equation 5 and the authors' ``distributed_sinkhorn``]. It works on logarithms, which
    neither overflow nor give 0/0 for a prototype far from every row, as the authors' code does.

    It does not communicate: give it the gathered scores, and every rank computes the same.
    """
    _need(scores.ndim == 2, "sinkhorn needs scores (N, K)", scores)
    codes = scores / epsilon
    for _ in range(steps):
        codes = codes.log_softmax(0).log_softmax(1)
    return codes.exp()
