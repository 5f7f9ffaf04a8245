"""Weighted nearest neighbors."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastproj.core.errors import InputError
from fastproj.core.linear import linear
from fastproj.evaluation.features import Features
from fastproj.evaluation.probes.common import ProbeResult, check, ranks

SIMILARITIES = 2**22  # entries of the similarity matrix held at once (16 MiB of float32),
QUERIES = 64  # or those of as many queries: fewer would read all of train for little work


def knn(
    train: Features,
    val: Features,
    num_classes: int | None = None,
    *,
    k: int | Sequence[int] = (20,),
    temperature: float | Sequence[float] = (0.07,),
) -> ProbeResult:
    """Weighted nearest neighbors: votes exp(cosine similarity / temperature) of the ``k`` nearest.

    Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
    section 3.4. Equally near neighbors are taken in the order of ``train``, equal votes go to the
    lower class, and a class without a vote is never a hit. ``num_classes`` None: the highest label
    of ``train`` and 1. Memory is bounded by ``SIMILARITIES`` and
    ``QUERIES``.

    Several ``k`` and ``temperature`` are scored in one pass over the similarities. Nothing is
    chosen among them: ``top1``, ``top5`` and the predictions are those of the first ``k`` with the
    first ``temperature``, the others' are further metrics, such as ``top1_k200_t0.07``. Published
    scores fix both, and leaving out one training image at a time, which reads no ``val``, would
    cost len(train) / len(val) times the probe itself.

    Raises ``InputError`` as ``linear_probe`` does, and for ``k`` above the number of training
    images.
    """
    start = time.perf_counter()
    num_classes = check(train, val, num_classes)
    counts = [k] if isinstance(k, int) else list(k)
    temperatures = [temperature] if isinstance(temperature, float | int) else list(temperature)
    for count in counts:
        if not 1 <= count <= len(train):
            raise InputError(
                f"kNN with k = {count} needs as many training images, there are {len(train)}"
            )
    bank = functional.normalize(train.features, dim=1)
    pairs = [(count, heat) for heat in temperatures for count in counts]
    hits = torch.zeros(len(pairs), 2, dtype=torch.int64, device=bank.device)
    predictions = []
    chunk = max(QUERIES, SIMILARITIES // len(bank))
    for queries, labels in zip(val.features.split(chunk), val.labels.split(chunk), strict=True):
        unit = functional.normalize(queries, dim=1)
        similarity = linear(unit, bank)
        near, rows = _nearest(similarity, max(counts))
        voters = functional.one_hot(train.labels[rows], num_classes).float()
        for at, (count, heat) in enumerate(pairs):
            # Relative to the nearest, so that no temperature overflows: a common factor of votes.
            weight = ((near[:, :count] - near[:, :1]) / heat).exp()
            votes = (weight.unsqueeze(1) @ voters[:, :count]).squeeze(1)
            rank = ranks(votes, labels)
            voted = votes.gather(1, labels.unsqueeze(1)).squeeze(1) > 0
            hits[at] += torch.stack([(rank < n).logical_and(voted).sum() for n in (1, 5)])
            if at == 0:
                predictions.append(votes.argmax(1))  # the lower class of equals
    metrics: dict[str, float] = {}
    for at, ((count, heat), found) in enumerate(zip(pairs, hits.double() / len(val), strict=True)):
        name = f"_k{count}_t{heat:g}" if at else ""
        metrics |= {f"top{n}{name}": share.item() for n, share in zip((1, 5), found, strict=True)}
    protocol = {
        "similarity": "cosine",
        "k": counts,
        "temperature": temperatures,
        "selection": "none: top1 and top5 are of the first k and the first temperature",
    }
    return ProbeResult(metrics, protocol, time.perf_counter() - start, torch.cat(predictions))


def _nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns, both (Q, k), of the ``k`` largest of each row (Q, N).

    Of equals at the end, the first columns. The ``k`` largest lie in the ``k`` groups of columns
    with the largest maxima: one pass finds these, and few columns are left to sort.
    """
    size = int((similarity.shape[1] / k) ** 0.5)  # columns per group, to keep both parts small
    groups = similarity.shape[1] // size
    best = similarity[:, : size * groups].unflatten(1, (size, groups)).amax(1)
    highest, group = best.topk(k, dim=1)
    column = torch.arange(similarity.shape[1], device=similarity.device)
    within = column[: size * groups : groups].view(-1, 1) + group.unsqueeze(1)
    rest = column[size * groups :].expand(len(similarity), -1)
    columns = torch.cat([within.flatten(1), rest], dim=1)
    candidates = similarity.gather(1, columns)
    values, at = candidates.topk(k, dim=1)
    columns = columns.gather(1, at)
    last = values[:, -1:]
    tied = (candidates >= last).sum(1) > k
    tied |= (best >= last).sum(1) > (highest >= last).sum(1)
    if tied.any():  # rare: topk may have taken any of the equals
        order = similarity[tied].sort(dim=1, descending=True, stable=True).indices
        columns[tied] = order[:, :k]
    # Of equals the first columns come first: fewer neighbors than k may vote as well.
    columns = columns.sort(1).values
    values, order = similarity.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)
