"""Raw images to betons: what is read, how it is stored, and what happens when things go wrong."""

import hashlib
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, JpegImagePlugin

from fastproj.core.errors import InputError, SettingError
from fastproj.data.beton import open_beton
from fastproj.data.manifest import read_manifest
from fastproj.data.verify import verify
from fastproj.prepare.command import main
from fastproj.prepare.encode import (
    MAX_PIXELS,
    Store,
    Unreadable,
    encode,
    encode_chunk,
    resized,
    upright_rgb,
)
from fastproj.prepare.folders import IMAGENET100
from fastproj.prepare.sources import open_sources
from fastproj.settings import PREPARE, load

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "data_prep/write_ffcv.py"]
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "imagenet-sample.tar"


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Something a JPEG keeps well: uint8 (H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (x * 255 / width, y * 255 / height, 128 + 100 * np.sin(x / 9) * np.cos(y / 7))
    return np.stack(planes, axis=2).astype(np.uint8)


def image_folder(root: Path, classes=("ant", "bee"), count=5, size=(9, 7)) -> Path:
    """``root/<class>/<n>.png``, every image different."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(noise(*size, 3, seed=100 * c + i)).save(root / name / f"{i}.png")
    return root


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    """The command as a user types it, in a checkout."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


# --- one image -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1", "RGB"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    """Against PIL's own conversion of the image before it was saved, where that is lossless."""
    image = Image.fromarray(smooth(20, 30)).convert("RGBA" if mode == "RGBA" else mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(noise(20, 30)))
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    read = upright_rgb(str(path))
    assert read.mode == "RGB" and read.size == (30, 20)
    if mode == "RGBA":  # alpha dropped: the colors stay as they are
        np.testing.assert_array_equal(np.asarray(read), np.asarray(image)[:, :, :3])
    elif mode in ("L", "LA", "1"):
        gray = np.asarray(image.convert("L"))
        np.testing.assert_array_equal(np.asarray(read), np.repeat(gray[:, :, None], 3, axis=2))
    elif mode == "CMYK":
        cmyk = np.asarray(image).astype(float)
        expected = (255 - cmyk[:, :, :3]) * (255 - cmyk[:, :, 3:]) / 255
        assert np.abs(np.asarray(read) - expected).max() <= 1
    elif mode == "P":
        palette = np.array(image.getpalette()).reshape(-1, 3)
        np.testing.assert_array_equal(np.asarray(read), palette[np.asarray(image)])


def test_cmyk_jpegs_are_not_inverted(tmp_path):
    """Adobe stores CMYK inverted in JPEGs; ImageNet has some."""
    image = Image.fromarray(smooth(40, 60))
    image.convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    read = np.asarray(upright_rgb(str(tmp_path / "x.jpg")))
    assert np.abs(read.astype(float) - np.asarray(image)).mean() < 4


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_gray_keeps_its_range(tmp_path, suffix):
    wide = np.linspace(0, 65535, 600).reshape(20, 30).round().astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / f"x.{suffix}")
    read = np.asarray(upright_rgb(str(tmp_path / f"x.{suffix}")))
    np.testing.assert_array_equal(read[:, :, 0], np.rint(wide / 257).astype(np.uint8))
    assert (read[:, :, 0] == read[:, :, 2]).all()


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="floating-point"):
        upright_rgb(str(tmp_path / "x.tif"))


EXIF = {  # EXIF 2.32, tag 0x0112: what to do to the stored rows and columns to see it upright
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", EXIF)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_orientation(tmp_path, orientation, suffix):
    stored = smooth(16, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(stored).save(path, exif=exif)
    expected = EXIF[orientation](np.asarray(Image.open(path)))
    np.testing.assert_array_equal(np.asarray(upright_rgb(str(path))), expected)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (1, 500)])
