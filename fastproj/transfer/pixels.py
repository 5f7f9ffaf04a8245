"""Sets whose pixels have classes, in ADE20K's and PASCAL VOC's formats, and how they are drawn."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.datasets import VOCSegmentation
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import v2

from fastproj.core.errors import InputError
from fastproj.transfer.batches import Sample, read_pixels
from fastproj.transfer.sets import VOC_CLASSES, open_voc, quietly

VOID = 255  # the class of a pixel that no loss and no score counts
ADE = "ADEChallengeData2016"
ADE_URL = f"http://data.csail.mit.edu/places/ADEchallenge/{ADE}.zip"
CLASSES = {"ade20k": 150, "voc": 1 + len(VOC_CLASSES)}  # VOC's first is the background
MOST = 0.75  # of a crop's pixels, that one class may have
TRIES = 10  # crops drawn until no class has more


class Masked(NamedTuple):
    """An image file, and the file of its pixels' classes."""

    file: Path
    mask: Path


@dataclass(frozen=True)
class MaskedSet:
    """``name``, the number of ``classes``, and ``images`` in the order of their lists."""

    name: str
    classes: int
    images: Sequence[Masked] = field(repr=False)

    def content(self) -> str:
        """A SHA-256 over file names and masks; not over the images' pixels."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(repr((image.file.name, image.mask.name)).encode())
            digest.update(image.mask.read_bytes())
        return digest.hexdigest()


def open_masked(kind: str, root: str | Path, splits: Sequence[str], download: bool) -> MaskedSet:
    """The set of ``splits`` below ``root``.

    ``kind``: ``ade20k``, whose splits are ``training`` and ``validation`` (images in
    ``root/ADEChallengeData2016/images/training``, masks in ``…/annotations/training``); or ``voc``,
    whose splits are ``2012_train``, ``2012_val`` and so on. ``download`` fetches a format's own
    set into ``root`` first.

    Raises ``InputError`` for a split that is not there, and for images without a mask.
    """
    opened = _voc if kind == "voc" else _ade
    images = [image for split in splits for image in opened(Path(root), split, download)]
    name = "+".join(splits)
    missing = [file for image in images for file in image if not file.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of the {2 * len(images)} files of {name} are missing, {missing[0]} "
            "the first: copy or download the set again"
        )
    return MaskedSet(name, CLASSES[kind], images)


def _voc(root: Path, split: str, download: bool) -> list[Masked]:
    reader = open_voc(VOCSegmentation, root, split, download, "2012_train or 2012_val")
    return [Masked(Path(a), Path(b)) for a, b in zip(reader.images, reader.masks, strict=True)]


def _ade(root: Path, split: str, download: bool) -> list[Masked]:
    images, masks = (root / ADE / folder / split for folder in ("images", "annotations"))
    if download and not (root / ADE).is_dir():
        with quietly():
            download_and_extract_archive(ADE_URL, root)
    found = sorted(images.glob("*.jpg"))
    if not found:
        raise InputError(
            f"{root} has no split {split} of ADE20K: there is no image in {images}; --data.root is "
            f"the folder of {ADE}; --data.download true fetches the set"
        )
    return [Masked(file, masks / f"{file.stem}.png") for file in found]


def read_masked(image: Masked, kind: str) -> Sample:
    """The pixels, uint8 (3, h, w), and ``mask``, their classes from 0, uint8 (h, w).

    Raises ``InputError`` for a file that is no image, a mask of another size, and a class that the
    set does not have.
    """
    pixels = read_pixels(image.file)
    try:
        with Image.open(image.mask) as opened:
            if opened.mode not in ("L", "P"):
                raise InputError(
                    f"{image.mask} is an image of mode {opened.mode}: a mask has one byte per "
                    "pixel, its class"
                )
            mask = torch.from_numpy(np.array(opened))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{image.mask} is no mask that Pillow reads ({error}): copy it again"
        ) from None
    if mask.shape != pixels.shape[1:]:
        raise InputError(
            f"{image.mask} has {mask.shape[1]}x{mask.shape[0]} pixels, its image "
            f"{pixels.shape[2]}x{pixels.shape[1]}: copy both again"
        )
    if kind == "ade20k":
        mask = mask - 1  # 0 is no class there, and becomes 255
    wrong = mask[(mask >= CLASSES[kind]) & (mask != VOID)]
    if len(wrong):
        value = int(wrong[0]) + (kind == "ade20k")
        raise InputError(
            f"{image.mask} has pixels of value {value}, which is no class of the format {kind}: "
            "correct the mask, or --data.format"
        )
    return pixels, {"mask": tv_tensors.Mask(mask)}


class Crop(nn.Module):
    """A crop of ``size`` pixels a side; what reaches over the edge is ``fill``, and ``VOID``.

    Drawn until no class has more than ``MOST`` of its pixels and there are two, ``TRIES`` times at
    most, as mmsegmentation's ``RandomCrop(cat_max_ratio=0.75)``.
    """

    def __init__(self, size: int, fill: Sequence[int]) -> None:
        super().__init__()
        self.size, self.fill = size, list(fill)

    def forward(self, image: Tensor, target: dict[str, Tensor]) -> Sample:
        mask = target["mask"]
        height, width = (min(side, self.size) for side in mask.shape)
        for _ in range(TRIES):
            top, left = (
                int(torch.randint(whole - side + 1, ()))
                for whole, side in zip(mask.shape, (height, width), strict=True)
            )
            part = mask[top : top + height, left : left + width]
            counts = torch.bincount(part.flatten(), minlength=VOID + 1)[:VOID]
            if (counts > 0).sum() > 1 and counts.max() < MOST * counts.sum():
                break
        pixels = torch.tensor(self.fill, dtype=torch.uint8)[:, None, None].expand(
            -1, self.size, self.size
        ).clone()  # fmt: skip
        pixels[:, :height, :width] = image[..., top : top + height, left : left + width]
        classes = torch.full((self.size, self.size), VOID, dtype=torch.uint8)
        classes[:height, :width] = part
        return tv_tensors.Image(pixels), {"mask": tv_tensors.Mask(classes)}


def crops(
    size: int, scale: tuple[float, float], flip: float, mean: Sequence[float]
) -> v2.Transform:
    """DINOv2's augmentation: another size, a crop, a mirror image, other colors.

    The shorter side becomes ``scale`` times ``size`` pixels, drawn between the two. ``mean``, in
    [0, 1], fills what a crop lacks. Brightness, contrast, saturation (by up to 32/255, half and
    half of themselves) and hue (by 18 degrees) change with probability 0.5 each.
    """
    sides = range(round(scale[0] * size), round(scale[1] * size) + 1)
    jitter = partial(v2.RandomApply, p=0.5)
    return v2.Compose(
        [
            v2.RandomShortestSize(min_size=list(sides)),
            Crop(size, [round(255 * value) for value in mean]),
            v2.RandomHorizontalFlip(flip),
            jitter([v2.ColorJitter(brightness=32 / 255)]),
            jitter([v2.ColorJitter(contrast=0.5)]),
            jitter([v2.ColorJitter(saturation=0.5)]),
            jitter([v2.ColorJitter(hue=18 / 360)]),
        ]
    )
