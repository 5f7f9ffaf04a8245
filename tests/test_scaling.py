"""docs/scaling.md: its tables follow from its formulas, and its Slurm script starts a run."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from fastproj.prepare.encode import Store
from fastproj.runs import journal
from fastproj.settings import RUN, load
from fastproj.training.build import build_learner
from tests.support.betons import digit_like, write

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text("utf-8")

JPEG, SQUARE, PADDED = 37.5e3, 3 * 160**2, 3 * 400**2  # bytes per image
DECODE = 1000  # images/s per core
PREDICTED = 8000  # images/s of one GPU
SETS = {"CIFAR-10": 50_000, "STL-10": 100_000, "ImageNet-100": 126_689, "ImageNet-1k": 1_281_167}
LINKS = {  # bytes/s through the ring's slowest link, seconds per hop
    "NVLink, 450 GB/s": (450e9, 3e-6),
    "PCIe 4.0, 25 GB/s": (25e9, 5e-6),
    "8 × 400 Gb/s per node": (400e9, 5e-6),
    "400 Gb/s per node": (50e9, 5e-6),
    "100 Gb/s Ethernet per node": (12.5e9, 20e-6),
}


def line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def reading() -> Iterator[str]:
    for rate in (1000, PREDICTED, 10_000, 20_000):
        stored = [f"{gpus * rate * JPEG / 1e9:.2f}" for gpus in (1, 8)]
        cores = [f"{gpus * rate / DECODE:.0f}" for gpus in (1, 8)]
        yield line(f"{rate:,}", *stored, *cores, f"{rate * PADDED / 1e9:.1f}")


def stores() -> Iterator[str]:
    for name in ("ImageNet-100", "ImageNet-1k"):
        images = SETS[name]
        yield line(name, f"{images:,}", *(f"{images * b / 1e9:.1f} GB" for b in (JPEG, SQUARE)))


def cached() -> Iterator[str]:
    for nodes in (1, 2, 8):
        shares = (f"{1 - (1 - 1 / nodes) ** epochs:.0%}" for epochs in (1, 2, 5, 10, 20))
        yield line(nodes, *(share.replace("%", " %") for share in shares))


def resident() -> Iterator[str]:
    share = load(RUN, ["--data.train", "x"], "test", "").data.memory_share
    for side in (32, 96, 160, 224):
        fit = (f"{share * memory * 1e9 / (3 * side**2) / 1e3:,.0f}" for memory in (24, 40, 80, 141))
        yield line(side, f"{3 * side**2:,}", *fit)
    for name, side in (
        ("CIFAR-10", 32), ("STL-10", 96), ("ImageNet-100", 160), ("ImageNet-100", 224),
        ("ImageNet-1k", 96), ("ImageNet-1k", 160), ("ImageNet-1k", 224),
    ):  # fmt: skip
        size = SETS[name] * 3 * side**2 / 1e9
        fits = ("yes" if size <= share * memory else "no" for memory in (24, 40, 80, 141))
        yield line(f"{name} at {side}", f"{size:.1f} GB", *fits)


def fsdp() -> Iterator[str]:
    for name, recipe, encoder in (
        ("ResNet-18 (in100)", "in100", "resnet18"),
        ("ResNet-50 (in100)", "in100", "resnet50"),
        ("ResNet-18, sparse (in100_sparse)", "in100_sparse", "resnet18"),
    ):
        argv = ["--cfg", str(ROOT / f"rcfg/{recipe}.yaml"), "--model.encoder", encoder]
        learner, outputs = build_learner(load(RUN, argv, "test", ""), 100), [0]

        def count(*called: Any, outputs: list[int] = outputs) -> None:
            outputs[0] += called[2].numel()

        for module in learner.encoder.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.register_forward_hook(count)
        with torch.no_grad():
            learner.encoder.eval()(torch.zeros(1, 3, 224, 224))
        parameters = sum(p.numel() for p in learner.parameters())
        sizes = (12 * parameters, 12 * parameters * 7 / 8, 2 * outputs[0] * 2 * 128)
        yield line(name, f"{parameters / 1e6:.0f} M", *(f"{s / 1e9:.1f} GB" for s in sizes))


def network() -> Iterator[str]:
    for encoder in ("resnet18", "resnet50"):
        recipe = ["--cfg", str(ROOT / "rcfg" / "in100.yaml"), "--model.encoder", encoder]
        learner = build_learner(load(RUN, recipe, "test", ""), 100)
        norms = [m.num_features for m in learner.modules() if isinstance(m, nn.BatchNorm2d)]
        weights = 4 * sum(p.numel() for p in learner.parameters())
        for world, batch, links in ((8, 1024, list(LINKS)[:2]), (64, 4096, list(LINKS)[2:])):
            others, buckets = world - 1, ceil(weights / (25 * 2**20))
            rows = 2 * batch * 512 * 4
            moved = [3 * rows / world, 2 * weights / world, 24 * sum(norms)]  # times W - 1
            hops = [3, 2 * buckets, 3 * len(norms)]  # times W - 1
            name = f"{encoder.replace('resnet', 'ResNet-')}, {world} GPUs, batch {batch:,}"
            yield line(name, "bytes", *(f"{others * b / 1e6:.1f} MB" for b in moved))
            for link in links:
                speed, hop = LINKS[link]
                times = [others * (b / speed + h * hop) for b, h in zip(moved, hops, strict=True)]
                yield line("", link, *(f"{1e3 * t:.1f} ms" for t in times))


def test_what_a_rank_holds_follows_from_the_columns_of_a_row() -> None:
    """Bytes per image in memory: a beton's columns, the hash and whether it was seen, an order."""
    from fastproj.data.layout import HASH_BYTES

    images = SETS["ImageNet-1k"]
    opened, *_, held = (int(megabytes) for megabytes in re.findall(r"\| (\d+) MB \|\n", PAGE))
    columns = 6 * 8 + 1  # width, height, pointer, length, label, index; the mode is a byte
    hashes = HASH_BYTES + 1
    assert f"{columns} bytes of columns, 8.5 of this set's manifest, {hashes} of hashes" in PAGE
    assert opened * 1e6 / images == pytest.approx(columns + 8.5, rel=0.01)
    rest = held * 1e6 / images - (columns + 8.5 + hashes + 4 * 8)  # the last four orders are kept
    assert f"the rest, {rest:.0f}, is the loader's" in PAGE


