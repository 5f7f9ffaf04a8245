"""A study whose runs have two ranks each: torchrun's own results, and nothing left of a kill."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch

from fastproj.evaluation.results import read_evaluation
from fastproj.prepare.encode import Store
from fastproj.runs import checkpoint
from fastproj.runs.folder import RunFolder
from tests.support.betons import half_drawn, write
from tests.support.studies import contents

RECIPE = """
run: {device: cpu}
views: {size: 8}
model: {encoder: resnet_small}
projector: {hidden: 32, out: 16}
optim: {batch_size: 16, epochs: 4, warmup_epochs: 0, optimizer: adamw, lr: 1e-3}
train: {precision: float32, log_every: 1}
eval: {logistic_strengths: [1e-3, 1e-1], knn_k: 3}
"""
FILE = """
study: {{recipe: {root}/recipe.yaml, seeds: [0], controls: false, name: two, ranks: 2}}
sets:
  s: {{data: {{train: {root}/train.beton, val: {root}/val.beton, engine: resident}}}}
arms:
  default:
  discretized:
    settings: {{projector: {{levels: 5}}}}
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_rank_dies_with_its_torchrun() -> None:
    """torchrun starts ranks in sessions of their own, which a kill of torchrun does not reach."""
    rank = (
        "import time, fastproj.__main__ as command\n"
        "command.run_command = lambda *rest: (print(flush=True), time.sleep(60))\n"
        "command.main('train')"
    )
    torchrun = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True)\n"
        "print(child.pid, flush=True); child.wait()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", torchrun], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "it"},
    )  # fmt: skip
    assert parent.stdout
    child = psutil.Process(int(parent.stdout.readline()))
    parent.stdout.readline()  # its command has begun
    parent.kill()
    parent.wait()
    parent.stdout.close()
    left = psutil.wait_procs([child], 10)[1]
    for one in left:
        one.kill()
    assert not left


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for split, count in (("train", 80), ("val", 40)):
        write(half_drawn(split, count), folder, Store("raw"))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "study.yaml").write_text(FILE.format(root=folder))
    return folder


def begin(root: Path, runs: Path) -> subprocess.Popen[str]:
    words = ["study", "--cfg", f"{root}/study.yaml", "--study.dir", str(runs)]
    return subprocess.Popen(
        [sys.executable, "-m", "fastproj", *words, "--study.processes", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip


def until_both_train(runs: Path, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Every process below the study, once both runs have made a step."""
    for arm in ("default", "discretized"):
        metrics = RunFolder(runs / "two" / "s" / f"{arm}-seed0").metrics
        while not (metrics.exists() and b'"event": "step"' in metrics.read_bytes()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len([one for one in below if "RANK" in one.environ()]) >= 4
    return below


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(run.checkpoints)
    assert newest
    found: dict[str, torch.Tensor] = checkpoint.load(newest)["encoder"]
    return found


@pytest.fixture(scope="module")
def undisturbed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunFolder]:
    """The study's folder, and one of its runs as torchrun by hand makes it."""
    runs = tmp_path_factory.mktemp("undisturbed")
    process = begin(root, runs)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors

    def torchrun(*words: str) -> None:
        by_hand: Sequence[str] = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "fastproj", *words,
        ]  # fmt: skip
        subprocess.run(by_hand, check=True, capture_output=True, env=ENVIRONMENT)

    torchrun(
        "train", "--cfg", f"{root}/recipe.yaml", "--data.train", f"{root}/train.beton",
        "--data.val", f"{root}/val.beton", "--data.engine", "resident", "--run.dir", str(runs),
        "--run.name", "hand", "--projector.levels", "5",
    )  # fmt: skip
    torchrun("evaluate", str(runs / "hand"))
    return runs / "two", RunFolder(runs / "hand")


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1800)  # some 30 starts of torch
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_study_of_two_ranks_stopped_and_begun_again_gives_torchruns_results(
    root: Path, undisturbed: tuple[Path, RunFolder], tmp_path: Path, number: signal.Signals
) -> None:
    whole, by_hand = undisturbed
    process = begin(root, tmp_path)
    below = until_both_train(tmp_path, process)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    assert not psutil.wait_procs(below, 20)[1]  # no torchrun and no rank is left
    process = begin(root, tmp_path)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    found = contents(tmp_path / "two")
    assert found == contents(whole)
    assert len(found["json"]["runs"]) == 2 and found["json"]["problems"] == {}
    for study in (whole, tmp_path / "two"):
        run = RunFolder(study / "s" / "discretized-seed0")
        for name, tensor in weights(by_hand).items():
            assert torch.equal(weights(run)[name], tensor), name
        scores = [[row.metrics for row in read_evaluation(one).rows] for one in (run, by_hand)]
        assert scores[0] == scores[1] and len(scores[0]) == 2
