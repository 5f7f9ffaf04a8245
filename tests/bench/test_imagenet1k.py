"""The stage of ImageNet-1k's size, on few images."""

import numpy as np
import pytest
import torch

from fastproj.bench import Plan, imagenet1k
from fastproj.data.beton import open_beton
from fastproj.prepare.encode import Store
from tests.support.betons import photographs, write


@pytest.mark.slow
def test_each_part_is_measured_and_writes_what_it_says(tmp_path, monkeypatch) -> None:
    kept = []

    def here(function, **given):
        result = function(**given)
        kept.append(open_beton(given.get("path", f"{given.get('folder')}/train.beton")))
        return result

    monkeypatch.setattr(imagenet1k, "alone", here)
    source = photographs(np.random.default_rng(0), tmp_path / "files", 5)
    photos = write(source, tmp_path / "beton", Store("jpeg", quality=90))
    given = Plan(photos, None, None, torch.device("cpu"), 1, 2)
    rows = imagenet1k.run(given, images=600, photographs=12)
    parts = ["open", "order of an epoch", "boxes of an epoch, two crops", "first epoch, stream",
             "second epoch, stream"]  # fmt: skip
    assert [row.engine for row in rows] == ["write", "write", *parts]
    assert [row.repeats for row in rows] == [1, 1, 2, 2, 1, 1, 1]
    for row in rows:
        assert row.rate and row.unit == "images" and row.peak_bytes is not None
    jpegs, raw = kept[:2]
    assert len(jpegs) == 12 and (jpegs.width[:5] == photos.width).all()
    assert jpegs.width[5:10].tolist() == photos.width.tolist()
    assert len(raw) == 600 and set(raw.length) == {3 * 8 * 8}
    size = len(raw.data)  # mapped: the folder is gone
    assert rows[1].note.startswith(f"{size / 600:,.0f} bytes an image, ")


def test_without_photographs_only_the_rows_are_measured(monkeypatch) -> None:
    found = {"seconds": 1.0, "peak_bytes": 5, "file_bytes": 2000, "manifest_bytes": 30}
    monkeypatch.setattr(
        imagenet1k, "alone",
        lambda function, **given: found if function is imagenet1k.written else [("open", [2.0], 7)],
    )  # fmt: skip
    rows = imagenet1k.run(Plan(None, None, None, torch.device("cpu"), 1, 1), images=10)
    assert [(row.engine, row.rate, row.peak_bytes) for row in rows] == [
        ("write", 10, 5), ("open", 5, 7)
    ]  # fmt: skip
    assert rows[0].note == "200 bytes an image, 3.0 in the manifest"
