"""The acceptance run: what the first hour on a GPU has to show, in three parts.

    python -m fastproj.bench gpu --bench.out DIR [--bench.part correctness|cifar10|imagenet100]

Each part takes less than nine minutes and writes ``DIR/PART.json`` after every figure, so a run
that is cut keeps what it has. ``tools/performance_gpu.py`` makes docs/performance-gpu.md of them.
``--bench.tiny true`` does everything with little, on a CPU too: it shows that it runs.

It needs torch, torchvision, numpy and numba, and what those bring; besides, of compiled packages,
psutil and safetensors alone. pytest is needed for the tests, nothing for the rest. Where nothing
can be installed, fastargs and the native part are carried there, the latter with libjpeg inside:
``PKG_CONFIG_LIBDIR=/nonexistent python setup.py build_ext --inplace --force``.
"""
