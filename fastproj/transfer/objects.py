"""The objects of an image as a detector is trained on them, and how an image is drawn."""

from collections.abc import Sequence
from typing import Any

import torch
from pycocotools import mask
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from fastproj.core.errors import InputError
from fastproj.transfer.batches import Sample, Target, read_pixels
from fastproj.transfer.sets import Annotated


def trainable(images: Sequence[Annotated]) -> list[Annotated]:
    """The images with an object to train on: COCO's crowds are none [detectron2's filter]."""
    return [image for image in images if len(_kept(image))]


def _kept(image: Annotated) -> list[int]:
    """The objects to train on: all but COCO's crowds, which have outlines; VOC's difficult stay."""
    crowd = image.ignored if image.outlines else torch.zeros(len(image), dtype=torch.bool)
    return (~crowd).nonzero().flatten().tolist()


def require_outlines(name: str, images: Sequence[Annotated], crowds: bool = True) -> None:
    """``InputError`` where objects of ``images``, those of the set ``name``, have no outline.

    ``crowds``: objects that are not trained on need one as well, as pycocotools scores with it.
    """
    without = [
        image.file
        for image in images
        for index in (range(len(image)) if crowds else _kept(image))
        if not (image.outlines and image.outlines[index])
    ]
    if without:
        raise InputError(
            f"{len(without)} objects of {name} have no outline, one in {without[0]} the first: "
            "give --detector.masks false, or annotations with a segmentation"
        )


def read(image: Annotated, masks: bool = False) -> Sample:
    """The pixels, uint8 (3, h, w), and an image's ``boxes``, ``labels`` and ``masks``.

    ``masks``: uint8 (n, h, w), of its outlines. Raises ``InputError`` for a file that is no image
    or of another size than annotated.
    """
    pixels = read_pixels(image.file)
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
    return pixels, target


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
