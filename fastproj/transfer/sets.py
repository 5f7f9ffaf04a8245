"""Detection sets in PASCAL VOC's and COCO's formats, read by torchvision and checked at once."""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from xml.etree import ElementTree

import torch
from torch import Tensor
from torchvision.datasets import CocoDetection, VOCDetection, VOCSegmentation
from torchvision.datasets.utils import download_and_extract_archive

from fastproj.core.errors import InputError

FORMATS = ("voc", "coco")
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
COCO_URL = "http://images.cocodataset.org"  # torchvision's reader of COCO downloads nothing
OVER = 1.0  # pixels that a box may reach over its image's edge: COCO's are rounded


V = TypeVar("V", VOCDetection, VOCSegmentation)


@dataclass(frozen=True)
class Annotated:
    """An image file, (width, height) in pixels, and its n objects.

    ``boxes``: float32 (n, 4), x1, y1, x2, y2 from the image's upper left corner, pixels.
    ``labels``: int64 (n,), from 1. ``ignored``: bool (n,), VOC's difficult and COCO's crowds, which
    no score counts. ``areas``: float32 (n,), of COCO's outlines, else of boxes. ``outlines``:
    COCO's polygons or run lengths, one for each object, or none.
    """

    file: Path
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    ignored: Tensor
    areas: Tensor
    outlines: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class DetectionSet:
    """``name``, ``classes`` (label 1 is the first) and ``images`` in the order of their lists."""

    name: str
    classes: tuple[str, ...]
    images: Sequence[Annotated] = field(repr=False)

    def content(self) -> str:
        """A SHA-256 over file names, sizes, boxes, labels and outlines; not over the pixels."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for image in self.images:
            digest.update(repr((image.file.name, image.size, image.outlines)).encode())
            for tensor in (image.boxes, image.labels, image.ignored):
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def open_set(kind: str, root: str | Path, splits: Sequence[str], download: bool) -> DetectionSet:
    """The set of ``splits`` below ``root``, all their annotations read and checked.

    ``kind`` is one of ``FORMATS``. VOC's splits are ``2007_trainval``, ``2012_trainval``,
    ``2007_test`` and so on; COCO's ``train2017`` and ``val2017``: the images are in
    ``root/train2017``, the annotations in ``root/annotations/instances_train2017.json``. Of a
    format's own sets, ``download`` fetches those into ``root`` first.

    Raises ``InputError`` for a split that is not there, annotations that cannot be read, images
    that are missing, categories that the set does not have, boxes outside of their image and a set
    without any object.
    """
    read: Callable[[Path, str, bool], tuple[tuple[str, ...], list[Annotated]]]
    read = _voc if kind == "voc" else _coco
    images: list[Annotated] = []
    of_split = {}
    for split in splits:
        of_split[split], found = read(Path(root), split, download)
        images += found
    same_classes(of_split)
    classes, name = of_split[splits[0]], "+".join(splits)
    missing = [image.file for image in images if not image.file.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(images)} images of {name} are missing, {missing[0]} the "
            "first: copy or download the set again"
        )
    if not any(len(image) for image in images):
        raise InputError(f"{root}: no image of {name} has an annotated object: nothing to detect")
    return DetectionSet(name, classes, images)


def same_classes(found: Mapping[str, Sequence[str]]) -> None:
    """``InputError`` where the ``found`` classes, by split, are not the same in the same order."""
    (first, classes), *others = found.items()
    for name, other in others:
        if list(other) != list(classes):
            number = next(
                (n for n, (a, b) in enumerate(zip(classes, other, strict=False)) if a != b),
                min(len(classes), len(other)),
            )
            one, two = ((*of, "none")[min(number, len(of))] for of in (classes, other))
            raise InputError(
                f"the classes of {first} and {name} differ: class {number + 1} is {one} in the one "
                f"and {two} in the other; give both files the same categories"
            )


def open_voc(kind: type[V], root: Path, split: str, download: bool, such_as: str) -> V:
    """torchvision's reader of a VOC split; ``InputError``, which names some, for none."""
    year, _, part = split.partition("_")
    try:
        with quietly():
            return kind(root, year=year, image_set=part, download=download)
    except ValueError as error:
        raise InputError(
            f"data: VOC has no split {split!r} ({one_line(error)}): give {such_as}"
        ) from None
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{root} has no split {split} of VOC ({one_line(error)}): --data.root is the folder "
            "of VOCdevkit; --data.download true fetches the set"
        ) from None


def _voc(root: Path, split: str, download: bool) -> tuple[tuple[str, ...], list[Annotated]]:
    such_as = "2007_trainval, 2012_trainval or 2007_test"
    reader = open_voc(VOCDetection, root, split, download, such_as)
    return VOC_CLASSES, [
        _of_voc(Path(image), Path(xml))
        for image, xml in zip(reader.images, reader.annotations, strict=True)
    ]


