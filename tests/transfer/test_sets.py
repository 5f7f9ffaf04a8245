"""Sets in VOC's and COCO's formats: what is read, and one line for what is wrong with them."""

import functools
import hashlib
import http.server
import json
import tarfile
import threading
from pathlib import Path

import pytest
from torchvision.datasets import voc

from fastproj.core.errors import InputError
from fastproj.transfer.sets import VOC_CLASSES, open_set, same_classes
from tests.support.detection import SHAPES, images, write_coco, write_voc

MADE = images(0, 6, empty=(4,))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_voc(tmp_path, "2007", "trainval", MADE, difficult=(1,))
    write_coco(tmp_path, "train2017", MADE, crowd=(1,))
    return tmp_path


def test_vocs_boxes_labels_and_difficult_ones(root: Path) -> None:
    opened = open_set("voc", root, ["2007_trainval"], False)
    assert opened.classes == VOC_CLASSES and len(opened.images) == 6
    for number, (image, (made, drawn)) in enumerate(zip(opened.images, MADE, strict=True)):
        assert image.size == made.size
        assert image.boxes.tolist() == [list(map(float, one.box)) for one in drawn]
        assert [opened.classes[label - 1] for label in image.labels] == [
            SHAPES[one.kind] for one in drawn
        ]
        assert image.ignored.tolist() == [number == 1 and not place for place in range(len(drawn))]
    assert len(opened.images[4]) == 0


def test_cocos_categories_are_numbered_and_its_images_sorted(root: Path) -> None:
    opened = open_set("coco", root, ["train2017"], False)
    assert opened.classes == SHAPES
    for image, (made, drawn) in zip(opened.images, reversed(MADE), strict=True):
        assert image.size == made.size
        assert image.boxes.tolist() == [list(map(float, one.box)) for one in drawn]
        assert image.labels.tolist() == [one.kind + 1 for one in drawn]
        assert [one[0] for one in image.outlines] == [one.outline for one in drawn]
    assert [bool(image.ignored.any()) for image in opened.images] == [i == 4 for i in range(6)]


def test_several_splits_are_one_set_and_its_content_is_digested(root: Path) -> None:
    write_voc(root, "2012", "trainval", images(1, 2))
    one = open_set("voc", root, ["2007_trainval"], False)
    both = open_set("voc", root, ["2007_trainval", "2012_trainval"], False)
    assert both.name == "2007_trainval+2012_trainval" and len(both.images) == 8
    assert one.content() == open_set("voc", root, ["2007_trainval"], False).content()
    file = root / "VOCdevkit/VOC2007/Annotations/trainval_0000.xml"
    file.write_text(file.read_text().replace(SHAPES[MADE[0][1][0].kind], "sheep"))
    assert one.content() != open_set("voc", root, ["2007_trainval"], False).content()


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def voc_file(root: Path, name: str) -> Path:
    return root / "VOCdevkit" / "VOC2007" / name


VOC_FAULTS = {
    "no folder": (lambda root: (root / "VOCdevkit").rename(root / "x"), "has no split"),
    "no split": (
        lambda root: voc_file(root, "ImageSets/Main/trainval.txt").unlink(),
        "has no split 2007_trainval",
    ),
    "empty": (
        lambda root: voc_file(root, "Annotations/trainval_0002.xml").write_text(""),
        "trainval_0002.xml is no annotation of VOC",
    ),
    "outside": (
        lambda root: replace(voc_file(root, "Annotations/trainval_0000.xml"), "<xmax>", "<xmax>9"),
        "lies outside of its",
    ),
    "category": (
        lambda root: replace(
            voc_file(root, "Annotations/trainval_0000.xml"), "</name>", "x</name>"
        ),
        "is none of VOC's 20 classes",
    ),
    "missing": (
        lambda root: voc_file(root, "JPEGImages/trainval_0003.jpg").unlink(),
        "1 of the 6 images of 2007_trainval are missing",
    ),
}


@pytest.mark.parametrize("fault", VOC_FAULTS)
def test_what_is_wrong_with_a_voc_set_is_one_line(root: Path, fault: str) -> None:
    harm, says = VOC_FAULTS[fault]
    harm(root)
    with pytest.raises(InputError, match=says) as refused:
        open_set("voc", root, ["2007_trainval"], False)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("split", ["2007_nothing", "1999_trainval", "train"])
