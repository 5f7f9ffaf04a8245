"""Limits: the bare work at the center of a stage, and nothing around it."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastproj.bench import Engine
from fastproj.core.linear import linear
from fastproj.data.beton import Beton


def decode(beton: Beton, workers: int) -> Engine:
    """Decode every whole image with libjpeg-turbo on ``workers`` threads."""

    def prepare() -> Callable[[], object]:
        import simplejpeg  # ImportError here: reported as missing

        def part(positions: np.ndarray) -> None:
            size = int((beton.width * beton.height).max()) * 3
            buffer = np.empty(size, np.uint8)
            for position in positions.tolist():
                simplejpeg.decode_jpeg(beton.stored(position), buffer=buffer)

        def call() -> None:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(part, np.array_split(np.arange(len(beton)), workers)))

        return call

    return Engine("decode alone", "limit", len(beton), prepare, "libjpeg-turbo, whole images")


def copy(shape: Sequence[int], device: torch.device, batch: int, images: int) -> Engine:
    """Copy uint8 batches of ``shape`` within the device, as many as ``images`` images fill."""
    times = -(-images // batch)

    def prepare() -> Callable[[], object]:
        source = torch.zeros(*shape, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)

        def call() -> None:
            for _ in range(times):
                target.copy_(source)

        return call

    return Engine("memory copy", "limit", times * batch, prepare, "of as many crops")


def convert(crops: Tensor) -> Engine:
    """One pass over the crops: read uint8, write float32."""
    out = torch.zeros(crops.shape, device=crops.device).contiguous(
        memory_format=torch.channels_last
    )
    note = "uint8 read, float32 written"
    return Engine("memory copy", "limit", len(crops), lambda: lambda: out.copy_(crops), note)


def products(
    count: int, rows: int, inner: int, columns: int, device: torch.device, work: int
) -> Engine:
    """``count`` float32 matrix products of (rows, inner) and (inner, columns)."""

    def prepare() -> Callable[[], object]:
        x = torch.randn(rows, inner, device=device)
        w = torch.randn(columns, inner, device=device)

        def call() -> None:
            for _ in range(count):
                linear(x, w)

        return call

    note = f"{count:,} of {rows} x {inner} by {inner} x {columns:,}"
    return Engine("matrix products", "limit", work, prepare, note)
