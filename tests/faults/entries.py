"""One function per fault: it makes one try in an empty folder and says what was lost.

Empty text: nothing was lost. Each try runs in a process of its own, which may fork. Nothing here
computes a gradient before it forks: autograd refuses in a process forked after that.
"""

import multiprocessing
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import torch

from fastproj.core.errors import InputError
from fastproj.data.beton import open_beton
from fastproj.prepare.encode import Store
from fastproj.prepare.sources import Source
from fastproj.prepare.splits import SplitWriter
from fastproj.runs import checkpoint
from tests.support.betons import digit_like, write

FORK = multiprocessing.get_context("fork")
PAGE = 4096  # bytes that a tmpfs gives out at once
ORPHAN = 10.0  # seconds after which a worker must have followed its killed writer


def _sources() -> tuple[Source, Source]:
    rng = np.random.default_rng(0)
    return digit_like(rng, 64, 12, 4), digit_like(rng, 400, 12, 4)


def _pair(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "train.beton").read_bytes(), (folder / "train.json").read_bytes()


def _refused(action: Callable[[], object]) -> str:
    """What is wrong with how ``action`` fails: it must fail with one line that names the reason."""
    try:
        action()
    except InputError as error:
        named = "No space left" in str(error) or "Read-only" in str(error)
        return "" if named and "\n" not in str(error) else f"the reason: {error}"
    return "the error: a write that cannot work was reported as done"


def _victim(work: Callable[..., None], folder: Path) -> tuple[BaseProcess, Connection]:
    """A process that does ``work`` without end, and what it tells; it ends with its reader."""
    reader, writer = FORK.Pipe(duplex=False)

    def begin() -> None:
        reader.close()
        work(folder, writer)

    process = FORK.Process(target=begin)
    process.start()
    writer.close()
    return process, reader


def _kill(process: BaseProcess) -> None:
    assert process.is_alive(), "it ended before the kill"
    process.kill()
    process.join()


def _write_for_ever(folder: Path, told: Connection) -> None:
    old, new = _sources()
    with SplitWriter(Store("raw"), workers=1, skip=False) as writer:
        while True:
            for source in (new, old):
                writer.write(source, folder, "test", "test")
                told.send(source.split)


def kill_beton_writer(seed: int, folder: Path) -> str:
    """SIGKILL of a process that writes betons over each other"""
    whole = [folder / "old", folder / "new", folder / "written"]
    whole[2].mkdir()
    process, told = _victim(_write_for_ever, whole[2])
    told.recv()
    time.sleep(random.Random(seed).uniform(0, 0.2))
    workers = psutil.Process(process.pid).children(recursive=True)
    _kill(process)
    _, alive = psutil.wait_procs(workers, ORPHAN)
    if alive:
        return f"{len(alive)} processes that outlive the writer by {ORPHAN:g} s"
    for source, place in zip(_sources(), whole, strict=False):
        write(source, place, Store("raw"))
    betons = [_pair(place)[0] for place in whole]
    try:
        open_beton(whole[2] / "train.beton")
    except InputError as error:
        lost = f"the older beton: {error}"
    else:
        lost = "" if betons[2] in betons[:2] else "the content: neither the old nor the new one"
    write(_sources()[1], whole[2], Store("raw"))
    again = _pair(whole[2])[0] == betons[1]
    return lost if again else "the way back: writing again gives another file"


def _save_for_ever(folder: Path, told: Connection) -> None:
    torch.set_num_threads(1)
    weights = torch.arange(100_000.0)
    for step in range(1, 10**6):
        path = checkpoint.step_path(folder, step)
        checkpoint.save(path, {"step": step, "weights": weights + step}, keep=2)
        told.send(step)


def kill_checkpoint_writer(seed: int, folder: Path) -> str:
    """SIGKILL of a process that saves checkpoints"""
    process, reader = _victim(_save_for_ever, folder)
    saved = reader.recv()
    ends = time.monotonic() + random.Random(seed).uniform(0, 0.05)
    while (left := ends - time.monotonic()) > 0:
        if reader.poll(left):
            saved = reader.recv()
    _kill(process)
    try:
        while True:  # what it told before it died
            saved = reader.recv()
    except EOFError:
        pass
    newest = checkpoint.latest(folder)
    if newest is None or int(newest.stem[5:]) < saved:
        return f"step {saved}, which was reported as saved"
    for path in folder.glob("step-*.pt"):
        state = checkpoint.load(path)
        step = int(path.stem[5:])
        if state["step"] != step or not torch.equal(
            state["weights"], torch.arange(100_000.0) + step
        ):
            return f"the content of {path.name}"
    following = checkpoint.step_path(folder, int(newest.stem[5:]) + 1)
    checkpoint.save(following, {}, keep=2)
    kept = sorted(path.name for path in folder.iterdir())
    return "" if kept == [newest.name, following.name] else f"order: the folder holds {kept}"


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes in memory; root may mount it."""
    place = folder / "disk"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def _pages(folder: Path, source: Source) -> int:
    """What a beton and its manifest take of a disk: less than their length, for they have holes."""
    with small_disk(folder, 1 << 26) as disk:
        write(source, disk, Store("raw"))
        space = os.statvfs(disk)
        return space.f_blocks - space.f_bfree


def fill_disk_under_beton_writer(seed: int, folder: Path) -> str:
    """disk full at a page of a beton or its manifest, beside an older pair (seed = pages left)"""
    old, new = _sources()
    room = seed % _pages(folder, new)
    with small_disk(folder, PAGE * (_pages(folder, old) + room)) as disk:
        write(old, disk, Store("raw"))
        before = _pair(disk)
        lost = _refused(lambda: write(new, disk, Store("raw")))
        if _pair(disk) != before:
            return "the older pair"
        left = sorted(path.name for path in disk.iterdir())
        return lost or ("" if len(left) == 2 else f"room: the folder holds {left}")


def write_to_a_read_only_disk(seed: int, folder: Path) -> str:
    """beton and checkpoint written to a file system that has become read-only"""
    old, new = _sources()
    with small_disk(folder, 1 << 22) as disk:
        write(old, disk, Store("raw"))
        checkpoint.save(checkpoint.step_path(disk, 1), {"step": seed}, keep=1)
        before = {path.name: path.read_bytes() for path in disk.iterdir()}
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        lost = _refused(lambda: write(new, disk, Store("raw"))) or _refused(
            lambda: checkpoint.save(checkpoint.step_path(disk, 2), {}, keep=1)
        )
        after = {path.name: path.read_bytes() for path in disk.iterdir()}
        return lost if after == before else "files that were there"


Entry = Callable[[int, Path], str]
NEED_ROOT = {
    "fill_disk_under_beton_writer",
    "fill_disk_under_commands",
    "write_to_a_read_only_disk",
}
