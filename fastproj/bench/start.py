"""Start-up: the time from building a loader to its first batch, in a new process each time."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from statistics import median
from typing import Any

import psutil

from fastproj.bench import Engine, Plan, Role, Row, compare, peers
from fastproj.bench.alone import alone
from fastproj.data.beton import open_beton
from fastproj.loaders import Crop, open_loader

# Name, role, engine of open_loader (None: FFCV's own loader), the module it imports besides torch.
ENGINES: tuple[tuple[str, Role, str | None, str], ...] = (
    ("stream", "ours", "stream", "simplejpeg"),
    ("dali", "ours", "dali", "nvidia.dali"),
    ("torch DataLoader + torchvision", "peer", "reference", "torchvision"),
    ("FFCV", "peer", None, "ffcv"),
)


def run(plan: Plan, size: int = 224, batch: int = 64, repeats: int = 3) -> list[Row]:
    """The unit is one start. One process per engine runs first, unmeasured, to warm the caches.

    Rates exclude Python's start and the imports; the notes give these. FFCV is timed to the first
    batch of one view.
    """
    if plan.photos is None:
        return []
    imports: dict[str, list[float]] = {}
    engines = []
    for name, role, engine, module in ENGINES:
        given = {"path": str(plan.photos.path), "engine": engine, "size": size, "batch": batch,
                 "workers": plan.workers, "device": plan.device.type}  # fmt: skip
        imports[name] = []
        engines.append(Engine(name, role, 1, _process(module, given, imports[name])))
    case = f"first batch of {batch}, {size} px, {plan.photos.manifest.store} store"
    return [
        replace(row, note=f"Python and imports before it: {median(imports[row.engine][1:]):.1f} s")
        if row.rate
        else row
        for row in compare("start", case, "starts", engines, 1, min(plan.repeats, repeats))
    ]


def _process(
    module: str, given: Mapping[str, Any], imports: list[float]
) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        if find_spec(module) is None:
            raise ImportError(f"No module named {module!r}")

        def call() -> float:
            before, seconds = alone(first_batch, **given)
            imports.append(before)
            return seconds

        return call

    return prepare


def first_batch(
    path: str, engine: str | None, size: int, batch: int, workers: int, device: str
) -> tuple[float, float]:
    """Seconds from the start of this process to the end of its imports, and then to the batch."""
    beton = open_beton(path)
    if engine == "dali":
        import nvidia.dali.plugin.pytorch  # noqa: F401
    elif engine is None:
        import ffcv  # noqa: F401
    before, start = time.time() - psutil.Process().create_time(), time.perf_counter()
    if engine is None:
        batches = iter(peers.ffcv_loader(beton, size, batch, workers))
    else:
        loader = open_loader(
            beton, [Crop(size, 2)], batch, device=device, engine=engine, workers=workers,
            drop_last=False,
        )  # fmt: skip
        batches = iter(loader)
    next(batches)
    seconds = time.perf_counter() - start
    if engine is not None:
        loader.close()
    return before, seconds
