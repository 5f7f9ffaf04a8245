"""One protocol for every encoder: crops -> features of train and val, once -> every probe."""

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fastproj.core import dist
from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.evaluation import PROBES
from fastproj.evaluation.depths import depths_of
from fastproj.evaluation.extract import Extractor
from fastproj.evaluation.features import Features
from fastproj.evaluation.files import FeaturesFile
from fastproj.evaluation.load import LoadedEncoder
from fastproj.evaluation.probes.common import ProbeResult
from fastproj.evaluation.published import BATCH_SIZES
from fastproj.evaluation.results import Row
from fastproj.evaluation.sets import Sets
from fastproj.models.architectures import IMAGENET

Scored = Iterator[tuple[Row, ProbeResult | InputError]]
"""Rows with their results; where a probe cannot be run, with the reason."""
ALL = "all"  # of ``depths``: each that the encoder has
BATCH_SIZE = 256  # of probes that run the encoder on new crops, unless a protocol has its own
OnImages = Callable[[str, Mapping[str, Any]], ProbeResult]


def takes_images(probe: str) -> bool:
    """Whether the probe runs the encoder on new crops; the others take features."""
    return "encoder" in inspect.signature(PROBES[probe]).parameters


def normalization(how: str, encoder: LoadedEncoder, train: Beton) -> tuple[Any, Any]:
    """Mean and standard deviation per channel, of pixels in [0, 1].

    ``how``: ``encoder`` takes what the encoder expects and, where it does not say, those of
    ``train``; ``data`` takes those of ``train``, ``imagenet`` ImageNet's.
    """
    return _stated(how, encoder) or (train.manifest.mean, train.manifest.std)


def describe_normalization(how: str, encoder: LoadedEncoder) -> str:
    """The same in words, for every training set."""
    stated = _stated(how, encoder)
    return in_words(*stated) if stated else "mean and std of each training set"


def _stated(how: str, encoder: LoadedEncoder) -> Any:
    """Mean and standard deviation that are the same for every training set, or None."""
    if how == "imagenet":
        return IMAGENET
    known = how == "encoder" and encoder.mean is not None and encoder.std is not None
    return (encoder.mean, encoder.std) if known else None


def in_words(mean: Sequence[float], std: Sequence[float]) -> str:
    """``mean 0.5, 0.5, 0.5 and std 0.5, 0.5, 0.5``."""
    one, other = (", ".join(f"{value:.4g}" for value in values) for values in (mean, std))
    return f"mean {one} and std {other}"


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
        of_images = [probe for probe in self.probes if takes_images(probe)]
        if of_images and not {"h", ALL} & {*self.depths}:
            raise InputError(
                f"eval.probes: {of_images[0]} runs the whole encoder: give eval.depths h as well"
            )

    def score(self, name: str, encoder: LoadedEncoder | None, baseline: bool = False) -> Scored:
        """One row per set, depth and probe of ``encoder`` (None: the pixels), called ``name``.

        At another depth than h it is called ``name/depth``. With several ranks only the first one
        runs the probes; the others give no rows. A ``baseline`` is scored at those of the depths
        that it has: it has no projector. Probes that run the encoder on new crops score h alone.
        """
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
                on_images = encoder and depth == "h" and partial(self._on_images, encoder, sets)
                yield from self._probe(row, train, val, sets.num_classes, on_images or None)

    def score_files(self) -> Scored:
        """One row per pair of features files and probe; ``InputError`` for a probe of images."""
        if of_images := [probe for probe in self.probes if takes_images(probe)]:
            raise InputError(
                f"eval.probes: {of_images[0]} runs the encoder on new crops, which a features file "
                "does not hold: leave it out, or give betons"
            )
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
            yield from self._probe(row, train, val, sets.num_classes)

    def _probe(
        self,
        row: Row,
        train: Features,
        val: Features,
        num_classes: int,
        on_images: OnImages | None = None,
    ) -> Scored:
        """``row`` once per probe, with its results; those of images only with ``on_images``."""
        for probe, arguments in self.probes.items():
            about = row.protocol["features"]
            try:
                if not takes_images(probe):
                    result = PROBES[probe](train, val, num_classes, **arguments)
                elif on_images:
                    result, about = on_images(probe, arguments), about | self._center().about()
                else:
                    continue
            except InputError as error:  # the other probes go on, and with them the other ranks
                yield replace(row, probe=probe), error
                continue
            done = replace(
                row,
                probe=probe,
                metrics=result.metrics,
                protocol=row.protocol | {"features": about, "probe": result.protocol},
                seconds=row.seconds | {"probe": result.seconds},
            )
            yield done, result

    def _on_images(
        self, encoder: LoadedEncoder, sets: Sets, probe: str, arguments: Mapping[str, Any]
    ) -> ProbeResult:
        """The result of a probe that runs the encoder on new crops of the sets."""
        assert isinstance(sets.train, Beton) and isinstance(sets.val, Beton)
        mean, std = normalization(self.normalize, encoder, sets.train)
        module = encoder.module.to(memory_format=torch.channels_last).to(self.extractor.device)
        batch_size = BATCH_SIZES.get(probe, BATCH_SIZE)
        with (
            closing(self.extractor.draw(sets.train, batch_size, arguments["seed"])) as train,
            closing(self._center().open(sets.val)) as val,
        ):
            return PROBES[probe](
                module, train, val, sets.num_classes, mean=mean, std=std, **arguments
            )

    def _center(self) -> Extractor:
        """What probes that run the encoder on new crops score on."""
        return replace(self.extractor, crops="center")

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
            if not wanted:
                return {}, {}
        ours, theirs = (
            self.extractor.encode(beton, encoder, wanted, (mean, std))
            for beton in (sets.train, sets.val)
        )
        about = self.extractor.about() | {
            "encoder": {
                **encoder.about,
                "weights": encoder.weights,
                "saw_labels_of_train": encoder.labeled == sets.train.manifest.content,
            },
            "mean": list(mean),
            "std": list(std),
        }
        # Of features that were kept, only the first rank has any.
        return {depth: (ours[depth], theirs[depth]) for depth in ours if depth in theirs}, about
