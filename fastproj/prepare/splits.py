"""Write one split of raw images as a beton and its manifest, with worker processes."""

import base64
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastproj import __version__
from fastproj.core.errors import InputError
from fastproj.core.files import remove_left_behind, replacing
from fastproj.core.machine import cores
from fastproj.core.progress import Progress
from fastproj.data.beton import Beton, open_beton
from fastproj.data.manifest import (
    FORMAT,
    Manifest,
    Shard,
    is_manifest,
    mean_and_std,
    pack_hashes,
    pack_names,
    waiting_manifest,
    write_manifest,
)
from fastproj.data.shards import shard_name
from fastproj.prepare.encode import (
    MAX_PIXELS,
    Chunk,
    Item,
    Store,
    Stored,
    Unreadable,
    encode_chunk,
)
from fastproj.prepare.shards import identity, part
from fastproj.prepare.sources import Lazy, Source
from fastproj.prepare.workers import Workers
from fastproj.prepare.writer import Written, write_container

CHUNK = 16  # images per task of a worker; more cost memory and delay Ctrl-C


class SplitWriter:
    """Writes splits with one pool of worker processes; a context manager.

    ``workers`` processes (at least 1) encode as ``store`` says. With ``skip``, an unreadable image
    is left out and the manifest lists it; otherwise ``InputError`` names it. A file of more than
    ``max_pixels`` counts as unreadable. Without ``index`` the file has two fields, as FFCV's own
    loops expect.
    """

    def __init__(
        self,
        store: Store,
        workers: int,
        skip: bool,
        index: bool = True,
        max_pixels: int = MAX_PIXELS,
    ):
        self.store, self.workers, self.skip, self.index = store, workers, skip, index
        self.max_pixels = max_pixels
        self.gray = 0  # gray images among those last written, which are stored as RGB
        self.pool = Workers(workers)

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()

    def write(
        self,
        source: Source,
        out: Path,
        dataset: str,
        command: str,
        shard: tuple[int, int] = (0, 1),
    ) -> Manifest:
        """Write ``out/<split>.beton`` and its manifest; older files stay until both are complete.

        ``shard``: (i, N) writes file i of N, ``out/<split>-<i>.beton``. A writer killed between the
        renames of the two files leaves the new manifest under a name where ``open_beton`` finds it.
        """
        number, of = shard
        whole, beton = source, out / f"{source.split}.beton"
        if of > 1:
            source, beton = part(whole, number, of), out / shard_name(source.split, number)
        described, histogram = beton.with_suffix(".json"), np.zeros((3, 256), np.int64)
        # Beside its beton a manifest may be damaged, and is written again.
        if described.exists() and not beton.exists() and not is_manifest(described):
            raise InputError(
                f"{described}: would be overwritten, and is no manifest of fastproj: move it away, "
                "or give another folder"
            )
        unreadable: dict[int, str] = {}
        count = len(source.labels)
        square = self.store.kind == "square"
        with replacing(beton) as file, Progress(count, beton.stem) as progress:
            samples = self._encoded(source, histogram, unreadable, progress)
            written = write_container(file, samples, count, square, self.index)
            manifest = self._manifest(source, written, histogram, unreadable, dataset, command)
            if of > 1:
                settings = (dataset, self.index, self.max_pixels, of)
                shared = identity(whole, self.store, *settings)
                counts = base64.b64encode(histogram.astype("<i8").tobytes()).decode()
                digests = base64.b64encode(written.digests).decode()
                manifest = replace(manifest, shard=Shard(number, of, shared, counts, digests))
            waiting = waiting_manifest(described, written.content)
            write_manifest(manifest, waiting)
        waiting.replace(described)
        remove_left_behind(described)
        return manifest

    def _encoded(
        self,
        source: Source,
        histogram: np.ndarray,
        unreadable: dict[int, str],
        progress: Progress,
    ) -> Iterator[Stored]:
        """Yield the stored samples in order; update ``histogram`` and ``unreadable``."""
        number = self.gray = 0
        for chunk in self._chunks(source):
            histogram += chunk.histogram
            self.gray += chunk.gray
            for result in chunk.results:
                if isinstance(result, Stored):
                    yield result
                elif self.skip:
                    unreadable[number] = result.reason
                else:
                    raise InputError(
                        f"cannot read {_place(source, number)}: {result.reason}; fix it, or "
                        "leave it out with --data.on_error skip"
                    )
                number += 1
            progress.update(len(chunk.results))

    def _chunks(self, source: Source) -> Iterator[Chunk]:
        """Yield ``encode_chunk``'s results in order, with a bounded number of chunks pending."""
        waiting: deque[Future] = deque()
        for start in range(0, len(source.labels), CHUNK):
            chunk = slice(start, start + CHUNK)
            labels = source.labels[chunk].tolist()
            images = [_read(source, start + at) for at in range(len(labels))]
            waiting.append(
                self.pool.submit(encode_chunk, images, labels, self.store, self.max_pixels)
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
            raise InputError(f"split {source.split}: no image could be read")
        mean, std = mean_and_std(histogram)
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


def write_beton(
    source: Source,
    out: str | os.PathLike,
    store: Store | None = None,
    *,
    dataset: str = "custom",
    workers: int = 0,
    skip: bool = False,
) -> Beton:
    """Write ``source`` as ``out/<split>.beton`` with its manifest, and open it.

    ``store`` None: an array of pixels stays raw, files and what ``Lazy`` reads become JPEG of
    quality 90. ``dataset`` is kept in the manifest. ``workers`` processes encode (0: one per core);
    a script that calls this needs ``if __name__ == "__main__":``, because they import it. With
    ``skip``, unreadable images are left out. Raises ``InputError`` for images that cannot be read
    or a folder that cannot be written.
    """
    if store is None:
        raw = isinstance(source.images, np.ndarray)
        store = Store("raw") if raw else Store("jpeg", quality=90)
    folder = make_folder(Path(out))
    with SplitWriter(store, workers or cores(), skip) as writer:
        writer.write(source, folder, dataset, "fastproj.write_beton")
    return open_beton(folder / f"{source.split}.beton")


def _read(source: Source, number: int) -> Item | Unreadable:
    """An image, or why its source does not give it."""
    try:
        return source.images[number]
    except Exception as error:  # a damaged page or member, or code of the user's
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        return Unreadable(" ".join(f"{kind}{error}".split()))


def make_folder(path: Path) -> Path:
    """Create ``path`` and its parents if missing. Raises ``InputError`` where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create folder {path}: {error.strerror}") from None
    return path


def _place(source: Source, number: int) -> str:
    if isinstance(source.images, Lazy | np.ndarray):
        return source.names[number]
    return source.images[number]
