"""What every engine provides: batches of uint8 crops, and a cursor that a checkpoint saves."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fastproj.data.beton import Beton
from fastproj.data.verify import FirstRead
from fastproj.loaders.boxes import Center, Crop, draw
from fastproj.loaders.crop import compiled_crop_batch, crop_batch
from fastproj.loaders.order import Order


@dataclass(frozen=True)
class Batch:
    """One step's input. The receiver owns it: no engine overwrites it later.

    ``crops``: one tensor per crop size, uint8 (views·B, 3, size, size) in channels-last memory on
    the device, view-major (all of view 1, then all of view 2). ``labels``, ``index``: int64 (B,).
    """

    crops: tuple[Tensor, ...]
    labels: Tensor
    index: Tensor


class Loader(ABC):
    """Iterates over the rest of the current epoch; then the next epoch is the current one.

    ``len(loader)`` is the number of steps per epoch. ``cursor`` is the next (epoch, step); ``seek``
    sets it. Use the loader as a context manager, or call ``close``.
    """

    def __init__(
        self,
        beton: Beton,
        crops: Sequence[Crop | Center],
        order: Order,
        device: torch.device,
        workers: int,
    ) -> None:
        self.beton, self.crops, self.order, self.device = beton, tuple(crops), order, device
        self.workers = workers
        self.first_read = FirstRead(beton)  # every engine compares each sample before it is given
        self.cursor = (0, 0)
        # Weak: with a cycle, threads and processes would wait for Python's garbage collector, which
        # may run in one of them and then lock itself out.
        self._running: weakref.ref[Generator[Batch, None, None]] | None = None
        self.reason = ""  # why open_loader chose this engine, in one line
        self.crop_batch: Callable[..., Tensor] = crop_batch  # what crops on a GPU, if one does
        if device.type == "cuda":  # else cuBLAS may round within the products of exact crops
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self._open()

    def _open(self) -> None:  # noqa: B027  # not abstract: some engines need nothing
        """Prepare for the first batch. Raises InputError if a dependency is missing."""

    def compile(self) -> None:
        """Compile the crops, where a GPU makes them; the pixels stay the same."""
        if self.device.type == "cuda":
            self.crop_batch = compiled_crop_batch()

    def __len__(self) -> int:
        return self.order.steps

    def seek(self, epoch: int, step: int) -> None:
        """Continue at ``step`` of ``epoch``; past its last step, at the next epoch's first."""
        self.cursor = (epoch, step) if step < len(self) else (epoch + 1, 0)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        running = self._rest_of_epoch()
        self._running = weakref.ref(running)
        return running

    def _rest_of_epoch(self) -> Generator[Batch, None, None]:
        epoch, first = self.cursor
        self.first_read.check_file()
        with closing(self._batches(epoch, range(first, len(self)))) as batches:
            for step, batch in enumerate(batches, first):
                self.seek(epoch, step + 1)
                yield batch

    @abstractmethod
    def _batches(self, epoch: int, steps: range) -> Generator[Batch, None, None]:
        """Yield the batches of these steps. Closing this generator must stop all it started."""

    def _boxes(self, epoch: int, positions: np.ndarray) -> list[np.ndarray]:
        return draw(self.crops, self.beton, positions, self.order.seed, epoch)

    def close(self) -> None:
        """End the current iteration, if there is one, and join its threads or processes.

        The end of a ``for`` loop does the same once nothing refers to its iterator any more, but an
        exception's traceback may keep such a reference for long.
        """
        running = self._running() if self._running else None
        if running is not None:
            running.close()
        self._running = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy a host array to the device, asynchronously."""
    tensor = torch.from_numpy(np.array(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
