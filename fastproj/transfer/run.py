"""A run that trains on an encoder and scores it: the same for detection and for segmentation.

The run folder, its journal, stops, resuming and ranks are those of ``fastproj train``; the row of
``eval.json`` is one.
"""

import platform
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from fastproj.core import dist
from fastproj.core.device import choose_device, choose_precision, prepare_device
from fastproj.core.errors import InputError, SettingError
from fastproj.core.files import sha256
from fastproj.core.interruption import Interruption
from fastproj.evaluation.load import LoadedEncoder, load_encoder
from fastproj.evaluation.protocol import in_words
from fastproj.evaluation.results import Evaluation, Row, write_evaluation
from fastproj.loaders.order import Order
from fastproj.models.architectures import IMAGENET
from fastproj.runs import checkpoint, resume
from fastproj.runs.environment import versions
from fastproj.runs.folder import RunFolder
from fastproj.runs.journal import Journal, StepMeter
from fastproj.runs.sinks import open_sinks
from fastproj.settings import SegmentSettings, TransferSettings
from fastproj.transfer.batches import Sample
from fastproj.transfer.training import Plan, Trainer


class ImageSet(Protocol):
    """Images with annotations: a name, and a digest of what they hold."""

    @property
    def name(self) -> str: ...

    @property
    def images(self) -> Sequence[Any]: ...

    def content(self) -> str: ...


C = TypeVar("C", bound=ImageSet)
S = TypeVar("S", TransferSettings, SegmentSettings)


class Work(ABC, Generic[S, C]):
    """What is trained on an encoder and scored: a subclass says what, on which sets.

    The parts are opened when they are first asked for; ``build`` makes those that train.
    ``probe``: its name in ``eval.json``. ``weights``: one line, which of the encoder's tensors are
    in use. ``left_out``: one line more, or empty.
    """

    probe: str
    trainer: Trainer
    order: Order
    weights: str
    left_out = ""

    def __init__(self, settings: S) -> None:
        self.settings: S = settings

    @abstractmethod
    def open(self, splits: Sequence[str]) -> C:
        """The set of ``splits``; ``InputError`` where it cannot be used."""

    @abstractmethod
    def build(self, rank: dist.Rank, device: torch.device) -> None:
        """Make the trainer, the order and what else a step takes."""

    @abstractmethod
    def batches(self, epoch: int, first: int) -> Iterator[list[Sample]]:
        """This rank's batches of ``epoch``, from its step ``first`` on."""

    @abstractmethod
    def score(self, interruption: Interruption) -> dict[str, float] | None:
        """The scores on val; None after a stop, and on all ranks but the first."""

    @cached_property
    def train(self) -> C:
        return self.open(self.settings.data.train)

    @cached_property
    def val(self) -> C:
        return self.open(self.settings.data.val)

    @cached_property
    def content(self) -> str:
        """The digest of both sets."""
        return f"{self.train.content()} {self.val.content()}"

    @cached_property
    def file(self) -> Path | None:
        """The encoder's file; None where a function gives its weights."""
        chosen = self.settings.encoder
        if chosen.checkpoint is None:
            if chosen.name is None:
                raise SettingError(
                    "give --encoder.checkpoint a run folder or a file with an encoder's weights"
                )
            return None
        path = Path(chosen.checkpoint)
        if not path.is_dir():
            return path
        newest = checkpoint.latest(RunFolder.open(path).checkpoints)
        if newest is None:
            raise InputError(f"{path} holds no checkpoint: train first")
        return newest

    @cached_property
    def encoder(self) -> LoadedEncoder:
        found = load_encoder(self.file, self.settings.encoder.name, setting="encoder.name")
        if self.settings.encoder.weights == "random":
            return found.at_random(self.settings.run.seed)
        return found

    def start(self, module: nn.Module, images: int, plan: Plan, rank: dist.Rank,
              device: torch.device) -> None:  # fmt: skip
        """Give ``module`` its trainer, and the ``images`` to train on their order."""
        settings, size = self.settings, self.settings.optim.batch_size
        if size % rank.world_size:
            raise InputError(
                f"optim.batch_size {size} cannot be shared by {rank.world_size} ranks: make it a "
                "multiple"
            )
        self.weights = weights_line(self.encoder, module)
        self.order = Order(
            images,
            size // rank.world_size,
            settings.run.seed,
            rank=rank.rank,
            world_size=rank.world_size,
        )
        precision = choose_precision(settings.train.precision, device)
        self.trainer = Trainer(module, plan, device, precision=precision, seed=settings.run.seed)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the trainer's state, and of what run and which data it is."""
        return {
            "settings": self.settings.flat(),
            "data": self.content,
            "cursor": list(divmod(self.trainer.step, self.order.steps)),
            **self.trainer.state_dict(),
        }


