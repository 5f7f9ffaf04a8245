"""Batch norm of each view on its own: the learner against separate passes written out by hand."""

import copy
import math
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from fastproj.models.encoders import Encoder
from fastproj.models.noise import Noise
from fastproj.models.projector import build_projector
from fastproj.objective import build_objective, losses
from fastproj.training.learner import Learner
from fastproj.training.penalties import information

IMAGES, CLASSES = 6, 3
OPTIONS: dict[str, dict[str, float]] = {
    "simclr": {}, "barlow": {}, "byol": {"predictor_hidden": 7}, "simsiam": {"predictor_hidden": 7},
    "mocov2plus": {"queue": 8}, "mocov3": {"predictor_hidden": 7},
    "swav": {"prototypes": 4}, "supervised": {},
}  # fmt: skip


def learner(name: str, per_view: bool, noise: bool = False) -> Learner:
    torch.manual_seed(0)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(3, 5, 3), norm=nn.BatchNorm2d(5), relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
    )  # fmt: skip
    projector = build_projector("mlp", 5, hidden=8, out=6, batch_norm=True, output_norm=True)
    objective = build_objective(name, 6, CLASSES, **OPTIONS[name])
    return Learner(
        Encoder(layers, 5), projector, objective, CLASSES,
        Noise(5, "learned", 0.1) if noise else None,
        {"matrix_information": information()} if noise else None,
        bn_per_view=per_view,
    ).double()  # fmt: skip


def batch(small: int = 0) -> tuple[tuple[Tensor, ...], Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(2, 6), (small, 4)] if small else [(2, 6)]
    # The second view is brighter: its statistics are others.
    views = tuple(
        torch.randn(v * IMAGES, 3, s, s, generator=generator, dtype=torch.float64)
        + torch.arange(v).repeat_interleave(IMAGES)[:, None, None, None]
        for v, s in sizes
    )
    return views, torch.arange(IMAGES) % CLASSES


def by_hand(model: Learner, name: str, views: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """One view after the other through every module, in the order of the views."""
    mean, z, teacher, p = [], [], [], []
    for group in views:
        for start in range(0, len(group), IMAGES):
            mean.append(model.encoder(group[start : start + IMAGES]))
    features = mean
    if model.noise is not None:
        assert model.noise.exponent is not None
        torch.manual_seed(2)
        draws = torch.randn(len(mean) * IMAGES, 5, dtype=torch.float64).split(IMAGES)
        features = [
            m + model.noise.sigma * 10 ** model.noise.exponent(m).tanh() * e
            for m, e in zip(mean, draws, strict=True)
        ]
    for view in features:
        z.append(model.projector.norm(model.projector.last(model.projector.trunk(view))))
    if model.teacher is not None:
        with torch.no_grad():
            teacher = [model.teacher(views[0][:IMAGES]), model.teacher(views[0][IMAGES:])]
    objective = model.objective
    if hasattr(objective, "predictor"):
        p = [objective.predictor(z[0]), objective.predictor(z[1])]
    loss = {
        "simclr": lambda: losses.nt_xent(*z),
        "barlow": lambda: losses.barlow_twins(*z),
        "byol": lambda: losses.byol(*p, *teacher),
        "simsiam": lambda: losses.simsiam(*p, *z),
        "mocov2plus": lambda: (
            losses.info_nce(z[0], teacher[1], objective.queue[1], 0.2)
            + losses.info_nce(z[1], teacher[0], objective.queue[0], 0.2)
        ) / 2,
        "mocov3": lambda: losses.moco_v3(*p, *teacher, 0.2),
        "swav": lambda: swav(objective, z),
        "supervised": lambda: losses.cross_entropy(objective.classifier(torch.stack(z)), labels),
    }[name]()  # fmt: skip
    if model.noise is not None:  # alpha 2, in closed form
        one, other = (
            nn.functional.normalize(torch.cat(x[:2])) for x in (features, z)
        )  # fmt: skip
        a, b = (one @ one.T).square(), (other @ other.T).square()
        loss = loss + 0.3 * ((a * b).mean() / (a.mean() * b.mean())).log()
    logits = model.probe(torch.cat(mean[:2]).detach()).float()  # as the online probe's are
    return loss + nn.functional.cross_entropy(logits, labels.repeat(2))


def swav(objective: nn.Module, z: list[Tensor]) -> Tensor:
    scores = torch.stack([nn.functional.normalize(x) @ objective.prototypes.weight.T for x in z])
    codes = torch.stack([losses.sinkhorn(scores[view], 0.05, 3) for view in (0, 1)])
    return losses.swav(scores, codes, 0.2)


CASES = [(name, 0, False) for name in OPTIONS] + [("swav", 3, False), ("simsiam", 0, True)]


@pytest.mark.parametrize(("name", "small", "noise"), CASES)
def test_gradients_and_running_statistics_are_those_of_separate_passes(
    name: str, small: int, noise: bool
) -> None:
    model = learner(name, True, noise)
    theirs = copy.deepcopy(model)
    views, labels = batch(small)
    torch.manual_seed(2)
    step = model(views, labels)
    loss = step.terms["objective"] + step.probe_loss
    if noise:
        loss = loss + 0.3 * step.terms["matrix_information"]
    wanted = by_hand(theirs, name, views, labels)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
    loss.backward()
    wanted.backward()
    trained = 0
    for (key, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert (ours.grad is None) == (other.grad is None), key
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, other.grad, rtol=1e-9, atol=1e-12)
            trained += 1
    assert trained >= 8
    for (key, ours), other in zip(model.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12, msg=key)
    assert model.encoder.norm.num_batches_tracked == 2 + small


@pytest.mark.parametrize("name", ["simclr", "simsiam", "mocov3"])
def test_one_joint_pass_is_another_method_with_the_same_names(name: str) -> None:
    views, labels = batch()
    models = [learner(name, per_view) for per_view in (True, False)]
    apart, joint = (model(views, labels).terms["objective"].item() for model in models)
    assert not math.isclose(apart, joint, rel_tol=1e-3)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    assert models[1].encoder.norm.num_batches_tracked == 1
    alike = views[0][:IMAGES].repeat(2, 1, 1, 1)  # twice the same view: the same statistics
    apart, joint = (model((alike,), labels).terms["objective"].item() for model in models)
    assert math.isclose(apart, joint, rel_tol=1e-9)
