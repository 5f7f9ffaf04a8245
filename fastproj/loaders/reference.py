"""torch's DataLoader, Pillow and torchvision: the slow engine that everybody trusts.

Tests and benchmarks compare the others with it. Same order and same boxes as theirs; the pixels
are torchvision's ``resized_crop`` (bilinear, antialiased) of them.
"""

import io
from collections.abc import Generator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as tv

from fastproj.loaders.base import Batch, Loader
from fastproj.loaders.boxes import Center, Crop
from fastproj.manifest import RAW, Beton

Sample = tuple[list[Tensor], int, int]


class ReferenceLoader(Loader):
    """``workers`` processes."""

    def _batches(self, epoch: int, steps: range) -> Generator[Batch, None, None]:
        keys = []
        for step in steps:
            positions = self.order.batch(epoch, step)
            boxes = self._boxes(epoch, positions)
            keys.append(
                [(int(p), [box[:, slot] for box in boxes]) for slot, p in enumerate(positions)]
            )
        loader = DataLoader(
            _Crops(self.beton, self.groups),
            batch_sampler=keys,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or it draws from the global one, and a resume differs
        )
        for crops, labels, index in loader:
            yield Batch(
                tuple(group.to(self.device, memory_format=torch.channels_last) for group in crops),
                labels.to(self.device),
                index.to(self.device),
            )


class _Crops(Dataset[Sample]):
    def __init__(self, beton: Beton, groups: Sequence[Crop | Center]) -> None:
        self.beton, self.sizes = beton, [group.size for group in groups]

    def __getitem__(self, key: tuple[int, list[np.ndarray]]) -> Sample:
        position, boxes = key
        image = read_image(self.beton, position)
        crops = [
            torch.stack(
                [
                    tv.resized_crop(image, *box, size=[size, size], antialias=True)
                    for box in group.tolist()
                ]
            )
            for group, size in zip(boxes, self.sizes, strict=True)
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


def _collate(samples: list[Sample]) -> tuple[list[Tensor], Tensor, Tensor]:
    crops, labels, index = zip(*samples, strict=True)
    groups = [torch.stack(group, 1).flatten(0, 1) for group in zip(*crops, strict=True)]
    return groups, torch.tensor(labels), torch.tensor(index)
