"""The compiled learner on two ranks: one graph with its collectives, and eager's gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastproj.core import dist
from fastproj.models.norm import synchronize
from fastproj.models.projector import build_projector
from fastproj.objective import build_objective
from fastproj.training.learner import Learner
from tests.support.ranks import on_ranks

IMAGES, CLASSES = 4, 3


class Tiny(nn.Sequential):
    num_features = 8

    def __init__(self) -> None:
        layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def steps() -> dict[str, Tensor | int]:
    """Gradients of each objective, eager and compiled, and the number of compiled graphs."""
    found: dict[str, Tensor | int] = {}
    for name in ("simclr", "barlow"):
        for way in ("eager", "compiled"):
            torch.manual_seed(0)
            encoder = Tiny()
            projector = build_projector("mlp", 8, hidden=16, out=8)
            learner = Learner(encoder, projector, build_objective(name, 8), CLASSES)
            synchronize(learner)
            torch.compiler.reset()
            counters.clear()
            if way == "compiled":  # the graphs are Inductor's, not the machine code
                learner.compile(dynamic=False, backend="aot_eager")
            model = dist.replicated(learner, torch.device("cpu"))
            torch.manual_seed(1 + dist.rank())
            views = torch.randn(2 * IMAGES, 3, 8, 8)
            seen = model((views,), torch.arange(IMAGES) % CLASSES)
            (seen.terms["objective"] + seen.probe_loss).backward()
            gradients = [p.grad.flatten() for p in learner.parameters() if p.grad is not None]
            found[f"{name}, {way}"] = torch.cat(gradients)
        found[f"{name}, graphs"] = counters["stats"]["unique_graphs"]
        found[f"{name}, breaks"] = sum(counters["graph_break"].values())
    return found


@pytest.mark.slow
def test_a_step_on_two_ranks_is_one_graph_with_eager_s_gradients(tmp_path) -> None:
    for found in on_ranks(2, steps, tmp_path):
        for name in ("simclr", "barlow"):
            assert found[f"{name}, graphs"] == 1 and found[f"{name}, breaks"] == 0
            eager = found[f"{name}, eager"]
            torch.testing.assert_close(found[f"{name}, compiled"], eager, rtol=1e-5, atol=1e-7)
            assert eager.norm() > 0
