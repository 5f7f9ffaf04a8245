"""The acceptance run: what the first hour on a GPU has to show, in three parts.

    python -m fastproj.bench gpu --bench.out DIR [--bench.part correctness|cifar10|imagenet100]

Each part takes less than nine minutes and writes ``DIR/PART.json`` after every figure, so a run
that is cut keeps what it has. ``tools/performance_gpu.py`` makes docs/performance-gpu.md of them.
``--bench.tiny true`` does everything with little, on a CPU too: it shows that it runs. Only the
item "compiled steps" compiles code then; elsewhere what is compiled is traced and runs eagerly.

It needs torch and what torch itself requires (setuptools among it), numpy, and ``CARRIED``, which
is carried there where nothing can be installed (wheels of 16.3 MB for Python 3.12, 7.5 of them
torchvision's, 7.1 Pillow's), with the native part, libjpeg inside it:
``PKG_CONFIG_LIBDIR=/nonexistent python setup.py build_ext --inplace --force``. All else is optional
and named in the item that lacks it: pytest, DALI, and numba for the sparse head on a CPU.
"""

CARRIED = (
    "fastargs",
    "lazy_loader",
    "PIL",
    "psutil",
    "safetensors",
    "terminaltables",
    "torchvision",
    "tqdm",
    "yaml",
)
"""Packages beside torch's own, as they are imported; tests/bench/test_gpu.py allows no others."""
