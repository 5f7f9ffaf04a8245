"""Command: the whole way through on a small set. ``python -m fastproj.demo --dataset digits``

Runs the three commands that a user would run (write the betons, pre-train, evaluate), each in a
process of its own, and prints one table. Betons go to ``data/`` and the run to ``runs/``, in the
folder where it is called.
"""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from fastproj.__main__ import main as run_as_script

    run_as_script("demo")

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fastproj.core.errors import InputError
from fastproj.evaluation.results import read_evaluation
from fastproj.runs import journal
from fastproj.runs.folder import RunFolder
from fastproj.settings import DEMO, load


def demo(dataset: str, data: Path, seed: int) -> Path:
    """Betons, pre-training and evaluation of ``dataset``; returns the run folder.

    Raises InputError when one of the commands fails; what it said is on the screen by then.
    """
    recipe = "demo" if dataset == "digits" else _cifar10_recipe()
    betons, seconds = data / dataset, {}
    name = f"demo-{dataset}-seed{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = RunFolder(Path("runs") / name)
    settings = ["--cfg", recipe, "--run.name", name,
                "--run.seed", str(seed), "--data.train", str(betons / "train.beton"),
                "--data.val", str(betons / "val.beton")]  # fmt: skip
    raw = ["--root", str(data / "raw"), "--download", "true"] if dataset != "digits" else []
    for stage, command in {
        "write betons": ["prepare", "--dataset", dataset, "--out", str(betons), *raw],
        "pre-train": ["train", *settings],
        "evaluate": ["evaluate", str(run.path), "--eval.baselines", "true"],
    }.items():
        print(f"\n$ fastproj {' '.join(command)}", flush=True)
        start = time.perf_counter()
        if subprocess.run([sys.executable, "-m", "fastproj", *command]).returncode:
            raise InputError(f"the demo ends here: the command to {stage} failed, see above")
        seconds[stage] = time.perf_counter() - start
    print(f"\n{table(run, seconds)}\n\nrun folder: {run.path}")
    return run.path


def _cifar10_recipe() -> str:
    import torch

    return "cifar10" if torch.cuda.is_available() else "cifar10_cpu"


def table(run: RunFolder, seconds: dict[str, float]) -> str:
    """Linear top-1 and kNN top-1 per encoder, then images/s and the seconds of each stage."""
    rows = read_evaluation(run).rows
    end = journal.read(run.metrics)[-1]
    top1 = {(row.encoder, row.probe): row.metrics["top1"] for row in rows}
    lines = [f"{'features':<22}{'linear top-1':>14}{'kNN top-1':>12}"]
    for encoder, text in {"pixels": "raw pixels", "random": "random encoder",
                          "pre-trained": "pre-trained encoder"}.items():  # fmt: skip
        lines.append(f"{text:<22}{top1[encoder, 'logistic']:>13.2%} {top1[encoder, 'knn']:>11.2%}")
    lines.append(f"pre-training: {end['images_per_second']:,.0f} images/s")
    lines.append("seconds: " + ", ".join(f"{stage} {s:.1f}" for stage, s in seconds.items()))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Run the demo that the settings name."""
    given = load(DEMO, argv, "python -m fastproj.demo", "The whole way through.").demo
    demo(given.dataset, Path(given.data), given.seed)
