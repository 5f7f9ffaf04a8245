"""Command: raw images to betons, ``<split>.beton`` and its manifest ``<split>.json``.

    python data_prep/write_ffcv.py --data.dataset cifar10 --data.root DIR --data.out DIR
    python data_prep/write_ffcv.py --verify DIR/train.beton

Worker processes read, convert, resize, encode and hash; this process writes what they send in
sample order, so the file is the same to the byte whatever the number of workers.
"""

import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # run as a file: Python then looks beside it, not in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_prep.encode import Store, Stored, Unreadable, encode_chunk
from data_prep.progress import Progress
from data_prep.sources import Source, open_sources
from data_prep.workers import Workers
from data_prep.writer import Written, write_container
from fastproj import __version__
from fastproj.errors import InputError, SettingError, run_command
from fastproj.machine import cores
from fastproj.manifest import (
    FORMAT,
    Manifest,
    open_beton,
    pack_hashes,
    pack_names,
    replacing,
    verify,
    write_manifest,
)
from fastproj.settings import PREPARE, Settings, load

CHUNK = 16  # images a worker is handed at a time; more would cost memory, and wait at Ctrl-C
SMALL = ("cifar10", "cifar100", "stl10", "digits")  # stored raw by default


class SplitWriter:
    """Writes splits with one pool of worker processes; a context manager.

    ``workers`` processes (at least 1) encode as ``store`` says; at an unreadable image ``skip``
    leaves it out (the manifest lists it), otherwise ``InputError`` names it.
    """

    def __init__(self, store: Store, workers: int, skip: bool):
        self.store, self.workers, self.skip = store, workers, skip
        self.pool = Workers(workers)

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()

    def write(self, source: Source, out: Path, dataset: str, command: str) -> Manifest:
        """Write ``out/<split>.beton`` and its manifest; what was there stays until both are whole.

        The manifest takes its place first: a writer killed in between leaves a pair that
        ``open_beton`` refuses, because each knows the other's content digest.
        """
        beton = out / f"{source.split}.beton"
        histogram = np.zeros((3, 256), np.int64)
        unreadable: dict[int, str] = {}
        count = len(source.labels)
        square = self.store.kind == "square"
        with replacing(beton) as file, Progress(source.split, count) as progress:
            samples = self._encoded(source, histogram, unreadable, progress)
            written = write_container(file, samples, count, square)
            manifest = self._manifest(source, written, histogram, unreadable, dataset, command)
            write_manifest(manifest, beton.with_suffix(".json"))
        return manifest

    def _encoded(
        self,
        source: Source,
        histogram: np.ndarray,
        unreadable: dict[int, str],
        progress: Progress,
    ) -> Iterator[Stored]:
        """The stored samples in order; adds to ``histogram`` and ``unreadable`` on the way."""
        number = 0
        for results, counts in self._chunks(source):
            histogram += counts
            for result in results:
                if isinstance(result, Stored):
                    yield result
                elif self.skip:
                    unreadable[number] = result.reason
                else:
                    raise InputError(
                        f"cannot read {_place(source, number)}: {result.reason}; mend it, or "
                        "leave it out with --data.on_error skip"
                    )
                number += 1
            progress.update(len(results))

    def _chunks(self, source: Source) -> Iterator[tuple[list[Stored | Unreadable], np.ndarray]]:
        """``encode_chunk``'s results in order; a bounded number of chunks is under way."""
        waiting: deque[Future] = deque()
        for start in range(0, len(source.labels), CHUNK):
            chunk = slice(start, start + CHUNK)
            labels = source.labels[chunk].tolist()
            waiting.append(
                self.pool.submit(encode_chunk, list(source.images[chunk]), labels, self.store)
            )
            if len(waiting) > 2 * self.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _manifest(
        self,
        source: Source,
        written: Written,
        histogram: np.ndarray,
        unreadable: dict[int, str],
        dataset: str,
        command: str,
    ) -> Manifest:
        if not written.samples:
            raise InputError(f"split {source.split}: not one image could be read")
        mean, std = _mean_and_std(histogram)
        names = [name for i, name in enumerate(source.names) if i not in unreadable]
        return Manifest(
            format=FORMAT,
            fastproj=__version__,
            command=command,
            dataset=dataset,
            split=source.split,
            samples=written.samples,
            classes=source.classes,
            store=self.store.kind,
            quality=self.store.quality,
            max_resolution=self.store.max_resolution,
            side=self.store.side,
            mean=mean,
            std=std,
            file_bytes=written.file_bytes,
            sha256=written.sha256,
            content=written.content,
            skipped=tuple(
                {"source": source.names[i], "reason": reason} for i, reason in unreadable.items()
            ),
            hashes=pack_hashes(written.hashes),
            sources=pack_names(names),
        )


