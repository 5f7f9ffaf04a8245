"""Native decoding and cropping: the pixels are Pillow's, and torch's to the bit where resized."""

import ctypes
import dataclasses
import io
import mmap
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.data.layout import JPEG, RAW
from fastproj.data.shards import File
from fastproj.loaders import fill as room
from fastproj.loaders.crop import batch_like
from fastproj.loaders.fill import Fill, read_at_random


@dataclasses.dataclass
class Stored:
    """Images in memory, as a beton would hold them: what ``Fill`` reads of one."""

    images: list[bytes | np.ndarray]  # a JPEG's bytes, or pixels (h, w, 3)
    sizes: list[tuple[int, int]]  # height, width
    path: Path = Path("some.beton")

    def __post_init__(self) -> None:
        parts = [np.frombuffer(i, np.uint8) if isinstance(i, bytes) else i.ravel()
                 for i in self.images]  # fmt: skip
        self.length = np.array([len(part) for part in parts])
        self.pointer = np.cumsum(self.length) - self.length
        table = np.zeros(24 * len(parts), np.uint8)  # a beton ends with its allocation table
        self.data = np.concatenate([*parts, table])
        self.mode = np.array([JPEG if isinstance(i, bytes) else RAW for i in self.images], np.uint8)
        self.height, self.width = np.array(self.sizes).T.copy()
        self.index = np.arange(len(parts))
        self.files = [File(self.path, 0, len(self.data))]

    def file_of(self, samples: np.ndarray) -> np.ndarray:
        return np.zeros_like(samples)


def photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth colors with noise on them: nothing that a JPEG holds exactly."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(y / a + x / b + c) for a, b, c in rng.uniform(3, 40, (3, 3))]
    return np.clip(np.stack(waves, -1) * 90 + 128 + rng.normal(0, 12, (height, width, 3)), 0, 255
                   ).astype(np.uint8)  # fmt: skip


