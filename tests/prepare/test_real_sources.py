"""Every kind of source makes the same beton of real photographs, whole and damaged."""

import os
import shutil
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton, open_beton
from fastproj.data.verify import verify
from fastproj.prepare.command import main
from fastproj.prepare.folders import IMAGENET100
from tests.support.sources import MAKERS, as_tar, as_zip, files

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample.tar"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason=f"needs {PHOTOGRAPHS.name}"),
]
KINDS = {**MAKERS, "one tar": as_tar, "one zip": as_zip}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300, one of each class: ``train/<class>/<image>``."""
    root = tmp_path_factory.mktemp("photographs")
    shutil.unpack_archive(PHOTOGRAPHS, root, filter="data")
    (root / "imagenet-sample").rename(root / "train")
    return root


@pytest.fixture(scope="module")
def hundred(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of ImageNet-100's classes."""
    root = tmp_path_factory.mktemp("hundred")
    for name in IMAGENET100.read_text().split():
        shutil.copytree(photographs / "train" / name, root / "train" / name)
    return root


@pytest.fixture(scope="module")
def damaged(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 300, of which the 10th is cut, the 20th is empty and the 30th has other coded bytes."""
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(photographs, root, dirs_exist_ok=True)
    cut, empty, changed = files(root)[9:30:10]
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    empty.write_bytes(b"")
    content = changed.read_bytes()
    middle = len(content) // 2
    changed.write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])
    return root


def prepared(dataset: str, root: Path, out: Path, *more: object) -> Beton:
    argv = ["--dataset", dataset, "--root", root, "--out", out, "--workers", 1, "--split", "train"]
    small = ["--store", "jpeg", "--max_resolution", 64]
    assert main([str(word) for word in (*argv, *small, *more)]) == 0
    return open_beton(out / "train.beton")


@pytest.fixture(scope="module")
def folders(hundred: Path, damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Beton]:
    """Both sets from their folders."""
    out = tmp_path_factory.mktemp("folders")
    skipping = ("folder", damaged, out / "damaged", "--on_error", "skip")
    return [prepared("imagenet100", hundred, out / "whole"), prepared(*skipping)]


def as_kind(kind: str, root: Path, out: Path) -> tuple[str, Path]:
    """The name of the data set, and its root, after ``root`` was written as ``kind``."""
    out.mkdir()
    return ("archive" if kind.startswith("one") else kind), KINDS[kind](root, out)


@pytest.mark.parametrize("kind", KINDS)
def test_imagenet100_is_the_same_from_every_kind_of_source(
    kind: str, hundred: Path, folders: list[Beton], tmp_path: Path
) -> None:
    theirs = folders[0]
    assert theirs.label.tolist() == list(range(100))
    ours = prepared(*as_kind(kind, hundred, tmp_path / "source"), tmp_path)
    assert ours.manifest.content == theirs.manifest.content
    assert ours.manifest.sha256 == theirs.manifest.sha256
    if kind != "webdataset":  # its labels are numbers
        assert ours.classes == theirs.classes
    assert verify(ours.path) == []


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_photographs_are_named_and_left_out_of_every_kind_of_source(
    kind: str, damaged: Path, folders: list[Beton], tmp_path: Path
) -> None:
    theirs = folders[1]
    assert len(theirs) == 297 and len(theirs.manifest.skipped) == 3
    source = as_kind(kind, damaged, tmp_path / "source")
    named = {"parquet": r"train\[9\]", "webdataset": "000009"}.get(kind, r"n\d{8}/.*\.JPEG")
    with pytest.raises(InputError, match=named) as why:
        prepared(*source, tmp_path)
    assert "\n" not in str(why.value) and not (tmp_path / "train.beton").exists()
    ours = prepared(*source, tmp_path, "--on_error", "skip")
    assert ours.manifest.content == theirs.manifest.content
    reasons = [[skipped["reason"] for skipped in b.manifest.skipped] for b in (ours, theirs)]
    assert len(reasons[0]) == 3 and reasons[0] == reasons[1]
    assert verify(ours.path) == []


@pytest.mark.soak
def test_all_300_are_the_same_from_a_dataset_and_from_classes_in_another_order(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = prepared("folder", photographs, tmp_path / "folder")
    assert len(theirs) == 300
    monkeypatch.setenv("PHOTOGRAPHS_OF_A_TEST", str(photographs / "train"))
    ours = prepared(f"{__name__}:torchvisions_folder", photographs, tmp_path / "dataset")
    assert ours.manifest.content == theirs.manifest.content and ours.classes == theirs.classes
    listed = tmp_path / "classes.txt"
    listed.write_text("\n".join(reversed(theirs.classes)))
    digests = set()
    for kind in ("folder", "parquet", "one zip"):
        dataset, root = "folder", photographs
        if kind != "folder":
            dataset, root = as_kind(kind, photographs, tmp_path / f"{kind} source")
        beton = prepared(dataset, root, tmp_path / kind, "--classes", listed)
        assert beton.label.tolist() == list(range(300))[::-1]
        digests.add(beton.manifest.content)
    assert len(digests) == 1 and digests != {theirs.manifest.content}


def torchvisions_folder() -> dict[str, ImageFolder]:
    return {"train": ImageFolder(os.environ["PHOTOGRAPHS_OF_A_TEST"])}
