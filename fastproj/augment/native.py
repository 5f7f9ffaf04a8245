"""The augmentation chain on a CPU: ``augment.c`` through ctypes, which releases the GIL.

Each sample goes through all its operations while it is in cache; operations that were not sampled
are skipped. ``chain`` holds the same operations for other devices.
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastproj.augment.draw import Params
from fastproj.core.machine import unwritten
from fastproj.core.native import library


class _Batch(ctypes.Structure):
    memory: list[Tensor]  # keeps the tensors alive that the pointers refer to
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("crops", "out")),
        *((name, ctypes.c_int64) for name in ("samples", "height", "width", "reach")),
        *((name, ctypes.c_void_p) for name in (*Params._fields, "scale", "shift")),
        ("next", ctypes.c_int64),
    ]


def augment(crops: Tensor, params: Params, reach: int, scale: Tensor, shift: Tensor) -> Tensor:
    """uint8 (N, 3, h, w) to float32 (N, 3, h, w) in channels-last memory, on torch's threads.

    ``scale`` and ``shift`` (3,) normalize; the blur's kernel reaches ``reach`` < h, w pixels to
    each side. Raises InputError if the C library is not built, MemoryError if memory runs out.
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
        raise MemoryError("out of memory while augmenting")
    return out.permute(0, 3, 1, 2)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "fastproj-augment")


if hasattr(os, "register_at_fork"):  # a forked child has no threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
