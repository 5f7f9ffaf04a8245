"""Which label each image has, from each kind of source, and labels that cannot be."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastproj.core.errors import InputError, SettingError
from fastproj.prepare.encode import upright_rgb
from fastproj.prepare.sources import MOST_CLASSES, Source, by_name, open_sources

PIXELS = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize("labels", [[0, 2], [-2, 0], [0, 1 << 40]])
def test_labels_outside_the_classes_are_refused(labels: list[int]) -> None:
    with pytest.raises(InputError, match=r"image \d has the label -?\d+, and there are 2 classes"):
        Source("train", ("a", "b"), PIXELS, np.array(labels))


def test_no_label_and_the_order_of_numbers() -> None:
    classes, labels = by_name(["10", "-1", "9", "", "9"])
    assert classes == ("9", "10") and labels.tolist() == [1, -1, 0, -1, 0]
    assert by_name(["--1", "b"])[0] == ("--1", "b")  # no number
    code = "from fastproj.prepare.sources import by_name; print(by_name(['1', '01', '001'])[0])"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "1234"
    }
    assert printed == {"('001', '01', '1')\n"}


def test_a_line_of_a_csv_without_an_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('label,path\nant,"a\nb.png"\nbee\n')
    with pytest.raises(InputError, match=r"a.csv, line 4: names no image: remove it"):
        open_sources("csv", tmp_path)


# --- parquet -------------------------------------------------------------------------------------


def write_parquet(path: Path, columns: Mapping[str, list], features: Any = None) -> Path:
    """One row for each label, with an image column; ``features``: those of Hugging Face."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    content = BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    count = len(next(iter(columns.values())))
    table = pa.table({"image": [content.getvalue()] * count, **columns})
    if features is not None:
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    parquet.write_table(table, path)
    return path


ANT_BEE = {"_type": "ClassLabel", "names": ["bee", "ant"]}


@pytest.mark.parametrize(
    ("columns", "features", "classes", "labels"),
    [
        ({"label": ["b", "a", None, "b"], "id": [5, 6, 7, 8]}, None, ("a", "b"), [1, 0, -1, 1]),
        ({"label": [1, None, 0, 1], "id": [5, 6, 7, 8]}, None, ("0", "1"), [1, -1, 0, 1]),
        ({"id": [5, 6, 7, 1 << 21]}, None, (), [-1] * 4),
        ({"width": [50] * 4, "text": ["a"] * 4}, None, (), [-1] * 4),
        ({"kind": [1, 0, 0, 1], "id": [5] * 4}, {"kind": ANT_BEE}, ("bee", "ant"), [1, 0, 0, 1]),
        ({"label": [1, 0, 0, -1]}, {"label": ANT_BEE}, ("bee", "ant"), [1, 0, 0, -1]),
        ({"boxes": [[1], [2], [], []], "label": [0, 1, 0, 1]},
         {"boxes": [{"dtype": "int64", "_type": "Value"}], "label": {"_type": "Value"}},
         ("0", "1"), [0, 1, 0, 1]),
    ],
)  # fmt: skip
def test_the_label_column_of_a_parquet_file(
    columns: dict, features: Any, classes: tuple, labels: list[int], tmp_path: Path
) -> None:
    path = write_parquet(tmp_path / "a.parquet", columns, features)
    (source,) = open_sources("parquet", path)
    assert source.classes == classes and source.labels.tolist() == labels


@pytest.mark.parametrize(
    ("columns", "features", "words"),
    [
        ({"label": [0.5, 1.0]}, None, "a label is 0.5, and a column label must hold whole numbers"),
        ({"label": [[1], [2]]}, None, r"a label is \[1\], and a column label must hold whole"),
        ({"label": [0, MOST_CLASSES]}, None, "a label is 1000000: it is damaged, or no class"),
        ({"label": [0, 2]}, {"label": ANT_BEE}, "image 1 has the label 2, and there are 2 classes"),
        ({"one": [0, 1], "other": [1, 0]}, {"one": ANT_BEE, "other": ANT_BEE}, "which the label"),
    ],
)
def test_a_label_column_that_cannot_be_is_one_line(
    columns: dict, features: Any, words: str, tmp_path: Path
) -> None:
    path = write_parquet(tmp_path / "a.parquet", columns, features)
    with pytest.raises(InputError, match=words) as why:
        open_sources("parquet", path)
    assert "\n" not in str(why.value)


