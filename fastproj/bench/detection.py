"""Detection: photographs with objects to resized images and targets, beside torchvision's."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from fastproj.bench import Engine, Plan, Row, compare, limits
from fastproj.bench.images import are_jpegs, drain, several_times
from fastproj.data.beton import Beton
from fastproj.loaders.order import Order

OBJECTS = 7  # of an image, as COCO has on average
CORNERS = 20  # of an object's outline
SIDES = tuple(range(480, 801, 32))  # of MoCo's VOC and torchvision's "multiscale"
MAX_SIZE = 1333
BATCH = 2  # images of each of eight GPUs
SPLIT = "train2017"


def run(plan: Plan, images: int = 300) -> list[Row]:
    """Two cases: boxes alone, and boxes with masks. One call is an epoch of ``images`` or more."""
    if plan.photos is None or not are_jpegs(plan.photos):
        return []
    beton = several_times(plan.photos, images)
    rows = []
    with as_coco(beton) as root:
        for masks in (False, True):
            engines = [
                Engine("fastproj transfer", "ours", len(beton),
                       partial(_ours, root, masks, plan.workers)),
                Engine("torchvision's reference", "peer", len(beton),
                       partial(_reference, root, masks, plan.workers, False), "on Pillow's images"),
                Engine("the same on tensors", "peer", len(beton),
                       partial(_reference, root, masks, plan.workers, True), "backend tv_tensor"),
                limits.decode(beton, plan.workers),
            ]  # fmt: skip
            case = f"shorter side 480 to 800, boxes{' and masks' if masks else ''}, batch {BATCH}"
            rows += compare("detection", case, "images", engines, 1, plan.repeats)
    return rows


@contextmanager
def as_coco(beton: Beton) -> Iterator[Path]:
    """The stored JPEGs in COCO's folders, each with objects at random places."""
    rng = np.random.default_rng(0)
    turn = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    with TemporaryDirectory(prefix="fastproj-") as folder:
        root = Path(folder)
        (root / SPLIT).mkdir()
        (root / "annotations").mkdir()
        pictures: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for number in range(len(beton)):
            name = f"{number:012d}.jpg"
            (root / SPLIT / name).write_bytes(beton.stored(number).tobytes())
            width, height = int(beton.width[number]), int(beton.height[number])
            pictures.append({"id": number, "file_name": name, "width": width, "height": height})
            for _ in range(OBJECTS):
                w, h = rng.uniform(8, [width / 2, height / 2])
                x, y = rng.uniform(0, [width - w, height - h])
                outline = np.stack([x + w / 2 * (1 + np.cos(turn)), y + h / 2 * (1 + np.sin(turn))])
                objects.append(
                    {"id": len(objects) + 1, "image_id": number, "category_id": 1, "iscrowd": 0,
                     "bbox": [x, y, w, h], "area": w * h * np.pi / 4,
                     "segmentation": [outline.T.ravel().tolist()]}
                )  # fmt: skip
        content = {"images": pictures, "annotations": objects,
                   "categories": [{"id": 1, "name": "ellipse"}]}  # fmt: skip
        (root / "annotations" / f"instances_{SPLIT}.json").write_text(json.dumps(content))
        yield root


def _ours(root: Path, masks: bool, workers: int) -> Callable[[], object]:
    from fastproj.transfer.batches import batches
    from fastproj.transfer.objects import augmentation, read, trainable
    from fastproj.transfer.sets import open_set

    images = trainable(open_set("coco", root, [SPLIT], False).images)
    order = Order(len(images), BATCH, drop_last=False)
    transform = augmentation(SIDES, MAX_SIZE, 0.5)
    return lambda: drain(
        batches(
            images, order, 0, read=partial(read, masks=masks), transform=transform, workers=workers
        )
    )


def _reference(root: Path, masks: bool, workers: int, tensors: bool) -> Callable[[], object]:
    """torchvision's readers and transforms as its references/detection has them ("multiscale")."""
    import pycocotools  # noqa: F401  # CocoDetection imports it

    file = root / "annotations" / f"instances_{SPLIT}.json"
    drawn = [
        v2.RandomShortestSize(min_size=list(SIDES), max_size=MAX_SIZE),
        v2.RandomHorizontalFlip(0.5),
    ]
    transforms = v2.Compose(
        [
            *([v2.PILToTensor(), *drawn] if tensors else [*drawn, v2.PILToTensor()]),
            v2.ToDtype(torch.float, scale=True),
            v2.ConvertBoundingBoxFormat("XYXY"),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    keys = {"boxes", "labels", "image_id"} | ({"masks"} if masks else set())
    dataset = wrap_dataset_for_transforms_v2(
        CocoDetection(root / SPLIT, str(file), transforms=transforms), target_keys=keys
    )
    loader = DataLoader(
        dataset, BATCH, shuffle=True, num_workers=workers,
        collate_fn=lambda batch: tuple(zip(*batch, strict=True)),
    )  # fmt: skip
    return lambda: drain(loader)
