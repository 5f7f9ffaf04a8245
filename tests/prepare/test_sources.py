"""Every kind of source holds what the same images hold as folders."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastproj.core.errors import InputError, SettingError
from fastproj.core.native import jpeg_damage
from fastproj.data.beton import open_beton
from fastproj.prepare.command import main
from fastproj.prepare.encode import Store, encode, upright_rgb
from fastproj.prepare.sources import Source, open_sources
from tests.support.sources import MAKERS, as_parquet, as_tar, as_webdataset, as_zip, files

CLASSES = ("ant", "bee", "cow")
COUNTS = {"train": 4, "val": 2}


def photo(seed: int) -> Image.Image:
    """Smooth, so that JPEG keeps it; larger than a block."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((50, 40), Image.Resampling.BICUBIC)


def jpeg(seed: int, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    photo(seed).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<split>/<class>/<number>.jpg``"""
    root = tmp_path_factory.mktemp("folders")
    for split, count in COUNTS.items():
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.jpg").write_bytes(
                    jpeg(100 * (split == "val") + 10 * label + i)
                )
    return root


def content(source: Source) -> list[tuple[bytes, str]]:
    """(pixels, class name) of each image, in any order."""
    pixels = [upright_rgb(image).tobytes() for image in source.images]
    names = [source.classes[label] if label >= 0 else "" for label in source.labels]
    return sorted(zip(pixels, names, strict=True))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_source_holds_what_folders_hold(kind: str, folders: Path, tmp_path: Path) -> None:
    ours = open_sources(kind, MAKERS[kind](folders, tmp_path))
    theirs = open_sources("folder", folders)
    assert [source.split for source in ours] == [source.split for source in theirs] == [*COUNTS]
    for mine, other in zip(ours, theirs, strict=True):
        if kind == "webdataset":  # its labels are numbers
            assert mine.classes == ("0", "1", "2")
            mine = Source(mine.split, CLASSES, mine.images, mine.labels, mine.names)
        assert mine.classes == other.classes and content(mine) == content(other)
        assert len(set(mine.names)) == len(mine.names)
    (val,) = open_sources(kind, tmp_path, "val")
    assert len(val.labels) == 6


@pytest.mark.parametrize("make", [as_tar, as_zip, lambda r, o: as_tar(r, o, "./")])
def test_one_archive_of_all_splits(make, folders: Path, tmp_path: Path) -> None:
    ours, theirs = open_sources("archive", make(folders, tmp_path)), open_sources("folder", folders)
    assert [source.split for source in ours] == ["train", "val"]
    assert [content(source) for source in ours] == [content(source) for source in theirs]


def test_webdatasets_labels_in_json(folders: Path, tmp_path: Path) -> None:
    train, _ = open_sources("webdataset", as_webdataset(folders, tmp_path, "json"))
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_every_source_makes_the_same_beton(folders: Path, tmp_path: Path) -> None:
    """The content digest covers bytes, sizes and labels of every sample, in order."""
    digests = set()
    for kind, make in {"folder": None, **MAKERS}.items():
        root = folders
        if make is not None:
            (tmp_path / kind).mkdir()
            root = make(folders, tmp_path / kind)
        out = tmp_path / f"{kind}-out"
        argv = ["--dataset", kind, "--root", str(root), "--out", str(out), "--workers", "1"]
        assert main([*argv, "--store", "raw", "--split", "train"]) == 0
        digests.add(open_beton(out / "train.beton").manifest.content)
    assert len(digests) == 1


class Pairs:
    """A Dataset of PIL images and labels that says no more."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int):
        return photo(i) if i < 4 else np.asarray(photo(i)), i % 3


class Gray(Pairs):
    classes = ("low", "middle", "high")
    targets = (0, 1, 2, 0, 1, 2)

    def __getitem__(self, i: int):
        return np.full((8, 9, 1), i, np.uint8), -7  # never asked for: ``targets`` says it


def test_any_dataset_of_a_function(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    here = __name__
    (source,) = open_sources(f"{here}:Pairs")
    assert source.classes == ("0", "1", "2") and source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    for i, image in enumerate(source.images):
        assert np.array_equal(upright_rgb(image), np.asarray(photo(i)))
    assert main(["--dataset", f"{here}:both", "--out", str(tmp_path), "--store", "raw"]) == 0
    printed = capsys.readouterr().out
    assert "6 images, 6 gray ones stored as RGB, 3 classes" in printed
    beton = open_beton(tmp_path / "val.beton")
    assert beton.classes == Gray.classes
    assert beton.stored(4).tolist() == [4] * (8 * 9 * 3)


class Named(Pairs):
    classes = Gray.classes


def both() -> dict[str, Pairs]:
    return {"train": Named(), "val": Gray()}


def four_channels() -> list:
    return [(np.zeros((4, 4, 4), np.uint8), 0), (np.zeros((4, 4, 4), np.uint8), 1)]


def floats() -> list:
    return [(np.zeros((4, 4, 3)), 0), (np.zeros((4, 4, 3)), 1)]


def strings() -> list:
    return [(np.zeros((4, 4, 3), np.uint8), "cat")]


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (f"{__name__}:four_channels", r"all\[0\]: 4 channels; an image has 3 .RGB. or 1"),
        (f"{__name__}:floats", "is float64 .4, 4, 3.: give PIL images or uint8"),
        (f"{__name__}:strings", "a label is 'cat', not a whole number"),
        (f"{__name__}:open_beton", "cannot be called .TypeError"),
        (f"{__name__}:nothing", "cannot be called .AttributeError"),
        (f"{__name__}:dict_of_none", "a NoneType has no length"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_one_line(dataset, words, tmp_path) -> None:
    with pytest.raises(InputError, match=words) as why:
        main(["--dataset", dataset, "--out", str(tmp_path), "--workers", "1", "--store", "raw"])
    assert "\n" not in str(why.value)


def dict_of_none() -> dict[str, None]:
    return {"train": None}


def test_a_set_that_torchvision_splits_into_trainval_and_test(tmp_path: Path) -> None:
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for part, count in (("trainval", 4), ("test", 6)):
        names = [f"{('cat', 'dog')[i % 2]}_{part}{i}" for i in range(count)]
        for name in names:
            Image.new("RGB", (9, 7)).save(folder / "images" / f"{name}.jpg")
        lines = [f"{name} {i % 2 + 1} {i % 2 + 1} 1" for i, name in enumerate(names)]
        (folder / "annotations" / f"{part}.txt").write_text("\n".join(lines))
    train, val = open_sources("torchvision:OxfordIIITPet", tmp_path)
    assert (train.split, val.split, len(train.labels), len(val.labels)) == ("train", "val", 4, 6)
    assert train.classes == ("Cat", "Dog") and train.labels.tolist() == [0, 1, 0, 1]


def test_a_set_of_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its real reader, on small files of the same form; MNIST says ``train``, EuroSAT nothing."""
    from torchvision import datasets

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 7), ("t10k", 3)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        head = [np.array([0x0803, count, 28, 28], ">i4"), np.array([0x0801, count], ">i4")]
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head[0].tobytes() + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head[1].tobytes() + labels.tobytes())
    train, val = open_sources("torchvision:MNIST", tmp_path)
    assert (train.split, val.split, len(train.labels), len(val.labels)) == ("train", "val", 7, 3)
    assert train.classes[3] == "3 - three" and val.labels.tolist() == [0, 1, 2]
    theirs = datasets.MNIST(tmp_path, train=False)
    for image, (own, _) in zip(val.images, theirs, strict=True):
        assert np.array_equal(np.asarray(upright_rgb(image)), np.asarray(own.convert("RGB")))
    with pytest.raises(InputError, match="no complete torchvision:CIFAR10.*data.download true"):
        open_sources("torchvision:CIFAR10", tmp_path)
    with pytest.raises(SettingError, match="torchvision has no 'MNITS'; did you mean 'MNIST'"):
        open_sources("torchvision:MNITS", tmp_path)
    with pytest.raises(InputError, match="needs --data.root"):
        open_sources("torchvision:MNIST")


def test_a_set_of_the_hub(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download is the hub's own; here it finds the files that the hub would have sent."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def snapshot_download(name: str, *, repo_type: str, local_dir: Path, allow_patterns: list):
        asked.update(name=name, repo_type=repo_type, allow_patterns=allow_patterns)
        local_dir.mkdir(exist_ok=True)
        as_parquet(folders, local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match="no parquet file of hf:a/b; fetch it with"):
        open_sources("hf:a/b", tmp_path)
    train, val = open_sources("hf:a/b", tmp_path, download=True)
    assert asked == {"name": "a/b", "repo_type": "dataset", "allow_patterns": ["*.parquet"]}
    assert train.classes == val.classes == CLASSES and len(train.labels) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["a--b"]
    with pytest.raises(InputError, match="no parquet file of hf:a/c; fetch it with"):
        open_sources("hf:a/c", tmp_path)  # another set in the same folder is not taken for it


# --- flat, nested, unlabeled; class lists; val_share ----------------------------------------------


def test_flat_and_unlabeled(folders: Path, tmp_path: Path) -> None:
    for number, path in enumerate(files(folders / "train")):
        (tmp_path / f"{number}.jpg").write_bytes(path.read_bytes())
    (source,) = open_sources("folder", tmp_path)
    assert source.classes == () and source.labels.tolist() == [-1] * 12
    train, val = open_sources("folder", folders, labels=False)
    assert train.classes == val.classes == () and set(train.labels) == {-1}
    assert list(train.images) == [str(path) for path in files(folders / "train")]


def test_a_flat_train_beside_a_labeled_val(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "val").symlink_to(folders / "val")
    train, val = open_sources("folder", tmp_path)
    assert train.classes == () and val.classes == CLASSES
    (tmp_path / "val" / "loose.jpg").write_bytes(jpeg(0))
    try:
        with pytest.raises(InputError, match="loose.jpg, 1 in all. beside class folders"):
            open_sources("folder", tmp_path)
    finally:
        (folders / "val" / "loose.jpg").unlink()


def test_class_lists_choose_and_order(folders: Path, tmp_path: Path) -> None:
    train, _ = open_sources("folder", folders, classes=["cow", "ant"])
    assert train.classes == ("cow", "ant")
    assert [Path(path).parent.name for path in train.images] == ["ant"] * 4 + ["cow"] * 4
    assert train.labels.tolist() == [1] * 4 + [0] * 4
    for listed, words in ((["ant", "dog"], "no class dog .1 of 2"), (["ant"] * 2, "listed twice")):
        with pytest.raises(InputError, match=words):
            open_sources("folder", folders, classes=listed)
    (tmp_path / "list.txt").write_text("bee\n\nant\n")
    out = ["--out", str(tmp_path), "--workers", "1", "--classes", str(tmp_path / "list.txt")]
    assert main(["--dataset", "folder", "--root", str(folders), *out]) == 0
    assert open_beton(tmp_path / "val.beton").classes == ("bee", "ant")


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_val_share_is_stratified_and_seeded(kind: str, folders: Path, tmp_path: Path) -> None:
    root = folders / "train" if kind == "folder" else as_tar(folders / "train", tmp_path)
    chosen = {}
    for seed in (0, 0, 1):
        train, val = open_sources(kind, root, val_share=0.25, seed=seed)
        assert (train.split, val.split) == ("train", "val")
        assert np.bincount(train.labels).tolist() == [3] * 3
        assert np.bincount(val.labels).tolist() == [1] * 3
        assert sorted([*train.names, *val.names]) == sorted(open_sources(kind, root)[0].names)
        assert chosen.setdefault(seed, val.names) == val.names
        if kind == "archive":
            assert content(val) == sorted(
                (upright_rgb((folders / "train" / name).read_bytes()).tobytes(), name[:3])
                for name in val.names
            )
    assert chosen[0] != chosen[1]
    with pytest.raises(InputError, match="the set has the splits train, val: leave it out"):
        open_sources("folder", folders, val_share=0.5)
    with pytest.raises(InputError, match="val_share 0.01 does not fit"):
        open_sources(kind, root, val_share=0.01)


# --- damage ---------------------------------------------------------------------------------------


def test_what_libjpeg_only_warns_of_is_damage(tmp_path: Path) -> None:
    good = jpeg(3)
    assert jpeg_damage(good, 50, 40) is None
    rng = np.random.default_rng(0)
    start = good.index(b"\xff\xda") + 14  # of the coded pixels
    accepted, damaged = 0, []
    for _ in range(40):
        bad = bytearray(good)
        for place in rng.integers(start, len(good) - 2, 3):
            bad[place] = int(rng.integers(0, 256))
        try:
            Image.open(io.BytesIO(bad)).load()
        except OSError:
            continue
        accepted += 1
        if jpeg_damage(bytes(bad), 50, 40):
            damaged.append(bytes(bad))
            with pytest.raises(ValueError, match="damaged JPEG: "):
                upright_rgb(bytes(bad))
    assert accepted > 30 and len(damaged) > 4  # Pillow takes them, libjpeg warns of some
    cut = good[: len(good) // 2]
    assert "premature end" in str(jpeg_damage(cut, 50, 40)).lower()
    left = good[:-2] + 40 * b"\x11" + good[-2:]  # coded bytes after the last pixel
    Image.open(io.BytesIO(left)).load()  # Pillow says nothing
    assert "extraneous bytes before marker 0xd9" in str(jpeg_damage(left, 50, 40))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "bad.jpg").write_bytes(damaged[0])
    (tmp_path / "b" / "good.jpg").write_bytes(good)
    argv = [
        "--dataset",
        "folder",
        "--root",
        str(tmp_path),
        "--out",
        str(tmp_path),
        "--workers",
        "1",
    ]
    with pytest.raises(InputError, match=r"a/bad\.jpg: damaged JPEG: "):
        main(argv)
    assert main([*argv, "--on_error", "skip"]) == 0
    assert open_beton(tmp_path / "all.beton").manifest.skipped[0]["source"] == "a/bad.jpg"


def test_why_a_file_is_no_image_is_the_same_every_time() -> None:
    for content, words in ((b"", "^empty$"), (b"text", "^no image of a known format$")):
        with pytest.raises(ValueError, match=words):
            upright_rgb(content)


def test_a_files_comment_is_not_stored() -> None:
    stored = []
    for comment in (b"", b"from a camera"):
        buffer = io.BytesIO()
        photo(1).save(buffer, "JPEG", comment=comment)
        stored.append(encode(upright_rgb(buffer.getvalue()), 0, Store("jpeg", 90))[0])
    assert stored[0] == stored[1] and b"camera" not in stored[1].data


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_good_jpegs_of_every_kind_are_not_called_damaged(mode: str, progressive: bool) -> None:
    buffer = io.BytesIO()
    photo(1).convert(mode).save(buffer, "JPEG", progressive=progressive)
    image = upright_rgb(buffer.getvalue())
    assert image.size == (50, 40) and image.info["gray"] == (mode == "L")


@pytest.mark.parametrize(
    ("kind", "name", "content", "words"),
    [
        ("csv", "a.csv", b"file,label\na,b\n", "has no column path"),
        ("csv", "a.csv", b"path,label\n", "lists no image"),
        ("csv", "a.txt", b"", "no .csv file there"),
        ("parquet", "a.parquet", b"no parquet", "damaged or no parquet file"),
        ("archive", "a.tar", b"no tar at all", "neither a zip nor an uncompressed tar"),
        ("archive", "a.rar", b"", "holds no .tar or .zip file"),
        ("webdataset", "a.tar", b"\0" * 10240, "no sample"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(kind, name, content, words, tmp_path) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as why:
        open_sources(kind, tmp_path)
    assert "\n" not in str(why.value) and str(tmp_path) in str(why.value)


def test_a_cut_tar_and_a_compressed_one(folders: Path, tmp_path: Path) -> None:
    path = as_tar(folders / "train", tmp_path)
    (source,) = open_sources("archive", path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match="bytes are missing: copy it again"):
        list(source.images)
    with tarfile.open(tmp_path / "it.tar.gz", "w:gz") as tar:
        tar.add(files(folders)[0], "a/0.jpg")
    with pytest.raises(InputError, match="uncompressed tar"):
        open_sources("archive", tmp_path / "it.tar.gz")


def test_pyarrow_is_asked_for_only_by_parquet(folders: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert open_sources("folder", folders)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(InputError, match=r"pip install 'fastproj-ssl\[parquet\]'"):
        open_sources("parquet", tmp_path)
