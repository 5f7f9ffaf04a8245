"""Where the crops lie: boxes drawn from (seed, epoch, sample index, view) alone.

Every engine calls ``draw`` and so crops the same boxes, whatever the number of workers, the
batch a sample falls into, or the rank that reads it. The random numbers are therefore not a
stream but a hash of their address (splitmix64, Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", 2014), computed for a whole batch at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastproj.manifest import Beton

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment
TRIES = 10  # torchvision's RandomResizedCrop gives up after ten boxes that do not fit


@dataclass(frozen=True)
class Crop:
    """``views`` random resized crops of ``size`` pixels a side (torchvision's distribution).

    ``scale`` bounds the share of the image's area, ``ratio`` the box's width over its height.
    """

    size: int
    views: int = 1
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Center:
    """The centre square of ``share`` of the shorter side, resized to ``size`` (for evaluation).

    224/256 is what "resize to 256, centre crop 224" keeps.
    """

    size: int
    share: float = 1.0
    views: int = 1


def draw(
    groups: Sequence[Crop | Center], beton: Beton, positions: np.ndarray, seed: int, epoch: int
) -> list[np.ndarray]:
    """Boxes of a batch: for each group an int64 array (views, B, 4) of top, left, height, width.

    Boxes are drawn in the geometry of the original image and then, where the beton stores squares,
    mapped to the stored pixels (rounded, at least one pixel), so that a square store sees the
    same regions as the original would.
    """
    width, height = beton.source_width[positions], beton.source_height[positions]
    index = beton.index[positions]
    boxes, view = [], 0
    for group in groups:
        if isinstance(group, Center):
            box = np.broadcast_to(_centre(group, width, height), (group.views, len(index), 4))
        else:
            views = np.arange(view, view + group.views)[:, None]
            key = _address(seed, epoch, index[None], views)
            wide, high = np.tile(width, group.views), np.tile(height, group.views)
            box = _random_resized(group, wide, high, key.ravel()).reshape(*key.shape, 4)
        boxes.append(
            _to_stored(box, width, height, beton.width[positions], beton.height[positions])
        )
        view += group.views
    return boxes


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: 64 bits in, 64 well-mixed bits out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _address(seed: int, epoch: int, index: np.ndarray, view: np.ndarray) -> np.ndarray:
    """A hash of where a view's random numbers are: uint64 (views, B)."""
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, index, view):
        key = _mix((key ^ np.asarray(part).astype(np.uint64)) + GOLDEN)
    return key


def _uniform(key: np.ndarray, attempt: int) -> np.ndarray:
    """Uniform [0, 1) numbers, float64 (4, n): area, aspect, top and left of keys (n,)."""
    counter = np.arange(attempt + 1, 4 * TRIES + 1, TRIES, dtype=np.uint64)[:, None]
    return (_mix(key + GOLDEN * counter) >> np.uint64(11)) * 2.0**-53


def _random_resized(
    crop: Crop, width: np.ndarray, height: np.ndarray, key: np.ndarray
) -> np.ndarray:
    """torchvision's ``RandomResizedCrop.get_params``, all arguments (n,), to (n, 4).

    Nearly always the first box fits; only where it does not is another drawn.
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
    """The centre of the image cut to the nearest allowed ratio, when no try fitted."""
    low, up = crop.ratio
    ratio = width / height
    h = np.where(ratio < low, np.rint(width / low).astype(np.int64), height)
    w = np.where(ratio > up, np.rint(height * up).astype(np.int64), width)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], -1)


def _centre(centre: Center, width: np.ndarray, height: np.ndarray) -> np.ndarray:
    side = np.maximum(np.rint(np.minimum(width, height) * centre.share).astype(np.int64), 1)
    return np.stack([(height - side) // 2, (width - side) // 2, side, side], -1)


def _to_stored(
    box: np.ndarray,
    width: np.ndarray,
    height: np.ndarray,
    stored_width: np.ndarray,
    stored_height: np.ndarray,
) -> np.ndarray:
    """Boxes of the original image as boxes of the stored one."""
    if np.array_equal(width, stored_width) and np.array_equal(height, stored_height):
        return box
    top, left, h, w = np.moveaxis(box, -1, 0)
    y0, y1 = (np.rint(y * stored_height / height).astype(np.int64) for y in (top, top + h))
    x0, x1 = (np.rint(x * stored_width / width).astype(np.int64) for x in (left, left + w))
    y0, x0 = np.minimum(y0, stored_height - 1), np.minimum(x0, stored_width - 1)
    return np.stack([y0, x0, np.maximum(y1 - y0, 1), np.maximum(x1 - x0, 1)], -1)
