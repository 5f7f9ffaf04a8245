"""One protocol for every encoder: crops -> features of train and val, once -> every probe."""

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fastproj.core import dist
from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.evaluation import PROBES
from fastproj.evaluation.corruptions import check_corruptions
from fastproj.evaluation.depths import depths_of
from fastproj.evaluation.extract import Extractor
from fastproj.evaluation.features import Features
from fastproj.evaluation.files import FeaturesFile
from fastproj.evaluation.fold import folded
from fastproj.evaluation.load import LoadedEncoder
from fastproj.evaluation.probes.common import ProbeResult
from fastproj.evaluation.published import BATCH_SIZES
from fastproj.evaluation.results import Row
from fastproj.evaluation.sets import Sets
from fastproj.loaders import Loader
from fastproj.models.architectures import IMAGENET

Scored = Iterator[tuple[Row, ProbeResult | InputError]]
"""Rows with their results; where a probe cannot be run, with the reason."""
ALL = "all"  # of ``depths``: each that the encoder has
BATCH_SIZE = 256  # of probes that train on new crops, unless a protocol has its own
OnImages = Callable[[str, Mapping[str, Any]], ProbeResult]


def takes_images(probe: str) -> bool:
    """Whether the probe runs the encoder on images; the others take features of train and val."""
    return "encoder" in inspect.signature(PROBES[probe]).parameters


def _draws_crops(probe: str) -> bool:
    """Whether a probe of images trains on new crops of them; otherwise on features of train."""
    return "train_features" not in inspect.signature(PROBES[probe]).parameters


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
        if of_images and any(isinstance(sets.train, FeaturesFile) for sets in self.sets):
            raise InputError(
                f"eval.probes: {of_images[0]} runs the encoder on images, which a features file "
                "does not hold: leave it out, or give betons"
            )
        if "corruptions" in self.probes:
            check_corruptions(self.extractor.size, **self.probes["corruptions"])
            if self.extractor.crops != "center":
                raise InputError(
                    "eval.probes: corruptions are those of center crops: give --eval.crops center"
                )

    def score(self, name: str, encoder: LoadedEncoder | None, baseline: bool = False) -> Scored:
        """One row per set, depth and probe of ``encoder`` (None: the pixels), called ``name``.

        At another depth than h it is called ``name/depth``. With several ranks only the first one
        runs the probes; the others give no rows. A ``baseline`` is scored at those of the depths
        that it has: it has no projector. Probes that run the encoder on images score h alone.
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
                on_images = None
                if encoder and depth == "h":
                    on_images = partial(self._on_images, encoder, sets, train)
                yield from self._probe(row, train, val, sets.num_classes, on_images)

    def score_files(self) -> Scored:
        """One row per pair of features files and probe."""
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
        self,
        encoder: LoadedEncoder,
        sets: Sets,
        features: Features,
        probe: str,
        arguments: Mapping[str, Any],
    ) -> ProbeResult:
        """The result of a probe that runs the encoder on images; ``features``: those of train."""
        assert isinstance(sets.train, Beton) and isinstance(sets.val, Beton)
        mean, std = normalization(self.normalize, encoder, sets.train)
        module = encoder.module.to(memory_format=torch.channels_last).to(self.extractor.device)
        train: Loader | Features = features
        with ExitStack() as opened:
            if _draws_crops(probe):
                batch_size = BATCH_SIZES.get(probe, BATCH_SIZE)
                loader = self.extractor.draw(sets.train, batch_size, arguments["seed"])
                train = opened.enter_context(closing(loader))
            else:
                module = folded(module)  # as for the features of train
            val = opened.enter_context(closing(self._center().open(sets.val)))
            return PROBES[probe](
                module, train, val, sets.num_classes, mean=mean, std=std, **arguments
            )

    def _center(self) -> Extractor:
        """What probes that run the encoder on images score on."""
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
