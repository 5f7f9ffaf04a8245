"""Objectives with parts of their own: predictors, momentum encoders, queues, prototypes."""

import math

import pytest
import torch
from torch import nn

from fastproj.core.errors import InputError, SettingError
from fastproj.core.table import hyperparameters
from fastproj.models.encoders import Encoder
from fastproj.models.projector import build_projector
from fastproj.objective import OBJECTIVES, build_objective, losses, normalize
from fastproj.training.learner import Learner
from fastproj.training.optim import cosine

SETTINGS = {
    "temperature": 0.2,
    "off_diagonal": 0.0051,
    "scale": 0.1,
    "invariance": 25.0,
    "variance": 25.0,
    "covariance": 1.0,
    "predictor_hidden": 16,
    "queue": 7,
    "queue_epoch": 2,
    "prototypes": 5,
    "sinkhorn_steps": 3,
    "epsilon": 0.05,
    "freeze_epochs": 1,
    "weight_norm": False,
}


def made(name: str, width: int = 6, **changes: object):
    torch.manual_seed(0)
    named = hyperparameters(OBJECTIVES[name])
    given = {option: value for option, value in SETTINGS.items() if option in named}
    return build_objective(name, width, 2, **{**given, **changes})


def projections(views: int = 2, batch: int = 4, width: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(views, batch, width, generator=generator)


def labels(batch: int = 4) -> torch.Tensor:
    return torch.arange(batch) % 2


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_a_loss_with_a_gradient(name):
    objective = made(name)
    z = projections().requires_grad_()
    teacher = projections(seed=1) if objective.teacher else None
    loss = objective(z, teacher, labels())
    loss.backward()
    assert loss.shape == () and loss.isfinite() and loss.dtype == torch.float32
    assert z.grad.isfinite().all() and z.grad.norm() > 0
    assert all(p.grad is not None for p in objective.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        half = objective(z.detach(), teacher, labels())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(loss.item(), rel=0.05, abs=0.05)


def test_functions_get_the_settings_they_name():
    z = projections()
    cases = {
        "simclr": losses.nt_xent(*z, temperature=0.3),
        "barlow": losses.barlow_twins(*z, off_diagonal=0.02, scale=0.5),
        "vicreg": losses.vicreg(*z, invariance=1.0, variance=2.0, covariance=3.0),
        "supcon": losses.sup_con(z, labels(), temperature=0.3),
    }
    changes = {
        "simclr": {"temperature": 0.3},
        "barlow": {"off_diagonal": 0.02, "scale": 0.5},
        "vicreg": {"invariance": 1.0, "variance": 2.0, "covariance": 3.0},
        "supcon": {"temperature": 0.3},
    }
    for name, wanted in cases.items():
        assert torch.equal(made(name, **changes[name])(z, None, labels()), wanted), name


def test_wrong_names_and_a_missing_queue_are_setting_errors():
    with pytest.raises(SettingError, match="objective.name: no 'simclear'; choose one of simclr"):
        made("simclear")
    with pytest.raises(SettingError, match="mocov2plus needs one, say --objective.queue 32768"):
        made("mocov2plus", queue=0)


@pytest.mark.parametrize("per_view", [False, True])
@pytest.mark.parametrize("name", ["byol", "simsiam", "mocov3"])
def test_a_predictor_sees_both_views_in_one_pass_or_one_in_each(name, per_view):
    objective = made(name)
    objective.bn_per_view = per_view
    z, teacher = projections(), projections(seed=1)
    both = objective.predictor(z.flatten(0, 1))
    p1, p2 = map(objective.predictor, z) if per_view else (both[:4], both[4:])
    wanted = {
        "byol": lambda: losses.byol(p1, p2, *teacher),
        "simsiam": lambda: losses.simsiam(p1, p2, *z),
        "mocov3": lambda: losses.moco_v3(p1, p2, *teacher, SETTINGS["temperature"]),
    }[name]()
    torch.testing.assert_close(objective(z, teacher, labels()), wanted)
    assert objective.constant_rate == (name == "simsiam")


def test_a_queue_keeps_the_newest_and_overwrites_the_oldest():
    """7 places, 4 samples a step: after three steps the last 7 of the 12, whichever their place."""
    objective = made("mocov2plus")
    steps = [projections(seed=step) for step in range(3)]
    for teacher in steps:
        objective.after_update(projections(), teacher)
    every = torch.cat(steps, dim=1)
    for view in range(2):
        kept = {tuple(row.tolist()) for row in objective.queue[view]}
        wanted = {tuple(row.tolist()) for row in normalize(every[view])[-7:]}
        assert kept == wanted
    assert objective.seen == 12
    longer = projections(batch=9)  # more than the queue holds
    objective.after_update(projections(), longer)
    kept = {tuple(row.tolist()) for row in objective.queue[0]}
    assert kept == {tuple(row.tolist()) for row in normalize(longer[0])[-7:]}


def test_moco_compares_each_view_with_the_other_views_keys():
    objective = made("mocov2plus")
    z, teacher = projections(), projections(seed=1)
    one = losses.info_nce(z[0], teacher[1], objective.queue[1], 0.2)
    two = losses.info_nce(z[1], teacher[0], objective.queue[0], 0.2)
    torch.testing.assert_close(objective(z, teacher, labels()), (one + two) / 2)


def test_swav_prototypes_are_unit_and_frozen_at_first():
    objective = made("swav")
    for epoch, frozen in ((0, True), (1, False)):
        objective.begin_epoch(epoch)
        objective(projections(views=3).requires_grad_(), None, labels()).backward()
        objective.before_update()
        assert (objective.prototypes.weight.grad is None) == frozen
    with torch.no_grad():
        objective.prototypes.weight.mul_(3)
    objective.after_update(projections(views=3), None)
    norms = objective.prototypes.weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(5))


def test_swavs_prototypes_with_weight_norm_are_torchs():
    """Forward pass, gradient and update of torch's parametrization with g fixed at 1."""
    objective, plain = made("swav", weight_norm=True), made("swav")
    with torch.no_grad():
        plain.prototypes.weight.copy_(normalize(objective.prototypes.weight))
    theirs = nn.Linear(6, 5, bias=False)
    theirs.load_state_dict(objective.prototypes.state_dict())
    nn.utils.parametrizations.weight_norm(theirs)
    g, v = theirs.parametrizations.weight.parameters()
    g.requires_grad_(False).fill_(1)
    optimizers = [torch.optim.SGD([p], 1.0) for p in (objective.prototypes.weight, v)]
    for step in range(3):
        z = projections(views=3, seed=step)
        unit = normalize(z.flatten(0, 1)).unflatten(0, (3, 4))
        scores = theirs(unit)
        codes = torch.stack([losses.sinkhorn(scores[view], 0.05, 3) for view in (0, 1)])
        wanted = losses.swav(scores, codes, SETTINGS["temperature"])
        loss = objective(z, None, labels())
        torch.testing.assert_close(loss, wanted)
        for optimizer, value in zip(optimizers, (loss, wanted), strict=True):
            optimizer.zero_grad()
            value.backward()
        torch.testing.assert_close(objective.prototypes.weight.grad, v.grad)
        if step == 0:  # the same forward pass, another gradient: with a part along the prototypes
            same = plain(z, None, labels())
            torch.testing.assert_close(same, loss)
            same.backward()
            weight, other = plain.prototypes.weight.detach(), plain.prototypes.weight.grad
            assert (other * weight).sum(1).abs().min() > 1e-4
            tangent = other - (other * weight).sum(1, keepdim=True) * weight
            torch.testing.assert_close(v.grad, tangent / v.norm(dim=1, keepdim=True))
        for optimizer in optimizers:
            optimizer.step()
        objective.after_update(z, None)
        torch.testing.assert_close(objective.prototypes.weight, v)
    assert (v.norm(dim=1) - 1).abs().min() > 1e-3  # the norm is free


def test_supervised_is_the_cross_entropy_of_a_linear_classifier():
    """Against a float64 loop from the formula, over both views."""
    objective = build_objective("supervised", 6, 3).double()
    z, classes = projections().double(), torch.tensor([2, 0, 1, 2])
    weight, bias = objective.classifier.weight, objective.classifier.bias
    total = 0.0
    for view in z:
        for row, label in zip(view, classes.tolist(), strict=True):
            logits = [(row @ w + b).item() for w, b in zip(weight, bias, strict=True)]
            total -= logits[label] - math.log(sum(map(math.exp, logits)))
    assert objective(z, None, classes).item() == pytest.approx(total / 8, rel=1e-12)
    assert objective.needs_labels and weight.shape == (3, 6)
    with pytest.raises(InputError, match="supervised needs the number of classes"):
        build_objective("supervised", 6)
    with pytest.raises(InputError, match=r"logits \(V, B, classes\) and labels \(B,\)"):
        objective(z, None, classes[:3])


def test_swav_uses_its_queue_when_it_is_full_and_the_epoch_has_come():
    objective, plain = made("swav"), made("swav", queue=0)
    plain.prototypes.load_state_dict(objective.prototypes.state_dict())
    z = projections(views=3)
    without = plain(z, None, labels())

    def loss(epoch: int) -> torch.Tensor:
        objective.begin_epoch(epoch)
        return objective(z, None, labels())

    assert torch.equal(loss(5), without)  # empty
    objective.remember(projections(seed=5))
    assert torch.equal(loss(5), without)  # 4 of 7
    objective.remember(projections(seed=6))
    assert torch.equal(loss(1), without)  # full, too early
    assert not torch.equal(loss(2), without)
    # By hand: the assignments of batch and queue together, the batch's part of them.
    unit = normalize(z.flatten(0, 1)).unflatten(0, (3, 4))
    weight = objective.prototypes.weight.detach()
    codes = torch.stack(
        [
            losses.sinkhorn(torch.cat([unit[v], objective.queue[v]]) @ weight.T, 0.05, 3)[:4]
            for v in (0, 1)
        ]
    )
    torch.testing.assert_close(loss(2), losses.swav(unit @ weight.T, codes, 0.2))


def learner(name: str = "byol", per_view: bool = False) -> Learner:
    torch.manual_seed(0)
    layers = {"flatten": nn.Flatten(), "linear": nn.Linear(12, 5), "norm": nn.BatchNorm1d(5)}
    head = {"hidden": 8, "out": 6, "depth": 2, "batch_norm": True, "dropout": 0.0}
    projector = build_projector("mlp", 5, **head, latents=None, k=0.1, levels=None)
    return Learner(Encoder(layers, 5), projector, made(name), classes=2, bn_per_view=per_view)


def test_the_teacher_starts_equal_follows_slowly_and_is_not_trained():
    model = learner()
    student = [*model.encoder.parameters(), *model.projector.parameters()]
    teacher = list(model.teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(student, teacher, strict=True))
    assert not any(p.requires_grad for p in teacher)
    before = [p.clone() for p in teacher]
    with torch.no_grad():
        for p in student:
            p.add_(torch.randn_like(p))
    model.update_teacher(0.9)
    for now, was, ours in zip(teacher, before, student, strict=True):
        torch.testing.assert_close(now, 0.9 * was + 0.1 * ours)
    step = model((torch.randn(8, 3, 2, 2),), labels())
    assert step.teacher.shape == (2, 4, 6) and not step.teacher.requires_grad
    assert learner("simclr").teacher is None


def test_the_momentum_follows_a_cosine():
    assert cosine(0.99, 1.0, 0) == pytest.approx(0.99)
    assert cosine(0.99, 1.0, 1) == 1
    # BYOL, section 3.3: 1 - (1 - base)(cos(pi k / K) + 1) / 2
    for k in range(11):
        wanted = 1 - (1 - 0.99) * (math.cos(math.pi * k / 10) + 1) / 2
        assert cosine(0.99, 1.0, k / 10) == pytest.approx(wanted)


def test_small_crops_join_the_large_ones_behind_one_encoder():
    model = learner("swav")
    large, small = torch.randn(8, 3, 2, 2), torch.randn(12, 3, 2, 2)
    step = model((large, small), labels())
    assert step.projections.shape == (5, 4, 6) and step.features.shape == (2, 4, 5)
    assert step.probe_loss.shape == step.probe_hits.shape == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "per_view"),
    [("barlow", False), ("mocov2plus", False), ("mocov3", True), ("simsiam", True),
     ("swav", False)],
)  # fmt: skip
def test_eager_equals_compiled(name, per_view):
    """The whole forward pass, compiled in place: same terms, same gradients, same names."""
    eager, compiled = learner(name, per_view), learner(name, per_view)
    names = compiled.state_dict().keys()
    compiled.compile()
    assert compiled.state_dict().keys() == names
    torch.manual_seed(1)
    groups = (torch.randn(8, 3, 2, 2),)
    for _ in range(2):  # the second step sees the buffers that the first one changed
        seen = []
        for model in (eager, compiled):
            step = model(groups, labels())
            (step.terms["objective"] + step.probe_loss).backward()
            model.objective.after_update(step.projections, step.teacher)
            seen.append(step.terms["objective"].detach())
        torch.testing.assert_close(*seen)
    for (key, ours), theirs in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(theirs.grad, ours.grad, msg=lambda m, key=key: f"{key}: {m}")
    for (key, ours), theirs in zip(eager.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(theirs, ours, msg=lambda m, key=key: f"{key}: {m}")
