"""Command: what an encoder is worth in detection. ``fastproj transfer --cfg transfer/voc_small``

Encoder -> its feature maps -> Faster or Mask R-CNN of torchvision's parts, fine-tuned or on the
frozen encoder -> average precision. The run folder, its journal, stops, resuming and ranks are
those of ``fastproj train``; ``eval.json`` gets one row.
"""

import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastproj.core import dist
from fastproj.core.device import choose_device, choose_precision, prepare_device
from fastproj.core.errors import InputError
from fastproj.core.files import sha256
from fastproj.core.interruption import Interruption
from fastproj.evaluation.load import LoadedEncoder, load_encoder
from fastproj.evaluation.results import Evaluation, Row, write_evaluation
from fastproj.loaders.order import Order
from fastproj.runs import checkpoint, resume
from fastproj.runs.environment import versions
from fastproj.runs.folder import RunFolder
from fastproj.runs.journal import Journal, StepMeter
from fastproj.runs.sinks import open_sinks
from fastproj.runs.start import start
from fastproj.settings import TRANSFER, TransferSettings
from fastproj.transfer.batches import Sample, augmentation, batches, trainable
from fastproj.transfer.detector import build_detector, weights_line
from fastproj.transfer.scores import coco_scores, voc_scores
from fastproj.transfer.sets import DetectionSet, open_set
from fastproj.transfer.training import DetectorTrainer, Plan, detect


@dataclass(frozen=True)
class Task:
    """The parts of a run, as its settings say. Each is opened when it is first asked for."""

    settings: TransferSettings

    @cached_property
    def train(self) -> DetectionSet:
        return self._set(self.settings.data.train)

    @cached_property
    def val(self) -> DetectionSet:
        return self._set(self.settings.data.val)

    def _set(self, splits: Sequence[str]) -> DetectionSet:
        data = self.settings.data
        return open_set(data.format, data.root, splits, data.download)

    @cached_property
    def content(self) -> str:
        """The digest of both sets."""
        return f"{self.train.content()} {self.val.content()}"

    @cached_property
    def file(self) -> Path:
        """The encoder's file."""
        path = Path(self.settings.detector.checkpoint)
        if not path.is_dir():
            return path
        newest = checkpoint.latest(RunFolder.open(path).checkpoints)
        if newest is None:
            raise InputError(f"{path} holds no checkpoint: train first")
        return newest

    @cached_property
    def encoder(self) -> LoadedEncoder:
        found = load_encoder(self.file, self.settings.detector.encoder)
        if self.settings.detector.weights == "random":
            return found.at_random(self.settings.run.seed)
        return found


