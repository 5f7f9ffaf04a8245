"""Compare the papers' projection heads on CIFAR-10 on a CPU: 3 seeds each, equal compute.

    python tools/compare_cpu.py DATA OUT [PROCESSES]

DATA holds train.beton and val.beton of CIFAR-10; the run folders are written to OUT. A finished run
is not repeated, an interrupted one is resumed. Each run is one process with one thread and the
recipe's settings except ``CHANGES``. At the end the script writes docs/compare-cpu.json and prints
its tables.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastproj.evaluation.results import read_evaluation  # noqa: E402
from fastproj.runs import journal  # noqa: E402
from fastproj.runs.folder import RunFolder  # noqa: E402

SEEDS = (0, 1, 2)
VARIANTS = {
    "default": "cifar10_cpu",
    "regularized": "cifar10_cpu_regularized",
    "discretized": "cifar10_cpu_discretized",
    "sparse": "cifar10_cpu_sparse",
    "SparseHead-style": "cifar10_cpu_sparsehead",
    "superfluous": "cifar10_cpu_superfluous",
}
# Differences from the recipes. bfloat16: one thread of this CPU is fastest in it (AMX).
CHANGES = {"optim.epochs": 2, "optim.warmup_epochs": 0.5, "train.precision": "bfloat16"}
# What the committed table was scored with.
PROBES = {"eval.probes": "sgd,knn", "eval.sgd_epochs": 30, "eval.sgd_batch_size": 1024}


def run(data: Path, out: Path, recipe: str, seed: int) -> dict[str, Any]:
    """Pre-train and evaluate unless already done; return the data for the tables."""
    name = f"{recipe}-seed{seed}"
    folder = RunFolder(out / name)
    changes = {"data.train": data / "train.beton", "data.val": data / "val.beton",
               "run.dir": out, "run.name": name, "run.seed": seed, **CHANGES}  # fmt: skip
    options = [f"--cfg=rcfg/{recipe}.yaml"]
    options += [f"--{key}={value}" for key, value in changes.items()]
    baselines = ["--eval.baselines", str(recipe == "cifar10_cpu" and seed == 0).lower()]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(module: str, *more: str) -> None:
        argv = [sys.executable, "-m", f"fastproj.{module}", *more]
        with open(out / f"{name}.log", "a") as log:
            subprocess.run(argv, cwd=ROOT, env=one_thread, check=True,
                           stdout=log, stderr=log)  # fmt: skip

    if not folder.metrics.exists():
        command("train", *options)
    elif journal.read(folder.metrics)[-1]["event"] != "end":
        command("train", "--run.resume", str(folder.path))
    if not folder.evaluation.exists():
        command(
            "evaluate", str(folder.path), *baselines, *(f"--{k}={v}" for k, v in PROBES.items())
        )
    events = journal.read(folder.metrics)
    accuracy: dict[str, dict[str, float]] = {}
    for row in read_evaluation(folder).rows:
        accuracy.setdefault(row.encoder, {})[row.probe] = row.metrics["top1"]
    epoch = [event for event in events if event["event"] == "epoch"][-1]
    environment = json.loads(folder.environment.read_text())
    del environment["command"]  # it has paths of this machine
    print(f"{time.strftime('%H:%M:%S')} {name}: {accuracy}", flush=True)
    return {
        "accuracy": accuracy,
        "images_per_second": events[-1]["images_per_second"],
        "diagnostics": epoch["diagnostics"],
        "loss": epoch["loss"],
        "environment": environment,
    }


def summary(results: dict[str, list[dict[str, Any]]], probe: str) -> dict[str, dict[str, float]]:
    """Top-1 accuracy of one ``probe`` per variant, in percent.

    ``mean`` and ``std`` are over seeds; ``gain`` and ``gain_std`` are those of the differences to
    the default with the same seed.
    """
    scores = {
        variant: [100 * seed["accuracy"]["pre-trained"][probe] for seed in seeds]
        for variant, seeds in results.items()
    }
    table = {}
    for variant, values in scores.items():
        gains = [a - b for a, b in zip(values, scores["default"], strict=True)]
        table[variant] = {
            "mean": statistics.mean(values), "std": statistics.stdev(values),
            "gain": statistics.mean(gains), "gain_std": statistics.stdev(gains),
        }  # fmt: skip
    return table


def main(data: str, out: str, processes: str = "4") -> None:
    folder = Path(out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(processes)) as pool:
        # Seed by seed, so that after an interruption all variants have the same number of seeds.
        jobs = {
            (variant, seed): pool.submit(run, Path(data).resolve(), folder, recipe, seed)
            for seed in SEEDS
            for variant, recipe in VARIANTS.items()
        }
        results = {v: [jobs[v, seed].result() for seed in SEEDS] for v in VARIANTS}
    tables = {probe: summary(results, probe) for probe in ("sgd", "knn")}
    text = json.dumps({"changes": CHANGES, "seeds": SEEDS, "tables": tables, "runs": results})
    (ROOT / "docs" / "compare-cpu.json").write_text(text + "\n")
    for probe, table in tables.items():
        print(probe)
        for variant, row in table.items():
            print(f"{variant:<18} {row['mean']:6.2f} ± {row['std']:.2f}   "
                  f"{row['gain']:+.2f} ± {row['gain_std']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