def test_max_resolution_bounds_the_longest_side_and_never_enlarges(size):
    image = Image.new("RGB", size)
    small = resized(image, Store("jpeg", 90, max_resolution=100))
    assert max(small.size) == min(100, max(size))
    share = max(small.size) / max(size)
    assert all(abs(s - max(1, o * share)) <= 0.5 for s, o in zip(small.size, size, strict=True))
    assert resized(image, Store("jpeg", 90)) is image


@pytest.mark.parametrize("store", [Store("square", side=32), Store("jpeg", 90, 32)])
def test_resizing_is_antialiased_bicubic(store):
    """Against torch's; on noise, where a resize without antialiasing would be far off."""
    pixels = noise(128, 128, 3)
    got = np.asarray(resized(Image.fromarray(pixels), store)).astype(float)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    wanted = torch.nn.functional.interpolate(planes, size=32, mode="bicubic", antialias=True)
    wanted = wanted[0].permute(1, 2, 0).numpy().clip(0, 255)
    assert np.abs(got - wanted).max() <= 2 and np.abs(got - wanted).mean() < 0.5


def test_jpeg_quality_and_chroma():
    image = Image.fromarray(smooth(60, 80))
    sizes = []
    for quality in (50, 90):
        stored, _ = encode(image, 3, Store("jpeg", quality))
        read = Image.open(io.BytesIO(stored.data))
        assert (stored.width, stored.height) == read.size == (80, 60)
        assert JpegImagePlugin.get_sampling(read) == 2  # 4:2:0
        # ITU T.81's luminance table scaled as libjpeg does: its first entry, 16, at this quality
        scale = 5000 / quality if quality < 50 else 200 - 2 * quality
        assert read.quantization[0][0] == int((16 * scale + 50) / 100)
        assert np.abs(np.asarray(read).astype(float) - np.asarray(image)).mean() < 4
        sizes.append(len(stored.data))
    assert sizes[0] < sizes[1]


def test_a_side_too_long_for_the_format_is_an_error():
    with pytest.raises(ValueError, match="65535"):
        encode(Image.new("RGB", (65536, 1)), 0, Store("raw"))