def test_writing_in_full_is_predicted_from_12_000_photographs() -> None:
    images, stored = SETS["ImageNet-1k"], 38_012
    (pair,) = re.findall(r"took ([\d.]+) and ([\d.]+) s with two", PAGE)
    rate = 12_000 / (sum(map(float, pair)) / 2)
    assert f"{rate:.0f} images/s" in PAGE and f"{stored:,} bytes per image" in PAGE
    minutes = images / rate / 60
    text = f"{minutes:.0f} minutes on these two cores, {minutes / 8:.0f} on sixteen, and "
    assert f"{text}{images * stored / 1e9:.1f} GB" in " ".join(PAGE.split())


TABLES = [row for table in (reading, stores, cached, resident, fsdp, network) for row in table()]


@pytest.mark.parametrize("row", TABLES)
def test_a_table_has_what_its_formula_gives(row: str) -> None:
    assert f"\n{row}\n" in PAGE


def test_the_decoding_rate_beside_the_assumed_one_is_the_measured_one() -> None:
    rates = []
    for file in (ROOT / "docs").glob("bench-cpu*.json"):
        bench = json.loads(file.read_text("utf-8"))
        rates += [row["rate"] / bench["settings"]["workers"]
                  for row in bench["rows"] if row["engine"] == "decode alone"]  # fmt: skip
    (said,) = re.findall(r"an AMD EPYC, decodes ([\d,]+)\.", PAGE)
    assert float(said.replace(",", "")) == pytest.approx(median(rates), abs=5)
    assert median(rates) > DECODE


def test_the_predicted_rate_is_the_middle_of_the_predicted_epochs() -> None:
    (rates,) = re.findall(r"are ([\d,]+)–([\d,]+) images/s", PAGE)
    low, high = (int(rate.replace(",", "")) for rate in rates)
    (seconds,) = set(re.findall(r"\| ImageNet-100, .* \| (\d+)–(\d+) s \| 20 s", PAGE))
    fast, slow = (SETS["ImageNet-100"] / int(s) for s in seconds)
    assert (low, high) == (pytest.approx(slow, abs=50), pytest.approx(fast, abs=50))
    assert abs((low + high) / 2 - PREDICTED) < 200
    steps = [f"{128e3 / PREDICTED:.0f} ms with 128 images", f"{64e3 / PREDICTED:.0f} ms with 64"]
    assert all(step in " ".join(PAGE.split()) for step in steps)


def test_the_commands_make_batches_that_divide() -> None:
    for gpus, batch in ((1, 256), (8, 1024), (64, 4096)):
        assert batch % gpus == 0
        assert SETS["ImageNet-100"] // batch == {1: 494, 8: 123, 64: 30}[gpus]


SRUN = """\
#!/bin/bash
while [[ $1 == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""
SCONTROL = """\
#!/bin/bash
if [ "$1" = requeue ]; then echo "$2" >>"${0%/*}/requeued"; else echo localhost; fi
"""


@pytest.mark.slow
def test_the_slurm_script_makes_one_run_of_two_nodes_and_is_requeued(tmp_path: Path) -> None:
    """Both nodes are this machine: in place of ``srun`` a script that starts torchrun twice.

    As Slurm does before a job's end, TERM goes to every process of the step and to no other.
    """
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    beton = write(digit_like(np.random.default_rng(0), 80, 12, 4), tmp_path, Store("raw"))
    slurm = {"JOB_ID": os.getpid(), "JOB_NODELIST": "here", "NNODES": 2, "CPUS_ON_NODE": 2,
             "GPUS_ON_NODE": 1}  # fmt: skip
    given = {"data.train": beton.path, "run.dir": tmp_path, "run.name": "r", "run.device": "cpu",
             "run.resume": "auto", "model.encoder": "resnet_small", "views.size": 8,
             "projector.hidden": 32, "optim.batch_size": 16, "optim.epochs": 12,
             "optim.warmup_epochs": 0.5, "train.log_every": 1}  # fmt: skip

    def sbatch() -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "docs/train.slurm", *(f"--{name}={value}" for name, value in given.items())],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
            | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable,
               "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def steps() -> list[int]:
        path = tmp_path / "r" / "metrics.jsonl"
        events = journal.read(path) if path.exists() else []
        return [e["step"] for e in events if e["event"] == "step"]

    job, end = sbatch(), time.monotonic() + 200
    while len(steps()) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    (srun,) = psutil.Process(job.pid).children()
    for process in srun.children(recursive=True):
        process.terminate()
    _, errors = job.communicate(timeout=200)
    assert job.returncode == 0 and "SIGTERM: finishing the step" in errors, errors
    assert (tmp_path / "requeued").read_text() == f"{os.getpid()}\n"
    assert 3 <= len(steps()) < 60 and not list(ROOT.glob(".stopped-*"))

    job = sbatch()
    _, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    assert steps() == list(range(1, 61))
    assert (tmp_path / "requeued").read_text() == f"{os.getpid()}\n"  # not again
