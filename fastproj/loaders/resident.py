"""Keep the whole set on the device as uint8 and crop there: no workers, no copies from the host.

For sets stored raw in one image size: CIFAR, STL-10, digits, and photographs that a square store
has resized to one square (ImageNet-100 at 160 px: 9.7 GB).
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch

from fastproj.core.errors import InputError, memory_shortage
from fastproj.core.progress import Progress
from fastproj.data.beton import Beton
from fastproj.data.layout import RAW
from fastproj.loaders.base import Batch, Loader, to_device
from fastproj.loaders.fill import Fill

CHUNK = 64 << 20  # bytes per copy to the device: torch keeps the page-locked memory of two
# Images whose order and boxes are drawn and copied to the device at once. For 50,000 images drawing
# takes 18 ms, in batches of 256 it takes 48 ms (one core of a Xeon, medians of 9 and 31 calls).
DRAWN = 2**16


def is_uniform(beton: Beton) -> bool:
    """Whether all images are stored raw and in one size."""
    return bool(
        (beton.mode == RAW).all()
        and (beton.width == beton.width[0]).all()
        and (beton.height == beton.height[0]).all()
    )


class ResidentLoader(Loader):
    """``workers`` threads read the set. Raises InputError for JPEGs or images of several sizes."""

    def _open(self) -> None:
        if not is_uniform(self.beton):
            raise InputError(
                f"{self.beton.path} holds JPEGs or images of several sizes, which cannot be "
                "resident: use --data.engine stream, or write it with --data.store square"
            )
        self._load()
        self.labels = torch.from_numpy(self.beton.label).to(self.device)
        self.index = torch.from_numpy(self.beton.index).to(self.device)

    def _load(self) -> None:
        """Copy the whole set to the device as (N, 3, H, W), with a progress bar on a terminal."""
        height, width = int(self.beton.height[0]), int(self.beton.width[0])
        samples, gpu = len(self.beton), self.device.type == "cuda"
        shape = (samples, 3, height, width)
        try:
            self.images = torch.empty(shape, dtype=torch.uint8, device=self.device)
        except (MemoryError, RuntimeError) as error:
            shortage = memory_shortage(error)
            if not shortage:
                raise
            raise InputError(
                f"{self.beton.path} does not fit into the memory of {self.device} ({shortage}): "
                "use --data.engine stream, which keeps a few batches there"
            ) from error
        shown = self.order.rank == 0
        chunk = max(1, CHUNK // (3 * height * width))
        with (
            ThreadPoolExecutor(self.workers, "fastproj-resident") as pool,
            Progress(samples, "resident", lines=False) if shown else nullcontext() as bar,
        ):
            for start in range(0, samples, chunk):
                positions = np.arange(start, min(start + chunk, samples))
                read = (len(positions), height, width, 3)
                host = torch.empty(read, dtype=torch.uint8, pin_memory=gpu)
                fill = Fill(self.beton, positions, [], padded=host)
                for job in [
                    pool.submit(fill.run, self.first_read, positions[worker :: self.workers])
                    for worker in range(self.workers)
                ]:
                    job.result()
                # Transposed on the device; the next chunk is read while this one is copied.
                images = host.to(self.device, non_blocking=True).movedim(-1, 1)
                self.images[start : start + len(positions)] = images
                if bar:
                    bar.update(len(positions))

    def _batches(self, epoch: int, steps: range) -> Generator[Batch, None, None]:
        at_once = max(1, DRAWN // self.order.batch_size)
        for first in range(steps.start, steps.stop, at_once):
            some = range(first, min(first + at_once, steps.stop))
            batches = [self.order.batch(epoch, step) for step in some]
            positions, sizes = np.concatenate(batches), [len(batch) for batch in batches]
            places = to_device(positions, self.device).split(sizes)
            boxes = [to_device(box, self.device) for box in self._boxes(epoch, positions)]
            by_step = zip(places, *(box.split(sizes, 1) for box in boxes), strict=True)
            for where, *of_step in by_step:
                images = self.images[where]
                crops = tuple(
                    self.crop_batch(images, box, crop.size).flatten(0, 1)
                    for crop, box in zip(self.crops, of_step, strict=True)
                )
                yield Batch(crops, self.labels[where], self.index[where])
