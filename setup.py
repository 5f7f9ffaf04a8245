"""What pyproject.toml cannot say: the compiled library, and the recipes as part of the package."""

import shlex
import subprocess
import sys
from typing import Any

from setuptools import Extension, find_packages, setup


def libjpeg() -> dict[str, Any]:
    """How to compile and link with the libjpeg that pkg-config finds, or how to do without."""
    try:
        found = subprocess.check_output(["pkg-config", "--cflags", "--libs", "libjpeg"], text=True)
    except (OSError, subprocess.CalledProcessError):
        print("pkg-config finds no libjpeg: JPEG stores will need --data.engine reference")
        return {"define_macros": [("WITHOUT_JPEG", None)]}
    words = shlex.split(found)
    return {
        "include_dirs": [word[2:] for word in words if word.startswith("-I")],
        "extra_link_args": [word for word in words if not word.startswith("-I")],
    }


# It uses nothing of Python, so one build serves every Python 3.11 and newer. For any processor of
# this kind: the faster instructions are chosen when it runs. Windows lacks mmap's advice.
native = Extension(
    "fastproj._native",
    ["fastproj/loaders/fill.c", "fastproj/augment/augment.c"],
    extra_compile_args=["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"],
    libraries=["m"],
    py_limited_api=True,
    **libjpeg(),
)

setup(
    ext_modules=[] if sys.platform == "win32" else [native],
    packages=[*find_packages(include=["fastproj*"]), "fastproj.rcfg"],
    package_dir={"fastproj.rcfg": "rcfg"},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
