"""torchrun, with Gloo on CPUs and NCCL on GPUs: what one process computes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore, all_gather_object
from torch.distributed import init_process_group as join
from torch.nn.parallel import DistributedDataParallel

from fastproj import evaluate, train
from fastproj.core import dist
from fastproj.evaluation.results import read_evaluation
from fastproj.prepare.encode import Store
from fastproj.runs import journal
from fastproj.runs.folder import RunFolder
from tests.support.betons import half_drawn, write
from tests.support.ranks import on_ranks

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
# Colors and noise are drawn per rank: nothing is drawn but the crops. SGD, because with LARS a
# gradient times 2 changes nothing.
OPTIONS = {
    "model.encoder": "resnet_small", "views.size": 16, "views.flip_prob": 0, "views.jitter_prob": 0,
    "views.gray_prob": 0, "views.blur_prob": 0, "projector.hidden": 32, "projector.out": 16,
    "optim.batch_size": 64, "optim.epochs": 1, "optim.warmup_epochs": 0, "optim.optimizer": "sgd",
    "optim.lr": 0.4, "train.log_every": 1, "train.precision": "float32", "model.sync_bn": "true",
    "data.workers": 1,
}  # fmt: skip
TRAIN = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
EVALUATE = ["--eval.probes", "logistic,knn", "--eval.knn_k", "3"]


def by_torchrun(ranks: int, module: ModuleType, words: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc-per-node={ranks}", "-m", module.__name__, *words],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.soak), GPU])
def test_training_and_evaluation_by_torchrun_equal_those_without_it(
    device: str, tmp_path: Path
) -> None:
    """As many ranks as there are GPUs, two at most; on one, torchrun starts one process."""
    for split, count in (("train", 320), ("val", 24)):
        write(half_drawn(split, count), tmp_path, Store("raw"))
    ranks = 2 if device == "cpu" else min(2, torch.cuda.device_count())
    files = ["--data.train", f"{tmp_path}/train.beton", "--data.val", f"{tmp_path}/val.beton"]
    words = [*TRAIN, *files, "--run.dir", str(tmp_path), "--run.device", device]
    train.main([*words, "--run.name", "alone"])
    by_torchrun(ranks, train, [*words, "--run.name", "together"])
    one, two = (
        [
            e["loss"]
            for e in journal.read(RunFolder(tmp_path / name).metrics)
            if e["event"] == "step"
        ]
        for name in ("alone", "together")
    )
    # Initial weights of one process multiplied by 1 ± 3e-8, less than float32 resolves, moved the
    # second loss by up to 6e-5 of it and later ones by up to 1e-3; a rate times 2 moved the second
    # by 3.7e-3 at least. GPUs multiply in TF32, which rounds more: their bounds are not measured.
    rounding = 1 if device == "cpu" else 10
    assert len(one) == 5 and two[:2] == pytest.approx(one[:2], rel=3e-4 * rounding)
    assert two == pytest.approx(one, rel=3e-3 * rounding)
    shutil.copytree(tmp_path / "alone", tmp_path / "again")
    evaluate.main([str(tmp_path / "alone"), "--run.device", device, *EVALUATE])
    by_torchrun(ranks, evaluate, [str(tmp_path / "again"), "--run.device", device, *EVALUATE])
    once, again = (
        [row.metrics for row in read_evaluation(RunFolder(tmp_path / name)).rows]
        for name in ("alone", "again")
    )
    assert once == again and len(once) == 2


def in_a_group_of_one(device: str) -> dict[str, Tensor]:
    """What the collectives make of one rank's values: a GPU alone can show that NCCL runs."""
    there, backend = (torch.device("cuda", 0), "nccl") if device == "cuda" else (None, "gloo")
    join(backend, store=HashStore(), rank=0, world_size=1, device_id=there)

    def shared(x: Tensor) -> Tensor:
        return dist._Gather.apply(x) * dist._Total.apply(x)

    found = {}
    for name, function in {
        "eager": shared, "compiled": torch.compile(shared, backend="aot_eager", fullgraph=True),
    }.items():  # fmt: skip
        x = torch.arange(12.0, device=device).view(4, 3).requires_grad_()
        y = function(x)
        y.sum().backward()
        found |= {name: y.detach().cpu(), f"{name}, gradient": x.grad.cpu()}
    layer = nn.Linear(3, 2, bias=False, device=device)
    DistributedDataParallel(layer, [there] if there else None)(x.detach()).sum().backward()
    values: list[str] = [""]
    all_gather_object(values, "text")
    found |= {"layer": layer.weight.grad.cpu(), "text": torch.tensor(values == ["text"])}
    dist.stop()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_group_of_one_rank_gives_back_its_values(device: str, tmp_path: Path) -> None:
    (found,) = on_ranks(1, partial(in_a_group_of_one, device), tmp_path)
    x = torch.arange(12.0).view(4, 3)
    for name in ("eager", "compiled"):  # the square of x, whose gradient is 2 x
        assert torch.equal(found[name], x * x) and torch.equal(found[f"{name}, gradient"], 2 * x)
    assert torch.equal(found["layer"], x.sum(0).expand(2, 3)) and found["text"]
