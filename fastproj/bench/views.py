"""The augmentation of ready crops: our ways beside peers doing the same."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from fastproj.bench import Engine, Plan, Row, compare, limits, peers
from fastproj.loaders import Crop, open_loader
from fastproj.manifest import Beton
from fastproj.views import PRESETS, Params, Views

SIMCLR = PRESETS["simclr"]
# (set, pixels, images a batch, images of those who go one by one: fewer give the same rate)
CASES = (("small", 32, 512, 64), ("photos", 224, 32, 8))


def run(plan: Plan, cases: Sequence[tuple[str, int, int, int]] = CASES) -> list[Row]:
    """Two views of a batch of a set's uint8 crops with the preset ``simclr``; the unit is one view.

    Each engine's time includes drawing its parameters.
    """
    rows = []
    for name, size, batch, few in cases:
        beton: Beton | None = getattr(plan, name)
        if beton is None:
            continue
        loader = open_loader(
            beton, [Crop(size, len(SIMCLR))], batch, device=plan.device, engine="stream",
            workers=plan.workers,
        )  # fmt: skip
        crops = next(iter(loader)).crops[0].clone(memory_format=torch.preserve_format)
        some = crops[: 2 * few]
        ours = {"chain": Views.chain, "chain, compiled": Views.chain}
        if plan.device.type == "cpu":
            ours = {"augment": Views.forward, **ours}
        engines = [
            *(Engine(name, "ours", len(crops), _ours(crops, way, name.endswith("compiled")))
              for name, way in ours.items()),
            Engine("kornia", "peer", len(crops), _kornia(crops), "one jitter order a batch"),
            Engine("torchvision", "peer", len(some), _torchvision(some), "v2, one by one"),
            Engine("lightly", "peer", len(some), _lightly(some, size), "Pillow, one by one"),
            limits.convert(crops),
        ]  # fmt: skip
        case = f"{size} px, batch {batch}, {beton.manifest.store} store, all operations"
        rows += compare("views", case, "views", engines, 2, plan.repeats)
    return rows


def _ours(
    crops: Tensor, way: Callable[[Views, Tensor, Params], Tensor], compiled: bool
) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        views = Views(SIMCLR, peers.MEAN, peers.STD).to(crops.device)
        if compiled:
            views.compile()
        generator = torch.Generator(crops.device).manual_seed(0)
        return lambda: way(views, crops, views.sample(len(crops) // 2, generator))

    return prepare


def _kornia(crops: Tensor) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        chain = peers.kornia_views(SIMCLR[0])
        return lambda: chain(crops.float() / 255)

    return prepare


def _torchvision(crops: Tensor) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        chain = peers.torchvision_views(SIMCLR[0])
        return lambda: torch.stack([chain(crop) for crop in crops])

    return prepare


def _lightly(crops: Tensor, size: int) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        _, *rest = peers.lightly_views(size).transform.transforms  # all but its crop
        pictures = [tv.to_pil_image(crop.cpu()) for crop in crops]

        def one(picture: object) -> Tensor:
            for transform in rest:
                picture = transform(picture)
            assert isinstance(picture, Tensor)
            return picture

        return lambda: torch.stack([one(picture) for picture in pictures])

    return prepare
