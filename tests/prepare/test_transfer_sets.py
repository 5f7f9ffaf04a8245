"""The classification sets that papers transfer to, by their real readers on small files."""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fastproj.core.errors import InputError, SettingError
from fastproj.data.beton import open_beton
from fastproj.evaluation.sets import open_folders
from fastproj.prepare import transfer_sets
from fastproj.prepare.command import main
from fastproj.prepare.sources import open_sources
from fastproj.prepare.transfer_sets import TRANSFER_SETS

Expected = tuple[list[int], list[int], tuple[str, ...]]  # labels of train and val, first classes


def image(path: Path, gray: int) -> None:
    """12 × 10 pixels of one gray, so that a test can tell the images apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (gray, gray, gray)).save(path)


def lines(path: Path, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address at which this process serves the files of ``folder``."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def dtd(root: Path) -> Expected:
    folder = root / "dtd" / "dtd"
    for gray, (split, kind) in enumerate(
        (split, kind) for split in ("train", "val", "test") for kind in ("banded", "dotted")
    ):
        image(folder / "images" / kind / f"{kind}_{split}.jpg", gray)
        rows = [f"{kind}/{kind}_{split}.jpg" for kind in ("banded", "dotted")]
        lines(folder / "labels" / f"{split}1.txt", rows)
    return [0, 1, 0, 1], [0, 1], ("banded", "dotted")


def idx(root: Path, name: str) -> None:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 3), ("t10k", 2)):
        pixels = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28).tobytes()
        labels = np.arange(count, dtype=np.uint8)
        head = [np.array([0x0803, count, 28, 28], ">i4"), np.array([0x0801, count], ">i4")]
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head[0].tobytes() + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head[1].tobytes() + labels.tobytes())


def mnist(root: Path) -> Expected:
    idx(root, "MNIST")
    return [0, 1, 2], [0, 1], ("0 - zero", "1 - one")


def fashion_mnist(root: Path) -> Expected:
    idx(root, "FashionMNIST")
    return [0, 1, 2], [0, 1], ("T-shirt/top", "Trouser")


def flowers102(root: Path, monkeypatch: pytest.MonkeyPatch) -> Expected:
    """Labels count from 1; the test files' own MD5 stand in for those of the real files."""
    from torchvision.datasets import Flowers102

    folder = root / "flowers-102"
    for number in range(1, 7):
        image(folder / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(folder / "imagelabels.mat", {"labels": [[1, 2, 3, 1, 2, 3]]})
    savemat(folder / "setid.mat", {"trnid": [[2, 1]], "valid": [[3, 6]], "tstid": [[5, 4]]})
    files = dict(Flowers102._file_dict)
    for key in ("label", "setid"):
        name = files[key][0]
        files[key] = (name, md5(folder / name))
    monkeypatch.setattr(Flowers102, "_file_dict", files)
    return [1, 0, 2, 2], [1, 0], ("pink primrose", "hard-leaved pocket orchid")


def gtsrb(root: Path) -> Expected:
    folder = root / "gtsrb"
    for label in range(2):
        image(folder / "GTSRB" / "Training" / f"{label:05d}" / "00000_00000.ppm", label)
    for number in range(3):
        image(folder / "GTSRB" / "Final_Test" / "Images" / f"{number:05d}.ppm", number)
    rows = [f"{number:05d}.ppm;12;10;1;1;9;9;{number % 2}" for number in range(3)]
    head = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    lines(folder / "GT-final_test.csv", [head, *rows])
    return [0, 1], [0, 1, 0], ("0", "1")


def pets(root: Path) -> Expected:
    folder = root / "oxford-iiit-pet"
    for part in ("trainval", "test"):
        names = [f"{kind}_{part}" for kind in ("cat", "dog")]
        for gray, name in enumerate(names):
            image(folder / "images" / f"{name}.jpg", gray)
        rows = [f"{name} {i + 1} {i + 1} 1" for i, name in enumerate(names)]
        lines(folder / "annotations" / f"{part}.txt", rows)
    return [0, 1], [0, 1], ("Cat", "Dog")


def food101(root: Path) -> Expected:
    folder = root / "food-101"
    for part in ("train", "test"):
        listed = {kind: [f"{kind}/{part}"] for kind in ("apple_pie", "baklava")}
        for gray, (name,) in enumerate(listed.values()):
            image(folder / "images" / f"{name}.jpg", gray)
        lines(folder / "meta" / f"{part}.json", [json.dumps(listed)])
    return [0, 1], [0, 1], ("apple_pie", "baklava")


def aircraft(root: Path) -> Expected:
    data = root / "fgvc-aircraft-2013b" / "data"
    lines(data / "variants.txt", ["707-320", "Boeing 717"])
    for part, numbers in (("trainval", (1, 2)), ("test", (3,))):
        for number in numbers:
            image(data / "images" / f"{number:07d}.jpg", number)
        names = {1: "Boeing 717", 2: "707-320", 3: "Boeing 717"}
        rows = [f"{number:07d} {names[number]}" for number in numbers]
        lines(data / f"images_variant_{part}.txt", rows)
    return [1, 0], [1], ("707-320", "Boeing 717")


def cars(root: Path) -> Expected:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    kinds = np.array(["AM General Hummer", "Acura RL"], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": kinds})
    for place, part in (("devkit/cars_train_annos.mat", "train"),
                        ("cars_test_annos_withlabels.mat", "test")):  # fmt: skip
        rows = np.array(
            [(f"{i}.jpg", label) for i, label in enumerate((2, 1))],
            dtype=[("fname", object), ("class", np.uint8)],
        )
        savemat(folder / place, {"annotations": rows})
        for i in range(2):
            image(folder / f"cars_{part}" / f"{i}.jpg", i)
    return [1, 0], [1, 0], ("AM General Hummer", "Acura RL")


def cub(root: Path) -> Expected:
    folder = root / "CUB_200_2011"
    names = ["001.Albatross/a.jpg", "001.Albatross/b.jpg", "002.Auklet/c.jpg", "002.Auklet/d.jpg"]
    for gray, name in enumerate(names):
        image(folder / "images" / name, gray)
    lines(folder / "images.txt", [f"{i} {name}" for i, name in enumerate(names, 1)])
    lines(folder / "image_class_labels.txt", ["1 1", "2 1", "3 2", "4 2"])
    lines(folder / "train_test_split.txt", ["1 1", "2 0", "3 0", "4 1"])
    lines(folder / "classes.txt", ["1 001.Albatross", "2 002.Auklet"])
    return [0, 1], [0, 1], ("Albatross", "Auklet")


MADE: dict[str, Callable[..., Expected]] = {
    "dtd": dtd, "mnist": mnist, "fashion_mnist": fashion_mnist, "flowers102": flowers102,
    "gtsrb": gtsrb, "pets": pets, "food101": food101, "aircraft": aircraft, "cars": cars,
    "cub": cub,
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFER_SETS)
def test_train_is_everything_but_the_test_images(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = MADE[name]
    wanted = make(tmp_path, monkeypatch) if name == "flowers102" else make(tmp_path)
    train, val = open_sources(f"transfer:{name}", tmp_path)
    assert (train.split, val.split) == ("train", "val")
    assert (train.labels.tolist(), val.labels.tolist(), train.classes[:2]) == wanted
    assert train.classes[: len(val.classes)] == val.classes
    (alone,) = open_sources(f"transfer:{name}", tmp_path, "val")
    assert alone.labels.tolist() == val.labels.tolist()


def test_images_of_two_splits_follow_one_another(tmp_path: Path) -> None:
    dtd(tmp_path)
    train, val = open_sources("transfer:dtd", tmp_path)
    grays = [np.asarray(one)[5, 5, 0] for source in (train, val) for one in source.images]
    assert grays == [0, 1, 2, 3, 4, 5]
    assert train.names[2] == "train[0]"


def test_written_sets_are_a_list_for_the_probes(tmp_path: Path) -> None:
    for name in ("dtd", "cub"):
        MADE[name](tmp_path)
        words = ["--dataset", f"transfer:{name}", "--root", str(tmp_path)]
        assert main([*words, "--out", str(tmp_path / "data" / name), "--workers", "1"]) == 0
    found = open_folders([str(tmp_path / "data" / name) for name in ("dtd", "cub")])
    assert [sets.num_classes for sets in found] == [2, 2]
    assert len(open_beton(tmp_path / "data" / "dtd" / "train.beton")) == 4


def test_cub_is_fetched_from_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's download, of a file of the same form, from this machine."""
    made = tmp_path / "made"
    wanted = cub(made)
    archive = tmp_path / "CUB_200_2011.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(made / "CUB_200_2011", "CUB_200_2011")
    with serving(tmp_path) as address:
        monkeypatch.setattr(transfer_sets, "CUB", f"{address}/{archive.name}")
        with pytest.raises(InputError, match="cannot be fetched"):  # other bytes than the authors'
            open_sources("transfer:cub", tmp_path / "raw", download=True)
        monkeypatch.setattr(transfer_sets, "CUB_MD5", md5(archive))
        train, val = open_sources("transfer:cub", tmp_path / "raw", download=True)
    assert (train.labels.tolist(), val.labels.tolist(), train.classes) == wanted


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="transfer: no 'dtt'.*did you mean 'dtd'"):
        open_sources("transfer:dtt", tmp_path)
    for name in ("dtd", "cub"):
        with pytest.raises(InputError, match="data.download true"):
            open_sources(f"transfer:{name}", tmp_path)
    with pytest.raises(InputError, match="cannot fetch StanfordCars any more"):
        open_sources("transfer:cars", tmp_path, download=True)
    cub(tmp_path)
    folder = tmp_path / "CUB_200_2011"
    lines(folder / "image_class_labels.txt", ["1 1", "2 1", "3 7", "4 2"])
    with pytest.raises(InputError, match=r"classes.txt: no class 7"):
        open_sources("transfer:cub", tmp_path)
    lines(folder / "image_class_labels.txt", ["1 1", "2"])
    with pytest.raises(InputError, match=r"labels.txt, line 2: expected a number and a text"):
        open_sources("transfer:cub", tmp_path)
    lines(folder / "image_class_labels.txt", ["1 1"])
    with pytest.raises(InputError, match="do not list the same images"):
        open_sources("transfer:cub", tmp_path)
