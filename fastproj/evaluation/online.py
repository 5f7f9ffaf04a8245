"""Online accuracy: a run under way, scored on validation images by the probe that it trains.

It is what solo-learn and others publish as online accuracy. It is no offline accuracy: the probe
has seen the changing features of augmented views for as many steps as the encoder has trained, and
nothing about it is chosen. So its names say online, and it never goes into ``eval.json``.
"""

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastproj.core.device import exact_float32
from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.evaluation.extract import Extractor
from fastproj.evaluation.features import Features, features
from fastproj.evaluation.probes.common import ranks
from fastproj.evaluation.probes.neighbors import knn
from fastproj.evaluation.sets import describe
from fastproj.models.frozen import frozen


@dataclass(frozen=True)
class OnlineAccuracy:
    """What a run under way is scored on, and how.

    ``train``: the beton that the run trains on, whose features are kNN's bank; ``val``: the one
    that is scored, of the same classes. ``size``: side of the center crop, pixels;
    ``crop_fraction``: of the shorter side; ``batch_size``: images in one forward pass; ``k`` and
    ``temperature``: those of ``knn``; ``loader``: further arguments of ``open_loader``.

    Raises ``InputError`` for a set with unlabeled images and for ``k`` above the number of training
    images.
    """

    train: Beton
    val: Beton
    size: int
    crop_fraction: float = 1.0
    batch_size: int = 512
    k: int = 20
    temperature: float = 0.07
    loader: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for beton in (self.train, self.val):
            unlabeled = int((beton.label < 0).sum())
            if unlabeled:
                raise InputError(
                    f"{unlabeled} of {len(beton)} images of {beton.path} have no label: online "
                    "accuracy needs them (--train.online_every 0: none)"
                )
        if self.k > len(self.train):
            raise InputError(
                f"kNN with k = {self.k} needs as many training images, {self.train.path} has "
                f"{len(self.train)}: lower --eval.knn_k"
            )

    def score(self, encoder: nn.Module, probe: nn.Module) -> dict[str, Any]:
        """``online_top1``, ``online_top5`` and ``online_knn_top1``: fractions of ``val`` in [0, 1].

        ``encoder`` maps images (B, 3, h, w) to features (B, d), ``probe`` features to logits (B,
        classes); both lie on one device. The first two scores are the probe's, the last is that of
        kNN among the features of ``train``. Images are normalized by the mean and standard
        deviation of ``train``. ``seconds`` and ``protocol`` say how long it took and how it was
        done.

        Modules run in eval mode and float32 (not TF32), without gradients. Neither their weights,
        buffers and training flags nor torch's random state are changed.

        Raises ``InputError`` for features that are not finite.
        """
        start = time.perf_counter()
        device = next(probe.parameters()).device
        with exact_float32():
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                train, val = (
                    self._features(beton, encoder, device) for beton in (self.train, self.val)
                )
            classes = len(self.train.classes)
            nearest = knn(train, val, classes, k=self.k, temperature=self.temperature)
            scores = top_1_and_5(probe, val)
        return {
            **scores,
            "online_knn_top1": nearest.metrics["top1"],
            "seconds": time.perf_counter() - start,
            "protocol": {
                "data": {"train": describe(self.train), "val": describe(self.val)},
                "crop": {
                    "kind": "center",
                    "size": self.size,
                    "crop_fraction": self.crop_fraction,
                },
                "knn": nearest.protocol,
            },
        }

    def _features(self, beton: Beton, encoder: nn.Module, device: torch.device) -> Features:
        extractor = Extractor(
            self.size,
            device,
            self.crop_fraction,
            batch_size=self.batch_size,
            loader=self.loader,
        )
        stored = self.train.manifest
        with closing(extractor.open(beton)) as loader:
            return features(encoder, loader, mean=stored.mean, std=stored.std, device=device)


@torch.no_grad()
def top_1_and_5(probe: nn.Module, val: Features) -> dict[str, float]:
    """``online_top1`` and ``online_top5`` of the logits ``probe(features)`` (N, classes).

    Fractions in [0, 1]; of equal logits the lower class comes first.
    """
    with frozen(probe):
        rank = ranks(probe(val.features), val.labels)
    return {f"online_top{n}": (rank < n).double().mean().item() for n in (1, 5)}
