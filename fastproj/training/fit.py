"""A training step that, where memory runs out, says what would have fitted."""

from dataclasses import replace

import torch
from torch import Tensor

from fastproj.core import dist
from fastproj.core.errors import InputError, memory_shortage
from fastproj.core.fit import first_that_fits, halves
from fastproj.core.progress import write_line
from fastproj.loaders import Batch
from fastproj.training.trainer import Trainer

SMALLEST = 2  # images in one pass: batch norm needs two


def train_step(trainer: Trainer, batch: Batch) -> dict[str, Tensor]:
    """``trainer.train_step(batch)``; where memory runs out, ``InputError`` says what fits.

    That is found by steps in more parts, or of fewer images, after which the trainer's state is no
    run's: do not save it. On a CPU the heap is cut up by then: near its limit a new process may
    hold a little more or less. With several ranks, which would have to try together, and with CUDA
    graphs, which keep the memory of the failed step, torch's own error is raised.
    """
    step = trainer.step
    try:
        return trainer.train_step(batch)
    except (MemoryError, RuntimeError) as error:
        shortage = memory_shortage(error)
        if not shortage or dist.world_size() > 1 or trainer.graphs:
            raise
    said = f"out of memory in step {step + 1} of {len(batch.labels)} images ({shortage})"
    write_line(f"{said}; trying what fits")  # oneDNN may crash where the host's memory is used up
    raise InputError(f"{said}: {_what_fits(trainer, batch)}")


def _what_fits(trainer: Trainer, batch: Batch) -> str:
    images, parts, step = len(batch.labels), trainer.accumulate, trainer.step

    def two_steps(images: int, parts: int) -> None:
        """The first one makes the optimizer's state, beside which the second one has to fit."""
        fewer = _first(batch, images)
        trainer.accumulate = parts
        for _ in range(2):
            trainer.optimizer.zero_grad()
            trainer.step = step
            trainer.train_step(fewer)

    sizes = [part * parts for part in halves(images // parts, SMALLEST)]
    size = first_that_fits(sizes, lambda size: two_steps(size, parts))
    splits = [images // part for part in halves(images // parts, SMALLEST) if images % part == 0]
    split = first_that_fits(splits, lambda split: two_steps(images, split))
    found = {"--optim.batch_size": size, "--optim.accumulate": split}
    if any(found.values()):
        words = " or ".join(f"{name} {number}" for name, number in found.items() if number)
        return f"{words} fits (tried)"
    return (
        f"nothing smaller fitted into this process, down to {min([images, *sizes])} images: start "
        "with far fewer, or take smaller crops, a smaller projector or another encoder"
    )


def _first(batch: Batch, images: int) -> Batch:
    crops = tuple(
        views.unflatten(0, (-1, len(batch.labels)))[:, :images]
        .flatten(0, 1)
        .contiguous(memory_format=torch.channels_last)
        for views in batch.crops
    )
    return replace(batch, crops=crops, labels=batch.labels[:images], index=batch.index[:images])
