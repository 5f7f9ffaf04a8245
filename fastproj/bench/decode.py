"""From stored JPEGs to batches that a device can crop: pinned where there is one, and owned."""

from collections.abc import Callable

from fastproj.bench import Engine, Plan, Row, compare, limits
from fastproj.bench.images import several_times
from fastproj.loaders import Crop
from fastproj.loaders.order import Order
from fastproj.loaders.stream import StreamLoader
from fastproj.manifest import Beton


def run(plan: Plan, images: int = 3000, size: int = 224, batch: int = 64) -> list[Row]:
    """What the engine ``stream`` does on the host where a device crops two boxes an image."""
    if plan.photos is None:
        return []
    epoch = several_times(plan.photos, images)
    engines = [
        Engine("stream", "ours", len(epoch), lambda: _ours(plan, epoch, size, batch)),
        limits.decode(epoch, plan.workers),
    ]
    case = f"padded batches of {batch}, {epoch.manifest.store} store"
    return compare("decode", case, "images", engines, 1, plan.repeats)


def _ours(plan: Plan, beton: Beton, size: int, batch: int) -> Callable[[], object]:
    order = Order(len(beton), batch, drop_last=False)
    loader = StreamLoader(beton, [Crop(size, 2)], order, plan.device, plan.workers)
    raise ImportError("no seam yet")
