"""Small detection sets in PASCAL VOC's and COCO's own formats: bright shapes on photographs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw

from tests.support.betons import photograph

SHAPES = ("car", "bottle", "dog")  # of VOC's names: a square, a disk, a triangle
COLORS = ((230, 40, 40), (40, 200, 60), (50, 80, 240))


class Drawn(NamedTuple):
    """A shape's corners x1, y1, x2, y2 (its last pixels are x2 - 1, y2 - 1), and its outline."""

    kind: int
    box: tuple[int, int, int, int]
    outline: list[float]


def draw(
    rng: np.random.Generator, width: int, height: int, count: int, colored: bool = True
) -> tuple[Image.Image, list]:
    """An image with ``count`` shapes that do not overlap; ``colored``: each kind has its color."""
    image = photograph(rng, width, height)
    pen, drawn = ImageDraw.Draw(image), list[Drawn]()
    while len(drawn) < count:
        side = int(rng.integers(min(width, height) // 4, min(width, height) // 2))
        x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
        box = (x, y, x + side, y + side)
        if any(x < b[2] and b[0] < x + side and y < b[3] and b[1] < y + side for _, b, _ in drawn):
            count -= 1  # no room here: one fewer
            continue
        kind = int(rng.integers(len(SHAPES)))
        right, down = x + side - 1, y + side - 1
        outline = [x, y, right, y, right, down, x, down]
        if kind == 1:
            turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            middle, radius = side / 2, side / 2 - 0.5
            points = np.stack(
                [x + middle + radius * np.cos(turn), y + middle + radius * np.sin(turn)]
            )
            outline = points.T.ravel().round(1).tolist()
        elif kind == 2:
            outline = [x + side // 2, y, right, down, x, down]
        color = COLORS[kind] if colored else tuple(rng.integers(0, 256, 3).tolist())
        pen.polygon(list(zip(outline[::2], outline[1::2], strict=True)), color)
        drawn.append(Drawn(kind, box, outline))
    return image, drawn


def images(
    seed: int, count: int, side: int = 64, empty: Sequence[int] = (), colored: bool = True
) -> list:
    """Images of about ``side`` pixels with one or two shapes; ``empty`` ones have none.

    Where they are not ``colored`` only its form says what a shape is.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(side, side + side // 4, (count, 2)).tolist()
    return [
        draw(rng, *size, 0 if number in empty else 1 + number % 2, colored)
        for number, size in enumerate(sizes)
    ]


def write_voc(root: Path, year: str, split: str, made: list, difficult: Sequence[int] = ()) -> Path:
    """A split in VOC's folders below ``root``; the first object of ``difficult`` images is."""
    folder = root / "VOCdevkit" / f"VOC{year}"
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    names = [f"{split}_{number:04d}" for number in range(len(made))]
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    for number, (name, (image, drawn)) in enumerate(zip(names, made, strict=True)):
        image.save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        top = ElementTree.Element("annotation")
        size = ElementTree.SubElement(top, "size")
        for side, value in zip(("width", "height", "depth"), (*image.size, 3), strict=True):
            ElementTree.SubElement(size, side).text = str(value)
        for place, (kind, (x1, y1, x2, y2), _) in enumerate(drawn):
            one = ElementTree.SubElement(top, "object")
            ElementTree.SubElement(one, "name").text = SHAPES[kind]
            hard = number in difficult and place == 0
            ElementTree.SubElement(one, "difficult").text = str(int(hard))
            box = ElementTree.SubElement(one, "bndbox")
            corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}  # counted from 1
            for side, value in corners.items():
                ElementTree.SubElement(box, side).text = str(value)
        ElementTree.ElementTree(top).write(folder / "Annotations" / f"{name}.xml")
    return folder


def write_coco(root: Path, split: str, made: list, crowd: Sequence[int] = ()) -> Path:
    """A split in COCO's folders below ``root``; returns its JSON. Categories are 3, 7 and 11."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    pictures, objects = [], []
    for number, (image, drawn) in enumerate(made):
        key = 100 - number  # in another order than the list
        image.save(root / split / f"{key:012d}.jpg", quality=95)
        width, height = image.size
        pictures.append(
            {"id": key, "file_name": f"{key:012d}.jpg", "width": width, "height": height}
        )
        for place, (kind, (x1, y1, x2, y2), outline) in enumerate(drawn):
            flat = np.array(outline).reshape(-1, 2)
            x, y = flat[:, 0], flat[:, 1]
            area = abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2
            objects.append(
                {
                    "id": len(objects) + 1, "image_id": key, "category_id": 3 + 4 * kind,
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area,
                    "iscrowd": int(number in crowd and place == 0), "segmentation": [outline],
                }
            )  # fmt: skip
    categories = [{"id": 3 + 4 * kind, "name": name} for kind, name in enumerate(SHAPES)]
    file = root / "annotations" / f"instances_{split}.json"
    file.write_text(
        json.dumps({"images": pictures, "annotations": objects, "categories": categories})
    )
    return file
