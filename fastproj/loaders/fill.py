"""Stored images to crops in native threads: ``fill.c`` through ctypes, which frees the GIL.

A ``Fill`` describes one batch; ``Fill.run`` works on it until no sample is left, and any number of
threads may call it at once: each takes the next sample that no other has taken. A JPEG is decoded
once, only where a view needs it, straight to where it is cropped from.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastproj.errors import InputError
from fastproj.manifest import Beton
from fastproj.native import library

MESSAGE_BYTES = 200  # jpeglib.h's JMSG_LENGTH_MAX


class _Group(ctypes.Structure):
    _fields_ = [
        ("boxes", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("views", ctypes.c_int64),
        ("size", ctypes.c_int64),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "data", "positions", "mode", "width", "height", "pointer", "length"
        )),
        ("batch", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("group", ctypes.POINTER(_Group)),
        ("padded", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("next", ctypes.c_int64),
    ]  # fmt: skip


class Fill:
    """Samples ``positions`` (B,) of a beton, and where their pixels go.

    ``boxes``: for each group int64 (views, B, 4) of top, left, height, width. Give either
    ``crops``, for each group uint8 (views, B, 3, size, size) in channels-last memory, to be filled
    with the resized boxes (bit for bit torch's antialiased bilinear resize of uint8); or
    ``padded``, uint8 (B, rows, columns, 3), to be filled with the images, each from the top left
    corner. Of a JPEG there, only the smallest box that holds all views is written. Raises
    InputError where the native part is not built.
    """

    def __init__(
        self,
        beton: Beton,
        positions: np.ndarray,
        boxes: Sequence[np.ndarray],
        crops: Sequence[Tensor] = (),
        padded: Tensor | None = None,
    ) -> None:
        self._library = library()
        self.beton, self.positions = beton, np.ascontiguousarray(positions, np.int64)
        self._kept = [np.ascontiguousarray(box, np.int64) for box in boxes], crops, padded
        targets = [crop.data_ptr() for crop in crops] if crops else [None] * len(boxes)
        sizes = [crop.shape[-1] if crops else 0 for crop in (crops or boxes)]
        groups = [
            _Group(box.ctypes.data, target, len(box), size)
            for box, target, size in zip(self._kept[0], targets, sizes, strict=True)
        ]
        self._batch = _Batch(
            *(array.ctypes.data for array in (
                beton.data, self.positions, beton.mode, beton.width, beton.height, beton.pointer,
                beton.length,
            )),
            len(self.positions),
            len(groups),
            (_Group * len(groups))(*groups),
            padded.data_ptr() if padded is not None else None,
            *(padded.shape[1:3] if padded is not None else (0, 0)),
            0,
        )  # fmt: skip

    def run(self) -> None:
        """Fill until no sample is left. Raises InputError for one that cannot be decoded."""
        why = ctypes.create_string_buffer(MESSAGE_BYTES)
        slot = self._library.fastproj_fill(ctypes.byref(self._batch), why)
        if slot >= 0:
            index = self.beton.index[self.positions[slot]]
            raise InputError(
                f"{self.beton.path}: sample {index} cannot be decoded ({why.value.decode()}): "
                f"run data_prep/write_ffcv.py --verify {self.beton.path}, then write it again"
            )

    def prefetch(self) -> None:
        """Begin to read the samples from the disk; returns at once."""
        self._library.fastproj_prefetch(ctypes.byref(self._batch))

    def stop(self) -> None:
        """Let nobody take another sample."""
        self._batch.next = len(self.positions)


def read_at_random(beton: Beton) -> None:
    """Tell the kernel that samples will be read in no order: nothing around them is wanted."""
    library().fastproj_read_at_random(beton.data.ctypes.data, len(beton.data))
