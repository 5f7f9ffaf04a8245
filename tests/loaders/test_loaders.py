"""The loaders' contract: same order, same boxes, torchvision's pixels, nothing left behind."""

import contextlib
import dataclasses
import gc
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from fastproj.bench import growth
from fastproj.bench.alone import alone
from fastproj.core.errors import InputError
from fastproj.core.machine import cores
from fastproj.data.beton import Beton, open_beton
from fastproj.data.layout import DESCRIPTOR, row_type
from fastproj.loaders import (
    Batch,
    Center,
    Crop,
    base,
    choose,
    open_loader,
    reference,
    resident,
    stream,
)
from fastproj.loaders.boxes import draw
from fastproj.loaders.choose import _choose
from fastproj.loaders.crop import crop_batch
from fastproj.loaders.order import Order
from fastproj.loaders.resident import ResidentLoader
from fastproj.loaders.stream import StreamLoader
from fastproj.prepare.encode import Store
from tests.support.betons import digit_like, photographs, write

GROUPS = [Crop(32, 2), Crop(16, 3, (0.05, 0.3))]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    """75 raw images of 20 x 20."""
    source = digit_like(np.random.default_rng(0), 75, 20, 5)
    return write(source, tmp_path_factory.mktemp("small"), Store("raw"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Beton]:
    """The same 40 photographs as JPEGs and as squares."""
    folder = tmp_path_factory.mktemp("photos")
    source = photographs(np.random.default_rng(1), folder / "files", 40)
    return {
        "jpeg": write(source, folder / "jpeg", Store("jpeg", quality=90)),
        "square": write(source, folder / "square", Store("square", side=64)),
    }


@pytest.fixture(params=["small", "jpeg", "square"])
def beton(request: pytest.FixtureRequest, small: Beton, photos: dict[str, Beton]) -> Beton:
    return small if request.param == "small" else photos[request.param]


def epoch(beton: Beton, engine: str, number: int = 0, start: int = 0, **options) -> list[Batch]:
    with open_loader(beton, GROUPS, 8, engine=engine, **options) as loader:
        loader.seek(number, start)
        return list(loader)


def engines(beton: Beton) -> list[str]:
    jpeg = beton.manifest.store == "jpeg"
    return ["stream", "reference"] if jpeg else ["stream", "reference", "resident"]


def oracle(beton: Beton, index: int, box: list[int], size: int) -> torch.Tensor:
    """torchvision's crop of the stored image, decoded by Pillow."""
    stored = np.array(beton.stored(index))
    if beton.manifest.store == "jpeg":
        image = tv.pil_to_tensor(Image.open(io.BytesIO(stored.tobytes())))
    else:
        shape = int(beton.height[index]), int(beton.width[index]), 3
        image = torch.from_numpy(stored).view(shape).movedim(-1, 0)
    return tv.resized_crop(image, *box, size=[size, size], antialias=True)


def test_every_engine_gives_torchvisions_crops_of_the_same_boxes(beton: Beton) -> None:
    for engine in engines(beton):
        batches = epoch(beton, engine, 3, seed=5, workers=2)
        assert len(batches) == len(beton) // 8
        for batch in batches:
            positions = batch.index.numpy()
            assert batch.labels.tolist() == beton.label[positions].tolist()
            boxes = draw(GROUPS, beton, positions, seed=5, epoch=3)
            for group, crops, box in zip(GROUPS, batch.crops, boxes, strict=True):
                assert crops.shape == (group.num_views * 8, 3, group.size, group.size)
                assert crops.dtype == torch.uint8
                assert crops.is_contiguous(memory_format=torch.channels_last)
                wanted = torch.stack(
                    [
                        oracle(beton, int(p), box[view, slot].tolist(), group.size)
                        for view in range(group.num_views)
                        for slot, p in enumerate(positions)
                    ]
                )
                difference = (crops.int() - wanted.int()).abs().float()
                assert difference.mean() < 0.5, engine  # the contract says 2
                assert difference.max() <= 2, engine


def test_prefetching_changes_no_pixel(
    photos: dict[str, Beton], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = epoch(photos["jpeg"], "stream", 1)
    monkeypatch.setattr(stream, "PREFETCHED", 0)
    for a, b in zip(plain, epoch(photos["jpeg"], "stream", 1), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


def test_order_depends_on_seed_and_epoch_alone(beton: Beton) -> None:
    first = epoch(beton, "stream", 1, seed=2, workers=1)
    for engine, workers in (("stream", 4), ("reference", 2)):
        for a, b in zip(first, epoch(beton, engine, 1, seed=2, workers=workers), strict=True):
            assert a.index.tolist() == b.index.tolist()
    for a, b in zip(first, epoch(beton, "stream", 1, seed=2, workers=4), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))
    for other in (epoch(beton, "stream", 2, seed=2), epoch(beton, "stream", 1, seed=3)):
        assert first[0].index.tolist() != other[0].index.tolist()
        assert not torch.equal(first[0].crops[0], other[0].crops[0])


def test_a_loader_continues_in_the_middle_and_goes_on_to_the_next_epoch(beton: Beton) -> None:
    for engine in engines(beton):
        whole = epoch(beton, engine, 1) + epoch(beton, engine, 2)
        with open_loader(beton, GROUPS, 8, engine=engine) as loader:
            loader.seek(1, 2)
            for _ in loader:
                if loader.cursor == (1, 4):
                    break
            rest = [*loader, *loader]
        assert loader.cursor == (3, 0)
        for a, b in zip(whole[4:], rest, strict=True):
            assert torch.equal(a.index, b.index)
            assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


def test_two_ranks_share_the_batches_of_one(small: Beton) -> None:
    one = Order(75, 8, seed=4)
    two = [Order(75, 4, seed=4, rank=rank, world_size=2) for rank in (0, 1)]
    assert one.steps == two[0].steps == two[1].steps == 9
    for step in range(9):
        parts = [order.batch(6, step) for order in two]
        assert np.concatenate(parts).tolist() == one.batch(6, step).tolist()
    seen = np.concatenate([order.batch(0, step) for order in two for step in range(9)])
    assert len(set(seen.tolist())) == 72


@pytest.mark.parametrize("world", [1, 2, 3])
def test_without_dropping_each_sample_comes_once_in_the_files_order(world: int) -> None:
    orders = [Order(75, 8, shuffle=False, drop_last=False, rank=r, world_size=world)
              for r in range(world)]  # fmt: skip
    assert len({order.steps for order in orders}) == 1
    seen = [p for step in range(orders[0].steps) for o in orders for p in o.batch(0, step)]
    assert seen == list(range(75))


def test_a_last_small_batch_is_read_by_every_engine(small: Beton) -> None:
    for engine in engines(small):
        given = {"engine": engine, "shuffle": False, "drop_last": False}
        with open_loader(small, [Center(20)], 32, **given) as loader:
            batches = list(loader)
        assert [len(batch.labels) for batch in batches] == [32, 32, 11]
        with open_loader(small, [Center(20)], 32, rank=1, world_size=2, **given) as loader:
            *_, last = second = list(loader)
        assert [len(batch.labels) for batch in second] == [32, 0]  # the first rank has the rest
        assert last.crops[0].shape == (0, 3, 20, 20) and len(last.index) == 0
        # The whole image at its own size: the stored pixels, untouched.
        pixels = torch.cat([batch.crops[0] for batch in batches]).movedim(1, -1)
        stored = np.stack([small.stored(i) for i in range(75)]).reshape(75, 20, 20, 3)
        assert np.array_equal(pixels.numpy(), stored)


def test_boxes_follow_torchvisions_distribution(photos: dict[str, Beton]) -> None:
    """Kolmogorov-Smirnov of each coordinate against torchvision's RandomResizedCrop.get_params."""
    beton = photos["jpeg"]
    crop = Crop(32, 1, (0.2, 0.9))
    sample = int(np.argmax(beton.width / beton.height))  # the widest: tries fail most often here
    image = torch.empty(3, int(beton.height[sample]), int(beton.width[sample]))
    torch.manual_seed(0)
    theirs = RandomResizedCrop(32, crop.scale, crop.ratio)
    wanted = [theirs.make_params([image]) for _ in range(4000)]
    ours = np.concatenate(
        [draw([crop], beton, np.array([sample]), 0, epoch)[0][0] for epoch in range(4000)]
    )
    for column, name in enumerate(("top", "left", "height", "width")):
        same = stats.ks_2samp(ours[:, column], [box[name] for box in wanted])
        assert same.pvalue > 1e-3, name


def test_boxes_of_views_samples_and_epochs_are_independent(small: Beton) -> None:
    crop = Crop(32, 2)
    boxes = np.stack([draw([crop], small, np.arange(75), 0, e)[0] for e in range(200)])
    top = boxes[..., 0].astype(float)  # (epoch, view, sample)
    for a, b in (
        (top[:, 0], top[:, 1]),
        (top[:, :, :-1], top[:, :, 1:]),
        (top[:-1], top[1:]),
    ):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03


def test_a_shape_that_no_try_fits_gets_the_center(tmp_path: Path) -> None:
    source = digit_like(np.random.default_rng(0), 4, 8, 2)
    beton = write(source, tmp_path, Store("raw"))
    wide = dataclasses.replace(
        beton, source_width=np.full(4, 400), source_height=np.full(4, 20),
        width=np.full(4, 400), height=np.full(4, 20),
    )  # fmt: skip
    box = draw([Crop(8, 1, (0.9, 1.0))], wide, np.arange(4), 0, 0)[0]
    # torchvision's fallback: all rows, width = height x 4/3, centered.
    assert box.tolist() == [[[0, (400 - 27) // 2, 20, 27]] * 4]


def test_square_boxes_cover_the_same_region_of_the_original(photos: dict[str, Beton]) -> None:
    positions = np.arange(40)
    jpeg, square = photos["jpeg"], photos["square"]
    original = draw([Crop(32)], jpeg, positions, 0, 0)[0][0]
    mapped = draw([Crop(32)], square, positions, 0, 0)[0][0]
    scale = np.stack([jpeg.height, jpeg.width] * 2, 1) / 64
    assert np.abs(mapped * scale - original).max() <= scale.max()  # a stored pixel at most
    assert (mapped[:, 2:] >= 1).all() and (mapped[:, :2] + mapped[:, 2:] <= 64).all()


def test_device_crops_in_half_precision_stay_within_the_contract() -> None:
    """What a GPU computes in float16, computed here in float16 on the same matrices."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 90, 120), dtype=torch.uint8)
    boxes = torch.tensor([[[0, 0, 90, 120], [10, 20, 30, 40], [5, 7, 80, 33], [1, 1, 12, 9]]])
    half = crop_batch(images, boxes, 64, dtype=torch.float16)
    for slot, box in enumerate(boxes[0].tolist()):
        wanted = tv.resized_crop(images[slot], *box, size=[64, 64], antialias=True)
        difference = (half[0, slot].int() - wanted.int()).abs().float()
        assert difference.mean() < 0.5 and difference.max() <= 2


@pytest.mark.gpu
def test_a_gpu_gets_the_crops_of_the_cpu(beton: Beton) -> None:
    for engine in engines(beton):
        for a, b in zip(
            epoch(beton, engine, 1), epoch(beton, engine, 1, device="cuda"), strict=True
        ):
            assert torch.equal(a.index, b.index.cpu()) and torch.equal(a.labels, b.labels.cpu())
            for x, y in zip(a.crops, b.crops, strict=True):
                assert y.is_cuda and y.is_contiguous(memory_format=torch.channels_last)
                assert (x.int() - y.cpu().int()).abs().float().mean() < 0.5


def test_batches_are_owned(small: Beton) -> None:
    for engine in engines(small):
        kept = epoch(small, engine, workers=3)
        copies = [batch.crops[0].clone() for batch in kept]
        epoch(small, engine, 1, workers=3)
        assert all(torch.equal(b.crops[0], c) for b, c in zip(kept, copies, strict=True))
        assert len({batch.crops[0].data_ptr() for batch in kept}) == len(kept)


@pytest.mark.slow  # processes
@pytest.mark.parametrize(
    ("augment", "size", "batches"), [(False, 160, 6), (True, 96, 3)], ids=["crops", "views"]
)
def test_batches_take_the_memory_of_those_before(
    small: Beton, augment: bool, size: int, batches: int
) -> None:
    """Two in progress, one held, one just made; with glibc's aligned memory it was 14 to 21."""
    told = alone(
        growth.read, path=str(small.path), engine="stream", images=1200, batch=64, augment=augment,
        size=size, workers=2, device="cpu", repeats=3,
    )  # fmt: skip
    each = 2 * 64 * 3 * size**2 * (5 if augment else 1)  # bytes; views are floats beside them
    assert told["peak_bytes"] < batches * each
    assert max(told["held"]) - told["held"][0] < each / 2


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def threads() -> int:
    return sum(t.name.startswith("fastproj-stream") for t in threading.enumerate())


def test_leaving_early_leaves_no_thread_and_no_process(
    small: Beton, no_garbage_collection: None
) -> None:
    for engine in engines(small):
        for _ in range(3):
            for _ in open_loader(small, GROUPS, 8, engine=engine, workers=2):
                break
        with open_loader(small, GROUPS, 8, engine=engine, workers=2) as loader:
            iterator = iter(loader)  # a reference that outlives the loop
            next(iterator)
        assert threads() == 0
        assert not multiprocessing.active_children()


def damaged(beton: Beton, sample: int, tmp_path: Path) -> Beton:
    """The beton with the middle of one sample's JPEG overwritten (behind the preflight's back)."""
    data = np.array(beton.data)
    start = beton.pointer[sample]
    data[start : start + 300] = 0
    return dataclasses.replace(beton, data=data)


def test_a_broken_sample_is_named_and_ends_the_iteration(
    photos: dict[str, Beton], tmp_path: Path
) -> None:
    beton = damaged(photos["jpeg"], 17, tmp_path)
    with (
        open_loader(beton, GROUPS, 8, engine="stream", workers=2) as loader,
        pytest.raises(InputError, match=r"sample 17 cannot be decoded.*--verify"),
    ):
        list(loader)
    assert threads() == 0


def copy(beton: Beton, folder: Path) -> Beton:
    path = Path(shutil.copytree(beton.path.parent, folder / "copy")) / beton.path.name
    return open_beton(path)


@pytest.mark.parametrize("engine", ["stream", "resident", "reference"])
def test_a_sample_that_decodes_but_is_damaged_is_named_when_first_read(
    photos: dict[str, Beton], tmp_path: Path, engine: str
) -> None:
    beton = copy(photos["square" if engine == "resident" else "jpeg"], tmp_path)
    with beton.path.open("r+b") as file:
        file.seek(int(beton.pointer[17] + beton.length[17] - 3))  # the end of the last block
        file.write(b"\x55")
    with (
        pytest.raises(InputError, match=r"sample 17 is damaged .*--verify"),
        open_loader(beton, GROUPS, 8, engine=engine, workers=2) as loader,
    ):
        list(loader)
    assert threads() == 0


@pytest.mark.parametrize("engine", ["stream", "resident", "reference"])
def test_a_flipped_label_within_the_classes_is_named(
    small: Beton, tmp_path: Path, engine: str
) -> None:
    beton = copy(small, tmp_path)
    rows = np.memmap(beton.path, row_type(False), "r+", 24 + 3 * DESCRIPTOR.itemsize, 75)
    rows["label"][3] = (rows["label"][3] + 1) % 5
    rows.flush()
    with (
        pytest.raises(InputError, match="sample 3 is damaged .*label"),
        open_loader(open_beton(beton.path), GROUPS, 25, engine=engine, workers=2) as loader,
    ):
        list(loader)


def test_a_file_written_to_or_cut_after_it_was_opened_ends_the_next_epoch(
    small: Beton, tmp_path: Path
) -> None:
    beton = copy(small, tmp_path)
    changes = {
        "written": lambda: os.utime(beton.path, ns=(0, 1)),
        "cut": lambda: os.truncate(beton.path, 100),
    }
    for change in changes.values():
        with open_loader(beton, GROUPS, 25, engine="stream", workers=2) as loader:
            list(loader)
            change()
            with pytest.raises(InputError, match="was written to or cut since it was opened"):
                list(loader)


def test_a_file_cut_while_it_is_read_is_an_input_error(
    photos: dict[str, Beton], small: Beton, tmp_path: Path
) -> None:
    for name, original in (("jpeg", photos["jpeg"]), ("raw", small)):
        beton = copy(original, tmp_path / name)
        with open_loader(beton, GROUPS, 8, engine="stream", workers=2) as loader:
            loader.first_read._seen[:] = True  # as in a later epoch: nothing is compared
            iterator = iter(loader)
            next(iterator)
            os.truncate(beton.path, 4096)
            with pytest.raises(InputError, match="the file was cut while it was read"):
                list(iterator)
    assert threads() == 0


def test_a_cut_file_read_by_others_ends_with_a_line(small: Beton, tmp_path: Path) -> None:
    beton = copy(small, tmp_path)
    script = (
        "import os, sys\nfrom fastproj.core.native import library\n"
        "from fastproj.data.beton import open_beton\n"
        "library()\nbeton = open_beton(sys.argv[1])\nos.truncate(sys.argv[1], 4096)\n"
        "beton.stored(70).sum()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(beton.path)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGBUS
    assert done.stderr == (
        "error: a file that is mapped into memory was cut, its disk or network failed, or "
        "/dev/shm is full\n"
    )


def test_reference_does_not_wait_for_ever(small: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "PATIENCE", 1)
    monkeypatch.setattr(reference, "read_image", lambda *_: time.sleep(30))
    with (
        pytest.raises(InputError, match="gave no batch .*timed out.* /dev/shm larger"),
        open_loader(small, GROUPS, 8, engine="reference", workers=1) as loader,
    ):
        next(iter(loader))
    assert not multiprocessing.active_children()


ITERATE = """
import sys
from fastproj.core.errors import run_command
from fastproj.loaders import Crop, open_loader
from fastproj.data.beton import open_beton
run_command(lambda argv: next(iter(open_loader(open_beton(argv[0]), [Crop(32, 2)], 16,
                                               engine="reference", workers=1))))
"""


def test_reference_says_that_shared_memory_is_too_small(small: Beton) -> None:
    """Else torch's worker prints a traceback, and its batch never comes."""
    script = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
    own = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh"]
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system")
    done = subprocess.run(
        [*own, sys.executable, "-c", ITERATE, small.path], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr == (
        "error: shared memory (/dev/shm) has 0.1 MB free, and 1 worker(s) need 0.2: make it larger "
        "(docker run --shm-size), give fewer --data.workers, or take --data.engine stream\n"
    )


def test_workers_are_clamped_to_the_cores_allowed(small: Beton) -> None:
    loader = open_loader(small, GROUPS, 8, engine="stream", workers=10_000)
    assert isinstance(loader, StreamLoader) and loader.workers == cores()


def test_auto_takes_resident_where_it_fits_a_gpu(
    small: Beton, photos: dict[str, Beton], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (180_000, 200_000))
    gpu = torch.device("cuda")  # the choice alone, so it needs none
    assert _choose(small, gpu, 0.5) == ("resident", "resident: 0.00 GB of 0 GB free")
    engine, reason = _choose(small, gpu, 0.4)
    assert engine == "stream" and reason.endswith("is more than the limit of 40%")
    assert _choose(photos["jpeg"], gpu, 0.5)[1] == "stream: JPEGs or images of several sizes"


def test_resident_reads_the_set_in_pieces(small: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_loader(small, GROUPS, 8, engine="resident")
    monkeypatch.setattr(resident, "CHUNK", 16 * 1200)  # 75 images: four pieces and a rest
    pieces = open_loader(small, GROUPS, 8, engine="resident", workers=2)
    assert isinstance(whole, ResidentLoader) and isinstance(pieces, ResidentLoader)
    assert torch.equal(whole.images, pieces.images)
    stored = np.array(small.stored(70)).reshape(20, 20, 3)
    assert np.array_equal(pieces.images[70].permute(1, 2, 0), stored)


def test_resident_draws_an_epoch_at_once_and_in_parts_alike(
    small: Beton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """75 images in batches of 8, the last of 3, from the third step on."""
    given = {"start": 2, "drop_last": False}
    stream = epoch(small, "stream", 1, **given)
    for drawn, calls in ((2**16, 1), (16, 4), (1, 8)):
        monkeypatch.setattr(resident, "DRAWN", drawn)
        with mock.patch.object(
            ResidentLoader, "_boxes", autospec=True, side_effect=ResidentLoader._boxes
        ) as draw:
            batches = epoch(small, "resident", 1, **given)
        assert draw.call_count == calls
        for ours, other in zip(batches, stream, strict=True):
            assert torch.equal(ours.index, other.index) and torch.equal(ours.labels, other.labels)
            for crops, wanted in zip(ours.crops, other.crops, strict=True):
                assert (crops.int() - wanted.int()).abs().max() <= 2


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``stream`` does on a CPU what it does for a GPU; CUDA's streams and pinned memory do not."""
    empty, opened = torch.empty, StreamLoader._open

    def with_a_stream(loader: StreamLoader) -> None:
        opened(loader)
        loader._beside = mock.MagicMock()
        loader._gpu_crops = loader.workers < stream.CROPPING_THREADS

    monkeypatch.setattr(StreamLoader, "_open", with_a_stream)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **more: empty(*a, **more))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: mock.MagicMock())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, _: None)


def test_many_threads_crop_for_a_gpu_too_and_few_leave_it_the_crops(
    photos: dict[str, Beton], as_if_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CROPPING_THREADS", 2)
    monkeypatch.setattr(choose, "cores", lambda: 2)
    wanted = epoch(photos["jpeg"], "reference")
    with mock.patch.object(base, "crop_batch", wraps=crop_batch) as on_device:
        by_threads = epoch(photos["jpeg"], "stream", workers=2)
        assert on_device.call_count == 0
        by_gpu = epoch(photos["jpeg"], "stream", workers=1)
        assert on_device.call_count == len(by_gpu) * len(GROUPS)
    for batches, allowed in ((by_threads, 0), (by_gpu, 2)):
        for ours, other in zip(batches, wanted, strict=True):
            assert torch.equal(ours.index, other.index)
            for crops, right in zip(ours.crops, other.crops, strict=True):
                assert (crops.int() - right.int()).abs().max() <= allowed
                assert crops.is_contiguous(memory_format=torch.channels_last)


def test_threads_crop_the_batches_that_are_too_large_for_a_gpu_and_the_loader_says_so(
    photos: dict[str, Beton], as_if_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    beton = photos["jpeg"]
    with open_loader(beton, GROUPS, 8, engine="stream", workers=1) as loader:
        batches = [loader.order.batch(0, step) for step in range(len(loader))]
        padded = [8 * 3 * int(beton.height[b].max()) * int(beton.width[b].max()) for b in batches]
        assert len(set(padded)) > 1 and "threads crop" not in loader.reason
        assert loader.memory == 3 * 8 * 3 * int(beton.height.max()) * int(beton.width.max())
    bound = sorted(padded)[1]
    monkeypatch.setattr(stream, "PADDED_BYTES", bound)
    made: list[int] = []
    with mock.patch.object(
        base, "crop_batch", side_effect=lambda images, *rest: (
            made.append(images.numel()), crop_batch(images, *rest))[1],
    ):  # fmt: skip
        here = epoch(beton, "stream", workers=1)
    assert set(made) == {size for size in padded if size <= bound} and max(made) <= bound
    for ours, other in zip(here, epoch(beton, "reference"), strict=True):
        for crops, right in zip(ours.crops, other.crops, strict=True):
            assert (crops.int() - right.int()).abs().max() <= 2
    with open_loader(beton, GROUPS, 8, engine="stream", workers=1) as loader:
        side = int(max(beton.height.max(), beton.width.max()))
        assert f"images of up to {side} pixels" in loader.reason
        assert "--data.max_resolution" in loader.reason
        crops = 8 * 3 * sum(crop.num_views * crop.size**2 for crop in GROUPS)
        assert loader.memory == 3 * max(bound, crops)


def test_each_loader_says_why_it_was_chosen(small: Beton) -> None:
    def reason(**options) -> str:
        return open_loader(small, GROUPS, 800, drop_last=False, **options).reason

    # Three batches of 800 images, each with two crops of 32 px and three of 16.
    says = "threads crop; 20 MB for batches in progress"
    assert reason() == f"stream: the device is a CPU; {says}"
    assert reason(engine="stream") == f"stream: as requested; {says}"
    assert reason(engine="resident") == "resident: as requested"


def test_what_cannot_be_opened_says_so(small: Beton, photos: dict[str, Beton]) -> None:
    with pytest.raises(InputError, match="batch of 76 .* larger than the set of 75 samples"):
        open_loader(small, GROUPS, 76)
    with pytest.raises(InputError, match="cannot be resident: use --data.engine stream"):
        open_loader(photos["jpeg"], GROUPS, 8, engine="resident")


def test_dali_is_looked_for_only_when_asked_for(
    small: Beton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # as where it is not installed
    assert len(epoch(small, "stream")) == 9
    with pytest.raises(InputError, match=r"needs NVIDIA DALI .*run \./setup\.sh dali") as found:
        open_loader(small, GROUPS, 8, engine="dali")
    assert "\n" not in str(found.value)