def test_a_split_that_voc_does_not_have_is_named(root: Path, split: str) -> None:
    with pytest.raises(InputError, match=f"VOC has no split '{split}'"):
        open_set("voc", root, [split], False)


def edited(root: Path, **changes: object) -> None:
    """The JSON with its first annotation changed."""
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0] |= changes
    file.write_text(json.dumps(content))


def annotations(root: Path) -> Path:
    return root / "annotations" / "instances_train2017.json"


COCO_FAULTS = {
    "no split": (lambda root: annotations(root).rename(root / "annotations/instances_a.json"),
                 "there is no .*instances_train2017.json; it has a;"),
    "empty": (lambda root: annotations(root).write_text(""), "holds no instances of COCO"),
    "a list": (lambda root: annotations(root).write_text("[]"), "holds no instances of COCO"),
    "no object": (
        lambda root: replace(annotations(root), '"annotations": [', '"annotations": [], "x": ['),
        "has an annotated object",
    ),
    "outside": (lambda root: edited(root, bbox=[0, 0, 500, 5]), "lies outside of its"),
    "category": (lambda root: edited(root, category_id=4),
                 "annotation 1 has category 4, which is none of the file's 3"),
    "missing": (lambda root: (root / "train2017" / "000000000098.jpg").unlink(),
                "1 of the 6 images of train2017 are missing, .*98.jpg"),
}  # fmt: skip


@pytest.mark.parametrize("fault", COCO_FAULTS)
def test_what_is_wrong_with_a_coco_set_is_one_line(root: Path, fault: str) -> None:
    harm, says = COCO_FAULTS[fault]
    harm(root)
    with pytest.raises(InputError, match=says) as refused:
        open_set("coco", root, ["train2017"], False)
    assert "\n" not in str(refused.value)


def test_splits_of_other_categories_are_not_one_set(root: Path) -> None:
    file = write_coco(root, "val2017", MADE)
    content = json.loads(file.read_text())
    content["categories"] = content["categories"][1:]
    content["annotations"] = [one for one in content["annotations"] if one["category_id"] != 3]
    file.write_text(json.dumps(content))
    train, val = (open_set("coco", root, [split], False) for split in ("train2017", "val2017"))
    assert val.classes == train.classes[1:]  # alone it is a set
    words = f"train2017 and val2017 differ: class 1 is {SHAPES[0]} in the one and {SHAPES[1]} in"
    with pytest.raises(InputError, match=words):
        open_set("coco", root, ["train2017", "val2017"], False)
    with pytest.raises(InputError, match=words):
        same_classes({train.name: train.classes, val.name: val.classes})
    with pytest.raises(InputError, match="class 3 is none in the one and c in the other"):
        same_classes({"one": "ab", "two": "abc"})


def test_a_box_is_cut_at_the_edge_and_one_without_area_is_left_out(root: Path) -> None:
    edited(root, bbox=[-0.5, 0, 20.5, 10])
    (first,) = [i for i in open_set("coco", root, ["train2017"], False).images if "100" in str(i)]
    assert first.boxes[0].tolist() == [0, 0, 20, 10]
    edited(root, bbox=[3, 3, 0, 10])
    (first,) = [i for i in open_set("coco", root, ["train2017"], False).images if "100" in str(i)]
    assert len(first) == len(first.outlines) == len(MADE[0][1]) - 1


def test_torchvision_downloads_voc(root: Path, tmp_path: Path, monkeypatch) -> None:
    """Its real download code, from a server of our own in the place of Oxford's."""
    served = tmp_path / "served"
    served.mkdir()
    with tarfile.open(served / "VOC.tar", "w") as tar:
        tar.add(root / "VOCdevkit", "VOCdevkit")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        content = (served / "VOC.tar").read_bytes()
        entry = {
            "url": f"http://127.0.0.1:{server.server_port}/VOC.tar",
            "filename": "VOC.tar",
            "md5": hashlib.md5(content, usedforsecurity=False).hexdigest(),
            "base_dir": "VOCdevkit/VOC2007",
        }
        monkeypatch.setitem(voc.DATASET_YEAR_DICT, "2007", entry)
        opened = open_set("voc", tmp_path / "new", ["2007_trainval"], True)
        server.shutdown()
    ours = open_set("voc", root, ["2007_trainval"], False)
    assert opened.content() == ours.content() and len(opened.images) == 6
