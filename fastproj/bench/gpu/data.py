"""Sets for the acceptance run, written on the spot: speed does not depend on what they show.

Decoding does depend on it, so photographs may be given; those made here are as large as
ImageNet's, stored as JPEGs of at most 400 pixels.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from fastproj.data.beton import Beton
from fastproj.prepare.encode import Store
from fastproj.prepare.sources import Source
from fastproj.prepare.splits import write_beton

NOISE = 5  # gray levels: the JPEGs have about 37 KB, as ImageNet's have


def squares(folder: Path, split: str, images: int, side: int, classes: int) -> Beton:
    """Raw noise whose class shows in the brightness of one of the columns."""
    rng = np.random.default_rng(images)
    labels = np.arange(images) % classes
    pixels = rng.integers(0, 200, (images, side, side, 3), dtype=np.uint8)
    pixels[np.arange(images), :, labels * side // classes] = 255
    source = _source(split, pixels, labels, classes)
    return write_beton(source, folder, Store("raw"), dataset="noise")


def photographs(folder: Path, images: int, longest: int, classes: int) -> Beton:
    """JPEGs of smooth colors and noise, ``longest`` pixels wide and three quarters as high."""
    rng = np.random.default_rng(0)
    height = longest * 3 // 4
    pixels = np.empty((images, height, longest, 3), np.uint8)
    for image in pixels:
        coarse = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((longest, height), Image.Resampling.BICUBIC)
        noise = rng.normal(0, NOISE, (height, longest, 1))
        image[:] = (np.asarray(smooth) + noise).clip(0, 255)
    source = _source("photographs", pixels, np.arange(images) % classes, classes)
    return write_beton(source, folder, Store("jpeg", quality=90), dataset="made photographs")


def _source(split: str, pixels: np.ndarray, labels: np.ndarray, classes: int) -> Source:
    return Source(split, tuple(f"c{i:03d}" for i in range(classes)), pixels, labels)
