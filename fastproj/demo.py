"""Command: the whole way through on a small set. ``python -m fastproj.demo --dataset digits``

Runs the three commands that a user would run (write the betons, pre-train, evaluate), each in a
process of its own, and prints one table. Needs the checkout: data_prep and rcfg are not installed.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastproj import journal
from fastproj.errors import InputError, run_command
from fastproj.settings import DEMO, load

ROOT = Path(__file__).resolve().parents[1]


def demo(dataset: str, data: Path, seed: int) -> Path:
    """Betons, pre-training and evaluation of ``dataset``; returns the run folder.

    Raises InputError when one of the commands fails; what it said is on the screen by then.
    """
    cifar10 = "cifar10" if torch.cuda.is_available() else "cifar10_cpu"
    recipe = "demo" if dataset == "digits" else cifar10
    betons, seconds = data / dataset, {}
    name = f"demo-{dataset}-seed{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    settings = ["--cfg", str(ROOT / "rcfg" / f"{recipe}.yaml"), "--run.name", name,
                "--run.seed", str(seed), "--data.train", str(betons / "train.beton"),
                "--data.val", str(betons / "val.beton"), "--eval.baselines", "true"]  # fmt: skip
    raw = ["--root", str(data / "raw"), "--download", "true"] if dataset != "digits" else []
    for stage, command in {
        "write betons": [str(ROOT / "data_prep/write_ffcv.py"), "--dataset", dataset,
                         "--out", str(betons), *raw],
        "pre-train": ["-m", "fastproj.train", *settings],
        "evaluate": ["-m", "fastproj.evaluate", *settings],
    }.items():  # fmt: skip
        print(f"\n$ python {' '.join(command)}", flush=True)
        start = time.perf_counter()
        if subprocess.run([sys.executable, *command]).returncode:
            raise InputError(f"the demo ends here: the command to {stage} failed, see above")
        seconds[stage] = time.perf_counter() - start
    run = Path("runs") / name
    print(f"\n{table(run, seconds)}\n\nrun folder: {run}")
    return run


def table(run: Path, seconds: dict[str, float]) -> str:
    """Linear top-1 and kNN of each kind of features, then images/s and seconds of each stage."""
    rows = json.loads((run / "eval.json").read_text())["rows"]
    end = journal.read(run / "metrics.jsonl")[-1]
    lines = [f"{'features':<22}{'linear top-1':>14}{'kNN top-1':>12}"]
    for row in rows:
        linear, knn = row["linear"]["top1"], row["knn"]["top1"]
        lines.append(f"{row['features']:<22}{linear:>13.2%} {knn:>11.2%}")
    lines.append(f"pre-training: {end['images_per_second']:,.0f} images/s")
    lines.append("seconds: " + ", ".join(f"{stage} {s:.1f}" for stage, s in seconds.items()))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Run the demo that the settings name."""
    given = load(DEMO, argv, "python -m fastproj.demo", "The whole way through.").demo
    demo(given.dataset, Path(given.data), given.seed)


if __name__ == "__main__":
    run_command(main)
