"""Which images each split has: the words that other people's sets call it by, and several files."""

import io
import os
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastproj.core.errors import InputError
from fastproj.data.beton import open_beton
from fastproj.prepare.command import main
from fastproj.prepare.folders import IMAGENET100
from fastproj.prepare.sources import Source, open_sources

COUNTS = {"train": 4, "validation": 2, "test": 6}  # images


def png(gray: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (gray, gray, gray)).save(buffer, "PNG")
    return buffer.getvalue()


def grays(source: Source) -> list[int]:
    return [Image.open(io.BytesIO(image)).getpixel((0, 0))[0] for image in source.images]


def folders(root: Path, *names: str) -> Path:
    """An image at each of the names, every one of another gray."""
    for gray, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(gray))
    return root


def tar(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def tar_of_images(path: Path, *names: str) -> Path:
    return tar(path, {name: png(gray) for gray, name in enumerate(names)})


def of_word(word: str) -> list[str]:
    """The images of the split that is called so, half of each class."""
    return [f"{'ab'[i % 2]}/{word}{i}.png" for i in range(COUNTS[word])]


def as_folder(root: Path) -> Path:
    return folders(root, *(f"{word}/{name}" for word in COUNTS for name in of_word(word)))


def as_one_archive(root: Path) -> Path:
    names = [f"photos/{word}/{name}" for word in COUNTS for name in of_word(word)]
    return tar_of_images(root / "set.tar", *names)


def as_an_archive_each(root: Path) -> Path:
    for word in COUNTS:
        tar_of_images(root / f"{word}.tar", *of_word(word))
    return root


def as_csv_files(root: Path) -> Path:
    for word in COUNTS:
        lines = [f"{name},{name[0]}\n" for name in of_word(word)]
        (root / f"{word}.csv").write_text("path,label\n" + "".join(lines))
    return root


def as_parquet_files(root: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for word, count in COUNTS.items():
        labels = [i % 2 if word != "test" else -1 for i in range(count)]  # as ImageNet's on the hub
        table = pa.table({"image": [png(i) for i in range(count)], "label": labels})
        parquet.write_table(table, root / f"{word}-00000-of-00001.parquet")
    return root


def as_shards(root: Path) -> Path:
    for word, count in COUNTS.items():
        pairs = [(f"{i}.png", png(i)) for i in range(count)]
        labels = [(f"{i}.cls", b"%d" % (i % 2)) for i in range(count)]
        tar(root / f"{word}-000000.tar", dict(pairs + labels))
    return root


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("folder", as_folder),
        ("archive", as_one_archive),
        ("archive", as_an_archive_each),
        ("csv", as_csv_files),
        ("parquet", as_parquet_files),
        ("webdataset", as_shards),
    ],
)
def test_validation_and_test_images_are_not_one_split(
    kind: str, make: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make(tmp_path)
    found = open_sources(kind, root)
    assert [(source.split, len(source.labels)) for source in found] == [("train", 4), ("val", 2)]
    note = f"note: {root}: split val is validation, without test\n"
    assert capsys.readouterr().err == note
    (train,) = open_sources(kind, root, "train")
    assert len(train.labels) == 4 and capsys.readouterr().err == ""


# --- several files of one split ------------------------------------------------------------------


@pytest.mark.parametrize("names", [("train-0", "train-1"), ("cats", "dogs")])
def test_several_archives_of_a_split_are_one(names: tuple[str, str], tmp_path: Path) -> None:
    for name, label in zip(names, "ab", strict=True):
        tar_of_images(tmp_path / f"{name}.tar", f"{label}/0.png", f"{label}/1.png", "c/0.png")
    split = "train" if names[0] == "train-0" else "all"
    out = ["--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(["--dataset", "archive", "--root", str(tmp_path), *out]) == 0
    beton = open_beton(tmp_path / "out" / f"{split}.beton")
    assert beton.classes == ("a", "b", "c") and beton.label.tolist() == [0, 0, 2, 1, 1, 2]
    first, second = (f"{name}.tar/c/0.png" for name in names)
    assert beton.manifest.source_names()[2::3] == [first, second]  # which of the two it is


def test_several_csv_files_of_a_split_are_one(tmp_path: Path) -> None:
    folders(tmp_path, "0.png", "1.png", "more/2.png")
    (tmp_path / "a.csv").write_text("path,label\n0.png,cat\n1.png,dog\n")
    (tmp_path / "more" / "b.csv").write_text("path,label\n2.png,ant\n")
    (source,) = open_sources("csv", tmp_path)
    assert source.split == "all" and source.classes == ("ant", "cat", "dog")
    assert source.labels.tolist() == [1, 2, 0]
    paths = [os.path.relpath(image, tmp_path) for image in source.images]
    assert paths == ["0.png", "1.png", "more/2.png"]


def twice() -> dict:
    images = [(np.zeros((4, 4, 3), np.uint8), label) for label in (0, 1)]
    return {1: images, "1": images}


def test_two_sources_of_one_split_are_refused() -> None:
    with pytest.raises(InputError, match="split 1 is there 2 times, .* join them") as why:
        open_sources(f"{__name__}:twice")
    assert "\n" not in str(why.value)


def test_a_split_that_lacks_files_is_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"image": [png(0), png(1)], "label": [0, 1]})
    for name in ("train-00000-of-00003", "train-00002-of-00003", "val-00000-of-00001-a1b2c3"):
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match=r"train-00000.*: one of 3 files, of which 2 are there"):
        open_sources("parquet", tmp_path)
    for root in (tmp_path, tmp_path / "train-00002-of-00003.parquet"):
        (source,) = open_sources("parquet", root, "val" if root.is_dir() else "train")
        assert source.labels.tolist() == [0, 1]


