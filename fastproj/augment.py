"""The views' operations on a CPU: ``augment.c`` through ctypes, which frees the GIL.

Of each sample everything is done at once, while it is in a core's caches, and nothing that was not
drawn. ``views`` holds the same chain for other devices.
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastproj.machine import unwritten
from fastproj.native import library


class Params(NamedTuple):
    """What is done to each of N = views x samples crops, view-major; (N,) unless said otherwise.

    An operation that was not drawn has its neutral value: factor 1, shift 0, sigma 0.
    """

    flip: Tensor  # bool
    place: Tensor  # int64 (N, 4): when brightness, contrast, saturation, hue happen, 0 first
    brightness: Tensor  # float32 factor
    contrast: Tensor  # float32 factor
    saturation: Tensor  # float32 factor
    hue: Tensor  # float32 shift in turns, -0.5 to 0.5
    gray: Tensor  # bool
    sigma: Tensor  # float32, pixels
    solarise: Tensor  # bool


class _Batch(ctypes.Structure):
    memory: list[Tensor]  # what the pointers point to: kept as long as a thread may use it
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("crops", "out")),
        *((name, ctypes.c_int64) for name in ("samples", "height", "width", "reach")),
        *((name, ctypes.c_void_p) for name in (*Params._fields, "scale", "shift")),
        ("next", ctypes.c_int64),
    ]


def augment(crops: Tensor, params: Params, reach: int, scale: Tensor, shift: Tensor) -> Tensor:
    """uint8 (N, 3, h, w) to float32 (N, 3, h, w) in channels-last memory, on torch's threads.

    ``scale`` and ``shift`` (3,) normalise, the blur reaches ``reach`` < h, w pixels. Raises
    InputError where the native part is not built, MemoryError.
    """
    crops = crops.contiguous(memory_format=torch.channels_last)
    samples, channels, height, width = crops.shape
    out = torch.from_numpy(unwritten((samples, height, width, channels), np.float32))
    given = [tensor.contiguous() for tensor in (*params, scale, shift)]
    batch = _Batch(
        crops.data_ptr(),
        out.data_ptr(),
        samples,
        height,
        width,
        reach,
        *(tensor.data_ptr() for tensor in given),
        0,
    )
    batch.memory = [crops, out, *given]

    def run() -> int:
        return library().fastproj_augment(ctypes.byref(batch))

    threads = min(torch.get_num_threads(), samples)
    others = [_pool(threads).submit(run) for _ in range(threads - 1)]
    if run() + sum(other.result() for other in others):
        raise MemoryError("no memory left for the views")
    return out.permute(0, 3, 1, 2)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "fastproj-augment")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not live on in a child
