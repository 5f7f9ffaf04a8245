"""A plugin through the whole life of a run: recorded, loaded again by each command, refused once
it has changed. Every command is a process of its own, so nothing is registered beforehand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastproj.prepare.encode import Store
from tests.support.betons import digit_like, write

PLUGIN = """
import torch
from fastproj.evaluation import PROBES
from fastproj.evaluation.probes.common import ProbeResult
from fastproj.models import ENCODERS
from fastproj.models.encoders import build_encoder
from fastproj.objective import OBJECTIVES


def margin_loss(z1: torch.Tensor, z2: torch.Tensor, margin: float = 0.5) -> torch.Tensor:
    return ((z1 - z2).float().square().sum(1) - margin).clamp(min=0).mean()


OBJECTIVES["margin"] = margin_loss
def one_class(train, val, num_classes, *, shift: int = 1) -> ProbeResult:
    classes = torch.full_like(val.labels, shift % num_classes)
    accuracy = (classes == val.labels).float().mean().item()
    return ProbeResult({"top1": accuracy, "top5": 1.0}, {"shift": shift}, 0.1, classes)


PROBES["mine"] = one_class
ENCODERS["mine"] = lambda stem: build_encoder("resnet_small", stem)
"""


def command(*words: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "fastproj", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_plugin_is_loaded_again_by_every_command(tmp_path: Path) -> None:
    beton = write(digit_like(np.random.default_rng(0), 48, 12, 4), tmp_path, Store("raw"))
    plugin, run = tmp_path / "my_heads.py", tmp_path / "runs" / "a"
    plugin.write_text(PLUGIN)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "plugins: [my_heads.py]\n"
        f"run: {{device: cpu, dir: {tmp_path / 'runs'}, name: a}}\n"
        f"data: {{train: {beton.path}, val: {beton.path}}}\n"
        "views: {size: 8, blur_prob: 0}\nmodel: {encoder: mine}\n"
        "projector: {hidden: 16, out: 8}\nobjective: {name: margin, margin: 0.25}\n"
        "optim: {optimizer: sgd, batch_size: 16, epochs: 2, warmup_epochs: 0}\n"
        "eval: {probes: [mine, knn], mine_shift: 2, knn_k: 3}\n"
    )
    started = command("train", "--cfg", recipe, "--train.stop_after", 2)
    assert started.returncode == 0, started.stderr
    kept = (run / "config.yaml").read_text()
    assert "margin: 0.25" in kept and "my_heads.py#sha256=" in kept
    for words in (["train", "--run.resume", run], ["evaluate", run], ["export", run],
                  ["report", run]):  # fmt: skip
        done = command(*words)
        assert done.returncode == 0, (words, done.stderr)
    plugin.write_text(PLUGIN + "# changed\n")
    refused = command("export", run)  # before torch is imported
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1, refused.stderr
    assert str(plugin) in refused.stderr and "changed" in refused.stderr