def _place(source: Source, number: int) -> str:
    image = source.images[number]
    return image if isinstance(image, str) else source.names[number]


def _mean_and_std(histogram: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel, in [0, 1], from the counts (3, 256): exact, in whatever order they came."""
    values = np.arange(256) / 255
    share = histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    return tuple(mean.tolist()), tuple(std.tolist())


def _verify(path: str) -> int:
    """Print each damage; exit code 1 if there is any."""
    start = time.perf_counter()
    beton = open_beton(path)
    with Progress("verify", len(beton)) as progress:
        damages = verify(path, progress.update)
    for damage in damages:
        where = "file" if damage.index is None else f"sample {damage.index} ({damage.source})"
        print(f"{path}: {where}: {damage.reason}")
    seconds = time.perf_counter() - start
    verdict = f"{len(damages)} damaged" if damages else "intact"
    rate = f"{len(beton) / seconds:,.0f} images/s, {len(beton.data) / seconds / 1e6:,.0f} MB/s"
    print(f"{path}: {len(beton):,} images in {seconds:.1f} s ({rate}): {verdict}")
    return 1 if damages else 0


def _store(settings: Settings) -> Store:
    """The store asked for; ``SettingError`` for a setting that this store would ignore."""
    data = settings.data
    small = data.dataset in SMALL
    kind = data.store if data.store != "auto" else "raw" if small else "jpeg"
    kept = {}
    for name, owner in (("quality", "jpeg"), ("max_resolution", "jpeg"), ("side", "square")):
        if kind == owner:
            kept[name] = getattr(data, name)
        elif settings.sources()[f"data.{name}"] != "default":
            raise SettingError(f"data.{name} needs --data.store {owner}, the store here is {kind}")
    return Store(kind, **kept)


def _write(settings: Settings, command: str) -> int:
    """Write every split asked for, one line each."""
    data = settings.data
    for name in ("dataset", "out"):
        if getattr(data, name) is None:
            raise SettingError(f"data.{name} is missing: give --data.{name} VALUE")
    store = _store(settings)
    out = Path(data.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make folder {out}: {error.strerror}") from None
    sources = open_sources(data.dataset, data.root, data.split, data.download)
    with SplitWriter(store, data.workers or cores(), data.on_error == "skip") as writer:
        for source in sources:
            start = time.perf_counter()
            manifest = writer.write(source, out, data.dataset, command)
            seconds = time.perf_counter() - start
            skipped = f", {len(manifest.skipped)} skipped" if manifest.skipped else ""
            print(
                f"{out / source.split}.beton: {manifest.samples:,} images{skipped}, "
                f"{len(manifest.classes)} classes, {manifest.file_bytes:,} bytes "
                f"in {seconds:.1f} s ({manifest.samples / seconds:,.0f} images/s)",
                flush=True,
            )
    return 0


def main(argv: Sequence[str]) -> int:
    """Write every split asked for, or verify one file; see the module's docstring."""
    program = "data_prep/write_ffcv.py"
    settings = load(PREPARE, argv, f"python {program}", "Raw images to betons.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clean up, then leave
    try:
        if settings.data.verify:
            return _verify(settings.data.verify)
        return _write(settings, shlex.join(["python", program, *argv]))
    except KeyboardInterrupt:
        print("stopped: nothing more was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    run_command(main)
