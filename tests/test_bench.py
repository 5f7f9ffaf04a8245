"""The benchmark measures what it says, names what it does not measure, and writes it down."""

import json
from pathlib import Path

import numpy as np
import pytest
from betons import digit_like, write

from data_prep.encode import Store
from fastproj.bench import Timing, loaders, measure
from fastproj.bench.__main__ import main, table
from fastproj.errors import run_command
from fastproj.manifest import Beton


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    source = digit_like(np.random.default_rng(0), 30, 16, 3)
    return write(source, tmp_path_factory.mktemp("bench"), Store("raw"))


def test_measure_counts_the_calls_after_the_warm_up() -> None:
    calls: list[int] = []
    timing = measure(lambda: calls.append(1), warmup=2, repeats=5)
    assert len(calls) == 7 and timing.repeats == 5
    assert 0 < timing.min <= timing.median <= timing.max


def test_rates_turn_seconds_around() -> None:
    rates = Timing(median=2.0, min=1.0, max=4.0, repeats=3).rates(100)
    assert rates == {"images_per_second": 50, "min": 25, "max": 100, "repeats": 3}


def test_a_set_listed_several_times_is_the_same_set(small: Beton) -> None:
    three = loaders.several_times(small, 3)
    assert len(three) == 90 and three.index.tolist() == list(range(90))
    for i in range(90):
        assert np.array_equal(three.stored(i), small.stored(i % 30))
        assert three.label[i] == small.label[i % 30]


@pytest.mark.slow  # FFCV compiles its pipeline
def test_every_engine_is_measured_on_the_same_images(
    small: Beton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "IMAGES", 60)
    rows = loaders.run(small.path, size=16, batch=10, workers=1, repeats=2)
    assert [row["engine"] for row in rows] == [
        "resident", "stream", "reference", "FFCV, a pass a view",
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["min"] <= row["images_per_second"] <= row["max"]
    assert "resident" in table(rows) and "images/s" in table(rows)


def test_the_command_says_what_it_does_not_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "bench.json"
    with pytest.raises(SystemExit) as left:
        run_command(main, ["loaders", "--out", str(out)])
    assert left.value.code == 0
    assert "not measured: loaders on photos, squares, small" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["rows"] == [] and result["environment"]["packages"]["torch"]


def test_a_stage_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_command(main, ["stairs"])
    assert left.value.code == 2
    assert "no stage 'stairs' to measure" in capsys.readouterr().err
