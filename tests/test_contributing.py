"""CONTRIBUTING.md adds an objective and a projector: its code is run as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj.core import dist
from fastproj.models import PROJECTORS
from fastproj.objective import OBJECTIVES
from fastproj.prepare.encode import Store
from fastproj.runs import journal
from fastproj.settings import RUN, load
from fastproj.train import train
from tests.support.betons import digit_like, write
from tests.support.ranks import on_ranks

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture
def tables():
    """Both tables, put back as they were."""
    before = dict(OBJECTIVES), dict(PROJECTORS)
    yield
    for table, entries in zip((OBJECTIVES, PROJECTORS), before, strict=True):
        table.clear()
        table.update(entries)


def guide() -> dict[str, object]:
    """What the guide's two blocks define, run one after the other."""
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    return names


def loss_of_a_share() -> torch.Tensor:
    z1, z2 = views()[:, dist.rank() * 4 : dist.rank() * 4 + 4]
    return dist.mean(guide()["alignment_uniformity"](z1, z2, spread=0.5))


def views() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 8, 6, generator=generator, dtype=torch.float64)


def test_the_objective_is_the_same_on_two_ranks(tables, tmp_path):
    alone = guide()["alignment_uniformity"](*views(), spread=0.5)
    for seen in on_ranks(2, loss_of_a_share, tmp_path):
        torch.testing.assert_close(seen, alone)


def test_one_function_and_one_line_each(tables, tmp_path, capsys):
    guide()
    source = digit_like(np.random.default_rng(0), 40, 12, 4)
    beton = write(source, tmp_path, Store("raw"))
    options = {
        "data.train": beton.path, "run.dir": tmp_path, "run.name": "r", "run.device": "cpu",
        "model.encoder": "resnet_small", "views.size": 8, "views.blur_prob": 0,
        "objective.name": "alignment_uniformity", "objective.spread": 0.7,
        "projector.kind": "bottleneck",
        "projector.hidden": 12, "projector.out": 8, "projector.levels": 5,
        "projector.latents": 32, "matrix_information.weight": 0.1, "sparsehead.weight": 0.1,
        "optim.batch_size": 20, "optim.epochs": 2,
    }  # fmt: skip
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    run = train(load(RUN, argv, "test", ""))
    assert journal.read(run / "metrics.jsonl")[-1]["event"] == "end"
    with pytest.raises(SystemExit):
        load(RUN, ["--help"], "test", "")
    assert "| alignment_uniformity)" in capsys.readouterr().out
