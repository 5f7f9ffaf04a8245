"""Sets whose pixels have classes: read as they are, drawn with their pixels, refused briefly."""

import functools
import http.server
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from fastproj.core.errors import InputError
from fastproj.transfer import pixels
from fastproj.transfer.pixels import VOID, Crop, crops, open_masked, read_masked
from tests.support.detection import COLORS, images
from tests.support.segmentation import BACKGROUND, FIRST, mask_of, write_ade, write_voc_masks

MADE = images(0, 5, empty=(4,))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_voc_masks(tmp_path, "train", MADE)
    write_ade(tmp_path, "training", MADE)
    return tmp_path


def test_vocs_masks_are_classes_with_void_outlines(root: Path) -> None:
    opened = open_masked("voc", root, ["2012_train"], False)
    assert (opened.name, opened.classes, len(opened.images)) == ("2012_train", 21, 5)
    for image, (made, drawn) in zip(opened.images, MADE, strict=True):
        found, target = read_masked(image, "voc")
        assert found.shape == (3, made.height, made.width) and found.dtype == torch.uint8
        assert np.array_equal(target["mask"], mask_of(made, drawn, 0, VOID))
        assert (target["mask"] == VOID).any() == bool(drawn)


def test_ade20ks_classes_count_from_zero_and_its_zero_is_void(root: Path) -> None:
    opened = open_masked("ade20k", root, ["training"], False)
    assert opened.classes == 150
    for image, (made, drawn) in zip(opened.images, MADE, strict=True):
        mask = read_masked(image, "ade20k")[1]["mask"]
        assert (mask[:, 0] == VOID).all()
        wanted = np.array(mask_of(made, drawn, BACKGROUND, None))[:, 1:] - 1
        assert np.array_equal(mask[:, 1:], wanted) and mask[0, 1] in (BACKGROUND - 1, FIRST - 1)


def test_several_splits_are_one_set_of_its_own_content(root: Path) -> None:
    write_voc_masks(root, "val", images(1, 2))
    one = open_masked("voc", root, ["2012_train"], False)
    both = open_masked("voc", root, ["2012_train", "2012_val"], False)
    assert both.name == "2012_train+2012_val" and len(both.images) == 7
    before = one.content()
    assert before == open_masked("voc", root, ["2012_train"], False).content() != both.content()
    Image.new("L", MADE[0][0].size, 1).save(one.images[0].mask)
    assert before != one.content()


