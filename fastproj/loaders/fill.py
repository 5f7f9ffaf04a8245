"""Decode and crop stored images with ``fill.c``, called through ctypes, which releases the GIL.

A ``Fill`` describes one batch. Any number of threads may call ``Fill.run`` at once; each takes
samples that no other thread has taken, until none is left. A JPEG is decoded once, only where a
crop needs it, directly to where it is cropped from.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastproj.core.errors import InputError
from fastproj.core.native import MESSAGE_BYTES, Batch, CropSpec, library, need_jpeg
from fastproj.data.beton import Beton
from fastproj.data.layout import RAW
from fastproj.data.verify import FirstRead


class Fill:
    """Samples ``positions`` (B,) of a beton, and where their pixels go.

    ``boxes``: per crop size int64 (views, B, 4) of top, left, height, width. Give either ``crops``,
    per crop size uint8 (views, B, 3, size, size) in channels-last memory, to fill with the resized
    boxes (bit for bit torch's antialiased bilinear resize of uint8); or ``padded``, uint8
    (B, rows, columns, 3), to fill with whole images, each from the top left corner. There, only the
    smallest box that holds all views of a JPEG is written. Raises InputError if the C library is
    not built, or built without libjpeg and a sample is a JPEG.
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
        if (beton.mode[positions] != RAW).any():
            need_jpeg(beton.path)
        self.beton, self.positions = beton, np.ascontiguousarray(positions, np.int64)
        self._kept = [np.ascontiguousarray(box, np.int64) for box in boxes], crops, padded
        targets = [crop.data_ptr() for crop in crops] if crops else [None] * len(boxes)
        sizes = [crop.shape[-1] if crops else 0 for crop in (crops or boxes)]
        specs = [
            CropSpec(box.ctypes.data, target, len(box), size)
            for box, target, size in zip(self._kept[0], targets, sizes, strict=True)
        ]
        self._batch = Batch(
            *(array.ctypes.data for array in (
                beton.data, self.positions, beton.mode, beton.width, beton.height, beton.pointer,
                beton.length,
            )),
            len(self.positions),
            len(specs),
            (CropSpec * len(specs))(*specs),
            padded.data_ptr() if padded is not None else None,
            *(padded.shape[1:3] if padded is not None else (0, 0)),
            0,
        )  # fmt: skip

    def run(self, first_read: FirstRead | None = None, share: np.ndarray | None = None) -> None:
        """Fill until no sample is left, after ``first_read`` has checked this thread's ``share``.

        Raises InputError for a sample that is damaged or cannot be decoded.
        """
        if first_read is not None and share is not None:
            first_read.check(share)
        why = ctypes.create_string_buffer(MESSAGE_BYTES)
        self.check(self._library.fastproj_fill(ctypes.byref(self._batch), why), why.value)

    @property
    def address(self) -> int:
        """Where the batch's description lies, for who calls ``fastproj_fill`` without ``run``."""
        return ctypes.addressof(self._batch)

    def check(self, slot: int, why: bytes) -> None:
        """Raise InputError for the sample at ``slot``: ``fastproj_fill`` returned it; -1: none."""
        if slot >= 0:
            position = self.positions[slot]
            index, file = self.beton.index[position], self.beton.file_of(position)
            raise InputError(
                f"{self.beton.path}: sample {index} cannot be decoded ({why.decode()}): "
                f"run fastproj prepare --verify {self.beton.files[file].path}, then write it again"
            )

    def prefetch(self) -> None:
        """Start reading the samples from disk; return at once."""
        self._library.fastproj_prefetch(ctypes.byref(self._batch))

    def stop(self) -> None:
        """Let no thread take another sample."""
        self._batch.next = len(self.positions)


def read_at_random(beton: Beton) -> None:
    """Disable the kernel's read-ahead (MADV_RANDOM): samples are read in random order."""
    library().fastproj_read_at_random(beton.data.ctypes.data, len(beton.data))