# --- sources -------------------------------------------------------------------------------------


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def cifar(root: Path, monkeypatch, kind, files: dict[str, dict], meta: dict) -> None:
    """Pickles as the University of Toronto publishes them; torchvision is told their MD5."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    for name, content in {**files, kind.meta["filename"]: meta}.items():
        (folder / name).write_bytes(pickle.dumps(content))
    listed = [[name, md5(folder / name)] for name in files]
    monkeypatch.setattr(kind, "train_list", listed[:-1])
    monkeypatch.setattr(kind, "test_list", listed[-1:])
    sums = {**kind.meta, "md5": md5(folder / kind.meta["filename"])}
    monkeypatch.setattr(kind, "meta", sums)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files(tmp_path, monkeypatch, name):
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    names = ["ant", "bee", "cat"]
    planes = noise(9, 3, 32, 32)  # the files hold the red plane, then green, then blue
    batches = {
        f"batch_{i}": {"data": planes[3 * i : 3 * i + 3].reshape(3, -1), key: [2, 0, i]}
        for i in range(3)
    }
    cifar(tmp_path, monkeypatch, kind, batches, {kind.meta["key"]: names})
    assert main(["--dataset", name, "--root", str(tmp_path), "--out", str(tmp_path)]) == 0
    train, val = open_beton(tmp_path / "train.beton"), open_beton(tmp_path / "val.beton")
    assert train.classes == val.classes == tuple(names) and train.manifest.store == "raw"
    assert train.label.tolist() == [2, 0, 0, 2, 0, 1] and val.label.tolist() == [2, 0, 2]
    for i in range(6):
        stored = train.stored(i).reshape(32, 32, 3)
        np.testing.assert_array_equal(stored, planes[i].transpose(1, 2, 0))
    pixels = planes[:6] / 255  # per channel, over every pixel of the split
    np.testing.assert_allclose(train.manifest.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(train.manifest.std, pixels.std(axis=(0, 2, 3)), rtol=1e-12)
    with pytest.raises(InputError, match="no split unlabeled"):
        open_sources(name, tmp_path, "unlabeled", False)

    (tmp_path / kind.base_folder / "batch_0").write_bytes(b"cut")
    with pytest.raises(InputError, match="no complete cifar.*--data.download true"):
        open_sources(name, tmp_path, "all", False)


def test_stl10_files(tmp_path, monkeypatch):
    from torchvision.datasets import STL10

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    planes = {name: noise(4, 3, 96, 96, seed=s) for s, name in enumerate("tuv")}
    for name, letter in (("train", "t"), ("unlabeled", "u"), ("test", "v")):
        # column-major: each plane of the file is transposed
        (folder / f"{name}_X.bin").write_bytes(planes[letter].transpose(0, 1, 3, 2).tobytes())
        (folder / f"{name}_y.bin").write_bytes(bytes([1, 10, 3, 1]))  # counted from 1
    for table in ("train_list", "test_list"):
        files = [[name, md5(folder / name)] for name, _ in getattr(STL10, table)]
        monkeypatch.setattr(STL10, table, files)
    assert main(["--dataset", "stl10", "--root", str(tmp_path), "--out", str(tmp_path)]) == 0
    for split, letter, labels in (
        ("train", "t", [0, 9, 2, 0]),
        ("val", "v", [0, 9, 2, 0]),
        ("unlabeled", "u", [-1] * 4),
    ):
        beton = open_beton(tmp_path / f"{split}.beton")
        assert beton.label.tolist() == labels
        assert (beton.classes[2], len(beton.classes)) == ("car", 10)
        for i in range(4):
            stored = beton.stored(i).reshape(96, 96, 3)
            np.testing.assert_array_equal(stored, planes[letter][i].transpose(1, 2, 0))


def test_digits():
    from sklearn.datasets import load_digits

    train, val = open_sources("digits", None, "all", False)
    assert (train.split, len(train.labels), val.split, len(val.labels)) == (
        "train",
        1437,
        "val",
        360,
    )
    images, labels = load_digits(return_X_y=True)
    chosen = [int(name[len("digits[") : -1]) for name in [*train.names, *val.names]]
    assert sorted(chosen) == list(range(1797))
    np.testing.assert_array_equal(np.r_[train.labels, val.labels], labels[chosen])
    pixels = np.concatenate([train.images, val.images])
    assert pixels.shape == (1797, 8, 8, 3) and pixels.dtype == np.uint8
    expected = images[chosen].reshape(-1, 8, 8, 1) * 255 / 16
    assert np.abs(pixels - expected).max() <= 0.5
    share = np.bincount(val.labels) / np.bincount(labels)
    assert np.abs(share - 0.2).max() < 0.01


def test_folder_order_is_torchvisions(tmp_path):
    from torchvision.datasets import ImageFolder

    image_folder(tmp_path, ("b", "a", "c"))
    image_folder(tmp_path / "a", ("nested",))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    shutil.copy(tmp_path / "b" / "0.png", tmp_path / "b" / "LOUD.PNG")
    (source,) = open_sources("folder", tmp_path, "all", False)
    theirs = ImageFolder(tmp_path)
    assert list(source.images) == [path for path, _ in theirs.samples]
    assert source.labels.tolist() == theirs.targets
    assert source.classes == tuple(theirs.classes) and source.split == "all"
    assert source.names[0] == os.path.join("a", "0.png")


def test_links_are_followed_once(tmp_path):
    """A link out of the tree is a folder; one into it would repeat images under other labels."""
    root = image_folder(tmp_path / "images")
    elsewhere = image_folder(tmp_path / "elsewhere", ("more",))
    (root / "ant" / "more").symlink_to(elsewhere / "more")
    (source,) = open_sources("folder", root, "all", False)
    assert len(source.images) == 15 and source.labels.tolist() == [0] * 10 + [1] * 5
    link = root / "bee" / "again"
    for target in (root, root / "bee", root / "ant", tmp_path, elsewhere / "more"):
        link.symlink_to(target)
        with pytest.raises(InputError, match="bee/again.* is a link to .*, which is read already"):
            open_sources("folder", root, "all", False)
        link.unlink()


def test_a_pipe_among_the_images_is_unreadable_and_waited_for_by_nobody(tmp_path):
    os.mkfifo(tmp_path / "9.png")
    (found,) = encode_chunk([str(tmp_path / "9.png")], [0], Store("raw")).results
    assert found == Unreadable("a pipe, socket or device, not a file")


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_split_folders(tmp_path, held_out):
    image_folder(tmp_path / "train")
    image_folder(tmp_path / held_out, count=2)
    sources = open_sources("folder", tmp_path, "all", False)
    assert [(s.split, len(s.labels)) for s in sources] == [("train", 10), ("val", 4)]
    (source,) = open_sources("folder", tmp_path, "val", False)
    assert source.names[0] == os.path.join(held_out, "ant", "0.png")
    shutil.rmtree(tmp_path / "train" / "bee")
    with pytest.raises(InputError, match="class bee is in one split only"):
        open_sources("folder", tmp_path, "all", False)


def test_a_class_may_be_called_train(tmp_path):
    (source,) = open_sources("folder", image_folder(tmp_path, ("car", "train")), "all", False)
    assert source.split == "all" and source.classes == ("car", "train")
    with pytest.raises(InputError, match="no split val; found all"):
        open_sources("folder", tmp_path, "val", False)


@pytest.mark.parametrize(
    ("classes", "words"), [((), "holds no image"), (("ant",), "a probe needs at least 2")]
)
def test_fewer_than_two_classes_is_an_error(tmp_path, classes, words):
    with pytest.raises(InputError, match=words):
        open_sources("folder", image_folder(tmp_path, classes), "all", False)


def test_folders_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(InputError, match="needs --data.root"):
        open_sources("folder", None, "all", False)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        open_sources("folder", tmp_path / "nowhere", "all", False)
    (image_folder(tmp_path) / "cow").mkdir()
    with pytest.raises(InputError, match="cow: holds no image"):
        open_sources("folder", tmp_path, "all", False)


def wnid_folders(root: Path, wnids) -> None:
    one = noise(4, 4, 3)
    for wnid in wnids:
        (root / wnid).mkdir(parents=True)
        Image.fromarray(one).save(root / wnid / f"{wnid}_1.JPEG")


def test_imagenet100_takes_its_classes_and_names_a_missing_one(tmp_path):
    wnids = IMAGENET100.read_text().split()
    assert len(set(wnids)) == 100
    wnid_folders(tmp_path / "train", [*wnids, "n00000001", "n99999999"])
    wnid_folders(tmp_path / "val", wnids)
    train, val = open_sources("imagenet100", tmp_path, "all", False)
    assert train.classes == val.classes == tuple(sorted(wnids))
    assert train.labels.tolist() == list(range(100))
    assert [Path(path).parent.name for path in train.images] == sorted(wnids)
    shutil.rmtree(tmp_path / "val" / wnids[7])
    with pytest.raises(InputError, match=f"val: 1 of 100 classes missing, first {wnids[7]}"):
        open_sources("imagenet100", tmp_path, "all", False)
    (source,) = open_sources("imagenet100", tmp_path / "train", "all", False)
    assert source.split == "all" and source.classes == train.classes


def test_a_changed_class_list_is_refused(tmp_path, monkeypatch):
    changed = tmp_path / "imagenet100.txt"
    changed.write_text(IMAGENET100.read_text().replace("n01558993", "n01558994"))
    monkeypatch.setattr("fastproj.prepare.folders.IMAGENET100", changed)
    wnid_folders(tmp_path / "train", ["n01558994"])
    with pytest.raises(InputError, match="not the published list"):
        open_sources("imagenet100", tmp_path, "all", False)


def test_imagenet_layout(tmp_path):
    wnids = [f"n{i:08d}" for i in range(1000)]
    wnid_folders(tmp_path / "train", wnids)
    (tmp_path / "val").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(InputError, match="val folder is flat: first move"):
        open_sources("imagenet", tmp_path, "all", False)
    shutil.rmtree(tmp_path / "val")
    (source,) = open_sources("imagenet", tmp_path, "all", False)
    assert len(source.labels) == len(source.classes) == 1000
    shutil.rmtree(tmp_path / "train" / wnids[3])
    with pytest.raises(InputError, match="999 class folders, ImageNet has 1000"):
        open_sources("imagenet", tmp_path, "all", False)
    with pytest.raises(InputError, match="neither train nor val"):
        open_sources("imagenet", tmp_path / "train", "all", False)


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["raw", "jpeg", "square"])
def test_the_number_of_workers_changes_nothing(tmp_path, store):
    root = image_folder(tmp_path / "images", ("ant", "bee", "cat"), count=30, size=(50, 40))
    betons = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        arguments = ["--dataset", "folder", "--root", root, "--out", out, "--store", store]
        done = run(*arguments, "--workers", workers)
        assert done.returncode == 0, done.stderr
        assert "all.beton: 90 images, 3 classes" in done.stdout
        assert sorted(path.name for path in out.iterdir()) == ["all.beton", "all.json"]
        betons.append(out / "all.beton")
    one, three = (read_manifest(path.with_suffix(".json")) for path in betons)
    assert betons[0].read_bytes() == betons[1].read_bytes()
    assert (one.content, one.sha256, one.mean) == (three.content, three.sha256, three.mean)
    assert hashlib.sha256(betons[0].read_bytes()).hexdigest() == one.sha256
    assert verify(betons[0]) == []


def test_square_store_keeps_original_sizes(tmp_path):
    """In the original geometry a device draws its boxes; EXIF turns it first."""
    root = image_folder(tmp_path / "images", count=1, size=(50, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth(20, 60)).save(root / "bee" / "0.png", exif=exif)
    arguments = ["--dataset", "folder", "--root", root, "--out", tmp_path, "--store", "square"]
    done = run(*arguments, "--side", 16)
    assert done.returncode == 0, done.stderr
    beton = open_beton(tmp_path / "all.beton")
    assert beton.width.tolist() == beton.height.tolist() == [16, 16]
    sizes = zip(beton.source_width, beton.source_height, strict=True)
    assert list(sizes) == [(40, 50), (20, 60)]


def test_a_broken_image_stops_or_is_skipped(tmp_path):
    root = image_folder(tmp_path / "images")
    broken = root / "ant" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    out = tmp_path / "out"
    arguments = ["--dataset", "folder", "--root", root, "--out", out, "--workers", 2]
    done = run(*arguments)
    assert done.returncode == 1 and list(out.iterdir()) == []
    (line,) = done.stderr.splitlines()
    assert str(broken) in line and "--data.on_error skip" in line

    done = run(*arguments, "--on_error", "skip")
    assert done.returncode == 0 and "9 images, 1 skipped" in done.stdout
    beton = open_beton(out / "all.beton")
    (skipped,) = beton.manifest.skipped
    assert skipped["source"] == os.path.join("ant", "3.png") and skipped["reason"]
    assert beton.index.tolist() == list(range(9)) and beton.label.tolist() == [0] * 4 + [1] * 5
    assert beton.manifest.source_names()[3] == os.path.join("ant", "4.png")
    assert verify(out / "all.beton") == []

    before = (out / "all.beton").read_bytes()
    assert run(*arguments).returncode == 1  # over an existing pair: it stays
    assert (out / "all.beton").read_bytes() == before and verify(out / "all.beton") == []

    for image in root.glob("*/*.png"):
        image.write_bytes(b"")
    done = run(*arguments, "--on_error", "skip")
    assert done.returncode == 1 and "no image could be read" in done.stderr


def test_an_image_of_more_pixels_than_the_limit_is_named_and_not_decoded(tmp_path, monkeypatch):
    root = image_folder(tmp_path / "images", count=2, size=(9, 7))
    bomb = root / "bee" / "1.png"  # a few kB that unpack to 400 MB
    Image.new("1", (20_000, 20_000)).save(bomb)
    arguments = ["--dataset", "folder", "--root", root, "--out", tmp_path / "out", "--workers", 1]
    done = run(*arguments)
    assert done.returncode == 1 and not list((tmp_path / "out").iterdir())
    (line,) = done.stderr.splitlines()
    assert f"{bomb}: 20000x20000 pixels, and data.max_pixels is 178,956,970" in line
    done = run(*arguments, "--on_error", "skip", "--data.max_pixels", 62)  # 9 · 7 is 63
    assert done.returncode == 1 and "no image could be read" in done.stderr
    done = run(*arguments, "--on_error", "skip", "--data.max_pixels", 63)
    assert done.returncode == 0 and "3 images, 1 skipped" in done.stdout
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own is no second limit
    assert upright_rgb(str(root / "ant" / "0.png")).size == (7, 9)
    assert load(PREPARE, [], "prepare", "").data.max_pixels == MAX_PIXELS


def test_verify_names_the_damaged_sample(tmp_path):
    root = image_folder(tmp_path / "images")
    assert run("--dataset", "folder", "--root", root, "--out", tmp_path).returncode == 0
    beton = tmp_path / "all.beton"
    done = run("--verify", beton)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("intact")
    pointer = int(open_beton(beton).pointer[7])
    with beton.open("r+b") as file:
        file.seek(pointer + 5)
        file.write(b"damage")
    done = run("--verify", beton)
    assert done.returncode == 1 and "sample 7 (bee/2.png)" in done.stdout
    assert done.stdout.rstrip().endswith("1 damaged")
    beton.write_bytes(beton.read_bytes()[:-100])
    done = run("--verify", beton)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {beton}: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data.dataset is missing"),
        (["--dataset", "digits"], "data.out is missing"),
        (
            ["--dataset", "digits", "--out", "x", "--side", "9"],
            "data.side is read only where data.store is square",
        ),
        (
            ["--dataset", "digits", "--out", "x", "--quality", "9"],
            "data.quality is read only where data.store is jpeg",
        ),
    ],
)
def test_settings_that_do_not_fit(arguments, message):
    with pytest.raises(SettingError, match=message):
        main(arguments)


def test_an_output_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot create folder .*file/out"):
        main(["--dataset", "digits", "--out", str(tmp_path / "file" / "out")])


def test_a_json_of_somebody_elses_is_not_overwritten(tmp_path):
    given = ["--dataset", "digits", "--split", "val", "--out", str(tmp_path), "--workers", "1"]
    described = tmp_path / "val.json"
    for theirs in ('{"images": [], "annotations": []}', "[1]", "no JSON", ""):
        described.write_text(theirs)
        with pytest.raises(InputError, match=r"val\.json: .* no manifest of fastproj: move it"):
            main(given)
        assert described.read_text() == theirs and os.listdir(tmp_path) == ["val.json"]
    described.unlink()
    assert main(given) == 0
    manifest = described.read_text()
    described.write_text(manifest[:100])  # damaged, beside its beton: written again
    assert main(given) == 0 and described.read_text() == manifest
    (tmp_path / "val.beton").unlink()
    assert main(given) == 0 and described.read_text() == manifest


@pytest.fixture
def slow_write(tmp_path):
    """A command that is busy for a long while: 600 links to one large image, two workers."""
    root = tmp_path / "images"
    Image.fromarray(noise(600, 800, 3)).save(tmp_path / "large.jpg")
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for i in range(300):
            os.link(tmp_path / "large.jpg", root / name / f"{i}.jpg")
    out = tmp_path / "out"
    arguments = ["--dataset", "folder", "--root", root, "--out", out, "--workers", 2]
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments), "--store", "raw"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process, out
    process.kill()
    process.wait()


def wait_for(condition, seconds=120.0):
    """Poll until ``condition()`` is true; its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def workers_of(process) -> list[psutil.Process]:
    """The worker processes: grandchildren, because a fork server starts them."""
    return [
        grandchild
        for child in psutil.Process(process.pid).children()
        for grandchild in child.children()
    ]


