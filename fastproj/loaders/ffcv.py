"""FFCV's own ``Loader`` as an engine for the same file.

FFCV reads the file's header and rows, runs its epoch thread and its queue, and calls our operation,
which decodes each sample once and cuts its boxes in numba's threads with the code of ``stream``:
the pixels are those of ``stream``, bit for bit. It is for those who trust FFCV; ``stream`` needs
neither FFCV nor a compilation.

What FFCV 1.0.2 does otherwise and this engine does not: batches are owned by whoever receives them
(FFCV overwrites them); an error in its thread is raised in the caller (FFCV's waits for ever);
leaving an epoch early ends and joins its thread. It is resumable, because the rest of our order is
given to FFCV as its epoch.

What it is not: it does not decode with FFCV's decoder, whose fast DCT gives other pixels; it cuts
on the CPU, also for a GPU; it compiles at each start, as FFCV has no cache for compiled code. Only
one of these loaders can run at a time in a process where numba has no thread-safe threading layer
(neither OpenMP nor TBB).
"""

import ctypes
import queue
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastproj.core.errors import InputError
from fastproj.core.native import MESSAGE_BYTES, library
from fastproj.data.foreign import read_fields
from fastproj.loaders.base import Batch, Loader, to_device
from fastproj.loaders.crop import batch_like
from fastproj.loaders.fill import Fill

CPU = torch.device("cpu")
AHEAD = 2  # batches that FFCV keeps ready


class FfcvLoader(Loader):
    """Loads with FFCV in ``workers`` threads. Raises InputError if FFCV is missing."""

    def _open(self) -> None:
        library()
        threads = torch.get_num_threads()
        self._ffcv, self._fill = _open_ffcv(self)
        torch.set_num_threads(threads)  # FFCV sets it to its workers
        self._epoch = _Epoch(0, iter(()))

    def _batches(self, epoch: int, steps: range) -> Generator[Batch, None, None]:
        positions = [self.order.batch(epoch, step) for step in steps]
        full = [part for part in positions if len(part)]  # a rank may get nothing of the last step
        work = self._epoch = _Epoch(epoch, iter(full))
        if full:
            yield from self._run(work, np.concatenate(full))
        for part in positions[len(full) :]:
            yield self._moved(self.make(part))

    def _run(self, work: "_Epoch", positions: np.ndarray) -> Generator[Batch, None, None]:
        threads = torch.get_num_threads()
        self._ffcv.traversal_order.positions = positions
        running = iter(self._ffcv)
        try:
            for (batch,) in running:
                torch.set_num_threads(threads)
                yield self._moved(batch)
            if work.error is not None:
                raise work.error
        finally:
            work.stopped = True
            while running.is_alive():  # it may wait to put a batch, or its end, into its queue
                try:
                    running.output_queue.get(timeout=0.01)
                except queue.Empty:
                    continue
            running.join()
            running.close()

    def work(self) -> Batch:
        """The next batch, in FFCV's thread; StopIteration ends that thread, an error would not."""
        work = self._epoch
        if work.stopped:
            raise StopIteration
        try:
            return self.make(next(work.positions))
        except StopIteration:
            raise
        except Exception as error:
            work.error = error
            raise StopIteration from error

    def make(self, positions: np.ndarray) -> Batch:
        """These samples' crops, on the CPU."""
        self.first_read.check(positions)
        crops = [batch_like(crop.num_views, len(positions), crop.size, CPU) for crop in self.crops]
        fill = Fill(self.beton, positions, self._boxes(self._epoch.number, positions), crops)
        slots = np.full(self.workers, -1)
        why = np.zeros((self.workers, MESSAGE_BYTES), np.uint8)
        self._fill(fill.address, slots, why.ctypes.data)
        for slot, text in zip(slots.tolist(), why, strict=True):
            fill.check(slot, text.tobytes().partition(b"\0")[0])
        return Batch(
            tuple(views.flatten(0, 1) for views in crops),
            torch.from_numpy(np.array(self.beton.label[positions])),
            torch.from_numpy(np.array(self.beton.index[positions])),
        )

    def _moved(self, batch: Batch) -> Batch:
        return Batch(
            tuple(crops.to(self.device) for crops in batch.crops),
            to_device(batch.labels.numpy(), self.device),
            to_device(batch.index.numpy(), self.device),
        )


class _Epoch:
    """What is left of the epoch that FFCV's thread works on, and the error that ended it."""

    def __init__(self, number: int, positions: Iterator[np.ndarray]) -> None:
        self.number, self.positions = number, positions
        self.stopped = False
        self.error: Exception | None = None


def _open_ffcv(ours: FfcvLoader) -> tuple[Any, Callable[[int, np.ndarray, int], None]]:
    """FFCV's loader of the same file, and the function that fills a batch in numba's threads."""
    beton, path = ours.beton, ours.beton.only_file
    try:
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.loader import Loader as Reading
        from ffcv.pipeline.compiler import Compiler
        from ffcv.pipeline.operation import Operation
        from ffcv.pipeline.state import State
        from ffcv.traversal_order.base import TraversalOrder
    except ImportError as error:
        raise InputError(
            f"the engine ffcv needs FFCV ({error}): run ./setup.sh ffcv, "
            "or use --data.engine stream"
        ) from error

    class Given(TraversalOrder):
        """The samples that we give it."""

        positions = np.arange(len(beton))

        def sample_order(self, epoch: int) -> np.ndarray:
            return self.positions

    class Samples(SimpleRGBImageDecoder):
        """FFCV wants a decoder first: this one hands on the samples' numbers."""

        def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
            return previous_state, None

        def generate_code(self) -> Callable[..., np.ndarray]:
            return lambda batch_indices, memory, metadata, storage_state: batch_indices

    class Cut(Operation):
        """Decode each sample once and cut its boxes."""

        def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
            return replace(previous_state, jit_mode=False), None

        def generate_code(self) -> Callable[..., Batch]:
            return lambda samples, memory: ours.work()

    image = beton.manifest.adopted.image if beton.manifest.adopted else "image"
    names = [name for _, name in read_fields(path, beton.data)]
    reading = Reading(
        str(path),
        indices=np.arange(len(beton)),  # of a subset that repeats images, more than the file has
        batch_size=ours.order.batch_size,
        num_workers=ours.workers,
        os_cache=True,
        drop_last=False,
        batches_ahead=AHEAD,
        pipelines={name: [Samples(), Cut()] if name == image else None for name in names},
    )
    reading.traversal_order = Given(reading)  # its parameter ``order`` takes no class of ours
    pointers = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_size_t, ctypes.c_size_t)
    fill_part = pointers(ctypes.cast(library().fastproj_fill, ctypes.c_void_p).value or 0)
    threads = Compiler.get_iterator()

    def fill(batch: int, slots: np.ndarray, why: int) -> None:
        for worker in threads(len(slots)):
            slots[worker] = fill_part(batch, why + worker * MESSAGE_BYTES)

    fill.is_parallel = True  # type: ignore[attr-defined]
    return reading, Compiler.compile(fill)
