"""Cut boxes out of a batch of images and resize them on the device: bilinear, antialiased.

A bilinear resize is linear and separable, so a batch of crops is two batched matrix products with
per-sample matrices: no loop over samples. Every sum in them is exact: weights are multiples of
1/2048, and pixels between the products multiples of 1/8, so that a sum has at most 22 bits and
float32 holds it. Hence no pixel depends on the order of summation, on the number of threads, or on
whether the processor multiplies in float64, float32, TF32 or float16 (accumulated in float32).

They differ from torchvision's ``resized_crop`` by the rounding (at most 2/255 in the tests). On a
CPU ``fill`` is the faster way, over 6 times at 32 px and 20 times at 224 (``resident`` and
``stream`` in docs/performance.md).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproj.core.machine import unwritten


def crop_batch(
    images: Tensor, boxes: Tensor, size: int, dtype: torch.dtype | None = None
) -> Tensor:
    """All views of a batch at once.

    ``images`` (B, 3, H, W) uint8, any padding outside the boxes is never read; ``boxes``
    (views, B, 4) int64 on the same device. Returns (views, B, 3, size, size) uint8 in
    channels-last memory. ``dtype`` of the products changes no pixel: by default float32 on a CPU,
    which is fast there, and float16 elsewhere.
    """
    dtype = dtype or (torch.float32 if images.device.type == "cpu" else torch.float16)
    views, batch = boxes.shape[:2]
    channels, height, width = images.shape[1:]
    top, left, h, w = boxes.unbind(-1)
    # Times 8, so that rounding to integers in between keeps eighths of a gray level.
    across = resize_matrices(
        left.T.contiguous(), w.T.contiguous(), size, width, total=8, dtype=dtype
    )
    down = resize_matrices(top, h, size, height, total=1 / 8, dtype=dtype)
    # The channels of a row side by side: then one product per axis takes all of them.
    rows = images.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).flatten(1, 2)
    # Products in float16 are rounded to float16: do the same to the others' exact sums.
    x = (rows @ across.flatten(1, 2).mT).to(torch.float16).round_()
    x = x.view(batch, height, channels, views, size).permute(3, 0, 1, 2, 4)
    x = down @ x.to(dtype, memory_format=torch.contiguous_format).flatten(3)
    out = batch_like(views, batch, size, images.device)
    x = x.to(torch.float16).add_(0.5)
    return out.copy_(x.view(views, batch, size, channels, size).transpose(2, 3))


# Compiled code must round as eager code does, or pixels would depend on the device. Rows that the
# compiler pads would be copied once more before the product.
OPTIONS: dict[str, Any] = {
    "eager_numerics.division_rounding": True,
    "emulate_precision_casts": True,
    "comprehensive_padding": False,
}


@cache
def compiled_crop_batch() -> Callable[..., Tensor]:
    """``crop_batch`` compiled: the same pixels, from fewer kernels on a GPU (docs/scaling.md)."""
    return torch.compile(crop_batch, options=OPTIONS)


def resize_matrices(
    start: Tensor, length: Tensor, size: int, full: int, total: float = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Antialiased bilinear weights from ``full`` pixels to ``size``, one matrix per box.

    ``start`` and ``length`` (...) int64 are the boxes along this axis. Returns (..., size, full)
    ``dtype`` whose rows sum to exactly ``total``, a power of 2 from 1/8 to 8, in multiples of
    ``total`` / 2048: a triangle as wide as the scale (never narrower than a pixel), cut off at the
    box and normalized, as Pillow and torch define it.
    Everything before the division is an integer below 2²⁴ for length² < 2²³·size, so it is exact.
    """
    device = start.device
    length = length[..., None]
    inside = 2 * (torch.arange(full, device=device) - start[..., None]) + 1  # half pixels in it
    center = (2 * torch.arange(size, device=device) + 1) * length
    reach = 2 * length.clamp(min=size)
    # A pixel outside the box is out of reach.
    pixel = (inside * size).float().masked_fill_((inside < 0) | (inside > 2 * length), torch.inf)
    # The distance minus one, in units of 1 / reach: weights up to a factor below 0.
    weights = (pixel[..., None, :] - center.float()[..., None]).abs_()
    weights.sub_(reach[..., None]).clamp_(max=0)
    # Rounding the cumulated weights, not each alone, keeps their sum.
    whole = weights.sum(-1, keepdim=True).div_(2048)
    ends = weights.cumsum(-1)
    starts = weights.neg_().add_(ends).div_(whole).round_()
    return ends.div_(whole).round_().sub_(starts).mul_(total / 2048).to(dtype)


def batch_like(
    views: int, batch: int, size: int, device: torch.device, *, pinned: bool = False
) -> Tensor:
    """An unwritten (views, B, 3, size, size) uint8 batch in channels-last memory.

    Fresh for every batch, so that whoever receives it owns it. ``pinned``: to be copied to a GPU.
    """
    shape = (views, batch, size, size, 3)
    if pinned:
        empty = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    elif device.type == "cpu":
        empty = torch.from_numpy(unwritten(shape, np.uint8))
    else:
        empty = torch.empty(shape, dtype=torch.uint8, device=device)
    return empty.permute(0, 1, 4, 2, 3)
