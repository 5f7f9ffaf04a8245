"""Small betons for tests, written by the real writer from images the tests make."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from fastproj.core.files import replacing
from fastproj.data.beton import Beton, open_beton
from fastproj.data.manifest import FORMAT, Manifest, pack_hashes, pack_names, write_manifest
from fastproj.data.shards import set_name
from fastproj.prepare.encode import Store, encode, upright_rgb
from fastproj.prepare.sources import Source
from fastproj.prepare.splits import SplitWriter
from fastproj.prepare.writer import write_container


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth colors with edges, so that JPEG and resizing have something to get wrong."""
    coarse = rng.integers(0, 256, (max(height // 16, 2), max(width // 16, 2), 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image.paste((255, 255, 255), (width // 4, height // 4, width // 2, height // 2))
    return image


def digit_like(rng: np.random.Generator, count: int, side: int, classes: int) -> Source:
    """``count`` square images whose class shows in the brightness of one of their columns."""
    labels = np.arange(count) % classes
    images = rng.integers(0, 100, (count, side, side, 3), dtype=np.uint8)
    images[np.arange(count), :, labels % side] = 255
    names = tuple(f"c{i}" for i in range(classes))
    return Source("train", names, images, labels, [f"image {i}" for i in range(count)])


def half_drawn(split: str, count: int) -> Source:
    """``count`` images of 4 classes as ``digit_like`` makes them; half of the labels are drawn.

    Otherwise every run would be right on all images.
    """
    rng = np.random.default_rng(count)
    source = digit_like(rng, count, 12, 4)
    labels = np.where(rng.random(count) < 0.5, rng.integers(0, 4, count), source.labels)
    return replace(source, split=split, labels=labels)


def photographs(rng: np.random.Generator, folder: Path, count: int) -> Source:
    """``count`` JPEG files of many sizes and shapes."""
    folder.mkdir(parents=True)
    for i in range(count):
        width, height = rng.integers(60, 160, 2).tolist()
        photograph(rng, width, height).save(folder / f"{i}.jpg", quality=95)
    files = [str(folder / f"{i}.jpg") for i in range(count)]
    return Source("all", ("a", "b"), files, np.arange(count) % 2, files)


def write(source: Source, out: Path, store: Store) -> Beton:
    """The split as a beton under ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    with SplitWriter(store, workers=1, skip=False) as writer:
        writer.write(source, out, "test", "test")
    return open_beton(out / f"{source.split}.beton")


def write_shards(source: Source, out: Path, store: Store, of: int) -> Beton:
    """The split as a set of ``of`` files under ``out``, the last one first."""
    out.mkdir(parents=True, exist_ok=True)
    with SplitWriter(store, workers=1, skip=False) as writer:
        for number in reversed(range(of)):
            writer.write(source, out, "test", "test", (number, of))
    return open_beton(out / set_name(source.split, of))


def write_here(source: Source, out: Path, store: Store) -> Beton:
    """The same without a worker process, which imports the main module again; mean and std are
    not the images'."""
    out.mkdir(parents=True, exist_ok=True)
    pairs = zip(source.images, source.labels.tolist(), strict=True)
    samples = [encode(upright_rgb(image), label, store)[0] for image, label in pairs]
    path = out / f"{source.split}.beton"
    with replacing(path) as file:
        written = write_container(file, iter(samples), len(samples), store.kind == "square")
    manifest = Manifest(
        FORMAT, "0", "test", "test", source.split, written.samples, tuple(source.classes),
        store.kind, store.quality, store.max_resolution, store.side, (0.5,) * 3, (0.25,) * 3,
        written.file_bytes, written.sha256, written.content, (), pack_hashes(written.hashes),
        pack_names(list(source.names)),
    )  # fmt: skip
    write_manifest(manifest, path.with_suffix(".json"))
    return open_beton(path)
