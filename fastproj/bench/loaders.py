"""From stored images to two uint8 crops an image: each engine beside its peers and its limit."""

from collections.abc import Callable
from contextlib import ExitStack

from fastproj.bench import Engine, Plan, Row, compare, limits, peers
from fastproj.bench.images import are_jpegs, as_files, drain, several_times
from fastproj.loaders import Crop, open_loader
from fastproj.loaders.resident import is_uniform
from fastproj.manifest import Beton

VIEWS = 2


def run(plan: Plan, images: int = 3000, photo: int = 224, small: int = 32) -> list[Row]:
    """Cases: the jpeg and the square store at ``photo`` pixels, raw small images at ``small``.

    A call is an epoch of at least ``images``: long enough that starting workers hardly counts.
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
    names = ["resident"] * is_uniform(beton) + ["stream", "dali"]
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
            "a pass a view; nearest neighbour where it enlarges",
        ),
    ]  # fmt: skip
    with ExitStack() as stack:
        if jpegs:
            files = stack.enter_context(as_files(beton))
            theirs += [
                Engine("DALI from files", "peer", len(beton),
                       lambda: peers.dali_files(files, size, batch, workers)),
                Engine("SPDL from files", "peer", len(beton),
                       lambda: peers.spdl_files(files, size, batch, workers), "a decode a view"),
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
        if name == "dali":
            import nvidia.dali  # noqa: F401  # missing here is no failure of the benchmark
        loader = open_loader(
            beton, [Crop(size, VIEWS)], batch, device=plan.device, engine=name,
            workers=plan.workers, drop_last=False,
        )  # fmt: skip
        return lambda: drain(loader)

    return prepare
