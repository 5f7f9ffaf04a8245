"""Images and targets for a detector: which, in which order and how drawn depends on the seed alone.

Order, flip and side of sample i in epoch e are functions of (seed, e, i): 1 rank and 2, any number
of workers and a resumed run give the same ones.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from fastproj.core.errors import InputError
from fastproj.loaders.order import Order
from fastproj.loaders.reference import PATIENCE
from fastproj.transfer.sets import Annotated

Target = dict[str, Tensor]
Sample = tuple[Tensor, Target]  # uint8 (3, h, w), and its boxes, labels and masks


def trainable(images: Sequence[Annotated]) -> list[Annotated]:
    """The images with an object to train on: COCO's crowds are none [detectron2's filter]."""
    return [image for image in images if len(_kept(image))]


def _kept(image: Annotated) -> list[int]:
    """The objects to train on: all but COCO's crowds, which have outlines; VOC's difficult stay."""
    crowd = image.ignored if image.outlines else torch.zeros(len(image), dtype=torch.bool)
    return (~crowd).nonzero().flatten().tolist()


class _Samples(Dataset[Sample | InputError]):
    def __init__(
        self, images: Sequence[Annotated], masks: bool, seed: int, transform: v2.Transform | None
    ) -> None:
        self.images, self.masks, self.seed, self.transform = images, masks, seed, transform

    def __getitem__(self, key: tuple[int, int]) -> Sample | InputError:
        epoch, index = key
        try:
            sample = read(self.images[index], self.masks)
        except InputError as error:  # raised by whoever asked: a worker would add its traceback
            return error
        if self.transform is None:
            return sample
        with torch.random.fork_rng(devices=[]):
            address = np.random.SeedSequence([self.seed, epoch, index])
            torch.manual_seed(int(address.generate_state(1)[0]))
            image, target = self.transform(*sample)
        return image.as_subclass(Tensor), {n: t.as_subclass(Tensor) for n, t in target.items()}


def read(image: Annotated, masks: bool) -> Sample:
    """The pixels, uint8 (3, h, w), and the target of an image; ``masks`` uint8 (n, h, w).

    Raises ``InputError`` for a file that is no image or of another size than annotated.
    """
    try:
        with Image.open(image.file) as file:
            pixels = v2.functional.pil_to_tensor(file.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{image.file} is no image that Pillow reads ({error}): copy it again"
        ) from None
    width, height = image.size
    if pixels.shape[1:] != (height, width):
        raise InputError(
            f"{image.file} has {pixels.shape[2]}x{pixels.shape[1]} pixels, its annotation says "
            f"{width}x{height}: correct the one or the other"
        )
    kept = _kept(image)
    boxes = tv_tensors.BoundingBoxes(image.boxes[kept], format="XYXY", canvas_size=(height, width))
    target: Target = {"boxes": boxes, "labels": image.labels[kept]}
    if masks:
        outlines = [_mask(image, index) for index in kept]
        target["masks"] = tv_tensors.Mask(torch.stack(outlines))
    return tv_tensors.Image(pixels), target


def _mask(image: Annotated, index: int) -> Tensor:
    """An object's outline as pixels, uint8 (h, w)."""
    width, height = image.size
    outline: Any = image.outlines[index] if image.outlines else None
    try:
        if isinstance(outline, list):
            outline = mask.merge(mask.frPyObjects(outline, height, width))
        elif isinstance(outline["counts"], list):
            outline = mask.frPyObjects(outline, height, width)
        return torch.from_numpy(mask.decode(outline))
    except Exception as error:  # a dozen types, of C
        raise InputError(
            f"{image.file}: object {index + 1} has no outline ({error}): give --detector.masks "
            "false, or annotations with a segmentation"
        ) from None


def augmentation(sizes: Sequence[int], max_size: int, flip: float) -> v2.Transform:
    """A mirror image, and the shorter side one of ``sizes``, the longer at most ``max_size``."""
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(flip),
            v2.RandomShortestSize(min_size=list(sizes), max_size=max_size),
        ]
    )


def batches(
    images: Sequence[Annotated],
    order: Order,
    epoch: int,
    first: int = 0,
    *,
    masks: bool = False,
    transform: v2.Transform | None = None,
    workers: int = 0,
) -> Iterator[list[Sample]]:
    """This rank's batches of ``epoch`` from its step ``first`` on, read by ``workers`` processes.

    Raises ``InputError`` for an image that cannot be read, and where a worker was killed.
    """
    loader = DataLoader(
        _Samples(images, masks, order.seed, transform),
        batch_sampler=[
            [(epoch, int(index)) for index in order.batch(epoch, step)]
            for step in range(first, order.steps)
        ],
        num_workers=workers,
        collate_fn=list,
        timeout=PATIENCE if workers else 0,
        generator=torch.Generator(),  # torch's global one would be drawn from
    )
    try:
        for batch in loader:
            for sample in batch:
                if isinstance(sample, InputError):
                    raise sample
            yield batch
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise InputError(
            f"a worker process gave no batch ({str(error).partition(chr(10))[0]}): it was killed, "
            "or shared memory is full: make /dev/shm larger, or give fewer --data.workers"
        ) from error