def jpeg(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def crops_of(stored: Stored, boxes: list[np.ndarray], sizes: list[int]) -> list[torch.Tensor]:
    batch = len(stored.images)
    crops = [batch_like(len(b), batch, s, torch.device("cpu"))
             for b, s in zip(boxes, sizes, strict=True)]  # fmt: skip
    Fill(stored, np.arange(batch), boxes, crops).run()  # type: ignore[arg-type]
    return crops


def random_boxes(rng: np.random.Generator, views: int, sizes: list[tuple[int, int]]) -> np.ndarray:
    boxes = np.empty((views, len(sizes), 4), np.int64)
    for view in range(views):
        for slot, (height, width) in enumerate(sizes):
            h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
            boxes[view, slot] = rng.integers(height - h + 1), rng.integers(width - w + 1), h, w
    return boxes


def torchs(pixels: np.ndarray, box: np.ndarray, size: int) -> torch.Tensor:
    top, left, height, width = box.tolist()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    part = image[:, :, top : top + height, left : left + width]
    return torch.nn.functional.interpolate(
        part, (size, size), mode="bilinear", antialias=True, align_corners=False
    )[0]


def check_resize(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [tuple(rng.integers(1, 300, 2).tolist()) for _ in range(6)]
    sizes += [(1, 1), (1, 300), (300, 1), (2, 3)]
    pixels = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    boxes = [random_boxes(rng, 3, sizes) for _ in range(4)]
    wanted = [1, 7, 32, int(rng.integers(33, 240))]
    for box, crops in zip(boxes, crops_of(Stored(pixels, sizes), boxes, wanted), strict=True):
        for view in range(3):
            for slot, image in enumerate(pixels):
                right = torchs(image, box[view, slot], crops.shape[-1])
                assert torch.equal(crops[view, slot], right), (image.shape, box[view, slot])


@pytest.mark.parametrize("seed", range(5))
def test_crops_are_torchs_to_the_bit(seed: int) -> None:
    check_resize(seed)


def test_without_avx2_the_bits_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = shutil.which("gcc")
    assert compiler, "set-up needs it as well"
    source = Path(room.__file__).with_suffix(".c")
    built = tmp_path / "plain.so"
    flags = ["-O1", "-DPLAIN", "-shared", "-fPIC", "-o", str(built)]
    subprocess.run([compiler, *flags, str(source), "-ljpeg", "-lm"], check=True)
    plain = ctypes.CDLL(str(built))
    plain.fastproj_fill.restype = ctypes.c_int64
    monkeypatch.setattr(room, "library", lambda: plain)
    check_resize(9)


@pytest.mark.parametrize("options", [
    {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}, {"subsampling": "4:2:0"},
    {"subsampling": "4:2:0", "progressive": True}, {"subsampling": "4:2:0", "optimize": True},
    {"subsampling": "4:2:0", "restart_marker_rows": 1}, {"subsampling": "4:4:0", "keep": True},
    {"gray": True},
], ids=str)  # fmt: skip
def test_a_part_of_a_jpeg_decodes_to_the_pixels_of_the_whole(options: dict) -> None:
    rng = np.random.default_rng(0)
    options = dict(options)
    gray, tall = options.pop("gray", False), options.pop("keep", False)
    if tall:
        options["subsampling"] = "4:2:2"  # Pillow cannot write 4:4:0: turned, its samplings swap
    sizes = [(97, 131), (64, 64), (33, 17), (200, 256), (5, 3), (16, 400)]
    pixels = [photograph(rng, *size) for size in sizes]
    files = [jpeg(p[..., 0] if gray else p, quality=90, **options) for p in pixels]
    if tall:
        files = [turned(file) for file in files]
        sizes = [size[::-1] for size in sizes]
    whole = [np.array(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    for _ in range(40):
        boxes = random_boxes(rng, 1, sizes)
        rows, columns = (max(size[axis] for size in sizes) for axis in (0, 1))
        padded = torch.full((len(sizes), rows, columns, 3), 7, dtype=torch.uint8)
        Fill(Stored(files, sizes), np.arange(len(sizes)), [boxes], padded=padded).run()  # type: ignore[arg-type]
        for image, decoded, box in zip(whole, padded.numpy(), boxes[0], strict=True):
            top, left, height, width = box
            here = np.s_[top : top + height, left : left + width]
            assert np.array_equal(decoded[here], image[here]), box


def turned(file: bytes) -> bytes:
    """A JPEG of 4:2:2 as one of 4:4:0: the header's sampling factors and sides change places.

    The pixels then are another picture (its blocks come in another order), a valid one.
    """
    data = bytearray(file)
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = data[at + 2 : at + 4] + data[at : at + 2]
    assert data[at + 6] == 0x21
    data[at + 6] = 0x12
    return bytes(data)


def test_threads_share_a_batch(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = [(40, 50)] * 64
    files = [jpeg(photograph(rng, *size)) for size in sizes]
    stored, boxes = Stored(files, sizes), [random_boxes(rng, 2, sizes)]
    (alone,) = crops_of(stored, boxes, [32])
    crops = torch.zeros_like(alone)
    fill = Fill(stored, np.arange(64), boxes, [crops])  # type: ignore[arg-type]
    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(fill.run) for _ in range(4)]:
            job.result()
    assert torch.equal(crops, alone)
    crops.zero_()
    fill.run()  # nothing is left to do
    assert not crops.any()


def test_prefetching_reads_the_samples_and_little_else(tmp_path: Path) -> None:
    """200 samples of 40 kB anywhere in a file of 64 MB that is in no cache."""

    def read_so_far() -> int:
        told = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(told["read_bytes"])

    size, length = 1 << 26, 40_000
    file = tmp_path / "file"
    file.write_bytes(np.random.default_rng(0).bytes(size))
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    stored = Stored([bytes(1)] * 200, [(1, 1)] * 200)
    stored.data = np.memmap(file, np.uint8, mode="r")
    stored.length = np.full(200, length)
    stored.pointer = np.random.default_rng(1).permutation(size // length)[:200] * length
    read_at_random(stored)  # type: ignore[arg-type]
    wanted = np.zeros(size, bool)
    for start in stored.pointer:
        wanted[start : start + length] = True
    pages = wanted.reshape(-1, mmap.PAGESIZE).any(1)
    missing = int((pages & ~in_memory(stored.data)).sum()) * mmap.PAGESIZE
    if missing < 100 * length:
        pytest.skip("this system keeps the file in memory")
    before = read_so_far()
    Fill(stored, np.arange(200), [], padded=torch.empty(200, 1, 1, 3)).prefetch()  # type: ignore[arg-type]
    read = read_so_far() - before
    if read == 0:
        pytest.skip("this file system does not count what is read from it")
    assert missing <= read <= 1.3 * missing


def in_memory(data: np.ndarray) -> np.ndarray:
    """For each page of a mapped file whether it is in the page cache."""
    told = np.empty(len(data) // mmap.PAGESIZE, np.uint8)
    address, bytes_ = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(len(data))
    assert ctypes.CDLL(None).mincore(address, bytes_, ctypes.c_void_p(told.ctypes.data)) == 0
    return (told & 1).astype(bool)


def test_what_cannot_be_decoded_is_named() -> None:
    rng = np.random.default_rng(0)
    good = jpeg(photograph(rng, 40, 50))
    cmyk = io.BytesIO()
    Image.new("CMYK", (50, 40)).save(cmyk, "JPEG")
    for bad, why in (
        (good[: len(good) // 2], "Premature end"),
        (b"not a picture", "Not a JPEG file"),
        (jpeg(photograph(rng, 40, 51)), "it has 51 x 40 pixels, its row says 50 x 40"),
        (cmyk.getvalue(), "Unsupported color conversion"),
        (good[:300] + bytes(100) + good[400:], "Corrupt|Unsupported|Bogus|Huffman"),
    ):
        stored = Stored([good, bad], [(40, 50)] * 2)
        boxes = np.array([[[0, 0, 40, 50]] * 2])
        with pytest.raises(InputError, match=f"some.beton: sample 1 cannot be decoded .*({why})"):
            crops_of(stored, [boxes], [8])


def test_a_beton_has_what_fill_reads() -> None:
    declared = {field.name for field in dataclasses.fields(Beton)}
    assert {"data", "mode", "width", "height", "pointer", "length", "index", "path"} <= declared
