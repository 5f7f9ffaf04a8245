"""Command: pre-train an encoder on a beton. ``python -m fastproj.train --cfg rcfg/cifar10.yaml``

Beton -> crops on the device -> views -> encoder -> projector -> objective, with a linear probe on
the detached features beside it. On several GPUs: ``torchrun --nproc-per-node 8 -m fastproj.train``.
``--run.resume runs/NAME`` goes on with a run that was stopped, as its ``config.yaml`` says;
``--run.name NAME --run.resume auto`` starts it or goes on, whichever there is to do. With
``train.online_every``, the probe and kNN are scored on ``data.val`` while the run is under way.
``--run.resume runs/NAME --run.extend EPOCHS`` gives a finished run more epochs.
"""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from fastproj.__main__ import main as run_as_script

    run_as_script("train")

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fastproj.augment.sheet import contact_sheet
from fastproj.core import dist
from fastproj.core.device import choose_device, prepare_device
from fastproj.core.errors import InputError
from fastproj.core.files import sha256
from fastproj.core.interruption import Interruption
from fastproj.core.watchdog import watched
from fastproj.data.beton import Beton, open_beton
from fastproj.evaluation.load import load_weights
from fastproj.evaluation.online import OnlineAccuracy
from fastproj.evaluation.sets import open_sets
from fastproj.loaders import Batch
from fastproj.runs import checkpoint, resume
from fastproj.runs.folder import RunFolder
from fastproj.runs.journal import Journal, StepMeter
from fastproj.runs.sinks import Sinks, open_sinks
from fastproj.runs.start import start
from fastproj.settings import RUN, Settings
from fastproj.training.build import build_trainer, run_stem
from fastproj.training.crops import misfit
from fastproj.training.fit import train_step
from fastproj.training.trainer import Trainer

SHOWN = 8  # samples of the first batch whose views the sinks get


def train(settings: Settings) -> Path:
    """Run, or resume, what the settings describe; returns the run folder.

    Raises InputError for what the user must fix. An interrupted run saves where it stands and
    leaves with exit code 128 + the signal's number.
    """
    run = resume.folder(settings.run.dir, settings.run.name, settings.run.resume)
    device = choose_device(settings.run.device)
    rank = dist.start(device, settings.run.timeout)
    try:
        device = prepare_device(device, rank.local_rank, tf32=True)
        if resume.nothing_to_do(run, settings.run.resume):
            return run.path
        found = resume.agreed_checkpoint(
            run, settings.run.resume, settings.train.log_to or (), settings.run.extend
        )
        trainer = build_trainer(settings, rank, device)
        had = None  # epochs of a run that is extended
        with dist.together():
            online = _online(settings)
            if found:
                beton, load = trainer.loader.beton, trainer.load_state_dict
                content = beton.manifest.content
                had = resume.restore(found, settings.flat(), content, beton.path, load)
            elif settings.train.init_from:
                _initialize(trainer, Path(settings.train.init_from))
            journal = _open_journal(run, found, trainer, settings)
        with (
            trainer.loader,
            Interruption() as interruption,
            journal,
            checkpoint.Writer() as writer,
            dist.losing_ranks(),
        ):
            if had is not None:
                _say_extended(trainer, had)
            _loop(trainer, online, journal, writer, run, interruption, settings, had is not None)
    finally:
        dist.stop()
    if interruption.signal:
        raise SystemExit(128 + interruption.signal)
    return run.path


def _initialize(trainer: Trainer, path: Path) -> None:
    """Give the encoder, and a momentum encoder, the weights in ``path``; say which were found."""
    learner = trainer.learner
    found = load_weights(learner.encoder, path)
    if learner.teacher is not None:
        learner.teacher[0].load_state_dict(learner.encoder.state_dict())
    if dist.is_main():
        print(f"encoder from {found}; all but the encoder starts anew", file=sys.stderr)


def _say_extended(trainer: Trainer, before: int) -> None:
    """Say how the schedule goes on in a run that had ``before`` epochs."""
    (group, *_), epochs = trainer.optimizer.param_groups, trainer.epochs
    last = group["lr"]
    trainer.set_rates()
    if dist.is_main():
        print(
            f"extended from {before} to {epochs} epochs: the learning rate goes from {last:.4g} to "
            f"{group['lr']:.4g}, as every schedule to where a run of {epochs} epochs has it here",
            file=sys.stderr,
        )


def _open_journal(
    run: RunFolder, found: Path | None, trainer: Trainer, settings: Settings
) -> Journal:
    if dist.is_main():
        run.path.mkdir(parents=True, exist_ok=True)
        _announce(run, trainer, settings)
    sinks = _sinks(run, settings, trainer.step)
    config = settings.to_yaml()
    return resume.open_journal(run, found, config, trainer.total_steps, trainer.step, sinks)