def _of_voc(image: Path, xml: Path) -> Annotated:
    try:
        root = ElementTree.parse(xml).getroot()  # noqa: S314  # expat itself limits entities
        said = VOCDetection.parse_voc_xml(root)["annotation"]
        size = int(said["size"]["width"]), int(said["size"]["height"])
        objects = said["object"]
        corners = [[float(one["bndbox"][side]) for side in SIDES] for one in objects]
        difficult = [one.get("difficult", "0") == "1" for one in objects]
        names = [one["name"] for one in objects]
    except (OSError, ElementTree.ParseError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{xml} is no annotation of VOC ({type(error).__name__}: {one_line(error)}): copy or "
            "download it again"
        ) from None
    for name in names:
        if name not in VOC_CLASSES:
            raise InputError(f"{xml}: {name!r} is none of VOC's {len(VOC_CLASSES)} classes")
    # Pixels count from 1 there, and the last one is within: 1 to w is 0 to w as coordinates.
    boxes = torch.tensor(corners).reshape(-1, 4) - torch.tensor([1.0, 1.0, 0.0, 0.0])
    labels = torch.tensor([VOC_CLASSES.index(name) + 1 for name in names], dtype=torch.int64)
    return _checked(image, size, boxes, labels, torch.tensor(difficult, dtype=torch.bool), xml)


SIDES = ("xmin", "ymin", "xmax", "ymax")


def _coco(root: Path, split: str, download: bool) -> tuple[tuple[str, ...], list[Annotated]]:
    file = root / "annotations" / f"instances_{split}.json"
    if download and not file.is_file():
        year = split[-4:]
        with quietly():
            for part in (f"zips/{split}", f"annotations/annotations_trainval{year}"):
                download_and_extract_archive(f"{COCO_URL}/{part}.zip", root)
    if not file.is_file():
        there = sorted(path.stem.removeprefix("instances_") for path in file.parent.glob("*.json"))
        raise InputError(
            f"{root} has no split {split}: there is no {file}; it has "
            f"{', '.join(there) or 'none'}; --data.download true fetches COCO's own"
        )
    try:
        with quietly():
            coco = CocoDetection(root / split, str(file)).coco
        names = {one["id"]: one["name"] for one in coco.loadCats(sorted(coco.getCatIds()))}
        label = {category: number for number, category in enumerate(names, start=1)}
        images = []
        for key in sorted(coco.imgs):
            about = coco.imgs[key]
            objects = coco.imgToAnns[key]
            for one in objects:
                if one["category_id"] not in label:
                    raise InputError(
                        f"{file}: annotation {one['id']} has category {one['category_id']}, which "
                        f"is none of the file's {len(label)} categories"
                    )
            boxes = torch.tensor([one["bbox"] for one in objects]).reshape(-1, 4).float()
            boxes[:, 2:] += boxes[:, :2]
            images.append(
                _checked(
                    root / split / about["file_name"],
                    (about["width"], about["height"]),
                    boxes,
                    torch.tensor([label[one["category_id"]] for one in objects], dtype=torch.int64),
                    torch.tensor(
                        [bool(one.get("iscrowd", 0)) for one in objects], dtype=torch.bool
                    ),
                    file,
                    torch.tensor([_area(one) for one in objects], dtype=torch.float32),
                    tuple(one.get("segmentation") for one in objects),
                )
            )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(
            f"{file} holds no instances of COCO ({type(error).__name__}: {one_line(error)}): "
            "copy or download it again"
        ) from None
    return tuple(names.values()), images


def _area(one: dict[str, Any]) -> float:
    return one["area"] if "area" in one else one["bbox"][2] * one["bbox"][3]


def _checked(
    image: Path,
    size: tuple[int, int],
    boxes: Tensor,
    labels: Tensor,
    ignored: Tensor,
    source: Path,
    areas: Tensor | None = None,
    outlines: tuple[Any, ...] = (),
) -> Annotated:
    """The image, its boxes cut at its edges; InputError for one that reaches further."""
    width, height = size
    edge = torch.tensor([width, height, width, height])
    for box in boxes[((boxes < -OVER) | (boxes > edge + OVER)).any(1)][:1]:
        corners = ", ".join(f"{x:g}" for x in box.tolist())
        raise InputError(
            f"{source}: the box ({corners}) of {image.name} lies outside of its {width}x{height} "
            "pixels: correct the annotation"
        )
    boxes = boxes.clamp(torch.zeros(4), edge)
    sides = boxes[:, 2:] - boxes[:, :2]
    if areas is None:
        areas = sides.prod(1)
    whole = (sides > 0).all(1)
    if not whole.all():  # lines and points, which COCO has a few of
        keep = whole.nonzero().flatten().tolist()
        boxes, labels, ignored, areas = (x[keep] for x in (boxes, labels, ignored, areas))
        outlines = tuple(outlines[index] for index in keep) if outlines else ()
    return Annotated(image, size, boxes, labels, ignored, areas, outlines)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Nothing on stdout, where these readers print."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def as_coco(images: Sequence[Annotated], classes: Sequence[str]) -> dict[str, Any]:
    """The ground truth of ``images`` as pycocotools takes it; image n has the id n + 1."""
    objects: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        rows = zip(
            image.boxes.tolist(),
            image.labels.tolist(),
            image.ignored.tolist(),
            image.areas.tolist(),
            image.outlines or [None] * len(image),
            strict=True,
        )
        for (x1, y1, x2, y2), label, ignored, area, outline in rows:
            entry = {
                "id": len(objects) + 1,
                "image_id": number,
                "category_id": label,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": area,
                "iscrowd": int(ignored),
            }
            objects.append(entry | ({"segmentation": outline} if outline else {}))
    return {
        "images": [
            {"id": number, "width": image.size[0], "height": image.size[1]}
            for number, image in enumerate(images, start=1)
        ],
        "annotations": objects,
        "categories": [
            {"id": number, "name": name} for number, name in enumerate(classes, start=1)
        ],
    }
