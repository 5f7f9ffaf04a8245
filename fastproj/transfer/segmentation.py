"""Command: what an encoder says of each pixel. ``fastproj segment --cfg transfer/ade20k_linear``

Frozen encoder -> its last feature map -> a linear classifier of pixels -> mean intersection over
union.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from fastproj.core import dist
from fastproj.core.errors import InputError, SettingError
from fastproj.core.interruption import Interruption
from fastproj.models.architectures import IMAGENET
from fastproj.runs.start import start
from fastproj.settings import SEGMENT, SegmentSettings
from fastproj.transfer.batches import Sample, batches
from fastproj.transfer.pixels import MaskedSet, crops, open_masked, read_masked
from fastproj.transfer.run import Work, facts, run
from fastproj.transfer.segmenter import LinearPlan, Segmenter, confusion, mask_scores
from fastproj.transfer.training import as_float, each


class Segmentation(Work[SegmentSettings, MaskedSet]):
    """A linear classifier of pixels, its images, its mean intersection over union."""

    probe = "segmentation"

    def __init__(self, settings: SegmentSettings) -> None:
        super().__init__(settings)
        if settings.images.scale_min > settings.images.scale_max:
            raise SettingError("images.scale_min is larger than images.scale_max: exchange them")
        self.read = partial(read_masked, kind=settings.data.format)

    def open(self, splits: Sequence[str]) -> MaskedSet:
        data = self.settings.data
        return open_masked(data.format, data.root, splits, data.download)

    def build(self, rank: dist.Rank, device: torch.device) -> None:
        settings, encoder, optim = self.settings, self.encoder, self.settings.optim
        torch.manual_seed(settings.run.seed)  # of the new weights
        segmenter = Segmenter(
            encoder.module, self.train.classes, settings.images.size, encoder.mean, encoder.std
        )
        plan = LinearPlan(optim.steps, optim.lr, optim.warmup_steps, optim.weight_decay)
        self.start(segmenter, len(self.train.images), plan, rank, device)

    def batches(self, epoch: int, first: int) -> Iterator[list[Sample]]:
        how = self.settings.images
        scale = (how.scale_min, how.scale_max)
        return batches(
            self.train.images,
            self.order,
            epoch,
            first,
            read=self.read,
            transform=crops(how.size, scale, how.flip_prob, self.encoder.mean or IMAGENET[0]),
            workers=self.settings.data.workers,
        )

    @torch.no_grad()
    def score(self, interruption: Interruption) -> dict[str, float] | None:
        trainer, classes = self.trainer, self.val.classes
        trainer.agree()
        trainer.module.eval()
        counts = torch.zeros(classes, classes, dtype=torch.int64)

        def look(number: int, sample: Sample) -> None:
            (found,) = trainer.module([as_float(sample[0], trainer.device)])
            counts.add_(confusion(sample[1]["mask"], found.cpu(), classes))

        done = each(
            self.val.images,
            self.read,
            look,
            workers=self.settings.data.workers,
            progress="score",
            stop=interruption.requested,
        )
        if not done:
            return None
        total = torch.stack(dist.exchange(counts)).sum(0)
        if not total.any():
            raise InputError(f"no pixel of {self.val.name} has a class: nothing to score on")
        return mask_scores(total) if dist.is_main() else None


def segment(settings: SegmentSettings) -> Path:
    """Train and score the classifier that the settings describe; as ``run``."""
    return run(Segmentation(settings))


def main(argv: Sequence[str]) -> None:
    about = ("fastproj segment", "Classify pixels from a frozen encoder.")
    start(SEGMENT, argv, *about, segment, lambda settings: facts(Segmentation(settings)))
