"""Loaders: stored images to two uint8 crops per image, beside peers and the limit."""

import importlib
from collections.abc import Callable
from contextlib import ExitStack

from fastproj.bench import Engine, Plan, Row, compare, limits, peers
from fastproj.bench.images import are_jpegs, as_files, drain, several_times
from fastproj.data.beton import Beton
from fastproj.loaders import Crop, open_loader
from fastproj.loaders.resident import is_uniform

VIEWS = 2
LIBRARIES = {"dali": "nvidia.dali", "ffcv": "ffcv.loader"}  # of engines that need one


def run(plan: Plan, images: int = 3000, photo: int = 224, small: int = 32) -> list[Row]:
    """Three cases: JPEG and square store with crops of ``photo`` pixels, raw images with ``small``.

    One call is an epoch of at least ``images`` images, so the time to start workers hardly counts.
    """
    rows = []
    for beton, size, batch in (
        (plan.photos, photo, 64), (plan.squares, photo, 64), (plan.small, small, 512)
    ):  # fmt: skip
        if beton is not None:
            rows += _case(plan, several_times(beton, images), size, batch)
    return rows


def _case(plan: Plan, beton: Beton, size: int, batch: int) -> list[Row]:
    jpegs = are_jpegs(beton)
    names = ["resident"] * is_uniform(beton) + ["stream", "dali", "ffcv"]
    ours = [
        Engine(name, "ours", len(beton), _ours(plan, beton, size, batch, name)) for name in names
    ]
    workers = plan.workers
    theirs = [
        Engine(
            "torch DataLoader + torchvision", "peer", len(beton),
            _ours(plan, beton, size, batch, "reference"), "the engine reference: the same boxes",
        ),
        Engine(
            "FFCV", "peer", len(beton), lambda: peers.ffcv(beton, size, batch, workers),
            "one decode per view; nearest neighbor where it enlarges",
        ),
    ]  # fmt: skip
    with ExitStack() as stack:
        if jpegs:
            files = stack.enter_context(as_files(beton))
            theirs += [
                Engine("DALI from files", "peer", len(beton),
                       lambda: peers.dali_files(files, size, batch, workers)),
                Engine("SPDL from files", "peer", len(beton),
                       lambda: peers.spdl_files(files, size, batch, workers),
                       "one decode per view"),
            ]  # fmt: skip
            limit = limits.decode(beton, workers)
        else:
            shape = (VIEWS * batch, size, size, 3)
            limit = limits.copy(shape, plan.device, batch, len(beton))
        case = f"two crops of {size} px, {beton.manifest.store} store, batch {batch}"
        return compare("loaders", case, "images", [*ours, *theirs, limit], 1, plan.repeats)


def _ours(
    plan: Plan, beton: Beton, size: int, batch: int, name: str
) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        if name in LIBRARIES:
            importlib.import_module(LIBRARIES[name])  # ImportError here: reported as missing
        loader = open_loader(
            beton, [Crop(size, VIEWS)], batch, device=plan.device, engine=name,
            workers=plan.workers, drop_last=False,
        )  # fmt: skip
        return lambda: drain(loader)

    return prepare
