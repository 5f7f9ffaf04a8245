"""One protocol for every encoder: center crops -> features of train and val -> every probe."""

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton, open_beton
from fastproj.evaluation import PROBES
from fastproj.evaluation.features import Features, features, pixels
from fastproj.evaluation.pretrained import Pretrained
from fastproj.evaluation.probes.common import ProbeResult
from fastproj.evaluation.results import Row
from fastproj.loaders import Center, Loader, open_loader

PIXELS = 32  # largest side of the raw-pixel baseline: 224 would be 150,528 features per image


def open_sets(train: str, val: str) -> tuple[Beton, Beton]:
    """Both betons; ``InputError`` unless they have the same two or more classes."""
    ours, theirs = open_beton(train), open_beton(val)
    if len(ours.classes) < 2:
        raise InputError(f"{ours.path} has {len(ours.classes)} class: a probe needs at least 2")
    for one, other in zip_longest(ours.classes, theirs.classes):
        if one != other:
            raise InputError(
                f"{ours.path} has class {one} where {theirs.path} has {other}: write both from one "
                "dataset"
            )
    return ours, theirs


@dataclass(frozen=True)
class Protocol:
    """What an encoder is scored on, and how.

    ``size``: side of the center crop, pixels; ``crop_fraction``: of the shorter side.
    ``loader``: further arguments of ``open_loader``. ``probes``: name in ``PROBES`` -> arguments.
    """

    train: Beton
    val: Beton
    size: int
    crop_fraction: float
    batch_size: int
    device: torch.device
    loader: Mapping[str, Any]
    probes: Mapping[str, Mapping[str, Any]]

    def score(
        self, name: str, encoder: nn.Module | None, weights: str, pretrained: Pretrained
    ) -> list[tuple[Row, ProbeResult]]:
        """One row per probe of ``encoder`` (None: the pixels themselves), called ``name`` there.

        ``weights`` says where the encoder's weights are from. Images are normalized by the
        ``pretrained`` encoder's mean and standard deviation.
        """
        size = self.size if encoder else min(self.size, PIXELS)
        about: dict[str, Any] = {
            "crop": {"kind": "center", "size": size, "crop_fraction": self.crop_fraction}
        }
        if encoder:
            encoder.to(memory_format=torch.channels_last).to(self.device)
            about |= {
                "encoder": {
                    "name": pretrained.encoder,
                    "stem": pretrained.stem,
                    "weights": weights,
                },
                "mode": "frozen, eval mode, float32",
                "mean": list(pretrained.mean),
                "std": list(pretrained.std),
            }
        start = time.perf_counter()
        train, val = (
            self._features(beton, encoder, size, pretrained) for beton in (self.train, self.val)
        )
        seconds = time.perf_counter() - start
        found = []
        for probe, arguments in self.probes.items():
            result = PROBES[probe](train, val, len(self.train.classes), **arguments)
            row = Row(
                encoder=name,
                data=self.val.manifest.dataset,
                probe=probe,
                metrics=result.metrics,
                protocol={
                    "data": {
                        "train": describe(self.train),
                        "val": describe(self.val),
                        "classes": len(self.train.classes),
                    },
                    "features": about | {"width": train.features.shape[1]},
                    "probe": result.protocol,
                },
                seconds={"features": seconds, "probe": result.seconds},
            )
            found.append((row, result))
        return found

    def _features(
        self, beton: Beton, encoder: nn.Module | None, size: int, pretrained: Pretrained
    ) -> Features:
        loader = center_loader(
            beton, size, self.crop_fraction, self.batch_size, self.device, self.loader
        )
        with closing(loader):
            if encoder is None:
                return pixels(loader, self.device)
            return features(
                encoder, loader, mean=pretrained.mean, std=pretrained.std, device=self.device
            )


def center_loader(
    beton: Beton,
    size: int,
    crop_fraction: float,
    batch_size: int,
    device: torch.device,
    more: Mapping[str, Any],
) -> Loader:
    """Each image of ``beton`` once, in order, as its center crop; ``more``: of ``open_loader``."""
    return open_loader(
        beton,
        [Center(size, crop_fraction)],
        min(batch_size, len(beton)),
        device=device,
        shuffle=False,
        drop_last=False,
        **more,
    )


def describe(beton: Beton) -> dict[str, Any]:
    return {"file": str(beton.path), "content": beton.manifest.content, "images": len(beton)}
