"""Read a beton in native threads that decode each image once for all its views.

It reads FFCV's file format, but not with FFCV's loader: version 1.0.2 recompiles its pipeline at
each start, hangs when a worker raises, overwrites buffers that it has handed out, cannot start
inside an epoch, and enlarges by nearest neighbor.

The thread that decoded an image also crops it, while it is still in cache. For a GPU with few
cores the threads only decode, into pinned memory, and the GPU crops (see ``CROPPING_THREADS``).
Copies and crops on the GPU run on their own CUDA stream, in parallel with the step.

Large samples are read in random order: we announce the next ones (MADV_WILLNEED) and disable
read-ahead (MADV_RANDOM). Measured on 2,048 photographs (78 MB) of a 460 MB file that was not in the
page cache, kernel read-ahead 8 MB, n = 6: the kernel read 87 MB, 445 MB without this; the first
batch came after 0.07 s, 0.3 s without.

Rows and columns of a JPEG that no view needs are not decoded. With two crops of scale 8 to 100 %
this skips 38 % of the pixels and a seventh of the time. libjpeg could decode at half size where all
boxes shrink more than that; we do not, because the pixels differ too much: from the contract's by
1.1/255 on average and at most 72/255 (centers of 60 photographs of 400 px, resized to 96 px), 2.1
and 103 when resized to 160 px.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch

from fastproj.core.native import library
from fastproj.loaders.base import Batch, Loader, to_device
from fastproj.loaders.crop import batch_like
from fastproj.loaders.fill import Fill, read_at_random

CPU = torch.device("cpu")
AHEAD = 2  # batches in progress beside the one that the caller holds
# For a GPU, so many threads and more also crop: decoding and two exact crops to 224 pixels take
# 1.16 ms per image and core, and 8,000 images/s are predicted of an H100's step (docs/scaling.md).
# Fewer threads leave the crops to the GPU. Not measured on a GPU.
CROPPING_THREADS = 10
PADDED_BYTES = 1 << 30  # of a batch that a GPU crops; of a larger one, the threads crop the images
PREFETCHED = 16 << 10  # mean bytes per sample from which samples are announced to the kernel


class StreamLoader(Loader):
    """Loads with ``workers`` threads. Raises InputError if the C library is not built."""

    def _open(self) -> None:
        library()  # raises now if it is missing
        # Small samples share pages with their neighbors, so there read-ahead helps.
        self._prefetch = self.order.shuffle and self.beton.length.mean() >= PREFETCHED
        if self._prefetch:
            read_at_random(self.beton)
        self._beside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._gpu_crops = self._beside is not None and self.workers < CROPPING_THREADS

    @property
    def cropping(self) -> str:
        """Who crops: on a GPU the pixels differ by a rounding."""
        return "the GPU crops" if self._gpu_crops else "threads crop"

    @property
    def memory(self) -> int:
        """Bytes of the batches in progress, in host memory; page-locked, torch rounds each up."""
        batch = self.order.batch_size
        largest = batch * sum(3 * crop.num_views * crop.size**2 for crop in self.crops)
        if self._gpu_crops:
            padded = batch * _padded(self.beton.height, self.beton.width)
            largest = padded if padded <= PADDED_BYTES else max(largest, PADDED_BYTES)
        return (AHEAD + 1) * largest

    @property
    def advice(self) -> str:
        """What to do about batches that are too large to be cropped by the GPU; mostly empty."""
        side = int(max(self.beton.height.max(), self.beton.width.max()))
        padded = self.order.batch_size * _padded(self.beton.height, self.beton.width)
        if not self._gpu_crops or padded <= PADDED_BYTES:
            return ""
        return (
            f"threads crop the batches that hold images of up to {side} pixels; for speed write "
            "the set with a lower --data.max_resolution"
        )

    def _batches(self, epoch: int, steps: range) -> Generator[Batch, None, None]:
        pool = ThreadPoolExecutor(self.workers, "fastproj-stream")
        started: deque[_Pending] = deque()
        try:
            for step in steps:
                started.append(self._start(pool, epoch, step))
                if len(started) > AHEAD:
                    yield self._finish(started.popleft())
            while started:
                yield self._finish(started.popleft())
        finally:
            for pending in started:
                pending.fill.stop()
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor, epoch: int, step: int) -> "_Pending":
        positions = self.order.batch(epoch, step)
        pending = _Pending(positions, self._boxes(epoch, positions))
        height, width = self.beton.height[positions], self.beton.width[positions]
        if self._gpu_crops and len(positions) * _padded(height, width) <= PADDED_BYTES:
            shape = (len(positions), int(height.max(initial=1)), int(width.max(initial=1)), 3)
            pending.images = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            pending.crops = [
                batch_like(
                    crop.num_views, len(positions), crop.size, CPU, pinned=self._beside is not None
                )
                for crop in self.crops
            ]
        pending.fill = Fill(self.beton, positions, pending.boxes, pending.crops, pending.images)
        if self._prefetch:
            pending.fill.prefetch()
        pending.jobs = [
            pool.submit(pending.fill.run, self.first_read, positions[worker :: self.workers])
            for worker in range(self.workers)
        ]
        return pending

    def _finish(self, pending: "_Pending") -> Batch:
        for job in pending.jobs:
            job.result()  # raises what the thread raised
        with torch.cuda.stream(self._beside) if self._beside is not None else nullcontext():
            if pending.images is not None:
                images = pending.images.to(self.device, non_blocking=True).movedim(-1, 1)
                pending.crops = [
                    self.crop_batch(images, to_device(boxes, self.device), crop.size)
                    for crop, boxes in zip(self.crops, pending.boxes, strict=True)
                ]
            else:
                pending.crops = [
                    crops.to(self.device, non_blocking=True) for crops in pending.crops
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
                tensor.record_stream(step)  # so its memory is not reused while the step reads it
        return batch


def _padded(height: np.ndarray, width: np.ndarray) -> int:
    """Bytes of one image of a batch that is padded to its highest and its widest image."""
    return 3 * int(height.max(initial=1)) * int(width.max(initial=1))


class _Pending:
    """A batch in progress: ``images`` that a GPU will crop, or ``crops`` that the threads fill."""

    fill: Fill

    def __init__(self, positions: np.ndarray, boxes: list[np.ndarray]) -> None:
        self.positions, self.boxes = positions, boxes
        self.jobs: list[Future[None]] = []
        self.images: torch.Tensor | None = None
        self.crops: list[torch.Tensor] = []