def test_huggingface_hub_is_asked_for_only_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "a--b").mkdir()
    as_parquet_files(tmp_path / "a--b")
    assert len(open_sources("hf:a/b", tmp_path)) == 2
    with pytest.raises(InputError, match=r"pip install 'fastproj-ssl\[parquet\]'"):
        open_sources("hf:a/b", tmp_path, download=True)


# --- the words, in folders and archives ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "archive"])
@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("train/a/0.png", "train/b/1.png", "valid/a/2.png", "valid/b/3.png"), "train val"),
        (("training/a/0.png", "training/b/1.png", "validation/a/2.png", "validation/b/3.png"),
         "train val"),
        (("train/a/0.png", "train/b/1.png", "test/2.png"), "train val"),
        (("train/0.png", "test/1.png"), "train val"),
        (("train/0.png", "car/1.png"), "all"),  # a class may be called so
        (("valid/0.png", "invalid/1.png"), "all"),
    ],
)  # fmt: skip
def test_folders_and_archives_know_the_same_words(
    kind: str, names: tuple[str, ...], found: str, tmp_path: Path
) -> None:
    root = folders(tmp_path, *names)
    theirs = open_sources("folder", root)
    ours = theirs
    if kind == "archive":
        ours = open_sources(kind, tar_of_images(tmp_path / "set.tar", *names))
    assert " ".join(source.split for source in ours) == found
    for one, other in zip(ours, theirs, strict=True):
        assert one.classes == other.classes and one.labels.tolist() == other.labels.tolist()
        assert [*one.names] == [*other.names]


def test_what_a_mac_adds_to_an_archive_is_left_out(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        for name in ("set/a/0.png", "set/b/1.png"):
            archive.writestr(name, png(0))
            archive.writestr(f"__MACOSX/{name[:6]}._{name[6:]}", b"\0\5\x16\7")
    tar(tmp_path / "mac.tar", {"a/0.png": png(0), "a/._0.png": b"\0\5", "b/1.png": png(1)})
    for name in ("mac.zip", "mac.tar"):
        (source,) = open_sources("archive", tmp_path / name)
        assert source.classes == ("a", "b") and source.labels.tolist() == [0, 1]


def test_a_hard_link_in_a_tar_is_the_file_and_another_link_is_named(tmp_path: Path) -> None:
    folders(tmp_path / "set", "a/0.png", "b/1.png")
    os.link(tmp_path / "set" / "a" / "0.png", tmp_path / "set" / "b" / "2.png")
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a/0.png", "b/1.png", "b/2.png"):
            archive.add(tmp_path / "set" / name, f"./{name}")
        assert archive.getmembers()[2].islnk()
    (source,) = open_sources("archive", path)
    assert source.labels.tolist() == [0, 1, 1] and grays(source) == [0, 1, 0]
    (tmp_path / "set" / "b" / "3.png").symlink_to("1.png")
    with tarfile.open(path, "a") as archive:
        archive.add(tmp_path / "set" / "b" / "3.png", "b/3.png")
    for kind in ("archive", "webdataset"):
        with pytest.raises(InputError, match="b/3.png is a link to 1.png.*--dereference") as why:
            open_sources(kind, path)
        assert "\n" not in str(why.value)


# --- what a setting switches off is not asked for ------------------------------------------------


def test_train_alone_needs_no_val_in_folders(tmp_path: Path) -> None:
    wnids = sorted(IMAGENET100.read_text().split())
    folders(tmp_path, *(f"train/{wnid}/0.png" for wnid in wnids), "val/0.png")
    with pytest.raises(InputError, match="val folder is flat"):
        open_sources("imagenet100", tmp_path)
    (train,) = open_sources("imagenet100", tmp_path, "train")
    assert train.split == "train" and train.labels.tolist() == [*range(100)]
    with pytest.raises(InputError, match="has no split val; found train"):
        (tmp_path / "val").rename(tmp_path / "elsewhere")
        open_sources("imagenet100", tmp_path, "val")


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_images_beside_class_folders_need_no_labels(kind: str, tmp_path: Path) -> None:
    names = ("0.png", "a/1.png", "b/2.png")
    root = folders(tmp_path / "set", *names)
    if kind == "archive":
        root = tar_of_images(tmp_path / "set.tar", *names)
    with pytest.raises(InputError, match=r"holds images .0.png, 1 in all. beside.*labels false"):
        open_sources(kind, root)
    (source,) = open_sources(kind, root, labels=False)
    assert [*source.names] == [*names] and source.labels.tolist() == [-1] * 3
    (source,) = open_sources(kind, root, classes=["b", "a"])
    assert [*source.names] == [*names[1:]] and source.labels.tolist() == [1, 0]


def test_a_class_that_is_not_chosen_may_be_in_one_split_only(tmp_path: Path) -> None:
    folders(tmp_path, *(f"{split}/{name}/0.png" for split in ("train", "val") for name in "ab"))
    folders(tmp_path, "train/c/0.png")
    with pytest.raises(InputError, match="class c is in one split only"):
        open_sources("folder", tmp_path)
    train, val = open_sources("folder", tmp_path, classes=["a", "b"])
    assert train.labels.tolist() == val.labels.tolist() == [0, 1]
    assert len(open_sources("folder", tmp_path, labels=False)[0].labels) == 3
