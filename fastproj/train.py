"""Command: pre-train an encoder on a beton. ``python -m fastproj.train --cfg rcfg/cifar10.yaml``

Beton -> crops on the device -> views -> encoder -> projector -> objective, with a linear probe on
the detached features beside it. On several GPUs: ``torchrun --nproc-per-node 8 -m fastproj.train``.
"""

import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastproj import checkpoint, dist
from fastproj.device import choose_device, choose_precision
from fastproj.encoder import build_encoder
from fastproj.errors import InputError, run_command
from fastproj.journal import Journal, RunClock, write_environment
from fastproj.journal import read as read_journal
from fastproj.learner import Learner
from fastproj.loaders import Crop, Loader, open_loader
from fastproj.machine import keep_freed_memory
from fastproj.manifest import Beton, open_beton
from fastproj.objective import OBJECTIVES
from fastproj.optim import build_optimiser, parameter_groups, probe_group, set_rates
from fastproj.projector import build_projector
from fastproj.settings import RUN, Settings, load
from fastproj.views import PRESETS, View, Views

# A run may be resumed on another machine, with other logging; nothing else may change under it.
FREE_TO_CHANGE = ("run.name", "run.dir", "run.device", "run.resume", "data.", "train.", "eval.")


def build_learner(settings: Settings, classes: int) -> Learner:
    """The model that the settings describe, initialised from ``run.seed``."""
    torch.manual_seed(settings.run.seed)
    encoder = build_encoder(settings.model.encoder, settings.model.stem)
    head = settings.projector
    projector = build_projector(
        head.kind, encoder.features, head.hidden, head.out, head.depth, head.batch_norm
    )
    return Learner(encoder, projector, classes)


def build_views(settings: Settings, beton: Beton) -> Views:
    """The preset's views with the settings' overrides, normalised by the set's own statistics."""
    preset = PRESETS[settings.views.preset]
    views: list[View] = []
    for number, view in enumerate(preset):
        changes = {}
        for name in ("flip", "jitter", "brightness", "contrast", "saturation", "hue", "gray",
                     "blur", "solarise"):  # fmt: skip
            given = getattr(settings.views, name)
            if given is not None:
                if len(given) not in (1, len(preset)):
                    raise InputError(
                        f"views.{name} has {len(given)} values: give one, or one for each of the "
                        f"{len(preset)} views"
                    )
                changes[name] = given[number % len(given)]
        views.append(replace(view, **changes))
    return Views(views, beton.manifest.mean, beton.manifest.std)


