"""Command: pre-train an encoder on a beton. ``python -m fastproj.train --cfg rcfg/cifar10.yaml``

Beton -> crops on the device -> views -> encoder -> projector -> objective, with a linear probe on
the detached features beside it. On several GPUs: ``torchrun --nproc-per-node 8 -m fastproj.train``.
``--run.resume runs/NAME`` goes on with a run that was stopped, as its ``config.yaml`` says;
``--run.name NAME --run.resume auto`` starts it or goes on, whichever there is to do. With
``train.online_every``, the probe and kNN are scored on ``data.val`` while the run is under way.
"""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from fastproj.__main__ import main as run_as_script

    run_as_script("train")

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastproj import __version__
from fastproj.augment.sheet import contact_sheet
from fastproj.core import dist
from fastproj.core.device import choose_device, prepare_device
from fastproj.core.errors import InputError, SettingError
from fastproj.core.files import write_text
from fastproj.core.interruption import Interruption
from fastproj.data.beton import Beton, open_beton
from fastproj.evaluation.online import OnlineAccuracy
from fastproj.evaluation.sets import open_sets
from fastproj.loaders import Batch
from fastproj.runs import checkpoint
from fastproj.runs.environment import write_environment
from fastproj.runs.folder import RunFolder
from fastproj.runs.journal import Journal, StepMeter
from fastproj.runs.journal import read as read_journal
from fastproj.runs.sinks import Sinks, check_sinks, open_sinks
from fastproj.settings import RUN, Settings, load
from fastproj.training.build import build_trainer, run_stem
from fastproj.training.crops import misfit
from fastproj.training.trainer import Trainer

AUTO = "auto"  # of run.resume: start where there is nothing, go on where there is something
# Ranks may be started with other paths of their machines; everything else is compared.
OWN_TO_A_RANK = ("run.dir", "data.")
# A run may be resumed on another machine, with other logging; nothing else may change under it.
FREE_TO_CHANGE = ("run.name", "run.dir", "run.device", "run.resume", "data.", "train.", "eval.")

SHOWN = 8  # samples of the first batch whose views the sinks get


def train(settings: Settings) -> Path:
    """Run, or resume, what the settings describe; returns the run folder.

    Raises InputError for what the user must fix. An interrupted run saves where it stands and
    leaves with exit code 128 + the signal's number.
    """
    run = _folder(settings)
    device = choose_device(settings.run.device)
    rank = dist.start(device)
    try:
        device = prepare_device(device, rank.local_rank, tf32=True)
        if settings.run.resume == AUTO and _finished(run):
            if dist.is_main():
                print(f"{run.path} holds a finished run: nothing to do", file=sys.stderr)
            return run.path
        with dist.together():
            if dist.is_main():
                check_sinks(settings.train.log_to or ())
            found = _find_checkpoint(run, settings.run.resume)
        dist.require_same({"the newest checkpoint": found and found.name})
        trainer = build_trainer(settings, rank, device)
        with dist.together():
            online = _online(settings)
            if found:
                _load(trainer, found, settings)
            journal = _open_journal(run, found, trainer, settings)
        with (
            trainer.loader,
            Interruption() as interruption,
            journal,
            checkpoint.Writer() as writer,
            dist.losing_ranks(),
        ):
            _loop(trainer, online, journal, writer, run.checkpoints, interruption, settings)
    finally:
        dist.stop()
    if interruption.signal:
        raise SystemExit(128 + interruption.signal)
    return run.path


def _folder(settings: Settings) -> RunFolder:
    resume = settings.run.resume
    named = Path(settings.run.dir) / settings.run.name
    return RunFolder(named if resume in (None, AUTO) else Path(resume))


def _finished(run: RunFolder) -> bool:
    return run.metrics.exists() and any(e["event"] == "end" for e in read_journal(run.metrics))


def _find_checkpoint(run: RunFolder, resume: str | None) -> Path | None:
    """The checkpoint to resume from; InputError where the folder and ``resume`` do not agree."""
    found = checkpoint.latest(run.checkpoints)
    finished = _finished(run)
    if found and resume is None and not finished:
        with _fitting(found):  # a kill may have come between the last checkpoint and "end"
            state = checkpoint.load(found)
            finished = state["cursor"][0] >= state["settings"]["optim.epochs"]
    if finished:
        raise InputError(f"{run.path} holds a finished run: give another --run.name, or remove it")
    if resume not in (None, AUTO) and found is None:
        raise InputError(
            f"{run.path} holds no checkpoint to resume from: start without --run.resume"
        )
    if found and resume is None:
        raise InputError(
            f"{run.path} holds an unfinished run: go on with --run.resume {run.path}, or give "
            "another --run.name"
        )
    return found