def writing(out: Path) -> bool:
    """Some samples are in the temporary file."""
    return any(path.stat().st_size > 10_000_000 for path in out.glob("*.tmp"))


def test_a_killed_worker_ends_the_command(slow_write):
    process, out = slow_write
    wait_for(lambda: out.exists() and writing(out))
    workers_of(process)[0].kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("error: a worker process was killed")
    assert "Traceback" not in errors
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cleans_up(slow_write, number):
    process, out = slow_write
    wait_for(lambda: out.exists() and writing(out))
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped: nothing more was written"
    assert "Traceback" not in errors
    assert list(out.iterdir()) == []


def test_a_killed_writer_leaves_nothing_that_opens_and_no_process(slow_write):
    process, out = slow_write
    wait_for(lambda: out.exists() and writing(out))
    workers = workers_of(process)
    assert len(workers) == 2
    process.kill()
    process.wait()
    psutil.wait_procs(workers, timeout=60)
    assert not any(worker.is_running() for worker in workers)
    (left,) = out.iterdir()
    assert left.name.startswith("all.beton.") and left.suffix == ".tmp"
    for path in (out / "all.beton", left):
        with pytest.raises(InputError):
            open_beton(path)


# --- the same file in FFCV, and real photographs -------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("os_cache", [True, False], ids=["os_cache", "process_cache"])
def test_a_plain_ffcv_loader_reads_it(tmp_path, os_cache):
    """Pixels and labels, over several pages; a whole-image crop to the same size changes none."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    root = image_folder(tmp_path / "images", count=100, size=(256, 256))
    arguments = ["--dataset", "folder", "--root", root, "--out", tmp_path]
    assert run(*arguments, "--store", "raw").returncode == 0
    beton = open_beton(tmp_path / "all.beton")
    assert beton.pointer[-1] // (1 << 23) > 3
    whole = RandomResizedCropRGBImageDecoder((256, 256), scale=(1, 1), ratio=(1, 1))
    for decoder in (SimpleRGBImageDecoder(), whole):
        loader = Loader(
            str(beton.path),
            batch_size=64,
            num_workers=1,
            os_cache=os_cache,
            order=OrderOption.RANDOM,
            seed=0,
            drop_last=False,
            pipelines={"image": [decoder]},
        )
        seen = []
        for images, labels, index in loader:
            for i, image in zip(index[:, 0].tolist(), np.asarray(images), strict=True):
                np.testing.assert_array_equal(image.reshape(-1), beton.stored(i))
                seen.append(i)
            np.testing.assert_array_equal(labels[:, 0], beton.label[index[:, 0]])
        assert sorted(seen) == list(range(200))


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason=f"needs {PHOTOGRAPHS.name}")
def test_imagenet100_from_real_photographs(tmp_path):
    shutil.unpack_archive(PHOTOGRAPHS, tmp_path, filter="data")
    root = tmp_path / "imagenet-sample"
    gray = [path for path in root.glob("*/*") if Image.open(path).mode == "L"]
    assert gray
    arguments = ["--dataset", "imagenet100", "--root", root, "--max_resolution", 400]
    done = run(*arguments, "--out", tmp_path, "--workers", 2)
    assert done.returncode == 0, done.stderr
    beton = open_beton(tmp_path / "all.beton")
    assert beton.label.tolist() == list(range(100))
    assert max(beton.width.max(), beton.height.max()) == 400
    assert verify(beton.path) == []
    decoded = [np.asarray(Image.open(io.BytesIO(beton.stored(i)))) for i in range(100)]
    assert all(image.shape[2] == 3 for image in decoded)
    # The manifest's are those just before compression.
    pixels = np.concatenate([image.reshape(-1, 3) for image in decoded]) / 255
    np.testing.assert_allclose(beton.manifest.mean, pixels.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(beton.manifest.std, pixels.std(axis=0), atol=1e-3)
