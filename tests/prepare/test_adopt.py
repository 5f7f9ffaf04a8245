"""FFCV's files with our loaders, and ours with FFCV's: written and read by FFCV itself."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj import train
from fastproj.core.errors import InputError, SettingError
from fastproj.data.beton import Beton, open_beton
from fastproj.data.layout import DESCRIPTOR, HEADER, JPEG, RAW
from fastproj.data.subset import subset
from fastproj.data.verify import verify
from fastproj.loaders import Center, Crop, open_loader
from fastproj.prepare.adopt import adopt
from fastproj.prepare.command import main
from fastproj.prepare.encode import Store
from fastproj.runs import journal
from tests.support.betons import digit_like, photograph, write

ffcv = pytest.importorskip("ffcv", reason="FFCV is not built here")

COUNT, CLASSES = 20, 3


def images(side: int = 0) -> list[np.ndarray]:
    """Photograph-like uint8 (H, W, 3), of several sizes or all ``side`` × ``side``."""
    rng = np.random.default_rng(0)
    sizes = [(side, side) if side else rng.integers(40, 90, 2).tolist() for _ in range(COUNT)]
    return [np.asarray(photograph(rng, *size)) for size in sizes]


class Samples:
    """A dataset of ``values(i)`` of each field."""

    def __init__(self, *columns: list) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> tuple:
        return tuple(column[i] for column in self.columns)


LABELS = [i % CLASSES for i in range(COUNT)]


def fields(kind: str) -> tuple[dict, list[list]]:
    """FFCV's fields of one kind of file, and the values of each."""
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField

    pictures = images()
    floats = [i / 7 for i in range(COUNT)]
    arrays = [np.full(5, i, np.float32) for i in range(COUNT)]
    texts = [np.frombuffer(b"x" * (i + 1), np.uint8) for i in range(COUNT)]
    records = [{"number": i} for i in range(COUNT)]
    raw = RGBImageField(write_mode="raw")
    if kind == "raw":
        return {"image": raw, "label": IntField()}, [pictures, LABELS]
    if kind == "jpeg":
        return {"image": RGBImageField("jpg"), "label": IntField()}, [pictures, LABELS]
    if kind == "quality 50":
        half = RGBImageField("jpg", max_resolution=48, jpeg_quality=50)
        return {"image": half, "label": IntField()}, [pictures, LABELS]
    if kind == "mixed":
        np.random.seed(0)  # FFCV draws which images it compresses
        some = RGBImageField("proportion", compress_probability=0.5)
        return {"image": some, "label": IntField()}, [pictures, LABELS]
    if kind == "other names, other order":
        return {"target": IntField(), "picture": raw}, [LABELS, pictures]
    if kind == "more fields":
        more = {"score": FloatField(), "text": BytesField(), "image": raw, "about": JSONField(),
                "label": IntField(), "array": NDArrayField(np.dtype("f4"), (5,))}  # fmt: skip
        return more, [floats, texts, pictures, records, LABELS, arrays]
    if kind == "three ints":
        ints = {"index": IntField(), "label": IntField(), "image": raw, "fold": IntField()}
        return ints, [list(range(COUNT))[::-1], LABELS, pictures, [0] * COUNT]
    assert kind == "several pages"
    return {"image": raw, "label": IntField()}, [images(256), LABELS]


KINDS = ["raw", "jpeg", "quality 50", "mixed", "other names, other order", "more fields",
         "three ints", "several pages"]  # fmt: skip


def written(path: Path, columns: dict, values: list[list]) -> Path:
    from ffcv.writer import DatasetWriter

    writer = DatasetWriter(str(path), columns, page_size=1 << 21, num_workers=1)
    writer.from_indexed_dataset(Samples(*values))
    return path