# --- webdataset ----------------------------------------------------------------------------------


def write_samples(path: Path, abouts: list[str]) -> Path:
    content = BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    with tarfile.open(path, "w") as tar:
        for number, about in enumerate(abouts):
            for kind, data in (("png", content.getvalue()), ("json", about.encode())):
                member = tarfile.TarInfo(f"{number}.{kind}")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    return path


def test_a_label_that_is_null_or_missing_in_json_is_none(tmp_path: Path) -> None:
    abouts = ['{"label": null}', '{"label": 3}', "{}", '{"cls": "7"}', '{"label": -1}']
    (source,) = open_sources("webdataset", write_samples(tmp_path / "a.tar", abouts))
    assert source.classes == ("3", "7") and source.labels.tolist() == [-1, 0, -1, 1, -1]


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ("7", "its .json is 7, no object with a label"),
        ("null", "its .json is None, no object"),
        ('{"label": [1, 2]}', r"\[1, 2\] is neither a whole number nor a name"),
        ('{"label": 1.5}', "1.5 is neither a whole number nor a name"),
    ],
)
def test_json_without_a_label_that_can_be_is_one_line(
    about: str, words: str, tmp_path: Path
) -> None:
    path = write_samples(tmp_path / "a.tar", ['{"label": 1}', about])
    with pytest.raises(InputError, match=f"label of sample 1 cannot be read .{words}") as why:
        open_sources("webdataset", path)
    assert "\n" not in str(why.value)


# --- Datasets ------------------------------------------------------------------------------------


def huge_label() -> list:
    return [(PIXELS[0], 0), (PIXELS[0], 1 << 21)]


def negative_label() -> list:
    return [(PIXELS[0], 0), (PIXELS[0], -5)]


def test_labels_of_a_dataset_that_cannot_be_classes() -> None:
    with pytest.raises(InputError, match="huge_label: a label is 2097152: it is damaged"):
        open_sources(f"{__name__}:huge_label")
    with pytest.raises(InputError, match="image 1 has the label -5"):
        open_sources(f"{__name__}:negative_label")


WIDE = np.linspace(0, 65535, 48).reshape(6, 8).round()


def wide_images() -> list:
    kinds = (np.uint16, np.int32, np.float32)  # PIL's modes I;16, I and F
    return [(Image.fromarray(WIDE.astype(kind)), label) for label, kind in enumerate(kinds)]


def test_a_datasets_wide_images_keep_their_range(tmp_path: Path) -> None:
    (source,) = open_sources(f"{__name__}:wide_images")
    for i in (0, 1):
        read = source.images[i]
        assert np.array_equal(read, np.rint(WIDE / 257).astype(np.uint8))
        image = upright_rgb(read)
        assert image.info["gray"] and image.size == (8, 6)
    with pytest.raises(ValueError, match="floating-point pixels have no defined range"):
        source.images[2]


@pytest.mark.parametrize(
    ("name", "asked"), [("CocoDetection", r" \(annFile\)"), ("FakeData", ""), ("PhotoTour", ".*")]
)
def test_a_set_of_torchvisions_that_asks_for_more_than_a_folder(
    name: str, asked: str, tmp_path: Path
) -> None:
    words = f"torchvision:{name} is not made from its folder alone{asked}: write a function"
    with pytest.raises(SettingError, match=words) as why:
        open_sources(f"torchvision:{name}", tmp_path)
    assert "\n" not in str(why.value)
