"""One protocol for every encoder: crops -> features of train and val, once -> every probe."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastproj.core import dist
from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.evaluation import PROBES
from fastproj.evaluation.architectures import IMAGENET
from fastproj.evaluation.depths import depths_of
from fastproj.evaluation.extract import Extractor
from fastproj.evaluation.features import Features
from fastproj.evaluation.files import FeaturesFile
from fastproj.evaluation.load import LoadedEncoder
from fastproj.evaluation.probes.common import ProbeResult
from fastproj.evaluation.results import Row
from fastproj.evaluation.sets import Sets

Scored = list[tuple[Row, ProbeResult]]
ALL = "all"  # of ``depths``: each that the encoder has


def normalization(how: str, encoder: LoadedEncoder, train: Beton) -> tuple[Any, Any]:
    """Mean and standard deviation per channel, of pixels in [0, 1].

    ``how``: ``encoder`` takes what the encoder expects and, where it does not say, those of
    ``train``; ``data`` takes those of ``train``, ``imagenet`` ImageNet's.
    """
    if how == "imagenet":
        return IMAGENET
    if how == "data" or encoder.mean is None or encoder.std is None:
        return train.manifest.mean, train.manifest.std
    return encoder.mean, encoder.std


@dataclass(frozen=True)
class Protocol:
    """What an encoder is scored on, and how.

    ``extractor`` computes the features; ``normalize`` is the ``how`` of ``normalization``;
    ``depths`` are those of ``depths_of``, or ``all``. ``probes``: name in ``PROBES`` -> arguments.
    """

    sets: Sequence[Sets]
    extractor: Extractor
    probes: Mapping[str, Mapping[str, Any]]
    depths: Sequence[str] = ("h",)
    normalize: str = "encoder"

    def __post_init__(self) -> None:
        names = Counter(sets.name for sets in self.sets)
        if twice := [name for name, count in names.items() if count > 1]:
            raise InputError(f"two sets are called {twice[0]}: rename the folder of one")

    def score(self, name: str, encoder: LoadedEncoder | None, baseline: bool = False) -> Scored:
        """One row per set, depth and probe of ``encoder`` (None: the pixels), called ``name``.

        At another depth than h it is called ``name/depth``. With several ranks only the first one
        runs the probes; the others return no rows. A ``baseline`` is scored at those of the depths
        that it has: it has no projector.
        """
        found: Scored = []
        for sets in self.sets:
            start = time.perf_counter()
            at_depths, about = self._features(sets, encoder, baseline)
            seconds = time.perf_counter() - start
            for depth, (train, val) in at_depths.items() if dist.is_main() else ():
                row = Row(
                    encoder=name if depth == "h" else f"{name}/{depth}",
                    data=sets.name,
                    probe="",
                    metrics={},
                    protocol={
                        "data": sets.describe(),
                        "features": about | {"depth": depth, "width": train.features.shape[1]},
                    },
                    seconds={"features": seconds},
                )
                found += self._probe(row, train, val, sets.num_classes)
        return found

    def score_files(self) -> Scored:
        """One row per pair of features files and probe."""
        found: Scored = []
        for sets in self.sets:
            assert isinstance(sets.train, FeaturesFile) and isinstance(sets.val, FeaturesFile)
            train, val = (
                Features(part.features.features.to(self.extractor.device),
                         part.features.labels.to(self.extractor.device))
                for part in (sets.train, sets.val)
            )  # fmt: skip
            row = Row(
                encoder="file",
                data=sets.name,
                probe="",
                metrics={},
                protocol={
                    "data": sets.describe(),
                    "features": {"mode": "as in the files", "width": train.features.shape[1]},
                },
                seconds={"features": 0.0},
            )
            found += self._probe(row, train, val, sets.num_classes)
        return found

    def _probe(self, row: Row, train: Features, val: Features, num_classes: int) -> Scored:
        """``row`` once per probe, with its results."""
        found = []
        for probe, arguments in self.probes.items():
            result = PROBES[probe](train, val, num_classes, **arguments)
            done = replace(
                row,
                probe=probe,
                metrics=result.metrics,
                protocol=row.protocol | {"probe": result.protocol},
                seconds=row.seconds | {"probe": result.seconds},
            )
            found.append((done, result))
        return found

    def _features(
        self, sets: Sets, encoder: LoadedEncoder | None, baseline: bool
    ) -> tuple[dict[str, tuple[Features, Features]], dict[str, Any]]:
        """Depth -> features of train and val, and what the protocol says of them."""
        assert isinstance(sets.train, Beton) and isinstance(sets.val, Beton)
        if encoder is None:
            train, val = (self.extractor.raw(beton) for beton in (sets.train, sets.val))
            return {"h": (train, val)}, self.extractor.raw_about()
        mean, std = normalization(self.normalize, encoder, sets.train)
        has = depths_of(encoder.module, encoder.projector)
        wanted = has if ALL in self.depths else self.depths
        if baseline:
            wanted = [depth for depth in wanted if depth in has]
        ours, theirs = (
            self.extractor.encode(beton, encoder, wanted, (mean, std))
            for beton in (sets.train, sets.val)
        )
        about = self.extractor.about() | {
            "encoder": {**encoder.about, "weights": encoder.weights},
            "mean": list(mean),
            "std": list(std),
        }
        return {depth: (ours[depth], theirs[depth]) for depth in ours}, about
