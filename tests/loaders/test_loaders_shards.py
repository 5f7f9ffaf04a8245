"""A set of several files against the same set in one: the same batches, bit for bit."""

import gc
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton, open_beton
from fastproj.data.subset import subset
from fastproj.loaders import Batch, Center, Crop, open_loader
from fastproj.prepare.encode import Store
from tests.support.betons import digit_like, photographs, write, write_shards

GROUPS = [Crop(32, 2), Crop(16, 3, (0.05, 0.3)), Center(24, 0.9)]
FILES = {"raw": [3, 16], "jpeg": [3, 16], "square": [3]}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Beton]]:
    """43 raw images; 40 photographs as JPEGs, and as squares: in 1, 3 and 16 files, not all."""
    folder = tmp_path_factory.mktemp("sets")
    noise = digit_like(np.random.default_rng(0), 43, 20, 5)
    photos = photographs(np.random.default_rng(1), folder / "files", 40)
    kinds = {
        "raw": (noise, Store("raw")),
        "jpeg": (photos, Store("jpeg", quality=90)),
        "square": (photos, Store("square", side=64)),
    }
    return {
        kind: {1: write(source, folder / kind, store)}
        | {of: write_shards(source, folder / f"{kind}{of}", store, of) for of in FILES[kind]}
        for kind, (source, store) in kinds.items()
    }


def batches(beton: Beton, engine: str, **options: object) -> list[Batch]:
    """Two epochs, then the second from its third step."""
    given = {"workers": 2, "drop_last": False, "seed": 3, **options}
    with open_loader(beton, GROUPS, 8, engine=engine, **given) as loader:
        read = [*loader, *loader]
        loader.seek(1, 2)
        return read + list(loader)


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert ours
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.labels, b.labels)
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


@pytest.mark.parametrize("kind", ["raw", "jpeg", "square"])
@pytest.mark.parametrize(
    "engine",
    [
        "stream",
        "resident",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("reference", "dali")),
    ],
)
def test_a_set_of_files_gives_the_batches_of_one(
    sets: dict[str, dict[int, Beton]], kind: str, engine: str
) -> None:
    if engine == "dali":
        pytest.importorskip("nvidia.dali", reason="no DALI: ./setup.sh dali")
    if (engine, kind) == ("resident", "jpeg"):
        pytest.skip("resident reads no JPEGs")
    whole = batches(sets[kind][1], engine)
    for of in FILES[kind]:
        assert len(sets[kind][of].files) == of
        assert_same(batches(sets[kind][of], engine), whole)


def test_a_rank_and_a_subset_read_what_they_read_of_one_file(
    sets: dict[str, dict[int, Beton]],
) -> None:
    chosen = np.random.default_rng(5).permutation(np.arange(80) % 40)
    one, several = (sets["jpeg"][of] for of in (1, 16))
    ranks = {"rank": 1, "world_size": 2}
    assert_same(batches(several, "stream", **ranks), batches(one, "stream", **ranks))
    some, others = subset(several, chosen), subset(one, chosen)
    assert_same(batches(some, "stream"), batches(others, "stream"))
    assert some.manifest.source_names() == others.manifest.source_names()


def test_the_engine_ffcv_reads_one_file(sets: dict[str, dict[int, Beton]]) -> None:
    with pytest.raises(InputError, match=r"FFCV reads one file, and this set is 3: take .*stream"):
        open_loader(sets["raw"][3], GROUPS, 8, engine="ffcv")


@pytest.fixture
def three(sets: dict[str, dict[int, Beton]], tmp_path: Path) -> Beton:
    """A copy of the JPEGs in three files, to be damaged."""
    path = sets["jpeg"][3].path
    return open_beton(shutil.copytree(path.parent, tmp_path / "copy") / path.name)


@pytest.mark.parametrize("engine", ["stream", "reference"])
def test_a_damaged_sample_is_named_with_its_file(three: Beton, engine: str) -> None:
    file = three.files[1]
    with file.path.open("r+b") as opened:
        opened.seek(int(three.pointer[17] + three.length[17]) - 3 - file.start)
        opened.write(b"\x55")
    with pytest.raises(InputError, match=r"\.\.00002}.*sample 17 is .*--verify .*all-00001.beton,"):
        batches(three, engine)


def test_a_shard_cut_or_written_to_after_it_was_opened_is_named(three: Beton) -> None:
    with open_loader(three, GROUPS, 8, engine="stream", workers=2) as loader:
        list(loader)
        os.utime(three.files[1].path, ns=(0, 1))
        with pytest.raises(InputError, match="all-00001.beton was written to or cut since"):
            list(loader)
    with open_loader(three, GROUPS, 8, engine="stream", workers=2) as loader:
        loader.first_read._seen[:] = True  # as in a later epoch: nothing is compared
        running = iter(loader)
        next(running)
        os.truncate(three.files[2].path, 4096)
        with pytest.raises(InputError, match=r"the file was cut .*--verify .*all-00002.beton,"):
            list(running)


def test_the_range_of_addresses_and_the_files_are_given_back(three: Beton) -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return maps.count(str(three.path.parent)), len(os.listdir("/proc/self/fd"))

    before = held()
    for _ in range(3):
        again = open_beton(three.path)
        with open_loader(again, GROUPS, 8, engine="stream", workers=1) as loader:
            next(iter(loader))
        assert held() == (before[0] + 3, before[1] + 3)
        assert not again.data.flags.writeable
        del again, loader
        assert held() == before