def _state(trainer: Trainer, settings: Settings) -> dict[str, Any]:
    """What a checkpoint holds: the trainer's state, and of what run and which data it is."""
    manifest = trainer.loader.beton.manifest
    return {
        "settings": settings.flat(),
        "data": manifest.content,
        "mean": manifest.mean,
        "std": manifest.std,
        **trainer.state_dict(),
    }


def _announce(run: RunFolder, trainer: Trainer, settings: Settings) -> None:
    """Say where the run is kept and, where crops and stem do not fit the images, what would."""
    print(f"run folder: {run.path}", file=sys.stderr, flush=True)
    beton = trainer.loader.beton
    advice = misfit(beton.width, beton.height, settings.views.size, run_stem(settings))
    if advice:
        print(f"note: {beton.path}: {advice}", file=sys.stderr, flush=True)


def _sinks(run: RunFolder, settings: Settings, step: int) -> Sinks:
    """Rank 0's sinks; the others have none."""
    names = settings.train.log_to or () if dist.is_main() else ()
    return open_sinks(names, run, settings.flat(), step)


def _online(settings: Settings) -> OnlineAccuracy | None:
    """What the run is scored on while it is under way; None where ``online_every`` is 0."""
    data, how = settings.data, settings.eval
    if not settings.train.online_every:
        return None
    if data.val is None:
        raise InputError(
            "data.val is missing: train.online_every scores the run on it; give --data.val FILE, "
            "or --train.online_every 0"
        )
    sets = open_sets(data.train, data.val)
    assert isinstance(sets.train, Beton) and isinstance(sets.val, Beton)  # it trains on one
    return OnlineAccuracy(
        sets.train,
        sets.val,
        size=how.size or settings.views.size,
        crop_fraction=how.crop_fraction,
        batch_size=how.batch_size,
        loader={name: getattr(data, name) for name in ("engine", "workers", "memory_share")},
        # The first of eval.probes' knn, where it is among them.
        **{
            name: how.options[f"knn_{name}"][0]
            for name in ("k", "temperature")
            if f"knn_{name}" in how.options
        },
    )


def _loop(
    trainer: Trainer,
    online: OnlineAccuracy | None,
    journal: Journal,
    writer: checkpoint.Writer,
    run: RunFolder,
    interruption: Interruption,
    settings: Settings,
    extended: bool,
) -> None:
    optim, how, first = settings.optim, settings.train, trainer.step
    last = min(trainer.total_steps, first + (how.stop_after or trainer.total_steps))
    meter = StepMeter(journal, optim.batch_size, how.log_every)
    journal.event("start", step=first, steps=trainer.total_steps, loader=trainer.loader.reason)

    def save() -> None:
        trainer.loader.first_read.check_file()  # what was trained on data that changed is not kept
        if dist.is_main():
            path = checkpoint.step_path(run.checkpoints, trainer.step)
            told = partial(journal.event, "checkpoint", step=trainer.step, file=path.name)
            writer.save(path, _state(trainer, settings), how.keep, told)
        meter.pause()

    if extended and dist.is_main():  # the journal has no end any more, so a resume goes on
        resume.write_epochs(run, optim.epochs)
    if first == 0 or extended:
        save()  # so that a run killed in its first epoch can be resumed as well
        writer.wait()
    while trainer.step < last:
        epoch = trainer.loader.cursor[0]
        meter.begin_epoch(epoch, trainer.step)
        for batch in meter.batches(watched(trainer.epoch(), how.patience)):
            if trainer.step == first:
                journal.picture("views", partial(_sheet, trainer, batch), first)
                meter.pause()
            metrics = train_step(trainer, batch)
            logged = meter.step(trainer.step, metrics, trainer.optimizer.param_groups[0]["lr"])
            writer.check()
            if interruption.requested(agree=logged) or trainer.step == last:
                break
        done = trainer.loader.cursor == (epoch + 1, 0)
        meter.end_epoch(trainer.step, trainer.diagnostics.report)
        if online and done and (epoch + 1) % how.online_every == 0 and dist.is_main():
            # Other ranks wait for rank 0 in the next step, at most run.timeout.
            learner = trainer.learner
            scores = online.score(learner.encoder, learner.probe)
            journal.event("probe", step=trainer.step, epoch=epoch, **scores)
            meter.pause()
        if not done or (epoch + 1) % how.checkpoint_every == 0 or trainer.step == last:
            save()
        if not done:
            break
    writer.wait()
    if trainer.step == trainer.total_steps:
        meter.end(trainer.step)


def _sheet(trainer: Trainer, batch: Batch) -> Tensor:
    return contact_sheet(trainer.views(batch, SHOWN))


def _facts(settings: Settings) -> dict[str, str]:
    facts = {"the content of data.train": open_beton(settings.data.train).manifest.content}
    start = settings.train.init_from
    if start and Path(start).is_file():  # a resumed run does not need it, and a new one refuses
        facts["the content of train.init_from"] = sha256(Path(start))
    return facts


def main(argv: Sequence[str]) -> None:
    about = ("python -m fastproj.train", "Pre-train an encoder on a beton.")
    start(RUN, argv, *about, train, _facts)
