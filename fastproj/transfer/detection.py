"""Command: what an encoder is worth in detection. ``fastproj transfer --cfg transfer/voc_small``

Encoder -> its feature maps -> Faster or Mask R-CNN of torchvision's parts, fine-tuned or on the
frozen encoder -> average precision.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from fastproj.core import dist
from fastproj.core.interruption import Interruption
from fastproj.runs.start import start
from fastproj.settings import TRANSFER, TransferSettings
from fastproj.transfer.batches import Sample, batches
from fastproj.transfer.detector import StepPlan, build_detector, detect
from fastproj.transfer.objects import augmentation, read, require_outlines, trainable
from fastproj.transfer.run import Work, facts, run
from fastproj.transfer.scores import coco_scores, voc_scores
from fastproj.transfer.sets import DetectionSet, open_set, same_classes


class Detection(Work[TransferSettings, DetectionSet]):
    """A detector, its images, its average precision."""

    probe = "detection"

    def open(self, splits: Sequence[str]) -> DetectionSet:
        data = self.settings.data
        return open_set(data.format, data.root, splits, data.download)

    def build(self, rank: dist.Rank, device: torch.device) -> None:
        settings, encoder, train, val = self.settings, self.encoder, self.train, self.val
        same_classes({train.name: train.classes, val.name: val.classes})
        how, images, optim = settings.detector, settings.images, settings.optim
        if how.masks:
            require_outlines(train.name, train.images, crowds=False)
            require_outlines(val.name, val.images)
        torch.manual_seed(settings.run.seed)  # of the detector's new weights
        detector = build_detector(
            encoder.module,
            len(train.classes),
            head=how.head,
            masks=how.masks,
            frozen=how.frozen,
            sync_bn=how.sync_bn,
            proposals=how.proposals,
            rois=how.rois,
            min_size=images.val_size,
            max_size=images.max_size,
            mean=encoder.mean,
            std=encoder.std,
        )
        self.images = trainable(train.images)
        if left := len(train.images) - len(self.images):
            self.left_out = (
                f"{left} of {len(train.images)} images of {train.name} have no object to train on: "
                "left out"
            )
        plan = StepPlan(
            optim.steps,
            optim.lr,
            [int(step) for step in optim.milestones or ()],
            optim.warmup_steps,
            optim.momentum,
            optim.weight_decay,
        )
        self.start(detector, len(self.images), plan, rank, device)

    def batches(self, epoch: int, first: int) -> Iterator[list[Sample]]:
        images = self.settings.images
        sizes = [int(size) for size in images.train_sizes]
        return batches(
            self.images,
            self.order,
            epoch,
            first,
            read=partial(read, masks=self.settings.detector.masks),
            transform=augmentation(sizes, images.max_size, images.flip_prob),
            workers=self.settings.data.workers,
        )

    def score(self, interruption: Interruption) -> dict[str, float] | None:
        """The average precisions on val; None after a stop. Only rank 0 computes them."""
        settings, trainer = self.settings, self.trainer
        if settings.detector.precise_bn:
            # Batches of an epoch that training does not reach.
            epoch = 1 + settings.optim.steps // self.order.steps
            trainer.calibrate(islice(self.batches(epoch, 0), settings.detector.precise_bn))
        trainer.agree()
        val = self.val
        found = detect(
            trainer.module,
            val.images,
            trainer.device,
            workers=settings.data.workers,
            progress="score",
            stop=interruption.requested,
        )
        if found is None or not dist.is_main():
            return None
        scores = voc_scores if settings.data.format == "voc" else None
        more = scores(val.images, val.classes, found) if scores else {}
        return more | coco_scores(val.images, val.classes, found)


def transfer(settings: TransferSettings) -> Path:
    """Train and score the detector that the settings describe; as ``run``."""
    return run(Detection(settings))


def main(argv: Sequence[str]) -> None:
    about = ("fastproj transfer", "Train a detector on an encoder, and score it.")
    start(TRANSFER, argv, *about, transfer, lambda settings: facts(Detection(settings)))
