"""The compiled parts, in one library: ``fill.c``, ``augment.c`` and the probes' ``nearest.c``."""

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

from fastproj.core.errors import InputError

FOLDER = Path(__file__).parents[1]  # the build puts the library there
MESSAGE_BYTES = 200  # jpeglib.h's JMSG_LENGTH_MAX
PARTS = (
    *("fill", "has_jpeg", "prefetch", "read_at_random", "catch_bus_errors"), "augment", "nearest"
)  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """Raises InputError where it is missing, does not load or lacks a part."""
    names = [f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]  # ".abi3.so" on Linux and macOS
    found = [FOLDER / name for name in names if (FOLDER / name).exists()]
    try:
        if not found:
            raise OSError(f"no _native library in {FOLDER}")
        loaded = ctypes.CDLL(str(found[0]))
        for part in PARTS:
            getattr(loaded, f"fastproj_{part}")
    except (OSError, AttributeError) as error:
        raise InputError(
            f"the native part, for Linux and macOS, is not built for here ({error}): in a checkout "
            "run ./setup.sh, elsewhere pip install --force-reinstall --no-deps fastproj-ssl"
        ) from error
    loaded.fastproj_catch_bus_errors()  # of a file that is cut while it is mapped
    loaded.fastproj_fill.restype = ctypes.c_int64
    loaded.fastproj_read_at_random.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return loaded


class CropSpec(ctypes.Structure):
    """``fill.c``'s: boxes (views, batch) and where their crops go."""

    _fields_ = [
        ("boxes", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("views", ctypes.c_int64),
        ("size", ctypes.c_int64),
    ]


class Batch(ctypes.Structure):
    """``fill.c``'s: the samples of a batch, and what is made of them."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "data", "positions", "mode", "width", "height", "pointer", "length"
        )),
        ("batch", ctypes.c_int64),
        ("num_crops", ctypes.c_int64),
        ("crops", ctypes.POINTER(CropSpec)),
        ("padded", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("next", ctypes.c_int64),
    ]  # fmt: skip


def jpeg_damage(stored: bytes, width: int, height: int) -> str | None:
    """What libjpeg finds wrong in a JPEG of ``width`` × ``height`` pixels; None if nothing.

    It only warns of most damage, and goes on with gray pixels; here every warning counts. Without
    the native part, or one built without libjpeg, nothing is found.
    """
    try:
        has_jpeg = library().fastproj_has_jpeg()
    except InputError:
        return None
    if not has_jpeg:
        return None
    data = np.frombuffer(stored, np.uint8)
    pixels = np.empty((height, width, 3), np.uint8)
    place = np.array([0, width, height, 0, len(stored)], np.int64)
    box = np.array([0, 0, height, width], np.int64)
    mode = np.zeros(1, np.uint8)  # a JPEG
    specs = (CropSpec * 1)(CropSpec(box.ctypes.data, None, 1, 0))
    at = [place[i:].ctypes.data for i in range(5)]
    batch = Batch(
        data.ctypes.data, at[0], mode.ctypes.data, *at[1:], 1, 1, specs, pixels.ctypes.data,
        height, width, 0,
    )  # fmt: skip
    why = ctypes.create_string_buffer(MESSAGE_BYTES)
    failed = library().fastproj_fill(ctypes.byref(batch), why)
    return why.value.decode(errors="replace") if failed >= 0 else None


def need_jpeg(path: Path) -> None:
    """Raises InputError where the library was built without libjpeg: it cannot read ``path``."""
    if not library().fastproj_has_jpeg():
        raise InputError(
            f"{path} holds JPEGs, and fastproj was built without libjpeg: use --data.engine "
            "reference (slower), or install pkg-config and libjpeg's headers (Debian: "
            "libjpeg-dev), then fastproj again"
        )