def _open_journal(
    run: RunFolder, found: Path | None, trainer: Trainer, settings: Settings
) -> Journal:
    """The run's journal, locked against other trainers; rank 0 starts the folder of a new run."""
    main = dist.is_main()
    if main:
        run.path.mkdir(parents=True, exist_ok=True)
        _announce(run, trainer, settings)
    sinks = _sinks(run, settings, trainer.step)
    journal = Journal(run.metrics, main, trainer.total_steps, trainer.step, sinks)
    if main:
        if checkpoint.latest(run.checkpoints) != found:
            journal.close()
            raise InputError(f"another process has trained in {run.path} just now: start again")
        if not found:
            write_text(run.config, settings.to_yaml())
            write_environment(run.environment)
    return journal


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


def _load(trainer: Trainer, path: Path, settings: Settings) -> None:
    """Go on from the checkpoint. Raises InputError where it is of another run or other data."""
    with _fitting(path):
        state, beton = checkpoint.load(path), trainer.loader.beton
        _require_same(state["settings"], settings.flat(), path)
        if state["data"] != beton.manifest.content:
            raise InputError(
                f"{path} was trained on other data than {beton.path}: resume on that data"
            )
        trainer.load_state_dict(state)


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Turn whatever reading a foreign or altered checkpoint raises into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # missing keys, other types, other shapes: a dozen exceptions
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} is no checkpoint of this run ({type(error).__name__}: {reason}): delete it, "
            "or start another run with --run.name"
        ) from error


def _require_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    for name in dict.fromkeys([*now, *before]):
        if before.get(name) != now.get(name) and not name.startswith(FREE_TO_CHANGE):
            made, here = (f"{x[name]}" if name in x else "not read" for x in (before, now))
            raise InputError(
                f"{path} was made with {name} = {made}, now it is {here}: resume "
                "without this setting, or start another run with --run.name"
            )


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
    checkpoints: Path,
    interruption: Interruption,
    settings: Settings,
) -> None:
    optim, how, first = settings.optim, settings.train, trainer.step
    last = min(trainer.total_steps, first + (how.stop_after or trainer.total_steps))
    meter = StepMeter(journal, optim.batch_size, how.log_every)
    journal.event("start", step=first, steps=trainer.total_steps, loader=trainer.loader.reason)

    def save() -> None:
        if dist.is_main():
            path = checkpoint.step_path(checkpoints, trainer.step)
            told = partial(journal.event, "checkpoint", step=trainer.step, file=path.name)
            writer.save(path, _state(trainer, settings), how.keep, told)
        meter.pause()

    if first == 0:
        save()  # so that a run killed in its first epoch can be resumed as well
        writer.wait()
    while trainer.step < last:
        epoch = trainer.loader.cursor[0]
        meter.begin_epoch(epoch, trainer.step)
        for batch in meter.batches(trainer.epoch()):
            if trainer.step == first:
                journal.picture("views", partial(_sheet, trainer, batch), first)
                meter.pause()
            metrics = trainer.train_step(batch)
            logged = meter.step(trainer.step, metrics, trainer.optimizer.param_groups[0]["lr"])
            writer.check()
            if interruption.requested(agree=logged) or trainer.step == last:
                break
        done = trainer.loader.cursor == (epoch + 1, 0)
        meter.end_epoch(trainer.step, trainer.diagnostics.report)
        if online and done and (epoch + 1) % how.online_every == 0 and dist.is_main():
            # Other ranks wait for rank 0 in the next step, at most dist.start's timeout.
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


def _read(argv: Sequence[str]) -> Settings:
    """The settings of a new run, or of the one that ``--run.resume`` names."""
    about = ("python -m fastproj.train", "Pre-train an encoder on a beton.")
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        folder = value if equals else following
        if option in ("--run.resume", "--resume") and folder.strip("-") not in ("", "null", AUTO):
            config = RunFolder.open(folder).config
            # ``stop_after`` was the earlier start's own.
            return load(RUN, ["--train.stop_after", "null", *argv], *about, config=config)
    return load(RUN, argv, *about)


def _require_same_start(settings: Settings) -> None:
    """Raises InputError on every rank where they have other settings, plugins, data or versions."""
    if dist.world_size() == 1:
        return
    with dist.together():
        manifest = open_beton(settings.data.train).manifest
    given = settings.flat().items()
    dist.require_same(
        {name: str(value) for name, value in given if not name.startswith(OWN_TO_A_RANK)}
        | {"the content of data.train": manifest.content, "fastproj": __version__}
        | {"torch": torch.__version__}
    )


def main(argv: Sequence[str]) -> None:
    settings = _read(argv)
    named = settings.sources()["run.name"] != "default"
    if settings.run.resume == AUTO and not named:
        raise SettingError("run.resume auto needs --run.name: by default each start has a new name")
    try:
        dist.start(choose_device(settings.run.device))
        with dist.losing_ranks():
            _require_same_start(settings)
            if settings.run.resume is None and not named:
                stamp = dist.exchange(time.strftime("%Y%m%d-%H%M%S"))[0]
                name = f"{settings.run.name}-seed{settings.run.seed}-{stamp}"
                settings = _read([*argv, f"--run.name={name}"])
            folder = train(settings)
    finally:
        dist.stop()
    print(f"run folder: {folder}")