def test_a_crop_is_filled_up_on_the_right_and_below() -> None:
    image = tv_tensors.Image(torch.full((3, 20, 40), 9, dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.arange(40, dtype=torch.uint8).expand(20, 40).clone())
    found, target = Crop(32, [1, 2, 3])(image, {"mask": mask})
    assert found.shape == (3, 32, 32) and (found[:, :20] == 9).all()
    assert all((found[channel, 20:] == channel + 1).all() for channel in range(3))
    columns = target["mask"][0]
    assert (target["mask"][:20] == columns).all() and (target["mask"][20:] == VOID).all()
    assert columns.tolist() == list(range(columns[0], columns[0] + 32))


def test_a_crop_is_drawn_again_where_one_class_has_most_of_it() -> None:
    """One crop in four has enough of both classes; of ten, one or more in 19 of 20 cases."""
    mask = torch.zeros(64, 96, dtype=torch.uint8)
    mask[:, 64:] = 1
    mask[:, :8] = VOID
    image = tv_tensors.Image(torch.zeros(3, 64, 96, dtype=torch.uint8))
    torch.manual_seed(0)
    mixed = 0
    for _ in range(40):
        found = Crop(32, [0, 0, 0])(image, {"mask": tv_tensors.Mask(mask)})[1]["mask"]
        mixed += 0.25 < (found == 1).sum() / (found != VOID).sum() < 0.75
    assert mixed >= 32
    only = tv_tensors.Mask(torch.zeros(64, 96, dtype=torch.uint8))
    assert (Crop(32, [0, 0, 0])(image, {"mask": only})[1]["mask"] == 0).all()


def test_masks_move_with_the_pixels(root: Path) -> None:
    """After all of the augmentation, a shape's pixels have its color, whatever colors became."""
    opened = open_masked("voc", root, ["2012_train"], False)
    transform = crops(48, (0.5, 2.0), 0.5, [0.5, 0.5, 0.5])
    purest = {0: 0, 1: 1, 2: 2}  # the shapes are red, green and blue
    assert [max(range(3), key=lambda c: color[c]) for color in COLORS] == [*purest.values()]
    right = total = 0
    for seed in range(12):
        torch.manual_seed(seed)
        image, target = transform(*read_masked(opened.images[seed % 4], "voc"))
        assert image.shape == (3, 48, 48) and target["mask"].shape == (48, 48)
        for kind, channel in purest.items():
            inside = target["mask"] == FIRST + kind
            right += int((image.argmax(0)[inside] == channel).sum())
            total += int(inside.sum())
    assert total > 1000 and right > 0.97 * total


def voc(root: Path, name: str) -> Path:
    return root / "VOCdevkit/VOC2012" / name


def ade(root: Path, name: str) -> Path:
    return root / "ADEChallengeData2016" / name


FAULTS = {
    "no voc": ("voc", lambda root: voc(root, "").rename(root / "x"), "has no split 2012_train of"),
    "no ade": ("ade20k", lambda root: ade(root, "images").rename(root / "x"), "has no split train"),
    "no mask": (
        "voc", lambda root: voc(root, "SegmentationClass/train_0001.png").unlink(),
        "1 of the 10 files of 2012_train are missing, .*train_0001.png",
    ),
    "no image": (
        "ade20k", lambda root: next(ade(root, "annotations").rglob("*02.png")).unlink(),
        "1 of the 10 files of training are missing",
    ),
    "damaged": (
        "voc", lambda root: voc(root, "SegmentationClass/train_0000.png").write_bytes(b"x"),
        "train_0000.png is no mask that Pillow reads",
    ),
    "colors": (
        "voc",
        lambda root: Image.new("RGB", (9, 9)).save(voc(root, "SegmentationClass/train_0000.png")),
        "train_0000.png is an image of mode RGB: a mask has one byte per pixel",
    ),
    "size": (
        "voc",
        lambda root: Image.new("L", (9, 9)).save(voc(root, "SegmentationClass/train_0000.png")),
        "train_0000.png has 9x9 pixels, its image",
    ),
    "voc's class": (
        "voc",
        lambda root: Image.new("L", MADE[0][0].size, 21).save(
            voc(root, "SegmentationClass/train_0000.png")
        ),
        "train_0000.png has pixels of value 21, which is no class of the format voc",
    ),
    "ade's class": (
        "ade20k",
        lambda root: Image.new("L", MADE[0][0].size, 151).save(
            ade(root, "annotations/training/ADE_training_00000000.png")
        ),
        "ADE_training_00000000.png has pixels of value 151, which is no class of the format ade20k",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_masks_is_one_line(root: Path, fault: str) -> None:
    kind, harm, says = FAULTS[fault]
    harm(root)
    with pytest.raises(InputError, match=says) as refused:
        split = "2012_train" if kind == "voc" else "training"
        for image in open_masked(kind, root, [split], False).images:
            read_masked(image, kind)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("split", ["2012_nothing", "1999_train", "train"])
def test_a_split_without_masks_is_named(root: Path, split: str) -> None:
    with pytest.raises(InputError, match=f"VOC has no split '{split}'"):
        open_masked("voc", root, [split], False)


def test_ade20k_is_downloaded_and_unpacked(root: Path, tmp_path: Path, monkeypatch) -> None:
    """Its real download code, from a server of our own."""
    served = tmp_path / "served"
    served.mkdir()
    with zipfile.ZipFile(served / "ADEChallengeData2016.zip", "w") as archive:
        for file in ade(root, "").rglob("*.*"):
            archive.write(file, file.relative_to(root))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/ADEChallengeData2016.zip"
        monkeypatch.setattr(pixels, "ADE_URL", url)
        opened = open_masked("ade20k", tmp_path / "new", ["training"], True)
        server.shutdown()
    assert opened.content() == open_masked("ade20k", root, ["training"], False).content()
