"""The projection heads of the papers on CIFAR-10, on a CPU: 3 seeds each, equal compute.

    python docs/compare_cpu.py DATA OUT [PROCESSES]

DATA holds train.beton and val.beton of CIFAR-10, OUT gets the run folders; a run that is there is
not run again, one that was broken off is resumed. Every run is one process of one thread with the
recipe's settings but for those below. Ends by writing docs/compare-cpu.json and printing its table.
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

from fastproj import journal  # noqa: E402

SEEDS = (0, 1, 2)
VARIANTS = {
    "default": "cifar10_cpu",
    "regularised": "cifar10_cpu_regularised",
    "discretised": "cifar10_cpu_discretised",
    "sparse": "cifar10_cpu_sparse",
    "SparseHead-style": "cifar10_cpu_sparsehead",
    "superfluous": "cifar10_cpu_superfluous",
}
# What differs from the recipes: one thread of this CPU is fastest in bfloat16 (AMX).
CHANGES = {"optim.epochs": 2, "optim.warmup_epochs": 0.5, "train.precision": "bfloat16"}


def run(data: Path, out: Path, recipe: str, seed: int) -> dict[str, Any]:
    """Pre-train and evaluate, unless that has been done; returns what the table needs."""
    name = f"{recipe}-seed{seed}"
    folder = out / name
    changes = {"data.train": data / "train.beton", "data.val": data / "val.beton",
               "run.dir": out, "run.name": name, "run.seed": seed, **CHANGES}  # fmt: skip
    options = [f"--{key}={value}" for key, value in changes.items()]
    baselines = ["--eval.baselines", str(recipe == "cifar10_cpu" and seed == 0).lower()]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(module: str, *more: str) -> None:
        argv = [sys.executable, "-m", f"fastproj.{module}", "--cfg", f"rcfg/{recipe}.yaml"]
        with open(out / f"{name}.log", "a") as log:
            subprocess.run([*argv, *options, *more], cwd=ROOT, env=one_thread, check=True,
                           stdout=log, stderr=log)  # fmt: skip

    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        command("train")
    elif journal.read(metrics)[-1]["event"] != "end":
        command("train", "--run.resume", "true")
    if not (folder / "eval.json").exists():
        command("evaluate", *baselines)
    events = journal.read(metrics)
    report = json.loads((folder / "eval.json").read_text())
    accuracy = {row["features"]: (row["linear"]["top1"], row["knn"]["top1"])
                for row in report["rows"]}  # fmt: skip
    epoch = [event for event in events if event["event"] == "epoch"][-1]
    environment = json.loads((folder / "environment.json").read_text())
    del environment["command"]  # its paths are this machine's own
    print(f"{time.strftime('%H:%M:%S')} {name}: {accuracy}", flush=True)
    return {
        "accuracy": accuracy,
        "images_per_second": events[-1]["images_per_second"],
        "diagnostics": epoch["diagnostics"],
        "loss": epoch["loss"],
        "environment": environment,
    }


def summary(results: dict[str, list[dict[str, Any]]], kind: int) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds, in points, and of the paired difference to default.

    ``kind`` 0: linear top-1, 1: kNN.
    """
    scores = {
        variant: [100 * seed["accuracy"]["pre-trained encoder"][kind] for seed in seeds]
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
        # Seed by seed: broken off, there is a whole comparison of fewer seeds.
        jobs = {
            (variant, seed): pool.submit(run, Path(data).resolve(), folder, recipe, seed)
            for seed in SEEDS
            for variant, recipe in VARIANTS.items()
        }
        results = {v: [jobs[v, seed].result() for seed in SEEDS] for v in VARIANTS}
    tables = {"linear": summary(results, 0), "knn": summary(results, 1)}
    text = json.dumps({"changes": CHANGES, "seeds": SEEDS, "tables": tables, "runs": results})
    (ROOT / "docs" / "compare-cpu.json").write_text(text + "\n")
    for kind, table in tables.items():
        print(kind)
        for variant, row in table.items():
            print(f"{variant:<18} {row['mean']:6.2f} ± {row['std']:.2f}   "
                  f"{row['gain']:+.2f} ± {row['gain_std']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
