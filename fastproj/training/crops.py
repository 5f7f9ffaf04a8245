"""Crop sizes: how they grow during a run, and whether they fit the images."""

import numpy as np

from fastproj.core.errors import InputError

STAGES = 4  # number of sizes of growing crops, including the first and the last
# Pixels, per stem: sizes between first and last are multiples of it. None: another library's.
GRID = {"cifar": 4, "imagenet": 32, None: 32}


def crop_size(epoch: int, epochs: int, first: int | None, last: int, stem: str | None) -> int:
    """Side in pixels of the large crops in ``epoch`` (from 0) of ``epochs``.

    It is always ``last``, or grows from ``first`` to ``last`` in ``STAGES`` equal parts of the run.
    There are few sizes because the model is compiled for each. A run of fewer epochs skips the
    first sizes. Small crops first is FFCV's "progressive resizing" (Leclerc et al. 2023, arXiv
    2306.12517); the last epochs train at the evaluated size (FixRes, Touvron et al. 2019, arXiv
    1906.06423). Raises ``InputError`` if ``first`` is above ``last``.
    """
    if first is None:
        return last
    if first > last:
        raise InputError(f"views.size_start {first} is above views.size {last}")
    stage = (STAGES * (epoch + 1) - 1) // epochs
    grid = GRID[stem]
    between = round((first + (last - first) * stage / (STAGES - 1)) / grid) * grid
    return {0: first, STAGES - 1: last}.get(stage, min(max(between, first), last))


def misfit(width: np.ndarray, height: np.ndarray, size: int, stem: str | None) -> str | None:
    """One line with better settings if crop size or stem do not fit the images, otherwise None.

    ``width``, ``height``: of the stored images, pixels (N,); ``size``: side of the large crops. The
    median shorter side decides. Crops of photographs (128 pixels and more) should have at least 96
    pixels; crops of small images should enlarge them at most twice. The CIFAR stem, which keeps the
    resolution, is for crops of at most 96 pixels; the ImageNet stem, which quarters it, for 64 and
    more. ``stem`` None: an encoder of another library, whose first layers are its own.
    """
    side = int(np.median(np.minimum(width, height)))
    small = side < 128
    fits = side // 2 <= size <= 2 * side if small else 96 <= size <= 2 * side
    if fits and (stem is None or (size <= 96 if stem == "cifar" else size >= 64)):
        return None
    if small:
        wanted, wanted_stem = max(8, min(side, 64) // 4 * 4), "cifar"
    else:
        wanted, wanted_stem = 224 if side >= 192 else 128, "imagenet"
    given, better = f"views.size {size}", f"--views.size {wanted}"
    if stem is not None:
        given, better = f"{given} with model.stem {stem}", f"{better} --model.stem {wanted_stem}"
    return f"{given} does not fit images of {side} pixels (median shorter side): consider {better}"
