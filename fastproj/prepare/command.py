"""Command: raw images to betons, ``<split>.beton`` and its manifest ``<split>.json``.

    fastproj prepare --data.dataset cifar10 --data.root DIR --data.out DIR
    fastproj prepare --data.dataset imagenet --data.root DIR --data.out DIR --data.shard 3/64
    fastproj prepare --verify DIR/train.beton
    fastproj prepare --adopt DIR/train.ffcv

Worker processes read, convert, resize, encode and hash the images. This process writes their
results in sample order, so the file is the same, byte for byte, for any number of workers.
"""

import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fastproj.core.errors import InputError, SettingError
from fastproj.core.machine import cores
from fastproj.core.progress import Progress
from fastproj.data.beton import open_part
from fastproj.data.manifest import Manifest
from fastproj.data.shards import set_name, shard_name
from fastproj.data.verify import verify
from fastproj.prepare.adopt import adopt
from fastproj.prepare.encode import Store
from fastproj.prepare.shards import left_behind
from fastproj.prepare.sources import open_sources
from fastproj.prepare.splits import SplitWriter, make_folder
from fastproj.settings import PREPARE, PrepareSettings, load, stored


def _verify(path: str) -> int:
    """Print each damage; exit code 1 if there is any."""
    start = time.perf_counter()
    beton = open_part(Path(path))
    with Progress(len(beton), "verify") as progress:
        damages = verify(path, progress.update)
    for damage in damages:
        where = "file" if damage.index is None else f"sample {damage.index} ({damage.source})"
        print(f"{damage.file}: {where}: {damage.reason}")
    seconds = time.perf_counter() - start
    verdict = f"{len(damages)} damaged" if damages else "intact"
    speed = beton.manifest.file_bytes / seconds / 1e6
    rate = f"{len(beton) / seconds:,.0f} images/s, {speed:,.0f} MB/s"
    print(f"{path}: {len(beton):,} images in {seconds:.1f} s ({rate}): {verdict}")
    return 1 if damages else 0


def _listed(path: str | None) -> list[str] | None:
    """The class names in a file, one per line; None without a file."""
    if path is None:
        return None
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"data.classes {path}: not UTF-8 ({error}): save it as that") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise InputError(f"data.classes {path}: lists no class; give one name per line")
    return names


def _adopt(settings: PrepareSettings, command: str) -> int:
    """Write the manifest of another program's file and print one line."""
    data = settings.data
    assert data.adopt is not None
    path, fields = Path(data.adopt), data.fields
    if fields is not None and len(fields) != 2:
        raise SettingError("data.fields names the image and the label: give IMAGE,LABEL")
    start = time.perf_counter()
    beton = adopt(path, fields, _listed(data.classes), command)
    print(
        f"{path}: adopted, {len(beton):,} images, {len(beton.classes)} classes, "
        f"{beton.manifest.store} store, in {time.perf_counter() - start:.1f} s: "
        f"{path.with_suffix('.json')}"
    )
    return 0


def _say(path: Path, manifest: Manifest, gray: int, seconds: float) -> None:
    """Print one line on a file that was written."""
    skipped = f", {len(manifest.skipped)} skipped" if manifest.skipped else ""
    print(
        f"{path}: {manifest.samples:,} images"
        + (f", {gray:,} gray ones stored as RGB" if gray else "")
        + f"{skipped}, {len(manifest.classes)} classes, {manifest.store}, "
        f"{manifest.file_bytes:,} bytes in {seconds:.1f} s "
        f"({manifest.samples / seconds:,.0f} images/s)",
        flush=True,
    )


def _write(settings: PrepareSettings, command: str) -> int:
    """Write every requested split and print one line for each file."""
    data = settings.data
    if data.dataset is None or data.out is None:
        name = "out" if data.dataset else "dataset"
        raise SettingError(f"data.{name} is missing: give --data.{name} VALUE")
    kind = stored(data.store, data.dataset)
    kept = {"jpeg": ("quality", "max_resolution"), "square": ("side",)}.get(kind, ())
    store = Store(kind, **{name: getattr(data, name) for name in kept})
    out = make_folder(Path(data.out))
    sources = open_sources(
        data.dataset,
        data.root,
        data.split,
        data.download,
        labels=data.labels,
        classes=_listed(data.classes),
        val_share=data.val_share,
        seed=data.seed,
    )
    index = data.fields != ("image", "label")
    if data.fields not in (None, ("image", "label"), ("image", "label", "index")):
        raise SettingError("data.fields must be image,label or image,label,index")
    if kind == "square" and not index:
        raise SettingError(
            "data.fields image,label leaves no place for the original size that data.store square "
            "keeps: leave one of them out"
        )
    shards = [(number, data.shards) for number in range(data.shards)]
    if data.shard is not None:
        number, of = map(int, data.shard.split("/"))
        shards = [(number, of)]
    of = shards[0][1]
    skip, workers = data.on_error == "skip", data.workers or cores()
    with SplitWriter(store, workers, skip, index, data.max_pixels) as writer:
        for source in sources:
            whole = f"{source.split}.beton"
            for shard in shards:
                start = time.perf_counter()
                manifest = writer.write(source, out, data.dataset, command, shard)
                name = shard_name(source.split, shard[0]) if of > 1 else whole
                _say(out / name, manifest, writer.gray, time.perf_counter() - start)
            old = left_behind(out, source.split, of)
            if old:
                written = set_name(source.split, of) if of > 1 else whole
                print(
                    f"note: of a set of more files {len(old)} are left, from {old[0]} on, and no "
                    f"part of {written}: remove them",
                    file=sys.stderr,
                )
    return 0


def _alone(settings: PrepareSettings, name: str, read: Sequence[str]) -> None:
    """``SettingError`` for what is given beside ``name`` although only ``read`` is read with it."""
    if settings.flat().get(name) is None:
        return
    for other, source in settings.sources().items():
        if source != "default" and other not in (name, *read):
            raise SettingError(f"{name} does not read {other}: leave it out")


def main(argv: Sequence[str]) -> int:
    """Write every requested split, or verify or adopt one file; see the module's docstring."""
    settings = load(PREPARE, argv, "fastproj prepare", "Turn raw images into betons.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: clean up, then exit
    try:
        _alone(settings, "data.verify", ())
        _alone(settings, "data.adopt", ("data.fields", "data.classes"))
        if settings.data.verify:
            return _verify(settings.data.verify)
        command = shlex.join(["fastproj", "prepare", *argv])
        return _adopt(settings, command) if settings.data.adopt else _write(settings, command)
    except KeyboardInterrupt:
        print("stopped: nothing more was written", file=sys.stderr)
        return 130