@pytest.fixture(scope="module")
def betons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ffcv")
    return {kind: written(folder / f"{kind}.ffcv", *fields(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_ffcvs_is_adopted_verified_and_read(kind: str, betons: dict[str, Path]) -> None:
    path = betons[kind]
    before = hashlib.sha256(path.read_bytes()).digest()
    beton = adopt(path)
    assert hashlib.sha256(path.read_bytes()).digest() == before
    pictures = images(256 if kind == "several pages" else 0)
    assert beton.label.tolist() == LABELS and beton.index.tolist() == list(range(COUNT))
    assert beton.classes == ("0", "1", "2")
    modes = {"jpeg": {JPEG}, "quality 50": {JPEG}, "mixed": {JPEG, RAW}}.get(kind, {RAW})
    assert set(beton.mode.tolist()) == modes
    for i, own in enumerate(pictures):
        if beton.mode[i] == RAW:
            assert np.array_equal(beton.stored(i).reshape(own.shape), own)
    if modes == {RAW}:
        every = np.concatenate([own.reshape(-1, 3) for own in pictures]) / 255
        np.testing.assert_allclose(beton.manifest.mean, every.mean(0), rtol=1e-9)
        np.testing.assert_allclose(beton.manifest.std, every.std(0), rtol=1e-9)
    if kind == "several pages":
        assert len({pointer // (1 << 21) for pointer in beton.pointer.tolist()}) > 1
    assert verify(path) == []
    engines = ["stream", "reference", "ffcv"]
    engines += ["resident"] * (kind == "several pages")  # of one size
    crops = {}
    for engine in engines:
        with open_loader(beton, [Crop(24, 2)], 5, engine=engine, seed=3, workers=1) as loader:
            crops[engine] = [(b.crops[0].int(), b.labels.tolist()) for b in loader]
    for engine in engines[1:]:
        for (mine, labels), (other, same) in zip(crops["stream"], crops[engine], strict=True):
            assert labels == same
            assert (mine - other).abs().float().mean() < (0.001 if engine == "ffcv" else 2)
    with pytest.raises(InputError, match="has a manifest already"):
        adopt(path)
    assert subset(beton, np.array([3, 1])).label.tolist() == [0, 1]


def losses(path: Path, folder: Path, engine: str) -> list[float]:
    """The losses of 20 steps of training."""
    given = {
        "data.train": path, "data.engine": engine, "data.workers": 1, "run.dir": folder,
        "run.name": engine, "run.device": "cpu", "model.encoder": "resnet_small", "views.size": 16,
        "projector.hidden": 16, "projector.out": 8, "optim.batch_size": 5, "optim.epochs": 5,
        "optim.warmup_epochs": 0, "train.log_every": 1, "train.precision": "float32",
    }  # fmt: skip
    train.main([word for key, value in given.items() for word in (f"--{key}", str(value))])
    events = journal.read(folder / engine / "metrics.jsonl")
    return [event["loss"] for event in events if event["event"] == "step"]


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_20_steps_on_a_file_of_ffcvs_lose_alike_with_every_engine(
    kind: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "train.ffcv", *fields(kind))
    adopt(path)
    stream = losses(path, tmp_path, "stream")
    assert len(stream) == 20
    assert losses(path, tmp_path, "ffcv") == stream
    np.testing.assert_allclose(losses(path, tmp_path, "reference"), stream, rtol=0.05)
    pytest.importorskip("nvidia.dali", reason="no DALI: ./setup.sh dali")
    if kind == "mixed":
        with pytest.raises(InputError, match="raw images and JPEGs, and DALI reads one kind"):
            losses(path, tmp_path, "dali")
    else:
        # DALI's pixels differ by up to 22/255 at a small crop's edge, and a run soon goes its way.
        dali = losses(path, tmp_path, "dali")
        assert dali[0] == pytest.approx(stream[0], rel=0.01)
        assert np.mean(dali) == pytest.approx(np.mean(stream), rel=0.05)


def test_ffcvs_reader_agrees_on_every_row(betons: dict[str, Path]) -> None:
    from ffcv.reader import Reader

    for kind in ("more fields", "mixed"):
        beton = open_beton(betons[kind])
        reader = Reader(str(betons[kind]))
        place = [*fields(kind)[0]].index("image")
        theirs = reader.metadata[f"f{place}"]
        assert beton.pointer.tolist() == theirs["data_ptr"].tolist()
        assert beton.width.tolist() == theirs["width"].tolist()
        sizes = dict(zip(reader.alloc_table["ptr"], reader.alloc_table["size"], strict=True))
        assert beton.length.tolist() == [sizes[pointer] for pointer in theirs["data_ptr"]]


def test_the_command_adopts_with_names_and_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from ffcv.fields import IntField, RGBImageField

    columns = {"left": RGBImageField(), "right": RGBImageField(), "a": IntField(), "b": IntField()}
    values = [images(), images()[::-1], LABELS, LABELS[::-1]]
    path = written(tmp_path / "pairs.ffcv", columns, values)
    words = "which RGB image field is the image.*left .RGB image., right .RGB image., a .int."
    with pytest.raises(InputError, match=words):
        main(["--adopt", str(path)])
    with pytest.raises(InputError, match="no RGB image field a; its fields are"):
        main(["--adopt", str(path), "--fields", "a,b"])
    with pytest.raises(SettingError, match="give IMAGE,LABEL"):
        main(["--adopt", str(path), "--fields", "left"])
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    named = ["--adopt", str(path), "--fields", "right,b", "--classes", str(tmp_path / "names.txt")]
    with pytest.raises(InputError, match="label outside the classes"):
        main(named)
    assert not path.with_suffix(".json").exists()
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    assert main(named) == 0
    assert "adopted, 20 images, 3 classes, raw store" in capsys.readouterr().out
    beton = open_beton(path)
    assert beton.classes == ("ant", "bee", "cow") and beton.label.tolist() == LABELS[::-1]
    assert np.array_equal(beton.stored(0), images()[-1].reshape(-1))


def test_what_cannot_be_adopted_is_said_truly(tmp_path: Path) -> None:
    from ffcv.fields import FloatField, IntField, RGBImageField

    floats = [[i / 3 for i in range(COUNT)]] * 2
    path = written(tmp_path / "floats.ffcv", {"x": FloatField(), "y": FloatField()}, floats)
    words = r"no RGB image field; its fields are x \(float\), y \(float\)"
    with pytest.raises(InputError, match=words):
        adopt(path)
    with pytest.raises(InputError, match=r"no manifest beside the beton \(x \(float\).*--adopt"):
        open_beton(path)
    values = [images(), floats[0]]
    path = written(tmp_path / "y.ffcv", {"image": RGBImageField(), "y": FloatField()}, values)
    with pytest.raises(InputError, match=r"no int field; its fields are image .*y \(float\)"):
        adopt(path)
    pair = {"image": RGBImageField("jpg"), "label": IntField()}
    path = written(tmp_path / "train.ffcv", pair, [images(), LABELS])
    with pytest.raises(InputError, match=r"image \(RGB image\), label \(int\).*prepare --adopt"):
        open_beton(path)
    for name, content, why in (
        ("text.ffcv", b"no FFCV file at all" * 99, "not a beton"),
        ("empty.ffcv", b"", "no FFCV file"),
        ("cut.ffcv", path.read_bytes()[:-100], "do not fit a header"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=why) as error:
            adopt(tmp_path / name)
        assert "\n" not in str(error.value)
    custom = bytearray(path.read_bytes())
    custom[HEADER.itemsize + DESCRIPTOR.itemsize] = 255  # the type of the second field
    (tmp_path / "custom.ffcv").write_bytes(custom)
    with pytest.raises(InputError, match="field label is of a type that is not FFCV's own"):
        adopt(tmp_path / "custom.ffcv")


def test_damage_before_and_after_adopting_is_named(tmp_path: Path) -> None:
    from ffcv.fields import IntField, RGBImageField

    pair = {"image": RGBImageField("jpg"), "label": IntField()}
    path = written(tmp_path / "train.ffcv", pair, [images(), LABELS])
    good = path.read_bytes()
    beton = adopt(path)
    start, length = int(beton.pointer[7]), int(beton.length[7])
    bad = bytearray(good)
    bad[start + length // 2 : start + length] = bytes(length - length // 2)
    del beton
    path.write_bytes(bad)
    (damage,) = verify(path)
    assert damage.index == 7
    path.with_suffix(".json").unlink()
    with pytest.raises(InputError, match="sample 7 is damaged .*whole or not at all"):
        adopt(path)
    assert not path.with_suffix(".json").exists()
    path.write_bytes(good)
    adopt(path)
    changed = bytearray(good)  # another file of the same size: a label of another value
    changed[HEADER.itemsize + 2 * DESCRIPTOR.itemsize + 16] ^= 1
    path.write_bytes(changed)
    with pytest.raises(InputError, match="not the file that was adopted"):
        open_beton(path)


# --- ours with FFCV -------------------------------------------------------------------------------


def two_fields(tmp_path: Path) -> Beton:
    argv = ["--dataset", "digits", "--out", str(tmp_path), "--fields", "image,label"]
    assert main([*argv, "--workers", "1", "--split", "val"]) == 0
    return open_beton(tmp_path / "val.beton")


def test_a_two_field_file_is_ffcvs_and_ours(tmp_path: Path) -> None:
    from ffcv.reader import Reader

    beton = two_fields(tmp_path)
    assert beton.manifest.adopted is None and verify(beton.path) == []
    reader = Reader(str(beton.path))
    assert list(reader.field_names) == ["image", "label"]
    assert reader.metadata["f1"].tolist() == beton.label.tolist()
    with open_loader(beton, [Center(8)], 50, shuffle=False, drop_last=False, workers=1) as loader:
        batches = list(loader)
    assert np.concatenate([b.index.numpy() for b in batches]).tolist() == list(range(360))
    pixels = np.concatenate([b.crops[0].permute(0, 2, 3, 1).numpy() for b in batches])
    assert np.array_equal(pixels[17].reshape(-1), beton.stored(17))


def test_the_loop_of_ffcvs_cifar_example_reads_a_file_of_ours(tmp_path: Path) -> None:
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import (
        Convert,
        Cutout,
        RandomHorizontalFlip,
        RandomTranslate,
        Squeeze,
        ToDevice,
        ToTensor,
        ToTorchImage,
    )

    ours = two_fields(tmp_path)
    device, gray = torch.device("cpu"), (125, 122, 113)
    stored = np.stack([ours.stored(i).reshape(8, 8, 3) for i in range(len(ours))])
    augment = [RandomHorizontalFlip(), RandomTranslate(padding=2, fill=gray), Cutout(2, gray)]
    for transforms in ([], augment):
        label = [IntDecoder(), ToTensor(), ToDevice(device), Squeeze()]
        image = [SimpleRGBImageDecoder(), *transforms, ToTensor(), ToDevice(device),
                 ToTorchImage(), Convert(torch.float32)]  # fmt: skip
        loader = Loader(
            str(ours.path), batch_size=90, num_workers=1, order=OrderOption.SEQUENTIAL,
            drop_last=not transforms, pipelines={"image": image, "label": label},
        )  # fmt: skip
        batches = [(x.clone(), y.clone()) for x, y in loader]
        assert torch.cat([y for _, y in batches]).tolist() == ours.label.tolist()
        pixels = torch.cat([x for x, _ in batches]).permute(0, 2, 3, 1).numpy()
        assert pixels.shape == stored.shape
        assert np.array_equal(pixels, stored) == (not transforms)


def test_two_fields_have_no_place_for_a_square_store(tmp_path: Path) -> None:
    argv = ["--dataset", "digits", "--out", str(tmp_path), "--store", "square", "--side", "8"]
    with pytest.raises(SettingError, match="leaves no place for the original size"):
        main([*argv, "--fields", "image,label"])
    with pytest.raises(SettingError, match="must be image,label or image,label,index"):
        main(["--dataset", "digits", "--out", str(tmp_path), "--fields", "label,image"])


@pytest.mark.slow
def test_ffcvs_own_loop_reads_two_fields(tmp_path: Path) -> None:
    """The loop of FFCV's CIFAR example: ``for images, labels in loader``."""
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    beton = two_fields(tmp_path)
    loader = Loader(
        str(beton.path),
        batch_size=60,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={
            "image": [SimpleRGBImageDecoder(), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    seen = 0
    for pixels, labels in loader:
        for image, label in zip(pixels.numpy(), labels[:, 0].tolist(), strict=True):
            assert np.array_equal(image.reshape(-1), beton.stored(seen))
            assert label == beton.label[seen]
            seen += 1
    assert seen == 360


def test_a_manifest_of_before_is_read(tmp_path: Path) -> None:
    """Written when there was no key ``adopted``."""
    import json

    beton = write(digit_like(np.random.default_rng(0), 6, 8, 2), tmp_path, Store("raw"))
    path = beton.path.with_suffix(".json")
    content = json.loads(path.read_text())
    assert content.pop("adopted") is None
    path.write_text(json.dumps(content))
    assert open_beton(beton.path).manifest == beton.manifest
