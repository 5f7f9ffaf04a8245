"""Small sets whose pixels have classes, in PASCAL VOC's and ADE20K's own formats."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastproj.transfer.pixels import VOID

BACKGROUND = 5  # in ADE20K's format, where 0 is no class
FIRST = 10  # of the shapes, in both formats


def mask_of(image: Image.Image, drawn: list, background: int, border: int | None) -> Image.Image:
    """The classes of an image's pixels, one byte each; shapes have a ``border`` of one pixel."""
    mask = Image.new("L", image.size, background)
    pen = ImageDraw.Draw(mask)
    for kind, _, outline in drawn:
        corners = list(zip(outline[::2], outline[1::2], strict=True))
        pen.polygon(corners, FIRST + kind, FIRST + kind if border is None else border)
    return mask


def write_voc_masks(root: Path, split: str, made: list, year: str = "2012") -> Path:
    """A split in VOC's folders below ``root``: masks with a palette, and void outlines."""
    folder = root / "VOCdevkit" / f"VOC{year}"
    for name in ("SegmentationClass", "ImageSets/Segmentation", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    names = [f"{split}_{number:04d}" for number in range(len(made))]
    (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    colors = np.random.default_rng(0).integers(0, 256, 768).tolist()
    for name, (image, drawn) in zip(names, made, strict=True):
        image.save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        mask = mask_of(image, drawn, 0, VOID)
        mask.putpalette(colors)
        mask.save(folder / "SegmentationClass" / f"{name}.png")
    return folder


def write_ade(root: Path, split: str, made: list) -> Path:
    """A split in ADE20K's folders below ``root``; pixels of the first column have no class."""
    folder = root / "ADEChallengeData2016"
    for name in ("images", "annotations"):
        (folder / name / split).mkdir(parents=True, exist_ok=True)
    for number, (image, drawn) in enumerate(made):
        name = f"ADE_{split}_{number:08d}"
        image.save(folder / "images" / split / f"{name}.jpg", quality=95)
        mask = mask_of(image, drawn, BACKGROUND, None)
        mask.paste(0, (0, 0, 1, mask.height))
        mask.save(folder / "annotations" / split / f"{name}.png")
    return folder
