"""Streams a beton through threads: each image is decoded once and every view cropped from it.

It reads FFCV's container, but neither through FFCV's loader nor with FFCV's decoder, because on
1.0.2 the loader compiles its pipeline anew at each start, hangs when a worker raises, hands
out buffers that it overwrites and cannot start inside an epoch; its crop is nearest-neighbour
where it enlarges. libjpeg-turbo through simplejpeg decoded 2,900 images/s on four cores where
FFCV's ``imdecode`` did 2,200 (ImageNet photographs of at most 400 px, quality 90; the machine
had other work), with the accurate DCT instead of the fast one.

Where a GPU crops, the threads only decode into a padded batch and the device does the rest; on a
CPU the thread that decoded an image also crops it, while it is still in the cache.
"""

import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import simplejpeg
import torch

from fastproj.errors import InputError
from fastproj.loaders.base import Batch, Loader, to_device
from fastproj.loaders.boxes import Center, Crop
from fastproj.loaders.crop import batch_like, crop_batch, crop_each
from fastproj.loaders.order import Order
from fastproj.loaders.resident import is_uniform
from fastproj.machine import cores
from fastproj.manifest import RAW, Beton

AHEAD = 2  # batches under way beside the one the caller holds
SMALL = 48  # px: below it a batched crop beats one call a sample, on a CPU too


class StreamLoader(Loader):
    """``workers`` threads (0: all cores this process may use, and never more than those)."""

    def __init__(
        self,
        beton: Beton,
        groups: Sequence[Crop | Center],
        order: Order,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        super().__init__(beton, groups, order, device)
        self.workers = min(workers or cores(), cores())
        small = is_uniform(beton) and max(beton.width[0], beton.height[0]) < SMALL
        self._crop_batched = device.type != "cpu" or bool(small)
        self._scratch = threading.local()

    def _batches(self, epoch: int, steps: range) -> Generator[Batch, None, None]:
        pool = ThreadPoolExecutor(self.workers, "fastproj-stream", initializer=_one_thread)
        under_way: deque[_Pending] = deque()
        waiting = iter(steps)
        try:
            for step in waiting:
                under_way.append(self._start(pool, epoch, step))
                if len(under_way) > AHEAD:
                    yield self._finish(under_way.popleft())
            while under_way:
                yield self._finish(under_way.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor, epoch: int, step: int) -> "_Pending":
        positions = self.order.batch(epoch, step)
        pending = _Pending(positions, self._boxes(epoch, positions))
        if self._crop_batched:
            height = int(self.beton.height[positions].max(initial=1))
            width = int(self.beton.width[positions].max(initial=1))
            pinned = self.device.type == "cuda"
            shape = (len(positions), height, width, 3)
            pending.images = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        else:
            pending.crops = [
                batch_like(group.views, len(positions), group.size, self.device)
                for group in self.groups
            ]
        for share in np.array_split(np.arange(len(positions)), self.workers):
            pending.jobs.append(pool.submit(self._work, pending, share))
        return pending

    def _work(self, pending: "_Pending", slots: np.ndarray) -> None:
        """One thread's share of a batch."""
        for slot in slots.tolist():
            position = int(pending.positions[slot])
            if pending.images is not None:
                self._decode_into(pending.images[slot].numpy(), position)
            else:
                boxes = [box[:, slot] for box in pending.boxes]
                crop_each(self._decode(position), boxes, slot, pending.crops)

    def _decode(self, position: int) -> np.ndarray:
        """One image, (H, W, 3) uint8, valid until this thread decodes the next one."""
        beton = self.beton
        height, width = int(beton.height[position]), int(beton.width[position])
        stored = beton.stored(position)
        size = height * width * 3
        buffer = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._scratch.buffer = np.empty(size, np.uint8)
        image = buffer[:size]
        if beton.mode[position] == RAW:
            image[:] = stored
            return image.reshape(height, width, 3)
        try:
            decoded = simplejpeg.decode_jpeg(stored, strict=True, buffer=image)
            return decoded.reshape(height, width, 3)
        except ValueError as error:
            raise InputError(
                f"{beton.path}: sample {beton.index[position]} cannot be decoded ({error}): "
                f"run data_prep/write_ffcv.py --verify {beton.path}, then write it again"
            ) from error

    def _decode_into(self, padded: np.ndarray, position: int) -> None:
        image = self._decode(position)
        padded[: image.shape[0], : image.shape[1]] = image

    def _finish(self, pending: "_Pending") -> Batch:
        for job in pending.jobs:
            job.result()  # raises what the thread raised
        if pending.images is not None:
            images = pending.images.to(self.device, non_blocking=True).movedim(-1, 1)
            pending.crops = [
                crop_batch(images, to_device(box, self.device), group.size)
                for group, box in zip(self.groups, pending.boxes, strict=True)
            ]
        return Batch(
            tuple(crops.flatten(0, 1) for crops in pending.crops),
            to_device(self.beton.label[pending.positions], self.device),
            to_device(self.beton.index[pending.positions], self.device),
        )


class _Pending:
    """A batch under way: ``images`` where the device will crop, else ``crops`` being filled."""

    def __init__(self, positions: np.ndarray, boxes: list[np.ndarray]) -> None:
        self.positions, self.boxes = positions, boxes
        self.jobs: list[Future[None]] = []
        self.images: torch.Tensor | None = None
        self.crops: list[torch.Tensor] = []


def _one_thread() -> None:
    torch.set_num_threads(1)  # this thread's own: the pool is the parallelism
