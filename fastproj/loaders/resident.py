"""The whole set on the device as uint8, cropped there: no worker, no copy, no wait.

For sets of one image size stored raw: CIFAR, STL-10, digits, and the square store of a set of
photographs (ImageNet-100 at 160 px: 9.7 GB).
"""

from collections.abc import Generator, Sequence

import numpy as np
import torch

from fastproj.errors import InputError
from fastproj.loaders.base import Batch, Loader, to_device
from fastproj.loaders.boxes import Center, Crop
from fastproj.loaders.crop import crop_batch
from fastproj.loaders.order import Order
from fastproj.manifest import RAW, Beton

CHUNK = 4096  # images a copy to the device: large enough to be fast, small beside the set


def is_uniform(beton: Beton) -> bool:
    """Whether every image is stored raw and in one size."""
    return bool(
        (beton.mode == RAW).all()
        and (beton.width == beton.width[0]).all()
        and (beton.height == beton.height[0]).all()
    )


class ResidentLoader(Loader):
    """Raises InputError where the beton holds JPEGs or images of several sizes."""

    def __init__(
        self, beton: Beton, groups: Sequence[Crop | Center], order: Order, device: torch.device
    ) -> None:
        super().__init__(beton, groups, order, device)
        if not is_uniform(beton):
            raise InputError(
                f"{beton.path} holds JPEGs or images of several sizes, which cannot be resident: "
                "use --data.engine stream, or write it with --data.store square"
            )
        height, width = int(beton.height[0]), int(beton.width[0])
        self.images = torch.empty((len(beton), 3, height, width), dtype=torch.uint8, device=device)
        for start in range(0, len(beton), CHUNK):
            chunk = raw_images(beton, np.arange(start, min(start + CHUNK, len(beton))))
            self.images[start : start + len(chunk)] = torch.from_numpy(chunk).movedim(-1, 1)
        self.labels = torch.from_numpy(beton.label).to(device)
        self.index = torch.from_numpy(beton.index).to(device)

    def _batches(self, epoch: int, steps: range) -> Generator[Batch, None, None]:
        for step in steps:
            positions = self.order.batch(epoch, step)
            where = to_device(positions, self.device)
            images = self.images[where]
            crops = tuple(
                crop_batch(images, to_device(box, self.device), group.size).flatten(0, 1)
                for group, box in zip(self.groups, self._boxes(epoch, positions), strict=True)
            )
            yield Batch(crops, self.labels[where], self.index[where])


def raw_images(beton: Beton, positions: np.ndarray) -> np.ndarray:
    """Raw images of one size, gathered from the mapped file: uint8 (B, H, W, 3)."""
    height, width = int(beton.height[positions[0]]), int(beton.width[positions[0]])
    bytes_each = height * width * 3
    pointers = beton.pointer[positions]
    if (np.diff(pointers) == bytes_each).all():  # neighbours in the file: one slice
        flat = beton.data[pointers[0] : pointers[0] + len(positions) * bytes_each]
        return np.array(flat).reshape(-1, height, width, 3)
    images = np.empty((len(positions), bytes_each), np.uint8)
    for image, pointer in zip(images, pointers, strict=True):
        image[:] = beton.data[pointer : pointer + bytes_each]
    return images.reshape(-1, height, width, 3)