def weights_line(encoder: LoadedEncoder, module: nn.Module) -> str:
    """One line: the encoder's tensors that ``module`` has, those it has not, and the new ones.

    Of the images, mean and standard deviation.
    """
    own = encoder.module.state_dict()
    places = {tensor.data_ptr() for tensor in module.state_dict().values()}
    left = [name for name, tensor in own.items() if tensor.data_ptr() not in places]
    new = len(places) - (len(own) - len(left))
    norm = in_words(encoder.mean or IMAGENET[0], encoder.std or IMAGENET[1])
    rest = f"; {len(left)} are left out: {', '.join(left[:3])}" + ", …" * (len(left) > 3)
    return (
        f"{encoder.describe()}; images normalized by {norm}; {len(own) - len(left)} of its "
        f"{len(own)} tensors are in the model{rest if left else ''}; {new} others are new"
    )


def run(work: Work[Any, Any]) -> Path:
    """Do, or resume, what the settings describe; returns the run folder.

    Raises InputError for what the user must fix. An interrupted run saves where it stands and
    leaves with exit code 128 + the signal's number.
    """
    settings = work.settings
    folder = resume.folder(settings.run.dir, settings.run.name, settings.run.resume)
    device = choose_device(settings.run.device)
    rank = dist.start(device, settings.run.timeout)
    try:
        device = prepare_device(device, rank.local_rank, tf32=True)
        torch.backends.cudnn.benchmark = False  # it times each shape, and images have hundreds
        if resume.nothing_to_do(folder, settings.run.resume):
            return folder.path
        found = resume.agreed_checkpoint(folder, settings.run.resume, settings.train.log_to or ())
        with dist.together():
            assert work.train and work.val and work.encoder  # what can fail on one rank alone
        work.build(rank, device)
        with dist.together():
            if found:
                root = Path(settings.data.root)
                resume.restore(
                    found, settings.flat(), work.content, root, work.trainer.load_state_dict
                )
            journal = _open_journal(work, folder, found)
        with (
            Interruption() as interruption,
            journal,
            checkpoint.Writer() as writer,
            dist.losing_ranks(),
        ):
            _loop(work, folder, journal, writer, interruption)
    finally:
        dist.stop()
    if interruption.signal:
        raise SystemExit(128 + interruption.signal)
    return folder.path


def facts(work: Work[Any, Any]) -> Mapping[str, object]:
    """What the ranks must have in common beside the settings."""
    if work.settings.data.download:
        raise InputError("data.download: fetch the set with one process, then start the ranks")
    file = work.file and sha256(work.file)
    return {"the content of the sets": work.content, "the encoder's file": file}


def _open_journal(work: Work[Any, Any], folder: RunFolder, found: Path | None) -> Journal:
    settings = work.settings
    if dist.is_main():
        folder.path.mkdir(parents=True, exist_ok=True)
        print(f"run folder: {folder.path}\n{work.weights}", file=sys.stderr, flush=True)
        if work.left_out:
            print(f"note: {work.left_out}", file=sys.stderr)
    step = work.trainer.step
    names = settings.train.log_to or () if dist.is_main() else ()
    sinks = open_sinks(names, folder, settings.flat(), step)
    return resume.open_journal(folder, found, settings.to_yaml(), settings.optim.steps, step, sinks)


def _loop(
    work: Work[Any, Any],
    folder: RunFolder,
    journal: Journal,
    writer: checkpoint.Writer,
    interruption: Interruption,
) -> None:
    trainer, how = work.trainer, work.settings.train
    first, total = trainer.step, trainer.plan.steps
    last = min(total, first + (how.stop_after or total))
    meter = StepMeter(journal, work.settings.optim.batch_size, how.log_every)
    journal.event("start", step=first, steps=total, loader=f"{work.order.samples} images")

    def save() -> None:
        if dist.is_main():
            path = checkpoint.step_path(folder.checkpoints, trainer.step)
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
        write_evaluation(folder, _evaluation(work, scores, seconds), {})
        meter.pause()
        meter.end(total)


def _evaluation(work: Work[Any, Any], scores: dict[str, float], seconds: float) -> Evaluation:
    row = Row(
        encoder=work.settings.encoder.weights,
        data=work.val.name,
        probe=work.probe,
        metrics=scores,
        protocol={
            "data": {"content": work.content, "train": work.order.samples},
            "features": {"encoder": dict(work.encoder.about), "weights": work.weights},
            "probe": work.settings.flat(),
        },
        seconds={"features": 0.0, "probe": seconds},
    )
    return Evaluation(
        checkpoint={
            "file": work.file and str(work.file),
            "sha256": work.file and sha256(work.file),
            "step": work.encoder.step,
            "epoch": work.encoder.epoch,
        },
        versions={
            **versions(),
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if work.trainer.device.type == "cuda" else "cpu",
        },
        rows=(row,),
    )
