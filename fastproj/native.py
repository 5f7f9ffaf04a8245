"""The compiled parts, ``loaders/fill.c`` and ``augment.c``, in one library: setup.sh builds it."""

import ctypes
from functools import cache
from pathlib import Path

from fastproj.errors import InputError

LIBRARY = Path(__file__).with_name("_native.so")


@cache
def library() -> ctypes.CDLL:
    """Raises InputError where it is missing, does not load or lacks a part."""
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        for name in ("fill", "prefetch", "read_at_random", "augment"):
            getattr(loaded, f"fastproj_{name}")
    except (OSError, AttributeError) as error:
        raise InputError(f"the native part is not built for here ({error}): run ./setup.sh"
                         ) from error  # fmt: skip
    loaded.fastproj_fill.restype = ctypes.c_int64
    loaded.fastproj_read_at_random.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return loaded
