"""Command: check this machine, and say how to fix what is missing.

``fastproj doctor`` tries everything that fastproj uses, in the way fastproj uses it, and prints one
line for each. The exit code is 0 if the main job (images to a table of accuracies) can run here and
1 if something that it needs is missing. A GPU, a compiler and the extras (FFCV, matplotlib, DALI,
timm, pycocotools, ONNX, TensorBoard, W&B) are optional: they are shown, and their absence is no
failure.
"""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from fastproj.__main__ import main as run

    run("doctor")

import argparse
import importlib
import importlib.metadata
import io
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastproj.core.errors import InputError

CHECKOUT = Path(__file__).parents[1]
PIP = f"{shlex.quote(sys.executable)} -m pip install"


def _set_up(extra: str = "", afresh: bool = False) -> str:
    """The line that installs: with setup.sh in a checkout, elsewhere with pip.

    In the image, whose user may not install, the line that builds it anew.
    """
    if (CHECKOUT / ".commit").exists():
        extras = f' --build-arg EXTRAS="{extra} ..."' if extra else ""
        return f"docker build{extras} .   # docs/containers.md lists the extras"
    if (CHECKOUT / "setup.sh").exists():
        clear, extra = "rm -rf .venv && " * afresh, f" {extra}" * bool(extra)
        return (
            f"cd {shlex.quote(str(CHECKOUT))} && {clear}./setup.sh{extra} && "
            ".venv/bin/python -m fastproj.doctor"
        )
    name = f"'fastproj-ssl[{extra}]'" if extra else "fastproj-ssl"
    return f"{PIP}{' --force-reinstall' * afresh} {name}"


SET_UP = _set_up()
SET_UP_AFRESH = _set_up(afresh=True)
COMPILER = "apt-get install g++ python3-dev   # or the like"
if (CHECKOUT / "setup.sh").exists():
    COMPILER = SET_UP

# What pyproject.toml asks for -> what is imported. torch has a check of its own.
PACKAGES = {
    "fastargs": "fastargs",
    "lazy-loader": "lazy_loader",
    "numba": "numba",
    "numpy": "numpy",
    "pillow": "PIL",
    "psutil": "psutil",
    "pyyaml": "yaml",
    "safetensors": "safetensors",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "terminaltables": "terminaltables",
    "torchvision": "torchvision",
    "tqdm": "tqdm",
}
ENOUGH_MEMORY = 2 << 30  # bytes: torch, FFCV's compiler and the demo's data
ENOUGH_DISK = 1 << 30  # bytes: the demo's betons and checkpoints, with room for a real run's


class Missing(Exception):
    """``args``: what is missing, and the line that fixes it."""


def python() -> str:
    return f"{sys.version.split()[0]} ({sys.executable})"


def torch() -> str:
    library = _load("torch")
    return f"{library.__version__}, built for CUDA {library.version.cuda}"


def packages() -> str:
    for module in PACKAGES.values():
        _load(module)
    return f"{len(PACKAGES)} others load"


