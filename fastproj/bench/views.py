"""Views: the augmentation of ready crops, by our implementations and by peers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from fastproj.augment.draw import PRESETS, Params
from fastproj.augment.views import Augmentation
from fastproj.bench import Engine, Plan, Row, compare, limits, peers
from fastproj.data.beton import Beton
from fastproj.loaders import Crop, open_loader

SIMCLR = PRESETS["simclr"]
# (set, pixels, images per batch, images for peers that process one by one: fewer, same rate)
CASES = (("small", 32, 512, 64), ("photos", 224, 32, 8))


def run(plan: Plan, cases: Sequence[tuple[str, int, int, int]] = CASES) -> list[Row]:
    """Two views per image of a batch of uint8 crops, preset ``simclr``; the unit is one view.

    Each engine's time includes sampling its parameters.
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
        ours = {"chain": Augmentation.chain, "chain, compiled": Augmentation.chain}
        if plan.device.type == "cpu":
            ours = {"augment": Augmentation.forward, **ours}
        engines = [
            *(Engine(name, "ours", len(crops), _ours(crops, way, name.endswith("compiled")))
              for name, way in ours.items()),
            Engine("kornia", "peer", len(crops), _kornia(crops), "one jitter order per batch"),
            Engine("torchvision", "peer", len(some), _torchvision(some), "v2, one by one"),
            Engine("lightly", "peer", len(some), _lightly(some, size), "Pillow, one by one"),
            limits.convert(crops),
        ]  # fmt: skip
        case = f"{size} px, batch {batch}, {beton.manifest.store} store, all operations"
        rows += compare("views", case, "views", engines, 2, plan.repeats)
    return rows


def _ours(
    crops: Tensor, way: Callable[[Augmentation, Tensor, Params], Tensor], compiled: bool
) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        views = Augmentation(SIMCLR, peers.MEAN, peers.STD).to(crops.device)
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
        _, *rest = peers.lightly_views(size).transform.transforms  # all except its crop
        pictures = [tv.to_pil_image(crop.cpu()) for crop in crops]

        def one(picture: object) -> Tensor:
            for transform in rest:
                picture = transform(picture)
            assert isinstance(picture, Tensor)
            return picture

        return lambda: torch.stack([one(picture) for picture in pictures])

    return prepare
