"""Encode one image as a beton stores it. Worker processes run this, so no FFCV and no torch."""

import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastproj.core.native import jpeg_damage
from fastproj.data.layout import JPEG, LONGEST, RAW, sample_digest


@dataclass(frozen=True)
class Store:
    """How a beton stores images.

    ``raw``: the pixels. ``jpeg``: compressed with ``quality`` and 4:2:0 chroma after the longer
    side is reduced to at most ``max_resolution`` pixels. ``square``: the raw pixels of the image
    resized to ``side`` × ``side``, with the original width and height in the sample's row.
    """

    kind: str
    quality: int | None = None
    max_resolution: int | None = None
    side: int | None = None


class Stored(NamedTuple):
    """A sample ready to be written. Sizes in pixels; ``digest`` from ``sample_digest``."""

    data: bytes
    mode: int
    width: int
    height: int
    label: int
    source_width: int
    source_height: int
    digest: bytes


class Unreadable(NamedTuple):
    """Why an image could not be read."""

    reason: str


Item = str | bytes | np.ndarray
"""An image: a file's path, a file's content, or uint8 pixels (H, W, 3), (H, W, 1) or (H, W)."""
MAX_PIXELS = 178_956_970  # Pillow's own limit: 512 MiB as RGB
GRAY = ("1", "L", "LA", "La", "F")  # PIL's modes with one channel of color, besides the wide "I…"


def _content(path: str) -> bytes:
    if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for ever
        raise ValueError("a pipe, socket or device, not a file")
    return Path(path).read_bytes()


def upright_rgb(item: Item, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """``item`` as an 8-bit RGB image, rotated as its EXIF says.

    ``info["gray"]`` of the result says whether it was gray. PIL converts gray, palette and CMYK
    images; alpha is dropped, as torchvision's loaders do; 16-bit gray is scaled to 8 bits. Raises
    whatever PIL raises for a broken file, and ``ValueError`` for damage of which libjpeg only
    warns, for pixels of other channels, and, before decoding, for more than ``max_pixels``.
    """
    if isinstance(item, np.ndarray):
        if item.ndim == 3 and item.shape[2] == 1:
            item = item[..., 0]
        if item.ndim == 3 and item.shape[2] != 3:
            raise ValueError(f"{item.shape[2]} channels; an image has 3 (RGB) or 1 (gray)")
        image = Image.fromarray(item).convert("RGB")
        image.info["gray"] = item.ndim == 2
        return image
    stored = item if isinstance(item, bytes) else _content(item)
    Image.MAX_IMAGE_PIXELS = None  # ours is the limit
    try:
        opened = Image.open(io.BytesIO(stored))
    except UnidentifiedImageError:  # names the BytesIO's address, which is another one every time
        raise ValueError("empty" if not stored else "no image of a known format") from None
    with opened as image:
        if image.width * image.height > max_pixels:
            raise ValueError(
                f"{image.width}x{image.height} pixels, and data.max_pixels is {max_pixels:,}"
            )
        image.load()
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):  # libjpeg makes RGB
            damage = jpeg_damage(stored, *image.size)
            if damage:
                raise ValueError(f"damaged JPEG: {damage}")
        upright = ImageOps.exif_transpose(image)
    return as_rgb(upright)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any of PIL's modes as 8-bit RGB; ``info["gray"]`` says whether it was gray.

    Raises ``ValueError`` for floating-point pixels.
    """
    gray = image.mode.startswith("I") or image.mode in GRAY
    if image.mode.startswith("I"):  # PIL's convert would clip 16 bits to 255: nearly all white
        wide = np.asarray(image, np.int64).clip(0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    rgb = image.convert("RGB")
    rgb.info = {"gray": gray}  # without the file's comment, which PIL would store again
    return rgb


def resized(image: Image.Image, store: Store) -> Image.Image:
    """``image`` at the size that the store keeps; bicubic, antialiased.

    Crops from the resized image should equal crops from the original. Measured on random resized
    crops (bilinear, 96 pixels) of 60 photographs stored as 160-pixel squares: crops differ from
    the original's by 1.6/255 with bicubic, 2.2 with bilinear, 2.4 with box and 1.5 with Lanczos,
    which costs 1.5 times as much as bicubic.
    """
    if store.kind == "square":
        assert store.side
        size = (store.side, store.side)
    elif store.kind == "jpeg" and store.max_resolution and max(image.size) > store.max_resolution:
        ratio = store.max_resolution / max(image.size)
        size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    else:
        return image
    return image.resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, label: int, store: Store) -> tuple[Stored, np.ndarray]:
    """Encode an upright RGB image; also return its histogram, int64 (3, 256)."""
    kept = resized(image, store)
    if max(kept.size + image.size) > LONGEST:
        raise ValueError(
            f"{image.width}x{image.height} pixels; a beton's limit is {LONGEST} per side"
        )
    if store.kind == "jpeg":
        buffer = io.BytesIO()
        kept.save(buffer, "JPEG", quality=store.quality, subsampling="4:2:0")
        mode, data = JPEG, buffer.getvalue()
    else:
        mode, data = RAW, kept.tobytes()
    source = image.size if store.kind == "square" else kept.size
    row = (mode, *kept.size, label, *source)
    histogram = np.array(kept.histogram(), np.int64).reshape(3, 256)
    return Stored(data, *row, digest=sample_digest(data, *row)), histogram


class Chunk(NamedTuple):
    """Encoded samples in order, their summed histogram, int64 (3, 256), how many were gray."""

    results: list[Stored | Unreadable]
    histogram: np.ndarray
    gray: int


def encode_chunk(
    items: Sequence[Item | Unreadable],
    labels: Sequence[int],
    store: Store,
    max_pixels: int = MAX_PIXELS,
) -> Chunk:
    """Encode a chunk of samples; those that were not read are passed on."""
    results: list[Stored | Unreadable] = []
    total, gray = np.zeros((3, 256), np.int64), 0
    for item, label in zip(items, labels, strict=True):
        if isinstance(item, Unreadable):
            results.append(item)
            continue
        try:
            image = upright_rgb(item, max_pixels)
            stored, histogram = encode(image, label, store)
        except Exception as error:  # PIL raises nearly anything on a broken file
            results.append(Unreadable(str(error) or type(error).__name__))
            continue
        results.append(stored)
        total += histogram
        gray += bool(image.info["gray"])
    return Chunk(results, total, gray)
