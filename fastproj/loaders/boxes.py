"""Crop boxes that depend only on (seed, epoch, sample index, view).

Every engine calls ``draw`` and so gets the same boxes, for any number of workers and ranks and any
batch size. A random number is therefore not the next one of a stream but a hash of (seed, epoch,
sample index, view), computed for a whole batch at once (splitmix64; Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", 2014).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastproj.data.beton import Beton

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment
TRIES = 10  # as torchvision's RandomResizedCrop, which then takes a center crop


@dataclass(frozen=True)
class Crop:
    """``num_views`` random resized crops of ``size`` × ``size`` pixels per sample.

    They have the distribution of torchvision's ``RandomResizedCrop``: ``scale`` bounds the fraction
    of the image's area, ``ratio`` bounds width / height.
    """

    size: int
    num_views: int = 1
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Center:
    """The center square whose side is ``crop_fraction`` of the shorter side, resized to ``size``.

    For evaluation: ``crop_fraction`` 224/256 equals "resize to 256, center crop 224".
    """

    size: int
    crop_fraction: float = 1.0
    num_views: int = 1


@dataclass(frozen=True)
class Five(Center):
    """Five such squares per image, as torchvision's ``FiveCrop`` orders them.

    Top left, top right, bottom left, bottom right, center. With ``crop_fraction`` 1 the five of a
    square image are one.
    """

    num_views: int = 5


def draw(
    crops: Sequence[Crop | Center], beton: Beton, positions: np.ndarray, seed: int, epoch: int
) -> list[np.ndarray]:
    """Boxes of a batch: one int64 array (views, B, 4) of top, left, height, width per crop.

    Boxes are drawn in the original image. For a square store (images resized to one square) they
    are then mapped to stored pixels, rounded to at least one pixel, so both show the same regions.
    """
    width, height = beton.source_width[positions], beton.source_height[positions]
    index = beton.index[positions]
    boxes, view = [], 0
    for crop in crops:
        if isinstance(crop, Center):
            squares = _five if isinstance(crop, Five) else _center
            box = np.broadcast_to(squares(crop, width, height), (crop.num_views, len(index), 4))
        else:
            views = np.arange(view, view + crop.num_views)[:, None]
            key = _address(seed, epoch, index[None], views)
            wide, high = np.tile(width, crop.num_views), np.tile(height, crop.num_views)
            box = _random_resized(crop, wide, high, key.ravel()).reshape(*key.shape, 4)
        boxes.append(
            _to_stored(box, width, height, beton.width[positions], beton.height[positions])
        )
        view += crop.num_views
    return boxes


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: 64 bits in, 64 well-mixed bits out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _address(seed: int, epoch: int, index: np.ndarray, view: np.ndarray) -> np.ndarray:
    """The hash from which a view's random numbers follow: uint64 (views, B)."""
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, index, view):
        key = _mix((key ^ np.asarray(part).astype(np.uint64)) + GOLDEN)
    return key


def _uniform(key: np.ndarray, attempt: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for keys (n,): float64 (4, n) for area, aspect, top and left."""
    counter = np.arange(attempt + 1, 4 * TRIES + 1, TRIES, dtype=np.uint64)[:, None]
    return (_mix(key + GOLDEN * counter) >> np.uint64(11)) * 2.0**-53


def _random_resized(
    crop: Crop, width: np.ndarray, height: np.ndarray, key: np.ndarray
) -> np.ndarray:
    """torchvision's ``RandomResizedCrop.get_params`` for n images: arguments (n,), result (n, 4).

    The first box nearly always fits; others are drawn only for images where it does not.
    """
    box = np.empty((len(key), 4), np.int64)
    rest = np.arange(len(key))
    for attempt in range(TRIES):
        wide, high = width[rest], height[rest]
        drawn, fits = _try(crop, wide, high, _uniform(key[rest], attempt))
        box[rest] = drawn
        rest = rest[~fits]
        if len(rest) == 0:
            return box
    box[rest] = _fallback(crop, width[rest], height[rest])
    return box


def _try(
    crop: Crop, width: np.ndarray, height: np.ndarray, uniform: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A box (n, 4) from its four numbers, and whether it fits in the image (n,)."""
    area, aspect, top, left = uniform
    target = (crop.scale[0] + area * (crop.scale[1] - crop.scale[0])) * (width * height)
    low, up = np.log(crop.ratio)
    ratio = np.exp(low + aspect * (up - low))
    w = np.rint(np.sqrt(target * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(target / ratio)).astype(np.int64)
    i = (top * (height - h + 1)).astype(np.int64)
    j = (left * (width - w + 1)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    return np.stack([i, j, h, w], -1), fits


def _fallback(crop: Crop, width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """The largest center box of the nearest allowed ratio, for images where no try fits."""
    low, up = crop.ratio
    ratio = width / height
    h = np.where(ratio < low, np.rint(width / low).astype(np.int64), height)
    w = np.where(ratio > up, np.rint(height * up).astype(np.int64), width)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], -1)


def _center(center: Center, width: np.ndarray, height: np.ndarray) -> np.ndarray:
    side = np.maximum(np.rint(np.minimum(width, height) * center.crop_fraction).astype(np.int64), 1)
    return np.stack([(height - side) // 2, (width - side) // 2, side, side], -1)


def _five(five: Center, width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """(5, B, 4): the corners, then the center."""
    center = _center(five, width, height)
    box = np.stack([center] * 5)
    bottom, right = height - center[:, 2], width - center[:, 3]
    for view, (top, left) in enumerate(((0, 0), (0, right), (bottom, 0), (bottom, right))):
        box[view, :, 0], box[view, :, 1] = top, left
    return box


def _to_stored(
    box: np.ndarray,
    width: np.ndarray,
    height: np.ndarray,
    stored_width: np.ndarray,
    stored_height: np.ndarray,
) -> np.ndarray:
    """Map boxes of the original image to boxes of the stored one."""
    if np.array_equal(width, stored_width) and np.array_equal(height, stored_height):
        return box
    top, left, h, w = np.moveaxis(box, -1, 0)
    y0, y1 = (np.rint(y * stored_height / height).astype(np.int64) for y in (top, top + h))
    x0, x1 = (np.rint(x * stored_width / width).astype(np.int64) for x in (left, left + w))
    y0, x0 = np.minimum(y0, stored_height - 1), np.minimum(x0, stored_width - 1)
    return np.stack([y0, x0, np.maximum(y1 - y0, 1), np.maximum(x1 - x0, 1)], -1)
