"""What pyproject.toml cannot say: the compiled library, and the recipes as part of the package."""

import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# A source distribution that holds a whole libjpeg: mozjpeg, whose decoder is libjpeg-turbo's.
MOZJPEG = (
    "mozjpeg-lossless-optimization==1.3.2 "
    "--hash=sha256:4d150f63b19831b22918118de0f85bcf17e167858700cbd6517da888ca6c59a6"
)


def installed_libjpeg() -> list[str]:
    """The words that pkg-config has for libjpeg; empty where it finds none."""
    try:
        command = ["pkg-config", "--cflags", "--libs", "libjpeg"]
        return shlex.split(subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL))
    except (OSError, subprocess.CalledProcessError):
        return []


def compiled_libjpeg(folder: Path) -> Path:
    """Downloads mozjpeg's source into ``folder`` and compiles it; returns where its headers are.

    The library is beside them, as libjpeg.a.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / "requirements.txt"
    wanted.write_text(MOZJPEG)
    # Without isolation: reading the name of this source distribution takes setuptools alone.
    download = ["download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary=:all:"]
    pip = [sys.executable, "-m", "pip", *download, "--require-hashes", "--requirement", str(wanted)]
    subprocess.check_call([*pip, "--dest", str(folder)])
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = next(folder.glob("*/mozjpeg"))
    static = ["BUILD_SHARED_LIBS=0", "WITH_TURBOJPEG=0", "PNG_SUPPORTED=0"]
    options = [*static, "CMAKE_BUILD_TYPE=Release", "CMAKE_POSITION_INDEPENDENT_CODE=1"]
    defined = [f"-D{option}" for option in options]
    subprocess.check_call(["cmake", "-G", "Ninja", "-S", source, "-B", source, *defined])
    subprocess.check_call(["cmake", "--build", source, "--target", "jpeg-static"])
    return source


class BuildNative(build_ext):
    """Compiles with the libjpeg that pkg-config finds, or with mozjpeg, or without any."""

    def build_extension(self, ext: Extension) -> None:
        if found := installed_libjpeg():
            ext.include_dirs += [word[2:] for word in found if word.startswith("-I")]
            ext.extra_link_args += [word for word in found if not word.startswith("-I")]
        else:
            try:
                source = compiled_libjpeg(Path(self.build_temp).absolute() / "libjpeg")
                ext.include_dirs.append(str(source))
                ext.extra_objects.append(str(source / "libjpeg.a"))
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"no libjpeg ({error}): JPEG stores will need --data.engine reference")
                ext.define_macros.append(("WITHOUT_JPEG", None))
        super().build_extension(ext)


# It uses nothing of Python, so one build serves every Python 3.11 and newer. For any processor of
# this kind: the faster instructions are chosen when it runs. Windows lacks mmap's advice.
native = Extension(
    "fastproj._native",
    [
        "fastproj/augment/augment.c",
        "fastproj/evaluation/probes/nearest.c",
        "fastproj/loaders/fill.c",
    ],
    extra_compile_args=["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"],
    libraries=["m"],
    py_limited_api=True,
)

setup(
    ext_modules=[] if sys.platform == "win32" else [native],
    cmdclass={"build_ext": BuildNative},
    setup_requires=[] if installed_libjpeg() else ["cmake", "ninja", "pip"],
    packages=[*find_packages(include=["fastproj*"]), "fastproj.rcfg"],
    package_dir={"fastproj.rcfg": "rcfg"},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
