"""The engine dali against the reference engine: same samples, same boxes, nearly the same pixels.

What happens without DALI is tested in test_loaders.py.
"""

import gc
import shutil
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton, open_beton
from fastproj.loaders import Batch, Center, Crop, Loader, open_loader
from fastproj.loaders.dali import DaliLoader
from fastproj.prepare.encode import Store
from tests.support.betons import digit_like, photographs, write

pytest.importorskip("nvidia.dali", reason="no DALI: ./setup.sh dali")

GROUPS = [Crop(32, 2), Crop(16, 3, (0.05, 0.3)), Center(24, 0.9)]


@pytest.fixture(scope="module")
def betons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Beton]:
    """40 raw images of noise, 20 x 20; 40 photographs as JPEGs; the same as squares."""
    folder = tmp_path_factory.mktemp("betons")
    noise = digit_like(np.random.default_rng(0), 40, 20, 5)
    photos = photographs(np.random.default_rng(1), folder / "files", 40)
    return {
        "raw": write(noise, folder / "raw", Store("raw")),
        "jpeg": write(photos, folder / "jpeg", Store("jpeg", quality=90)),
        "square": write(photos, folder / "square", Store("square", side=64)),
    }


@pytest.fixture(params=["raw", "jpeg", "square"])
def beton(request: pytest.FixtureRequest, betons: dict[str, Beton]) -> Beton:
    return betons[request.param]


def loader_of(beton: Beton, engine: str = "dali", batch: int = 8, **options) -> Loader:
    return open_loader(beton, GROUPS, batch, engine=engine, **{"workers": 2, **options})


def epoch(beton: Beton, number: int = 0, step: int = 0, **options) -> list[Batch]:
    with loader_of(beton, **options) as loader:
        loader.seek(number, step)
        return list(loader)


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.labels, b.labels)
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


def threads() -> int:
    """DALI's own, which Python does not know of, and Python's."""
    gc.collect()
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("[DALI]") for name in names) + threading.active_count()


def test_crops_are_those_of_the_reference_engine(beton: Beton) -> None:
    ours = epoch(beton, 3, seed=5)
    theirs = epoch(beton, 3, seed=5, engine="reference")
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.labels, b.labels)
        for crops, wanted in zip(a.crops, b.crops, strict=True):
            assert crops.shape == wanted.shape and crops.dtype == torch.uint8
            assert crops.is_contiguous(memory_format=torch.channels_last)
            difference = (crops.int() - wanted.int()).abs()
            assert difference.float().mean() < 0.5  # the contract says 2
            assert difference[..., 2:-2, 2:-2].max() <= 1  # the rim: see the module's docstring


def test_an_image_at_its_own_size_is_untouched_and_a_last_batch_may_be_small(
    betons: dict[str, Beton],
) -> None:
    beton = betons["raw"]
    with open_loader(
        beton, [Center(20)], 16, engine="dali", shuffle=False, drop_last=False
    ) as loader:
        batches = list(loader)
    assert [len(batch.labels) for batch in batches] == [16, 16, 8]
    pixels = torch.cat([batch.crops[0] for batch in batches]).movedim(1, -1)
    stored = np.stack([beton.stored(i) for i in range(40)]).reshape(40, 20, 20, 3)
    assert np.array_equal(pixels.numpy(), stored)


def test_the_number_of_threads_changes_nothing(beton: Beton) -> None:
    assert_same(epoch(beton, workers=1), epoch(beton, workers=4))


def test_it_continues_in_the_middle_and_goes_on_to_the_next_epoch(beton: Beton) -> None:
    whole = epoch(beton, 1) + epoch(beton, 2)
    with loader_of(beton) as loader:
        loader.seek(1, 2)
        for _ in loader:
            if loader.cursor == (1, 4):
                break
        rest = [*loader, *loader]
    assert loader.cursor == (3, 0)
    assert_same(rest, whole[4:])


def test_two_ranks_share_the_batches_of_one(beton: Beton) -> None:
    one = epoch(beton, 6)
    first, second = (epoch(beton, 6, batch=4, rank=rank, world_size=2) for rank in (0, 1))
    for whole, a, b in zip(one, first, second, strict=True):
        assert torch.equal(whole.index, torch.cat([a.index, b.index]))
        for group, crops, x, y in zip(GROUPS, whole.crops, a.crops, b.crops, strict=True):
            parts = [part.unflatten(0, (group.num_views, 4)) for part in (x, y)]
            assert torch.equal(crops, torch.cat(parts, 1).flatten(0, 1))


