"""A trainer whose data, folder or clock change under it, that gets signals, or that runs long.

It may stop, with one line; then the same command ends as if nothing had been.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fastproj.runs import journal
from tests.faults.entries import PAGE, small_disk
from tests.faults.killed import (
    TRAIN,
    compared,
    evaluated,
    prepared,
    spent,
    start,
    to_the_end,
    trained,
)
from tests.support.network import mounted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")  # apt: libfaketime
EPOCHS = 60
FIRST = 10  # epochs until caches and pools are filled
GROWTH = 20_000  # bytes of memory per epoch: a megabyte in 50


def _after(process: BaseProcess, seconds: float) -> bool:
    """Wait until the process has had so much processor time; False where it ended before."""
    watched = psutil.Process(process.pid)
    while process.is_alive():
        with suppress(psutil.NoSuchProcess):
            if spent(watched) > seconds:
                return True
        time.sleep(0.002)
    return False


def _ended(process: BaseProcess, folder: Path) -> str:
    """What is wrong with how the command ended: it may succeed, or stop for a reason."""
    process.join(120)
    if process.is_alive():
        process.kill()
        return "time: it did not end within 120 s"
    log = folder / "log.txt"
    said = log.read_text() if log.exists() else ""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    told = process.exitcode in (0, 130) or -(process.exitcode or 0) in SIGNALS
    told = told or (process.exitcode or 0) - 128 in SIGNALS or len(errors) == 1
    if "Traceback" in said or not told:
        return f"the reason: exit code {process.exitcode}, {said[-300:]}"
    return ""


def _without_journal(folder: Path) -> dict[str, Any]:
    """The last checkpoint: of a folder that is removed while one is saved, that may stay alone."""
    return {name: value for name, value in trained(folder).items() if name != "losses"}


def _on(whole: Path, folder: Path, results: Callable[[Path], dict[str, Any]] = trained) -> str:
    """Give the command again, to the end, and compare."""
    try:
        to_the_end(TRAIN, folder)
    except AssertionError as error:
        return f"the way back: {error}"
    return compared(whole, folder, results)


def signal_trainer(seed: int, folder: Path) -> str:
    """up to 6 of SIGTERM, SIGINT, SIGHUP, SIGUSR1 to train in any order; the same command again"""
    whole, seconds = prepared(folder, "train", [TRAIN])
    take, place = random.Random(seed), folder / "run"
    place.mkdir()
    process = start(TRAIN, place)
    for moment in sorted(take.uniform(0, seconds) for _ in range(take.randint(1, 6))):
        if not _after(process, moment):
            break
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, take.choice(SIGNALS))
    return _ended(process, place) or _on(whole, place)


def _with_own_data(
    seed: int, folder: Path, change: Callable[[random.Random, Path], object]
) -> str:  # fmt: skip
    """``change`` the beton at some moment of a run; put it back, and give the command again."""
    whole, seconds = prepared(folder, "train", [TRAIN])
    take, place, data = random.Random(seed), folder / "run", folder / "data"
    shutil.copytree(folder.parent / "data", data)
    place.mkdir()
    (place / "own").mkdir()
    process = start(TRAIN, place / "own")  # whose ../../data is the copy
    if _after(process, take.uniform(0, seconds)):
        change(take, data / "train.beton")
    wrong = _ended(process, place / "own")
    shutil.copy(folder.parent / "data" / "train.beton", data)
    return wrong or _on(whole, place / "own")


def _cut(take: random.Random, beton: Path) -> None:
    os.truncate(beton, take.randrange(beton.stat().st_size))


def _write_into(take: random.Random, beton: Path) -> None:
    with beton.open("r+b") as file:
        size = beton.stat().st_size
        for _ in range(50):
            file.seek(take.randrange(size - 64 * 500, size))  # where the images are
            file.write(take.randbytes(64))


def cut_data_under_trainer(seed: int, folder: Path) -> str:
    """beton cut at any byte while train has it mapped, then restored; the same command goes on"""
    return _with_own_data(seed, folder, _cut)


def change_data_under_trainer(seed: int, folder: Path) -> str:
    """beton overwritten while train has it mapped, then restored; the same command goes on"""
    return _with_own_data(seed, folder, _write_into)


def remove_folder_under_trainer(seed: int, folder: Path) -> str:
    """run folder removed while train writes to it; the same command starts anew or goes on"""
    whole, seconds = prepared(folder, "train", [TRAIN])
    place = folder / "run"
    place.mkdir()
    process = start(TRAIN, place)
    if _after(process, random.Random(seed).uniform(0, seconds)):
        shutil.rmtree(place / "r", ignore_errors=True)
    return _ended(process, place) or _on(whole, place, _without_journal)


def fill_disk_under_commands(seed: int, folder: Path) -> str:
    """disk full at a page of what train, evaluate, export, report write; the same commands again"""
    commands = [[*TRAIN, "--run.dir", "disk"], ["evaluate", "disk/r", "--eval.baselines", "true"],
                ["export", "disk/r"], ["report", "disk/r"]]  # fmt: skip
    whole, _ = prepared(folder, "commands", commands)
    place = folder / "run"
    place.mkdir()
    files = [path for path in (whole / "disk").rglob("*") if path.is_file()]
    pages = sum(-(-path.stat().st_size // PAGE) for path in files)
    with small_disk(place, PAGE * random.Random(seed).randint(1, pages)) as disk:
        for command in commands:
            process = start(command, place)
            if wrong := _ended(process, place):
                return wrong
            if process.exitcode:
                break
        said = (place / "log.txt").read_text()
        if process.exitcode and "No space left" not in said:
            return f"the reason: {said[-300:]}"
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        try:
            for command in commands:
                to_the_end(command, place)
        except AssertionError as error:
            return f"the way back: {error}"
        return compared(whole / "disk", disk, _everything)


def _everything(folder: Path) -> dict[str, Any]:
    run = folder / "r"
    made = [path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()]
    export = (run / "export" / "model.safetensors").read_bytes()
    scores = evaluated(folder)
    del scores["eval.json/checkpoint/sha256"]  # of a file that says when it was written
    return trained(folder) | scores | {"files": sorted(made), "export": export}


def lose_network_store_under_trainer(seed: int, folder: Path) -> str:
    """network store of the beton cut off while train reads it, and mounted again; it goes on"""
    whole, seconds = prepared(folder, "train", [TRAIN])
    take, place, store = random.Random(seed), folder / "run", folder.parent / "data"
    (place / "own").mkdir(parents=True)
    with mounted(store, folder / "data") as cut:  # it is ../../data of the run
        process = start(TRAIN, place / "own")
        if _after(process, take.uniform(0, seconds)):
            cut()
        wrong = _ended(process, place / "own")
    if wrong:
        return wrong
    with mounted(store, folder / "data"):
        return _on(whole, place / "own")


def jump_clock_under_trainer(seed: int, folder: Path) -> str:
    """clock set forth or back, by a second to a year, again and again while train runs"""
    whole, _ = prepared(folder, "train", [TRAIN])
    take, place, offset = random.Random(seed), folder / "run", folder / "offset"
    place.mkdir()
    offset.write_text("+0s")
    faked = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(offset),
             "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1"}  # fmt: skip
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastproj", *TRAIN], cwd=place, stdout=log, stderr=log,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]),
                 "OMP_NUM_THREADS": "1", **faked},
        )  # fmt: skip
        while process.poll() is None:
            seconds = take.choice([1, 60, 3600, 86_400, 31_536_000])
            offset.write_text(f"{take.choice('+-')}{seconds}s")
            time.sleep(take.uniform(0.01, 0.3))
    if process.returncode:
        return f"the run: {(folder / 'log.txt').read_text()[-300:]}"
    events = journal.read(place / "r" / "metrics.jsonl")
    rates = [event["images_per_second"] for event in events if "images_per_second" in event]
    if min(rates) <= 0:
        return f"the rates: {min(rates)} images/s"
    spread = max(event["time"] for event in events) - min(event["time"] for event in events)
    if spread < 3600:
        return f"the try itself: the clock moved by {spread:.0f} s only"
    return compared(whole, place, trained)


def train_long(seed: int, folder: Path) -> str:
    """50 epochs of train after 10: descriptors, threads and memory (RSS, linear fit) stay"""
    prepared(folder, "train", [TRAIN])
    (folder / "run").mkdir()
    process = start([*TRAIN, "--optim.epochs", str(EPOCHS)], folder / "run")
    journal, seen = folder / "run" / "r" / "metrics.jsonl", []
    watched = psutil.Process(process.pid)
    while process.is_alive():
        with suppress(psutil.NoSuchProcess, FileNotFoundError, psutil.AccessDenied):
            epochs = journal.read_bytes().count(b'"event": "epoch"')
            if epochs >= FIRST:
                fields = (watched.memory_info().rss, watched.num_fds(), watched.num_threads())
                seen.append((epochs, *fields))
        time.sleep(0.005)
    process.join()
    if process.exitcode or not seen or seen[-1][0] < EPOCHS - 1:
        last = seen[-1][0] if seen else 0
        return f"the run: exit code {process.exitcode} after {last} of {EPOCHS} epochs"
    epochs, memory, files, threads = np.array(seen).T
    growth = np.polyfit(epochs, memory, 1)[0]
    middle = len(seen) // 2
    for name, values in (("descriptors", files), ("threads", threads)):
        if values[middle:].max() > values[:middle].max():
            return f"{name}: {values[:middle].max()}, later {values[middle:].max()}"
    return f"memory: {growth:,.0f} bytes per epoch" if growth > GROWTH else ""
