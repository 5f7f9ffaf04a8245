"""The slow reference engine: torch's DataLoader, Pillow and torchvision.

Tests and benchmarks compare the other engines with it. Order and boxes are the same; pixels come
from torchvision's ``resized_crop`` (bilinear, antialiased).
"""

import io
import multiprocessing
import shutil
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as tv

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.data.layout import RAW
from fastproj.loaders.base import Batch, Loader
from fastproj.loaders.boxes import Center, Crop

PATIENCE = 300.0  # seconds for a batch of a worker that hangs

AHEAD = 2  # batches in progress of each worker
SHARED = Path("/dev/shm")  # noqa: S108 - Linux's shared memory, nothing of ours is written there
# A process that is not forked would get the whole file through a pipe.
FORK = "fork" if "fork" in multiprocessing.get_all_start_methods() else None

Key = tuple[int, list[np.ndarray]]
Sample = tuple[list[Tensor], int, int]


class ReferenceLoader(Loader):
    """Loads with ``workers`` processes."""

    def _keys(self, epoch: int, steps: range) -> Iterator[list[Key]]:
        """Each step's samples: position, and the boxes of each crop size."""
        for step in steps:
            positions = self.order.batch(epoch, step)
            self.first_read.check(positions)
            boxes = self._boxes(epoch, positions)
            yield [(int(p), [box[:, slot] for box in boxes]) for slot, p in enumerate(positions)]

    def _require_shared_memory(self) -> None:
        """torch passes batches through /dev/shm; where that is full, the next one never comes."""
        batch = sum(3 * crop.num_views * crop.size**2 for crop in self.crops)
        needed = batch * self.order.batch_size * AHEAD * self.workers
        try:
            free = shutil.disk_usage(SHARED).free
        except OSError:
            return
        if free < needed:
            raise InputError(
                f"shared memory ({SHARED}) has {free / 1e6:,.1f} MB free, and {self.workers} "
                f"worker(s) need {needed / 1e6:,.1f}: make it larger (docker run --shm-size), give "
                "fewer --data.workers, or take --data.engine stream"
            )

    def _batches(self, epoch: int, steps: range) -> Generator[Batch, None, None]:
        self._require_shared_memory()
        loader = DataLoader(
            _Crops(self.beton, self.crops),
            batch_sampler=self._keys(epoch, steps),
            num_workers=self.workers,
            collate_fn=partial(_collate, self.crops),
            multiprocessing_context=FORK,
            prefetch_factor=AHEAD,
            pin_memory=self.device.type == "cuda",
            timeout=PATIENCE,
            # By default it draws from torch's global generator, and a resumed run would differ.
            generator=torch.Generator(),
        )
        try:
            for crops, labels, index in loader:
                yield Batch(
                    tuple(
                        crop.to(self.device, memory_format=torch.channels_last) for crop in crops
                    ),
                    labels.to(self.device),
                    index.to(self.device),
                )
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):  # what a worker raised, not its end
                raise
            raise InputError(
                f"a worker process gave no batch ({str(error).partition(chr(10))[0]}): it was "
                "killed, or shared memory is full: make /dev/shm larger (docker run --shm-size), "
                "give fewer --data.workers, or take --data.engine stream"
            ) from error


class _Crops(Dataset[Sample]):
    def __init__(self, beton: Beton, crops: Sequence[Crop | Center]) -> None:
        self.beton, self.sizes = beton, [crop.size for crop in crops]

    def __getitem__(self, key: Key) -> Sample:
        position, boxes = key
        image = read_image(self.beton, position)
        crops = [
            torch.stack(
                [
                    tv.resized_crop(image, *box, size=[size, size], antialias=True)
                    for box in views.tolist()
                ]
            )
            for views, size in zip(boxes, self.sizes, strict=True)
        ]
        return crops, int(self.beton.label[position]), int(self.beton.index[position])


def read_image(beton: Beton, position: int) -> Tensor:
    """One stored image, decoded by Pillow: uint8 (3, H, W)."""
    stored = np.array(beton.stored(position))
    if beton.mode[position] == RAW:
        pixels = stored.reshape(beton.height[position], beton.width[position], 3)
    else:
        pixels = np.array(Image.open(io.BytesIO(stored.tobytes())))
    return torch.from_numpy(pixels).movedim(-1, 0)


def _collate(
    crops: Sequence[Crop | Center], samples: list[Sample]
) -> tuple[list[Tensor], Tensor, Tensor]:
    if not samples:  # of several ranks some may get none in the last step
        none = torch.empty(0, dtype=torch.int64)
        return [torch.empty(0, 3, c.size, c.size, dtype=torch.uint8) for c in crops], none, none
    by_sample, labels, index = zip(*samples, strict=True)
    views = [torch.stack(crop, 1).flatten(0, 1) for crop in zip(*by_sample, strict=True)]
    return views, torch.tensor(labels), torch.tensor(index)
