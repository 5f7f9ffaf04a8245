"""Command: pre-train an encoder on a beton. ``python -m fastproj.train --cfg rcfg/cifar10.yaml``

Beton -> crops on the device -> views -> encoder -> projector -> objective, with a linear probe on
the detached features beside it. On several GPUs: ``torchrun --nproc-per-node 8 -m fastproj.train``.
"""

import signal
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from fastproj import checkpoint, dist
from fastproj.device import choose_device
from fastproj.errors import InputError, run_command
from fastproj.journal import Journal, RunClock, write_environment
from fastproj.journal import read as read_journal
from fastproj.machine import keep_freed_memory
from fastproj.settings import RUN, Settings, load
from fastproj.trainer import Trainer


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
            torch.backends.cudnn.benchmark = True  # batches have few shapes: time the algorithms
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
        epoch, before = loader.cursor[0], clock.seconds()
        told: defaultdict[str, list[Tensor]] = defaultdict(list)
        trainer.begin_epoch(epoch)
        logged, spent = trainer.step, clock.seconds()
        for batch in loader:
            clock.lap("data_wait")
            for name, value in trainer.train_step(batch).items():
                told[name].append(value)
            if trainer.step % every == 0:
                loss = dist.mean(told["loss"][-1]).item()  # the only wait for the device
                clock.lap("step")
                seconds = clock.seconds(spent)
                journal.event(
                    "step",
                    step=trainer.step,
                    epoch=epoch,
                    loss=loss,
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
            steps=len(told["loss"]),
            **{name: dist.mean(torch.stack(v).mean()).item() for name, v in told.items()},
            diagnostics=trainer.diagnostics.report(),
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
