"""Kills of the commands that take long: the same command, given again, ends as if nothing had been.

The moment of a kill is a share of the processor time that the command took when nobody killed it,
children included, so that a busy machine moves it little.
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch

import fastproj.evaluate
import fastproj.study
import fastproj.train  # noqa: F401, imported once for all tries
from fastproj.__main__ import dispatch
from fastproj.core.errors import run_command
from fastproj.prepare.encode import Store
from fastproj.runs import checkpoint, journal
from fastproj.runs.folder import RunFolder
from fastproj.studies import running
from tests.faults.entries import FORK
from tests.support.betons import half_drawn, write_here
from tests.support.studies import Forked, contents

RUN = """
run: {device: cpu, name: r, resume: auto, dir: .}
views: {size: 8, blur_prob: 0}
model: {encoder: resnet_small}
projector: {hidden: 32, out: 16}
optim: {batch_size: 16, epochs: 4, warmup_epochs: 0, optimizer: adamw, lr: 1e-3}
train: {precision: float32, log_every: 1}
eval: {probes: "sgd,logistic,knn", sgd_epochs: 3, logistic_strengths: [1e-3, 1e-1], knn_k: 3}
data: {train: ../../data/train.beton, val: ../../data/val.beton}
"""
STUDY = """
study: {recipe: ../../data/recipe.yaml, seeds: [0, 1], controls: false, name: tiny, dir: .}
settings: {optim: {epochs: 2}, eval: {probes: "logistic,knn"}}
sets:
  s: {data: {train: ../../data/train.beton, val: ../../data/val.beton, engine: resident}}
arms:
  default:
  discretized:
    settings: {projector: {levels: 5}}
    acted: used_codes above 0.3
"""


def start(argv: Sequence[str], folder: Path) -> BaseProcess:
    """``fastproj`` with these arguments in ``folder``, a process that leads a group of its own."""

    def begin() -> None:
        os.setsid()
        os.chdir(folder)
        torch.set_num_threads(1)
        running.Popen = Forked  # type: ignore[misc,assignment]
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        run_command(dispatch, argv)

    process = FORK.Process(target=begin)
    process.start()
    return process


def spent(process: psutil.Process) -> float:
    """Seconds of processor time of a process and its children, dead and alive."""
    times = process.cpu_times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in process.children():
        with suppress(psutil.NoSuchProcess):
            total += spent(child)
    return total


def to_the_end(argv: Sequence[str], folder: Path) -> float:
    """Processor time of the whole command; it must succeed."""
    process, before = start(argv, folder), spent(psutil.Process())
    process.join()
    assert process.exitcode == 0, (folder / "log.txt").read_text()[-500:]
    return spent(psutil.Process()) - before


def _killed(argv: Sequence[str], folder: Path, after: float) -> bool:
    """Kill the command and its children after so much processor time; False: it had ended."""
    process = start(argv, folder)
    watched = psutil.Process(process.pid)
    while process.is_alive():
        with suppress(psutil.NoSuchProcess):
            if spent(watched) > after:
                children = watched.children(recursive=True)
                process.kill()
                psutil.wait_procs(children, 20)  # they follow the one that started them
                break
        time.sleep(0.002)
    process.join()
    return process.exitcode == -signal.SIGKILL


def prepared(folder: Path, name: str, commands: Sequence[Sequence[str]]) -> tuple[Path, float]:
    """The folder where ``commands`` ran undisturbed, and the seconds of the last one.

    The tries of one fault share it: it lies beside their folders.
    """
    data, whole = folder.parent / "data", folder.parent / f"unkilled-{name}" / "whole"
    if not data.exists():
        for split, count in (("train", 64), ("val", 40)):
            write_here(half_drawn(split, count), data, Store("raw"))
        (data / "recipe.yaml").write_text(RUN)
        (data / "study.yaml").write_text(STUDY)
    if not (whole / "seconds.txt").exists():
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir(parents=True)
        seconds = [to_the_end(argv, whole) for argv in commands]
        (whole / "seconds.txt").write_text(str(seconds[-1]))
    return whole, float((whole / "seconds.txt").read_text())


def compared(whole: Path, other: Path, results: Callable[[Path], dict[str, Any]]) -> str:
    """What is not the same in two folders."""
    ours, theirs = results(whole), results(other)
    differ = [name for name in ours | theirs if not _same(ours.get(name), theirs.get(name))]
    return f"{len(differ)} results, the first {differ[0]}" if differ else ""


def _try(
    seed: int, folder: Path, argv: Sequence[str], before: Sequence[Sequence[str]],
    results: Callable[[Path], dict[str, Any]],
) -> str:  # fmt: skip
    """Kill the command ``argv`` once, give it again, and compare what it leaves."""
    whole, seconds = prepared(folder, argv[0], [*before, argv])
    after = random.Random(seed).uniform(0, seconds)
    killed = folder / "killed"
    while True:
        shutil.rmtree(killed, ignore_errors=True)
        if before:
            shutil.copytree(whole, killed, ignore=shutil.ignore_patterns("eval.json", "features"))
        killed.mkdir(parents=True, exist_ok=True)
        if _killed(argv, killed, after):
            break
        after *= 0.8  # it was quicker this time
    try:
        to_the_end(argv, killed)
    except AssertionError as error:
        return f"the way back: {error}"
    return compared(whole, killed, results)


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return torch.equal(one, two)
    return one == two


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    """Entries of nested dicts and lists by their path."""
    if not isinstance(value, dict | list):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        name: entry
        for key, inner in items
        for name, entry in _flat(f"{prefix}/{key}", inner).items()
    }


def trained(folder: Path) -> dict[str, Any]:
    """Every entry of the last checkpoint, and every step's loss."""
    run = RunFolder(folder / "r")
    newest = checkpoint.latest(run.checkpoints)
    steps = [e for e in journal.read(run.metrics) if e["event"] == "step"]
    state = _flat("state", checkpoint.load(newest)) if newest else {}
    return state | {"losses": [(event["step"], event["loss"]) for event in steps]}


def evaluated(folder: Path) -> dict[str, Any]:
    """All of eval.json but times, and the predictions."""
    run = RunFolder(folder / "r")
    scores = _flat("eval.json", json.loads(run.evaluation.read_text()))
    kept = {path.name: path.read_bytes() for path in run.features.glob("*-predictions.npy")}
    return {name: entry for name, entry in scores.items() if "/seconds/" not in name} | kept


TRAIN = ["train", "--cfg", "../../data/recipe.yaml"]
EVALUATE = ["evaluate", "r", "--eval.baselines", "true"]


def kill_trainer(seed: int, folder: Path) -> str:
    """SIGKILL of train; the same command goes on: weights, optimizer and every loss to the bit"""
    return _try(seed, folder, TRAIN, [], trained)


def kill_evaluate(seed: int, folder: Path) -> str:
    """SIGKILL of evaluate; the same command again: eval.json but for times, and predictions"""
    return _try(seed, folder, EVALUATE, [TRAIN], evaluated)


def kill_study(seed: int, folder: Path) -> str:
    """SIGKILL of study and of what it started; the same command goes on: its tables to the byte"""
    return _try(
        seed, folder, ["study", "--cfg", "../../data/study.yaml"], [],
        lambda place: contents(place / "tiny"),
    )  # fmt: skip