def score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and share of right answers over the labelled samples; -1 is no label.

    ``logits`` (n, classes) float32, ``labels`` (n,) int64. Both 0 where nothing is labelled
    (STL-10's unlabelled split), so that the probe then learns nothing and disturbs nothing.
    """
    labelled = (labels >= 0).sum().clamp(min=1)
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / labelled
    return loss, (logits.detach().argmax(1) == labels).sum() / labelled


class Interruption:
    """SIGTERM and Ctrl-C ask for a stop, which the loop grants after the step under way."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> "Interruption":
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:  # twice: the user means now
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Trainer:
    """A run: what it is made of, how one step goes, and what a checkpoint keeps of it."""

    def __init__(self, settings: Settings, rank: dist.Rank, device: torch.device) -> None:
        self.settings, self.rank, self.device = settings, rank, device
        optim = settings.optim
        self.beton = open_beton(settings.data.train)
        classes = len(self.beton.classes)
        if classes < 2:
            raise InputError(f"{self.beton.path} has {classes} class: probing needs at least 2")
        if optim.batch_size % (rank.world * optim.accumulate):
            raise InputError(
                f"optim.batch_size {optim.batch_size} cannot be split over {rank.world} rank(s) "
                f"and {optim.accumulate} part(s): make it a multiple of their product"
            )
        self.views = build_views(settings, self.beton)
        self.loader = self._open_loader()
        self.learner = build_learner(settings, classes).to(device)
        self.learner.to(memory_format=torch.channels_last)
        self.views.to(device)
        self.precision = choose_precision(settings.train.precision, device)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=self.precision is torch.float16 and device.type == "cuda"
        )
        self.optimiser = build_optimiser(
            optim.optimiser,
            [
                *parameter_groups(
                    [self.learner.encoder, self.learner.projector], optim.weight_decay
                ),
                probe_group(self.learner.probe, optim.probe_lr * optim.batch_size / 256),
            ],
            lr=optim.lr * optim.batch_size / 256,
            momentum=optim.momentum,
            trust=optim.trust,
        )
        self.generator = torch.Generator(device)
        self.objective = OBJECTIVES[settings.objective.name]
        self.step = 0
        self.model = self._wrap()

    def _open_loader(self) -> Loader:
        settings, views = self.settings, self.settings.views
        if views.scale_min > views.scale_max:
            raise InputError(
                f"views.scale_min {views.scale_min} is above views.scale_max {views.scale_max}"
            )
        crop = Crop(views.size, len(self.views.views), (views.scale_min, views.scale_max))
        return open_loader(
            self.beton,
            [crop],
            settings.optim.batch_size // self.rank.world,
            device=self.device,
            engine=settings.data.engine,
            seed=settings.run.seed,
            rank=self.rank.rank,
            world=self.rank.world,
            workers=settings.data.workers,
            memory_share=settings.data.memory_share,
        )

    def _wrap(self) -> nn.Module:
        """Compile in place (so that checkpoint keys stay clean), then DDP where there are ranks."""
        if self.settings.model.sync_bn and self.rank.world > 1 and self.device.type == "cuda":
            self.learner = nn.SyncBatchNorm.convert_sync_batchnorm(self.learner)
        wish = self.settings.train.compile
        if wish == "true" or (wish == "auto" and self.device.type == "cuda"):
            self.learner.compile()
            self.views.compile()
        if self.rank.world == 1:
            return self.learner
        ids = [self.rank.local] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.learner, device_ids=ids)

    @property
    def total_steps(self) -> int:
        return self.settings.optim.epochs * len(self.loader)

    def train_step(self, crops: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One update from this rank's uint8 crops (V·B, 3, h, w), view-major, and labels (B,).

        Returns the loss and the probe's share of right answers, both still on the device.
        """
        optim, steps = self.settings.optim, len(self.loader)
        warmup = min(optim.warmup_epochs * steps, self.total_steps)
        set_rates(self.optimiser, self.step, self.total_steps, warmup, optim.warmup_lr)
        # One address a step and rank, so that a resumed run draws what it would have drawn.
        address = [self.settings.run.seed, self.step, self.rank.rank]
        self.generator.manual_seed(int(np.random.SeedSequence(address).generate_state(1)[0]))
        params = self.views.sample(len(labels), self.generator)
        with torch.no_grad():
            views = self.views(crops, params)

        count = len(self.views.views)
        loss_sum = torch.zeros((), device=self.device)
        right = torch.zeros((), device=self.device)
        parts = zip(
            views.unflatten(0, (count, -1)).chunk(optim.accumulate, 1),
            labels.chunk(optim.accumulate),
            strict=True,
        )
        for part, target in parts:
            with torch.autocast(
                self.device.type, self.precision, enabled=self.precision is not torch.float32
            ):
                part = part.flatten(0, 1).contiguous(memory_format=torch.channels_last)
                z, logits = self.model(part)
            loss = self.objective(*z.chunk(count), temperature=self.settings.objective.temperature)
            probe_loss, hits = score(logits.float(), target.repeat(count))
            self.scaler.scale((loss + probe_loss) / optim.accumulate).backward()
            loss_sum += loss.detach() / optim.accumulate
            right += hits / optim.accumulate
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()
        self.step += 1
        return loss_sum, right

    def state(self) -> dict[str, object]:
        """All that the next step depends on."""
        return {
            "settings": self.settings.flat(),
            "data": self.beton.manifest.content,
            "mean": self.beton.manifest.mean,
            "std": self.beton.manifest.std,
            "step": self.step,
            "epoch": self.loader.cursor[0],
            "cursor": list(self.loader.cursor),
            "encoder": self.learner.encoder.state_dict(),
            "projector": self.learner.projector.state_dict(),
            "probe": self.learner.probe.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def restore(self, path: Path) -> None:
        """Continue where the checkpoint stands. Raises InputError where it is of another run."""
        state = checkpoint.load(path)
        for name, value in self.settings.flat().items():
            before = state["settings"].get(name)
            if before != value and not name.startswith(FREE_TO_CHANGE):
                raise InputError(
                    f"{path} was made with {name} = {before}, now it is {value}: resume with the "
                    "run's own config.yaml, or start another run with --run.name"
                )
        if state["data"] != self.beton.manifest.content:
            raise InputError(
                f"{path} was trained on other data than {self.beton.path}: resume on that data"
            )
        self.learner.encoder.load_state_dict(state["encoder"])
        self.learner.projector.load_state_dict(state["projector"])
        self.learner.probe.load_state_dict(state["probe"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        self.step = state["step"]
        self.loader.seek(*state["cursor"])


def train(settings: Settings) -> Path:
    """Run, or resume, what the settings describe; returns the run folder.

    Raises InputError for what the user must mend. An interrupted run saves where it stands and
    leaves with exit code 128 + the signal's number.
    """
    run = Path(settings.run.dir) / settings.run.name
    device = choose_device(settings.run.device)
    rank = dist.start(device)
    try:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            device = torch.device("cuda", rank.local)
        else:
            keep_freed_memory()
        found = _find_checkpoint(run, settings.run.resume)
        dist.barrier()  # rank 0 must not start the folder before the others have looked
        trainer = Trainer(settings, rank, device)
        if found:
            trainer.restore(found)
        elif dist.is_main():
            run.mkdir(parents=True, exist_ok=True)
            (run / "config.yaml").write_text(settings.to_yaml(), encoding="utf-8")
            write_environment(run)
        with (
            trainer.loader,
            Interruption() as interruption,
            Journal(run, dist.is_main(), trainer.total_steps, trainer.step) as journal,
        ):
            _loop(trainer, journal, run / "checkpoints", interruption)
    finally:
        dist.stop()
    if interruption.signal:
        raise SystemExit(128 + interruption.signal)
    return run


def _find_checkpoint(run: Path, resume: bool) -> Path | None:
    """The checkpoint to resume from; InputError where the folder and ``resume`` do not agree."""
    found = checkpoint.latest(run / "checkpoints")
    metrics = run / "metrics.jsonl"
    finished = metrics.exists() and any(e["event"] == "end" for e in read_journal(metrics))
    if finished:
        raise InputError(f"{run} holds a finished run: give another --run.name, or remove it")
    if resume and found is None:
        raise InputError(f"{run} holds no checkpoint to resume from: start without --run.resume")
    if found and not resume:
        raise InputError(
            f"{run} holds an unfinished run: go on with --run.resume true, or give another "
            "--run.name"
        )
    return found


def _loop(
    trainer: Trainer, journal: Journal, checkpoints: Path, interruption: Interruption
) -> None:
    settings, loader, clock = trainer.settings, trainer.loader, RunClock()
    batch_size, every = settings.optim.batch_size, settings.train.log_every
    first = trainer.step
    last = min(trainer.total_steps, first + (settings.train.stop_after or trainer.total_steps))
    journal.event("start", step=first, steps=trainer.total_steps, loader=loader.reason)

    def save() -> None:
        if dist.is_main():
            path = checkpoint.step_path(checkpoints, trainer.step)
            checkpoint.save(path, trainer.state(), settings.train.keep)
            journal.event("checkpoint", step=trainer.step, file=path.name)
        clock.lap("pause")

    if first == 0:
        save()  # so that a run killed in its first epoch can be resumed as well
    while trainer.step < last:
        epoch, before, losses, hits = loader.cursor[0], clock.seconds(), [], []
        logged, spent = trainer.step, clock.seconds()
        for batch in loader:
            clock.lap("data_wait")
            loss, right = trainer.train_step(batch.crops[0], batch.labels)
            losses.append(loss)
            hits.append(right)
            if trainer.step % every == 0:
                value = dist.mean(loss).item()  # the only wait for the device
                clock.lap("step")
                seconds = clock.seconds(spent)
                journal.event(
                    "step",
                    step=trainer.step,
                    epoch=epoch,
                    loss=value,
                    lr=trainer.optimiser.param_groups[0]["lr"],
                    images_per_second=(trainer.step - logged) * batch_size / sum(seconds.values()),
                    data_wait=seconds["data_wait"] / sum(seconds.values()),
                )
                logged, spent = trainer.step, clock.seconds()
            clock.lap("step")
            asked = interruption.signal
            if trainer.rank.world > 1:  # agree, but only where the ranks wait anyway
                asked = trainer.step % every == 0 and dist.any_true(bool(asked))
            if asked or trainer.step == last:
                break
        done = loader.cursor == (epoch + 1, 0)
        journal.event(
            "epoch",
            step=trainer.step,
            epoch=epoch,
            steps=len(losses),
            loss=dist.mean(torch.stack(losses).mean()).item(),
            online_probe=dist.mean(torch.stack(hits).mean()).item(),
            seconds=clock.seconds(before),
        )
        if not done or (epoch + 1) % settings.train.checkpoint_every == 0 or trainer.step == last:
            save()
        if not done:
            break
    if trainer.step == trainer.total_steps:
        seconds = clock.seconds()
        rate = (trainer.step - first) * batch_size / (seconds["step"] + seconds["data_wait"])
        journal.event("end", step=trainer.step, seconds=seconds, images_per_second=rate)


def main(argv: Sequence[str]) -> None:
    settings = load(RUN, argv, "python -m fastproj.train", "Pre-train an encoder on a beton.")
    print(f"run folder: {train(settings)}")


if __name__ == "__main__":
    run_command(main)