def test_a_rank_beyond_the_end_gets_an_empty_batch(beton: Beton) -> None:
    options = {"batch": 16, "world_size": 2, "shuffle": False, "drop_last": False}
    first, second = (epoch(beton, rank=rank, **options) for rank in (0, 1))
    assert [len(batch.index) for batch in first] == [16, 8]
    assert [len(batch.index) for batch in second] == [16, 0]
    assert second[1].crops[1].shape == (0, 3, 16, 16)


def test_batches_are_owned(beton: Beton) -> None:
    with loader_of(beton) as loader:
        kept, copies = [], []
        for batch in loader:
            kept.append(batch)
            copies.append(Batch(tuple(c.clone() for c in batch.crops), batch.labels, batch.index))
    epoch(beton, 1)
    assert_same(kept, copies)


def test_the_stored_bytes_are_fed_without_a_copy(beton: Beton) -> None:
    with loader_of(beton) as loader:
        assert isinstance(loader, DaliLoader)
        images = next(loader._inputs(0, range(1), deque()))[0]
        assert all(np.shares_memory(image, beton.data) for image in images)


def test_leaving_early_leaves_no_thread(beton: Beton) -> None:
    before = threads()
    for _ in range(3):
        for _ in loader_of(beton):
            break
    with loader_of(beton) as loader:
        iterator = iter(loader)  # a reference that outlives the loop
        next(iterator)
        assert threads() > before
    assert threads() == before


def damaged(beton: Beton, sample: int, offset: int, folder: Path) -> Beton:
    """The beton with a part of one sample's JPEG overwritten, which the check on opening misses."""
    path = Path(shutil.copytree(beton.path.parent, folder / "copy")) / beton.path.name
    with path.open("r+b") as file:
        file.seek(int(beton.pointer[sample]) + offset)
        file.write(bytes(300))
    return open_beton(path)


def test_a_damaged_sample_is_named_though_dali_would_decode_it(
    betons: dict[str, Beton], tmp_path: Path
) -> None:
    before = threads()
    beton = betons["jpeg"]
    broken = damaged(beton, 17, int(beton.length[17]) // 2, tmp_path)
    with loader_of(broken) as loader:
        assert isinstance(loader, DaliLoader)
        with pytest.raises(InputError, match=r"sample 17 is damaged.*--verify"):
            list(loader)
        loader.first_read._seen[:] = True  # a hash is compared once only
        list(loader)  # DALI alone says nothing
    assert threads() == before


def test_what_dali_cannot_decode_ends_the_iteration(
    betons: dict[str, Beton], tmp_path: Path
) -> None:
    before = threads()
    with loader_of(damaged(betons["jpeg"], 17, 0, tmp_path)) as loader:
        assert isinstance(loader, DaliLoader)
        loader.first_read._seen[:] = True
        with pytest.raises(InputError, match=r"^[^\n]*DALI failed at epoch 0[^\n]*engine stream$"):
            list(loader)
    assert threads() == before


def test_an_epoch_that_dali_ends_too_soon_is_an_error(
    betons: dict[str, Beton], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = DaliLoader._inputs

    def short(self: DaliLoader, number: int, steps: range, under_way: deque) -> Iterator:
        return whole(self, number, steps[:-1], under_way)

    monkeypatch.setattr(DaliLoader, "_inputs", short)
    with pytest.raises(RuntimeError, match="DALI ended epoch 0 before its step 4"):
        epoch(betons["raw"])


@pytest.mark.gpu
def test_a_gpu_gets_the_crops_of_the_cpu(beton: Beton) -> None:
    for a, b in zip(epoch(beton, 1), epoch(beton, 1, device="cuda"), strict=True):
        assert torch.equal(a.index, b.index.cpu()) and torch.equal(a.labels, b.labels.cpu())
        for x, y in zip(a.crops, b.crops, strict=True):
            assert y.is_cuda and y.is_contiguous(memory_format=torch.channels_last)
            assert (x.int() - y.cpu().int()).abs().float().mean() < 2  # nvJPEG is not libjpeg
