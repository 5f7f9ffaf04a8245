"""The compiled parts, ``loaders/fill.c`` and ``augment/augment.c``, in one library."""

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from fastproj.core.errors import InputError

FOLDER = Path(__file__).parents[1]  # the build puts the library there
PARTS = ("fill", "has_jpeg", "prefetch", "read_at_random", "catch_bus_errors", "augment")


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


def need_jpeg(path: Path) -> None:
    """Raises InputError where the library was built without libjpeg: it cannot read ``path``."""
    if not library().fastproj_has_jpeg():
        raise InputError(
            f"{path} holds JPEGs, and fastproj was built without libjpeg: use --data.engine "
            "reference (slower), or install pkg-config and libjpeg's headers (Debian: "
            "libjpeg-dev), then fastproj again"
        )
