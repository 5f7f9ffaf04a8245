"""Weighted nearest neighbors."""

import time
from collections.abc import Sequence

import torch
from torch.nn import functional

from fastproj.core.errors import InputError
from fastproj.evaluation.features import Features
from fastproj.evaluation.probes.common import ProbeResult, check, ranks
from fastproj.evaluation.probes.nearest import Bank

QUERIES = 64  # whose votes are counted at once


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
    of ``train`` and 1.

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
    found = Bank(train.features).nearest(val.features, max(counts))
    pairs = [(count, heat) for heat in temperatures for count in counts]
    hits = torch.zeros(len(pairs), 2, dtype=torch.int64, device=val.features.device)
    predictions = []
    parts = (whole.split(QUERIES) for whole in (*found, val.labels))
    for near, rows, labels in zip(*parts, strict=True):
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
