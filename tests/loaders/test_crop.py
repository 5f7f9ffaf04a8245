"""Crops by matrix products: the same pixels whatever sums them, and in whatever order."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastproj.loaders.crop import compiled_crop_batch, crop_batch, resize_matrices
from tests.support.betons import photograph

ROOT = Path(__file__).parents[2]
SIZES = (8, 32, 100)
KINDS = ("differences of one", "checkerboard", "few levels", "noise", "photographs")


def images(kind: str, count: int = 3, height: int = 48, width: int = 60) -> Tensor:
    """(count, 3, height, width) uint8. All but noise and photographs are full of ties."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    pictures = {
        "differences of one": (x + y) % 2 + 100,
        "checkerboard": (x + y) % 2 * 255,
        "few levels": rng.integers(0, 17, (count, 3, height, width)) * 15,  # as the digits
        "noise": rng.integers(0, 256, (count, 3, height, width)),
    }
    if kind == "photographs":
        taken = [np.asarray(photograph(rng, width, height)) for _ in range(count)]
        return torch.from_numpy(np.stack(taken)).movedim(-1, 1).contiguous()
    pixels = np.broadcast_to(pictures[kind], (count, 3, height, width))
    return torch.from_numpy(pixels.astype(np.uint8))


def boxes(views: int = 4, count: int = 3, height: int = 48, width: int = 60) -> Tensor:
    rng = np.random.default_rng(1)
    h = rng.integers(1, height + 1, (views, count))
    w = rng.integers(1, width + 1, (views, count))
    h[0], w[0] = height, width  # the whole image
    h[1], w[1] = height // 2, width // 2  # scales that make ties
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    return torch.from_numpy(np.stack([top, left, h, w], -1))


def digest() -> str:
    """Of every kind of image at every size."""
    crops = [crop_batch(images(kind), boxes(), size) for kind in KINDS for size in SIZES]
    return hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in crops)).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_the_type_of_the_products_changes_no_pixel(kind: str) -> None:
    for size in SIZES:
        crops = crop_batch(images(kind), boxes(), size)
        for dtype in (torch.float16, torch.float64):
            assert torch.equal(crop_batch(images(kind), boxes(), size, dtype), crops), (size, dtype)


def exact_weights(start: int, length: int, size: int, full: int) -> np.ndarray:
    """(size, full) int64 weights that sum to 2048, from the formula in integers."""
    weights = np.zeros((size, full), np.int64)
    for i in range(size):
        triangle = []
        for j in range(length):
            distance = abs((2 * j + 1) * size - (2 * i + 1) * length)  # · 1 / (2 · size)
            triangle.append(max(0, 2 * max(size, length) - distance))
        ends = np.cumsum(triangle)
        rounded = np.round(ends.astype(np.float32) / np.float32(ends[-1] / 2048)).astype(np.int64)
        weights[i, start : start + length] = np.diff(rounded, prepend=0)
    return weights


@pytest.mark.parametrize("kind", ["checkerboard", "few levels", "photographs"])
def test_pixels_are_those_of_integer_sums(kind: str) -> None:
    """Sums of int64, exact in every order; rounded to float16 once in between and once after."""
    batch, cut = images(kind), boxes(views=2)
    for size in (8, 32):
        crops = crop_batch(batch, cut, size)
        for view, slot in np.ndindex(2, len(batch)):
            top, left, h, w = cut[view, slot].tolist()
            across, down = exact_weights(left, w, size, 60), exact_weights(top, h, size, 48)
            eighths = np.einsum("chw,jw->chj", batch[slot].numpy().astype(np.int64), across) / 256
            eighths = np.round(eighths.astype(np.float16)).astype(np.int64)
            pixels = np.einsum("ih,chj->cij", down, eighths) / (8 * 2048)
            pixels = np.floor(pixels.astype(np.float16) + np.float16(0.5)).clip(0, 255)
            assert np.array_equal(crops[view, slot].numpy(), pixels), (size, view, slot)


def test_weights_sum_to_one_in_any_order() -> None:
    lengths = torch.arange(1, 501)
    for size in (7, 96, 224):
        weights = resize_matrices(torch.zeros_like(lengths), lengths, size, 500)
        assert (weights >= 0).all() and (weights * 2048 == (weights * 2048).round()).all()
        assert (weights.sum(-1) == 1).all() and (weights.flip(-1).cumsum(-1)[..., -1] == 1).all()


@pytest.mark.slow  # processes
@pytest.mark.parametrize(("instructions", "threads"), [("SSE", 1), ("AVX2", 2)])
def test_older_processors_cut_the_same_pixels(instructions: str, threads: int) -> None:
    """torch, oneDNN and MKL told to do without this processor's newer instructions."""
    older = {
        "SSE": ("default", "SSE41", "SSE4_2"),
        "AVX2": ("avx2", "AVX2", "AVX2"),
    }[instructions]
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    done = subprocess.run(
        [sys.executable, "-c", "from tests.loaders.test_crop import digest; print(digest())"],
        env={**os.environ, **dict(zip(names, older, strict=True)), "OMP_NUM_THREADS": str(threads)},
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == digest()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled_crops_have_the_same_pixels(dtype: torch.dtype) -> None:
    for kind in KINDS:
        crops = compiled_crop_batch()(images(kind), boxes(), SIZES[0], dtype)
        assert torch.equal(crops, crop_batch(images(kind), boxes(), SIZES[0])), kind


def test_padded_batches_of_many_shapes_need_three_graphs() -> None:
    """Photographs pad each batch to its own height and width; each graph costs seconds."""
    counter, graphs = CompileCounterWithBackend("eager"), []
    torch.compiler.reset()
    for height, width in ((40, 40), (40, 37), (39, 40), (37, 37), (35, 33), (40, 39), (12, 30),
                          (6, 4), (64, 48), (40, 40), (16, 16), (300, 200)):  # fmt: skip
        batch, inside = images("noise", 3, height, width), boxes(2, 3, height, width)
        with torch.compiler.set_stance("default", force_backend=counter):  # without C++
            crops = compiled_crop_batch()(batch, inside, 16)
        assert torch.equal(crops, crop_batch(batch, inside, 16)), (height, width)
        graphs.append(counter.frame_count)
    torch.compiler.reset()
    assert graphs == [1, 2, *[3] * 10]  # one shape; widths that change; heights as well


@pytest.mark.gpu
def test_a_gpu_cuts_the_pixels_of_a_cpu() -> None:
    for cut in (crop_batch, compiled_crop_batch()):
        for kind in KINDS:
            for size in SIZES:
                crops = cut(images(kind).cuda(), boxes().cuda(), size).cpu()
                assert torch.equal(crops, crop_batch(images(kind), boxes(), size)), (kind, size)
