"""What the commands read of their own: prepare, report, bench and demo."""

from dataclasses import dataclass

from fastproj.settings.checkers import (
    Bool,
    Choice,
    File,
    Float,
    Int,
    KeyOrAddress,
    OrNull,
    Part,
    Texts,
)
from fastproj.settings.schema import Loaded, Needs, Schema, setting

_count = Int(low=1)

SMALL = (  # stored raw by default
    *("cifar10", "cifar100", "stl10", "digits", "transfer:mnist", "transfer:fashion_mnist"),
    *(f"torchvision:{name}" for name in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "SVHN")),
)


def stored(kind: str, dataset: str | None) -> str:
    """What ``data.store`` means for this set: auto is raw for a small one, or jpeg."""
    return kind if kind != "auto" else "raw" if dataset in SMALL else "jpeg"


def _only(wanted: str) -> Needs:
    return Needs(
        f"data.store is {wanted}",
        ("data.store", "data.dataset"),
        lambda kind, dataset: stored(kind, dataset) == wanted,
    )


@dataclass(frozen=True)
class Raw:
    """raw images to a beton and its manifest"""

    dataset: str | None = setting(
        OrNull(KeyOrAddress("fastproj.prepare.sources:DATASETS", "torchvision", "transfer", "hf")),
        "what to read; needed unless data.verify or data.adopt is given",
    )
    root: str | None = setting(
        OrNull(File()), "folder of the raw images, or their archive, csv or parquet file"
    )
    out: str | None = setting(OrNull(File()), "folder to write <split>.beton and <split>.json into")
    split: str = setting(Choice("all", "train", "val", "unlabeled"), "all: every split", "all")
    download: bool = setting(
        Bool(),
        "fetch the set first, torchvision's into data.root, hf:OWNER/NAME into"
        " data.root/OWNER--NAME",
        False,
    )
    labels: bool = setting(Bool(), "false: every image is unlabeled", True)
    classes: str | None = setting(
        OrNull(File()), "file of class names, one per line: only these, in this order"
    )
    val_share: float = setting(
        Float(low=0, high=0.9), "fraction of each class of train that becomes val", 0.0
    )
    seed: int = setting(
        Int(0, 2**32 - 1), "chooses the images of val", 0,
        needs=Needs("data.val_share is above 0", ("data.val_share",), bool),
    )  # fmt: skip
    store: str = setting(
        Choice("auto", "raw", "jpeg", "square"), "auto: raw if small, or jpeg", "auto"
    )
    quality: int = setting(Int(1, 100), "JPEG quality", 90, needs=_only("jpeg"))
    max_resolution: int | None = setting(
        OrNull(_count),
        "longest side in the jpeg store, pixels; null: as is",
        needs=_only("jpeg"),
    )
    side: int = setting(Int(8), "side in the square store, pixels", 160, needs=_only("square"))
    fields: tuple[str, ...] | None = setting(
        OrNull(Texts()),
        "image,label: leave out the index, for loops over FFCV's two fields; with data.adopt: the"
        " names of image and label there",
    )
    max_pixels: int = setting(
        _count, "a larger image is not decoded but counts as unreadable", 178_956_970
    )
    shards: int = setting(
        Int(1, 100_000), "files to write each split as: <split>-00000.beton and so on", 1,
        needs=Needs("data.shard is null", ("data.shard",), lambda shard: shard is None),
    )  # fmt: skip
    shard: str | None = setting(
        OrNull(Part(100_000)),
        "write only file i of N, from 0, while other processes write the others",
    )
    workers: int = setting(Int(0), "processes; 0: every core this process may use", 0)
    on_error: str = setting(
        Choice("stop", "skip"), "at an unreadable image: end, or leave it out", "stop"
    )
    adopt: str | None = setting(
        OrNull(File()), "FFCV file of another program: write a manifest beside it, to train on it"
    )
    verify: str | None = setting(
        OrNull(File()), "beton to read whole and compare with its manifest"
    )


@dataclass(frozen=True)
class PrepareSettings(Loaded):
    """Settings of ``data_prep/write_ffcv.py``."""

    data: Raw


PREPARE = Schema(PrepareSettings)


@dataclass(frozen=True)
class Report:
    """what is written, and where"""

    out: str | None = setting(
        OrNull(File()),
        "page to write; null: report.html in the folder of the run or study, of several runs here",
    )
    figures: str | None = setting(
        OrNull(File()), "folder to write each figure into as well, as SVG and PNG"
    )
    watch: int = setting(
        Int(0), "seconds between refreshes until the runs have ended; 0: write once", 0
    )


@dataclass(frozen=True)
class ReportSettings(Loaded):
    """Settings of ``fastproj report``."""

    report: Report


REPORT = Schema(ReportSettings)


@dataclass(frozen=True)
class Bench:
    """what is measured, and on which images"""

    photos: str | None = setting(
        OrNull(File()), "jpeg beton of photographs: decode, loaders, chain, start, growth"
    )
    squares: str | None = setting(OrNull(File()), "square beton of photographs: loaders")
    small: str | None = setting(
        OrNull(File()),
        "raw beton of small images: loaders, step, published, growth, endtoend",
    )
    device: str = setting(
        Choice("auto", "cpu", "cuda"), "where to compute; auto: cuda if there", "auto"
    )
    workers: int = setting(Int(0), "loader threads; 0: every core this process may use", 0)
    repeats: int = setting(_count, "measured calls, after the warm-up", 5)
    out: str = setting(
        File(),
        "JSON file to write, and beside it a picture; gpu: folder of its files",
        "bench-results/bench.json",
    )
    part: str = setting(
        Choice("all", "correctness", "cifar10", "imagenet100"), "gpu: what to run", "all"
    )
    items: tuple[str, ...] | None = setting(
        OrNull(Texts()), "gpu: only these items of the part, in quotes; null: all"
    )
    tiny: bool = setting(Bool(), "gpu: with so little that a CPU does it, to try it out", False)


@dataclass(frozen=True)
class BenchSettings(Loaded):
    """Settings of ``fastproj.bench``."""

    bench: Bench


BENCH = Schema(BenchSettings)


@dataclass(frozen=True)
class Demo:
    """the whole way through on a small set"""

    dataset: str = setting(Choice("digits", "cifar10"), "cifar10 is downloaded (170 MB)", "digits")
    data: str = setting(File(), "folder for raw images and betons", "data")
    seed: int = setting(Int(0, 2**32 - 1), "fixes weights, order, crops and views", 0)


@dataclass(frozen=True)
class DemoSettings(Loaded):
    """Settings of ``fastproj.demo``."""

    demo: Demo


DEMO = Schema(DemoSettings)
