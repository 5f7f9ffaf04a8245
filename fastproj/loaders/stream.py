"""Streams a beton through native threads: each image is decoded once, for every view.

It reads FFCV's container, but not through FFCV's loader, because on 1.0.2 that compiles its
pipeline anew at each start, hangs when a worker raises, hands out buffers that it overwrites and
cannot start inside an epoch; its crop is nearest-neighbour where it enlarges.

Where a GPU crops, the threads only decode, into pinned memory, and the copy and the crops run on a
stream of their own beside the step. On a CPU the thread that decoded an image also crops it, while
it is still in the cache.

Of large samples in a drawn order the kernel is told which come next, and to read nothing around
them: of 2,048 photographs in a file of 460 MB that was in no cache, it read 87 MB for their 78, and
445 MB without being told (read-ahead of 8 MB; n 6), and the first batch came after 0.07 s, not 0.3.

Of a JPEG, the rows and columns that no view needs are not decoded: two crops of 8 to 100 % leave
out 38 % of the pixels, and it takes a seventh less time. Decoding at half the size, where all boxes
are shrunk to less, is left alone as it computes something else: 1.1/255 from the contract's pixels
on average and up to 72 (60 photographs of 400 px, their centres to 96 px; to 160 px 2.1 and 103).
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch

from fastproj.loaders.base import Batch, Loader, to_device
from fastproj.loaders.crop import batch_like, crop_batch
from fastproj.loaders.fill import Fill, read_at_random
from fastproj.native import library

AHEAD = 2  # batches under way beside the one the caller holds
PREFETCHED = 16 << 10  # bytes a sample on average, from which each is asked for by itself


class StreamLoader(Loader):
    """``workers`` threads. Raises InputError where the native part is not built."""

    def _open(self) -> None:
        library()  # complain now where it is missing
        # Smaller samples share their pages: there what lies around them is wanted as well.
        self._prefetch = self.order.shuffle and self.beton.length.mean() >= PREFETCHED
        if self._prefetch:
            read_at_random(self.beton)
        self._beside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def memory(self) -> int:
        """The most bytes on the host for batches under way, beside the one the caller holds."""
        if self._beside is not None:
            each = 3 * int(self.beton.height.max() * self.beton.width.max())
        else:
            each = sum(3 * group.views * group.size**2 for group in self.groups)
        return (AHEAD + 1) * self.order.batch_size * each

    def _batches(self, epoch: int, steps: range) -> Generator[Batch, None, None]:
        pool = ThreadPoolExecutor(self.workers, "fastproj-stream")
        under_way: deque[_Pending] = deque()
        try:
            for step in steps:
                under_way.append(self._start(pool, epoch, step))
                if len(under_way) > AHEAD:
                    yield self._finish(under_way.popleft())
            while under_way:
                yield self._finish(under_way.popleft())
        finally:
            for pending in under_way:
                pending.fill.stop()
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor, epoch: int, step: int) -> "_Pending":
        positions = self.order.batch(epoch, step)
        pending = _Pending(positions, self._boxes(epoch, positions))
        if self._beside is not None:
            height = int(self.beton.height[positions].max(initial=1))
            width = int(self.beton.width[positions].max(initial=1))
            shape = (len(positions), height, width, 3)
            pending.images = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            pending.crops = [
                batch_like(group.views, len(positions), group.size, self.device)
                for group in self.groups
            ]
        pending.fill = Fill(self.beton, positions, pending.boxes, pending.crops, pending.images)
        if self._prefetch:
            pending.fill.prefetch()
        pending.jobs = [pool.submit(pending.fill.run) for _ in range(self.workers)]
        return pending

    def _finish(self, pending: "_Pending") -> Batch:
        for job in pending.jobs:
            job.result()  # raises what the thread raised
        with torch.cuda.stream(self._beside) if self._beside is not None else nullcontext():
            if pending.images is not None:
                images = pending.images.to(self.device, non_blocking=True).movedim(-1, 1)
                pending.crops = [
                    crop_batch(images, to_device(box, self.device), group.size)
                    for group, box in zip(self.groups, pending.boxes, strict=True)
                ]
            batch = Batch(
                tuple(crops.flatten(0, 1) for crops in pending.crops),
                to_device(self.beton.label[pending.positions], self.device),
                to_device(self.beton.index[pending.positions], self.device),
            )
        if self._beside is not None:
            step = torch.cuda.current_stream(self.device)
            step.wait_stream(self._beside)
            for tensor in (*batch.crops, batch.labels, batch.index):
                tensor.record_stream(step)  # or its memory is reused while the step reads it
        return batch


class _Pending:
    """A batch under way: ``images`` where the device will crop, else ``crops`` being filled."""

    fill: Fill

    def __init__(self, positions: np.ndarray, boxes: list[np.ndarray]) -> None:
        self.positions, self.boxes = positions, boxes
        self.jobs: list[Future[None]] = []
        self.images: torch.Tensor | None = None
        self.crops: list[torch.Tensor] = []