def ffcv() -> str:
    """FFCV is a peer in the tests and the benchmark: fastproj reads and writes its files itself.

    Try FFCV's library in a process of its own: a damaged one kills the process that loads it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(_try_ffcv).result()
        except BrokenProcessPool as error:
            what = "its library kills the process that loads it"
            raise Missing(what, _set_up("ffcv", afresh=True)) from error


def _try_ffcv() -> str:
    """Crop an image of one color, and decode a JPEG of it."""
    fix = _set_up("ffcv")
    os.environ["NUMBA_DISABLE_JIT"] = "1"  # importing FFCV compiles for 8 s, and not its library
    np, library = _load("numpy"), _load("ffcv.libffcv", fix)
    image = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    cropped, decoded = np.zeros((4, 4, 3), np.uint8), np.zeros_like(image)
    library.resize_crop(image, 2, 10, 2, 10, cropped)
    library.imdecode(_jpeg(image), decoded, 16, 16, 16, 16)
    if (cropped != image[:4, :4]).any() or abs(decoded.astype(int) - image).max() > 4:
        raise Missing("its library crops or decodes wrongly", _set_up("ffcv", afresh=True))
    return f"{importlib.metadata.version('ffcv')}, its library loads, crops and decodes"


def native() -> str:
    """The compiled part: decode a JPEG of one color, or take its pixels, and crop it."""
    np, torch, loaders = _load("numpy"), _load("torch"), _load("fastproj.loaders.fill")
    image = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    crops = torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8)
    try:
        jpeg = bool(loaders.library().fastproj_has_jpeg())
        _crop(image, jpeg, crops)
    except InputError as error:
        raise Missing(str(error), SET_UP_AFRESH) from error
    if abs(crops.numpy().astype(int) - image[:8, :8]).max() > 4:
        raise Missing("it decodes or crops wrongly", SET_UP_AFRESH)
    without = "crops; built without libjpeg: JPEG stores need --data.engine reference"
    return "decodes and crops" if jpeg else without


def _crop(image: Any, jpeg: bool, crops: Any) -> None:
    """Fill ``crops`` (1, 1, 8, 8, 3) from the image (16, 16, 3), stored as JPEG or raw."""
    np, loaders = _load("numpy"), _load("fastproj.loaders.fill")
    stored = _jpeg(image) if jpeg else image.ravel()
    beton = SimpleNamespace(
        path="the image tried",
        data=stored,
        mode=np.array([loaders.RAW * (not jpeg)], np.uint8),
        **dict.fromkeys(("width", "height"), np.array([16])),
        pointer=np.array([0]),
        length=np.array([len(stored)]),
    )
    boxes = np.array([[[4, 4, 8, 8]]])
    loaders.Fill(beton, np.array([0]), [boxes], [crops.permute(0, 1, 4, 2, 3)]).run()


def _jpeg(image: Any) -> Any:
    """The image (h, w, 3) as the bytes of a JPEG, uint8."""
    file = io.BytesIO()
    _load("PIL.Image").fromarray(image).save(file, "JPEG", quality=95)
    return _load("numpy").frombuffer(file.getvalue(), "uint8")


def cores() -> str:
    machine = _load("fastproj.core.machine")
    return f"{machine.cores()} of this machine's {os.cpu_count()} for this process"


def memory() -> str:
    total, available = _load("fastproj.core.machine").memory()
    says = f"{_gib(available)} of {_gib(total)} available"
    if available < ENOUGH_MEMORY:
        raise Missing(
            f"{says}, the demo needs {_gib(ENOUGH_MEMORY)}",
            "end other programs, or raise the container's limit: docker run --memory 4g",
        )
    return says


def disk() -> str:
    """The folder the command runs in is where runs and betons go."""
    folder = Path.cwd()
    if not os.access(folder, os.W_OK):
        raise Missing(f"{folder} cannot be written to", "cd to a folder that is yours")
    free = shutil.disk_usage(folder).free
    if free < ENOUGH_DISK:
        raise Missing(
            f"{_gib(free)} free at {folder}, the demo needs {_gib(ENOUGH_DISK)}",
            f"du -xh -d 2 {folder} | sort -h | tail   # and delete what you can spare",
        )
    return f"{_gib(free)} free at {folder}"


def gpu() -> str:
    library = _load("torch")
    if library.version.cuda is None:
        raise Missing("this torch is built without CUDA: all runs on the CPU", SET_UP_AFRESH)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        works = library.cuda.is_available()
    if not works:
        why = str(caught[-1].message).split(". ")[0] if caught else "none that CUDA can use"
        raise Missing(
            f"{why}: all runs on the CPU, smaller",
            "nvidia-smi   # must list it: install NVIDIA's driver; in Docker: --gpus all",
        )
    found = map(library.cuda.get_device_properties, range(library.cuda.device_count()))
    return ", ".join(f"{each.name} {_gib(each.total_memory)}" for each in found)


def dali() -> str:
    return str(_load("nvidia.dali", _set_up("dali")).__version__)


def matplotlib() -> str:
    """It draws the report's and the benchmark's pictures."""
    return str(_load("matplotlib", _set_up("report")).__version__)


def timm() -> str:
    """Its models are what ``eval.encoder timm:NAME`` evaluates."""
    return str(_load("timm", _set_up("timm")).__version__)


def pycocotools() -> str:
    """It reads outlines and scores detections for ``fastproj transfer``."""
    fix = _set_up("transfer")
    _load("pycocotools.mask", fix)
    return importlib.metadata.version("pycocotools")


def onnx() -> str:
    """``fastproj export`` writes ONNX with onnxscript and tries it in ONNX Runtime."""
    fix = _set_up("onnx")
    _load("onnxscript", fix)
    return f"{_load('onnx', fix).__version__}, Runtime {_load('onnxruntime', fix).__version__}"


def tensorboard() -> str:
    return str(_load("tensorboard", _set_up("tensorboard")).__version__)


def wandb() -> str:
    return str(_load("wandb", _set_up("wandb")).__version__)


def compiler() -> str:
    """Compile what torch.compile writes for a CPU: C++ that includes Python.h, with OpenMP."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise Missing(f"no {name}: models run without torch.compile, slower", COMPILER)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <omp.h>\n#include <vector>\n")
        headers = sysconfig.get_path("include")
        command = [name, "-c", "-fopenmp", f"-I{headers}", str(source), "-o", f"{folder}/probe.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise Missing(f"{name} fails: {why}", COMPILER)
    return f"{shutil.which(name)} compiles for torch.compile"


# A name, its check, and whether the main job needs it: then "MISSING" is a failure.
CHECKS: tuple[tuple[str, Callable[[], str], bool], ...] = (
    ("Python", python, True),
    ("torch", torch, True),
    ("packages", packages, True),
    ("native", native, True),
    ("cores", cores, True),
    ("memory", memory, True),
    ("disk", disk, True),
    ("GPU", gpu, False),
    ("matplotlib", matplotlib, False),
    ("FFCV", ffcv, False),
    ("DALI", dali, False),
    ("timm", timm, False),
    ("pycocotools", pycocotools, False),
    ("ONNX", onnx, False),
    ("TensorBoard", tensorboard, False),
    ("W&B", wandb, False),
    ("compiler", compiler, False),
)


def _load(module: str, fix: str = SET_UP) -> Any:
    """The module, or ``Missing``: told apart are one that is not there and one that is broken."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Missing(f"no module {error.name}", fix) from error
    except Exception as error:
        raise Missing(f"{module} is broken: {error}", SET_UP_AFRESH) from error


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"


def main(argv: Sequence[str]) -> None:
    """Print what each check finds. ``InputError`` names what the main job lacks."""
    parser = argparse.ArgumentParser(
        prog="fastproj doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser.parse_args(argv)
    lacking = []
    for name, check, needed in CHECKS:
        try:
            print(f"  ok       {name:11} {check()}", flush=True)
        except Missing as missing:
            what, fix = missing.args
            print(f"  {'MISSING' if needed else 'without'}  {name:11} {' '.join(what.split())}")
            print(f"{'':22} fix: {fix}", flush=True)
            if needed:
                lacking.append(name)
    if lacking:
        raise InputError(f"the main job cannot run here: fix {', '.join(lacking)} as said above")
    print("The main job can run here.")
