"""The engine ffcv against stream: the same batches, bit for bit; nothing hangs or is left behind.

The oracle is ``stream``, which test_loaders.py holds against torchvision.
"""

import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton, open_beton
from fastproj.data.subset import subset
from fastproj.loaders import Batch, Center, Crop, open_loader
from fastproj.prepare.encode import Store
from tests.support.betons import digit_like, photographs, write

GROUPS = [Crop(32, 2), Crop(16, 3, (0.05, 0.3)), Center(24, 0.9)]


@pytest.fixture(scope="module")
def betons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Beton]:
    folder = tmp_path_factory.mktemp("betons")
    photos = photographs(np.random.default_rng(1), folder / "files", 40)
    return {
        "raw": write(digit_like(np.random.default_rng(0), 43, 20, 5), folder / "r", Store("raw")),
        "jpeg": write(photos, folder / "j", Store("jpeg", quality=90)),
        "square": write(photos, folder / "s", Store("square", side=64)),
    }


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.labels, b.labels)
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


@pytest.mark.parametrize("kind", ["raw", "jpeg", "square"])
def test_two_epochs_and_a_resumed_one_are_those_of_stream(
    betons: dict[str, Beton], kind: str
) -> None:
    pytest.importorskip("ffcv", reason="no FFCV: ./setup.sh ffcv")
    batches = []
    for engine in ("ffcv", "stream"):
        with open_loader(
            betons[kind], GROUPS, 8, engine=engine, workers=2, drop_last=False, seed=3
        ) as loader:
            threads = torch.get_num_threads()
            read = [*loader, *loader]
            loader.seek(1, 2)
            batches.append(read + list(loader))
            assert torch.get_num_threads() == threads
    assert len(batches[0]) > 12
    assert_same(*batches)


@pytest.mark.parametrize("rows", [range(100), range(9)], ids=["more", "fewer"])
def test_a_subset_has_as_many_batches_as_with_stream(betons: dict[str, Beton], rows: range) -> None:
    pytest.importorskip("ffcv", reason="no FFCV: ./setup.sh ffcv")
    some = subset(betons["raw"], np.array(rows) % len(betons["raw"]))
    batches = []
    for engine in ("ffcv", "stream"):
        with open_loader(some, GROUPS, 8, engine=engine, workers=1, drop_last=False) as loader:
            batches.append(list(loader))
    assert sum(len(batch.index) for batch in batches[0]) == len(rows)
    assert_same(*batches)


def test_ranks_split_a_last_step_as_with_stream(betons: dict[str, Beton]) -> None:
    pytest.importorskip("ffcv", reason="no FFCV: ./setup.sh ffcv")
    options = {"workers": 1, "drop_last": False, "rank": 1, "world_size": 2}
    batches = []
    for engine in ("ffcv", "stream"):
        with open_loader(betons["raw"], GROUPS, 14, engine=engine, **options) as loader:
            batches.append(list(loader))
    assert [len(batch.index) for batch in batches[0]] == [14, 1]
    assert_same(*batches)


def test_an_epoch_that_is_left_early_leaves_no_thread(betons: dict[str, Beton]) -> None:
    pytest.importorskip("ffcv", reason="no FFCV: ./setup.sh ffcv")
    with open_loader(betons["raw"], [Crop(16, 2)], 2, engine="ffcv", workers=1) as loader:
        before = threading.active_count()
        kept = []
        for _ in range(5):
            kept += [batch.index.clone() for batch, _ in zip(loader, range(3), strict=False)]
            loader.close()
            assert threading.active_count() == before


def test_a_damaged_sample_ends_the_epoch_with_its_name(
    betons: dict[str, Beton], tmp_path: Path
) -> None:
    pytest.importorskip("ffcv", reason="no FFCV: ./setup.sh ffcv")
    good = betons["jpeg"]
    for suffix in (".beton", ".json"):
        shutil.copy(good.path.with_suffix(suffix), tmp_path / f"all{suffix}")
    with (tmp_path / "all.beton").open("r+b") as file:
        file.seek(int(good.pointer[7]) + int(good.length[7]) // 2)
        file.write(b"\xff" * 20)
    before = threading.active_count()
    with (
        open_loader(open_beton(tmp_path / "all.beton"), GROUPS, 8, engine="ffcv") as loader,
        pytest.raises(InputError, match="sample 7"),
    ):
        list(loader)
    assert threading.active_count() == before


def test_without_ffcv_one_line_says_so(
    betons: dict[str, Beton], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)  # as where it is not installed
    with pytest.raises(InputError, match=r"needs FFCV .*run \./setup\.sh ffcv") as found:
        open_loader(betons["raw"], GROUPS, 8, engine="ffcv")
    assert "\n" not in str(found.value)