class Run:
    """A detector's run: its batches, its steps, its scores."""

    def __init__(self, task: Task, rank: dist.Rank, device: torch.device) -> None:
        self.task, settings = task, task.settings
        how, images, optim = settings.detector, settings.images, settings.optim
        encoder = task.encoder
        torch.manual_seed(settings.run.seed)  # of the detector's new weights
        detector = build_detector(
            encoder.module,
            len(task.train.classes),
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
        self.weights = weights_line(encoder, detector)
        self.images = trainable(task.train.images)
        if optim.batch_size % rank.world_size:
            raise InputError(
                f"optim.batch_size {optim.batch_size} cannot be shared by {rank.world_size} ranks: "
                "make it a multiple"
            )
        self.order = Order(
            len(self.images),
            optim.batch_size // rank.world_size,
            settings.run.seed,
            rank=rank.rank,
            world_size=rank.world_size,
        )
        self.trainer = DetectorTrainer(
            detector,
            Plan(
                optim.steps,
                optim.lr,
                [int(step) for step in optim.milestones or ()],
                optim.warmup_steps,
                optim.momentum,
                optim.weight_decay,
            ),
            device,
            precision=choose_precision(settings.train.precision, device),
            seed=settings.run.seed,
        )

    def batches(self, epoch: int, first: int) -> Iterator[list[Sample]]:
        """This rank's batches of ``epoch``, from its step ``first`` on."""
        settings = self.task.settings
        images = settings.images
        sizes = [int(size) for size in images.train_sizes]
        return batches(
            self.images,
            self.order,
            epoch,
            first,
            masks=settings.detector.masks,
            transform=augmentation(sizes, images.max_size, images.flip_prob),
            workers=settings.data.workers,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the trainer's state, and of what run and which data it is."""
        return {
            "settings": self.task.settings.flat(),
            "data": self.task.content,
            "cursor": list(divmod(self.trainer.step, self.order.steps)),
            **self.trainer.state_dict(),
        }

    def score(self, interruption: Interruption) -> dict[str, float] | None:
        """The average precisions on val; None after a stop. Only rank 0 computes them."""
        settings, trainer = self.task.settings, self.trainer
        if settings.detector.precise_bn:
            # Batches of an epoch that training does not reach.
            epoch = 1 + settings.optim.steps // self.order.steps
            trainer.calibrate(islice(self.batches(epoch, 0), settings.detector.precise_bn))
        trainer.agree()
        val = self.task.val
        found = detect(
            trainer.detector,
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
    """Run, or resume, what the settings describe; returns the run folder.

    Raises InputError for what the user must fix. An interrupted run saves where it stands and
    leaves with exit code 128 + the signal's number.
    """
    run = resume.folder(settings.run.dir, settings.run.name, settings.run.resume)
    device = choose_device(settings.run.device)
    rank = dist.start(device, settings.run.timeout)
    try:
        device = prepare_device(device, rank.local_rank, tf32=True)
        torch.backends.cudnn.benchmark = False  # it times each shape, and images have hundreds
        if resume.nothing_to_do(run, settings.run.resume):
            return run.path
        found = resume.agreed_checkpoint(run, settings.run.resume, settings.train.log_to or ())
        with dist.together():
            task = Task(settings)
            assert task.train and task.val and task.encoder  # what can fail on one rank alone
        work = Run(task, rank, device)
        with dist.together():
            if found:
                root = Path(settings.data.root)
                resume.restore(
                    found, settings.flat(), task.content, root, work.trainer.load_state_dict
                )
            journal = _open_journal(run, found, work)
        with (
            Interruption() as interruption,
            journal,
            checkpoint.Writer() as writer,
            dist.losing_ranks(),
        ):
            _loop(work, run, journal, writer, interruption)
    finally:
        dist.stop()
    if interruption.signal:
        raise SystemExit(128 + interruption.signal)
    return run.path


def _open_journal(run: RunFolder, found: Path | None, work: Run) -> Journal:
    settings = work.task.settings
    if dist.is_main():
        run.path.mkdir(parents=True, exist_ok=True)
        left = len(work.task.train.images) - len(work.images)
        print(f"run folder: {run.path}\n{work.weights}", file=sys.stderr, flush=True)
        if left:
            print(
                f"note: {left} of {len(work.task.train.images)} images of "
                f"{work.task.train.name} have no object to train on: left out",
                file=sys.stderr,
            )
    step = work.trainer.step
    names = settings.train.log_to or () if dist.is_main() else ()
    sinks = open_sinks(names, run, settings.flat(), step)
    return resume.open_journal(run, found, settings.to_yaml(), settings.optim.steps, step, sinks)


def _loop(
    work: Run,
    run: RunFolder,
    journal: Journal,
    writer: checkpoint.Writer,
    interruption: Interruption,
) -> None:
    trainer, how = work.trainer, work.task.settings.train
    first, total = trainer.step, trainer.plan.steps
    last = min(total, first + (how.stop_after or total))
    meter = StepMeter(journal, work.task.settings.optim.batch_size, how.log_every)
    journal.event("start", step=first, steps=total, loader=f"{len(work.images)} images")

    def save() -> None:
        if dist.is_main():
            path = checkpoint.step_path(run.checkpoints, trainer.step)
            told = partial(journal.event, "checkpoint", step=trainer.step, file=path.name)
            writer.save(path, work.state(), how.keep, told)
        meter.pause()

    if first == 0:
        save()  # so that a run killed before its next checkpoint can be resumed as well
        writer.wait()
    stopped = False
    while trainer.step < last and not stopped:
        epoch, place = divmod(trainer.step, work.order.steps)
        meter.begin_epoch(epoch, trainer.step)
        for batch in meter.batches(work.batches(epoch, place)):
            metrics = trainer.train_step(batch)
            logged = meter.step(trainer.step, metrics, trainer.optimizer.param_groups[0]["lr"])
            writer.check()
            stopped = interruption.requested(agree=logged)
            if stopped or trainer.step == last:
                break
            if trainer.step % how.checkpoint_every == 0:
                save()
        meter.end_epoch(trainer.step, dict)
    if trainer.step > first:
        save()
        writer.wait()
    if trainer.step < total or stopped:
        return
    start = time.perf_counter()
    scores = work.score(interruption)
    if scores is not None:
        epoch = (total - 1) // work.order.steps
        seconds = time.perf_counter() - start
        journal.event("probe", step=total, epoch=epoch, **scores)
        print("  ".join(f"{name} {value:.2%}" for name, value in scores.items()), flush=True)
        write_evaluation(run, _evaluation(work, scores, seconds), {})
        meter.pause()
        meter.end(total)


def _evaluation(work: Run, scores: dict[str, float], seconds: float) -> Evaluation:
    task = work.task
    how = task.settings.detector
    row = Row(
        encoder=how.weights,
        data=task.val.name,
        probe="detection",
        metrics=scores,
        protocol={
            "data": {"content": task.content, "train": len(work.images)},
            "features": {"encoder": dict(task.encoder.about), "weights": work.weights},
            "probe": task.settings.flat(),
        },
        seconds={"features": 0.0, "probe": seconds},
    )
    return Evaluation(
        checkpoint={
            "file": str(task.file),
            "sha256": sha256(task.file),
            "step": task.encoder.step,
            "epoch": task.encoder.epoch,
        },
        versions={
            **versions(),
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if work.trainer.device.type == "cuda" else "cpu",
        },
        rows=(row,),
    )


def _facts(settings: TransferSettings) -> dict[str, str]:
    if settings.data.download:
        raise InputError("data.download: fetch the set with one process, then start the ranks")
    task = Task(settings)
    return {"the content of the sets": task.content, "the encoder's file": sha256(task.file)}


def main(argv: Sequence[str]) -> None:
    about = ("fastproj transfer", "Train a detector on an encoder, and score it.")
    start(TRANSFER, argv, *about, transfer, _facts)
