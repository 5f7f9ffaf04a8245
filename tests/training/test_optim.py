import copy
import math
from unittest import mock

import pytest
import timm.optim
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastproj.core.errors import InputError, SettingError
from fastproj.models.encoders import build_encoder
from fastproj.models.projector import build_projector
from fastproj.training import optim
from fastproj.training.optim import (
    Lars,
    _scale,
    _scale_together,
    build_optimizer,
    parameter_groups,
    probe_group,
    set_rates,
    warmup_cosine,
)

SHAPES = [(8, 3, 3, 3), (16, 8), (1, 5), (4, 4), (6, 2), (3, 3)]
ZERO_PARAM, ZERO_GRAD, NO_GRAD = 3, 4, 5  # positions in SHAPES
RATES = [3e-5, 0.1, 0.4, 2.0, 0.0]


def random_params(seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=generator) for shape in SHAPES]
    params[ZERO_PARAM].zero_()
    vectors = [torch.randn(n, generator=generator) for n in (1, 7)]
    return [nn.Parameter(p) for p in params], [nn.Parameter(v) for v in vectors]


def fill_grads(matrices, vectors, step):
    generator = torch.Generator().manual_seed(100 + step)
    for number, p in enumerate([*matrices, *vectors]):
        size = 10.0 ** (step % 5 - 3)  # small ones are clipped at 1, large ones are scaled down
        p.grad = size * torch.randn(p.shape, generator=generator)
        if number == ZERO_GRAD:
            p.grad.zero_()
        if number == NO_GRAD:
            p.grad = None


def test_lars_equals_timm_over_20_steps():
    ours, theirs = random_params(), random_params()
    groups = [
        {"params": ours[0], "weight_decay": 1e-2, "adapt": True},
        {"params": ours[1], "weight_decay": 0.0, "adapt": False},
    ]
    lars = Lars(groups, lr=0.4, momentum=0.9, trust_coefficient=0.02)
    # timm adapts those groups that have decay.
    groups = [
        {"params": theirs[0], "weight_decay": 1e-2},
        {"params": theirs[1], "weight_decay": 0.0},
    ]
    oracle = timm.optim.Lars(groups, lr=0.4, momentum=0.9, trust_coeff=0.02, trust_clip=True)
    for step in range(20):
        fill_grads(*ours, step)
        fill_grads(*theirs, step)
        for optimizer in (lars, oracle):
            for group in optimizer.param_groups:
                group["lr"] = RATES[step % len(RATES)]
            optimizer.step()
        for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(ours[0] + ours[1], sum(random_params(), []), strict=True):
        assert torch.equal(a, b) == (a.shape == SHAPES[NO_GRAD])  # all others have moved


def test_lars_without_adaptation_is_sgd():
    ours, theirs = sum(random_params(), []), sum(random_params(), [])
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
    lars, sgd = Lars(ours, adapt=False, **settings), torch.optim.SGD(theirs, **settings)
    for step in range(5):
        fill_grads(ours, [], step)
        fill_grads(theirs, [], step)
        lars.step()
        sgd.step()
    torch.testing.assert_close(ours, theirs)


def test_lars_leaves_gradients_alone_and_stops_at_rate_zero():
    params = sum(random_params(), [])
    fill_grads(params, [], 4)
    before = [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in params]
    Lars(params, lr=0.0, weight_decay=0.1).step()
    for p, (value, grad) in zip(params, before, strict=True):
        assert torch.equal(p, value)
        assert p.grad is None if grad is None else torch.equal(p.grad, grad)


def test_lars_skips_a_step_that_a_scaler_finds_not_finite():
    """A real GradScaler: scaled gradients move it as plain ones do, an infinite one not at all."""
    ours, theirs = random_params(), random_params()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))  # makes its state, as the first loss does
    scaled, plain = (
        Lars(parameter_groups([nn.ParameterList(sum(p, []))], 1e-3), lr=0.4) for p in (ours, theirs)
    )
    for step, scale in enumerate((8.0, 8.0, 4.0)):
        for params, optimizer in ((ours, scaled), (theirs, plain)):
            fill_grads(*params, step)
            if optimizer is plain:
                if step != 1:
                    optimizer.step()
                continue
            for p in sum(params, []):
                if p.grad is not None:
                    p.grad *= scale
            if step == 1:
                params[0][0].grad.view(-1)[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        torch.testing.assert_close(ours, theirs)
    assert scaler.get_scale() == 4.0
    for p, q in zip(sum(ours, []), sum(theirs, []), strict=True):
        torch.testing.assert_close(scaled.state[p], plain.state[q])


def test_fused_sgd_has_momentum_from_the_start(monkeypatch):
    """A first step that a scaler skips would leave it as the memory was."""
    ours, theirs = sum(random_params(), []), sum(random_params(), [])
    plain = build_optimizer("sgd", parameter_groups([nn.ParameterList(theirs)], 1e-3), 0.1)
    monkeypatch.setattr(optim, "_fused", lambda groups: True)  # torch has it on a CPU as well
    fused = build_optimizer("sgd", parameter_groups([nn.ParameterList(ours)], 1e-3), 0.1)

    def fill(step):
        for params in (ours, theirs):
            fill_grads(params, [], step)
            for p in params:
                if p.ndim == 4:  # as the trainer does, after the optimizer was made
                    p.data = p.data.contiguous(memory_format=torch.channels_last)
                    p.grad = p.grad.contiguous(memory_format=torch.channels_last)

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))  # makes its state, as the first loss does
    fill(0)
    before = [p.detach().clone() for p in ours]
    ours[0].grad.fill_(torch.inf)
    scaler.step(fused)
    assert all(map(torch.equal, before, ours))
    for p in ours:
        if p.grad is not None:
            kept = fused.state[p]["momentum_buffer"]
            assert not kept.any() and kept.stride() == p.stride()
    optim.load_optimizer(fused, copy.deepcopy(fused.state_dict()))  # one has no gradient, nor state
    for step in range(3):
        fill(step)
        fused.step()
        plain.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_a_file_of_another_device_leaves_the_kernels_of_this_one(name, monkeypatch):
    """Whether steps are fused is the device's, and AdamW's count of steps lies where they are."""
    ours, theirs = sum(random_params(), []), sum(random_params(), [])
    plain = build_optimizer(name, parameter_groups([nn.ParameterList(theirs)], 1e-3), 0.1)
    fill_grads(theirs, [], 0)
    plain.step()
    monkeypatch.setattr(optim, "_fused", lambda groups: True)
    fused = build_optimizer(name, parameter_groups([nn.ParameterList(ours)], 1e-3), 0.1)
    optim.load_optimizer(fused, copy.deepcopy(plain.state_dict()))
    asked = [group.get("fused") for group in fused.param_groups]
    assert asked == [None if name == "lars" else True] * len(asked)
    fill_grads(ours, [], 1)
    fill_grads(theirs, [], 1)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    fused.step()
    plain.step()
    torch.testing.assert_close(ours, theirs)


def test_scaling_together_gives_the_bits_of_scaling_one_by_one():
    """Filters in channels-last memory too, whose elements lie in another order."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3, 3, 3), (7, 5), (1, 1), (4, 6, 1, 1), (2, 3, 5)]
    updates = [torch.randn(shape, generator=generator) for shape in shapes]
    updates[0] = updates[0].contiguous(memory_format=torch.channels_last)
    ratios = torch.rand(len(shapes), generator=generator)
    wanted = [update * ratio for update, ratio in zip(updates, ratios, strict=True)]
    strides = [update.stride() for update in updates]
    _scale_together(updates, ratios.unbind())
    for update, product, stride in zip(updates, wanted, strides, strict=True):
        assert torch.equal(update, product) and update.stride() == stride


def test_a_gpu_scales_small_tensors_together_and_large_ones_alone():
    """Counted on tensors without data: two calls of foreach, and every tensor in one of them."""
    calls = []

    def record(updates, factors):
        pairs = zip(updates, factors, strict=True)
        calls.append([(tuple(update.shape), tuple(factor.shape)) for update, factor in pairs])

    with FakeTensorMode(), torch.device("cuda"):
        updates = [torch.empty(3, 4), torch.empty(600, 600), torch.empty(2, 2, 1, 1)]
        with mock.patch.object(torch, "_foreach_mul_", record):
            _scale(updates, torch.empty(3))
            _scale(updates[1:2], torch.empty(1))
    small = [((3, 4), (3, 4)), ((2, 2, 1, 1), (2, 2, 1, 1))]
    assert calls == [small, [((600, 600), ())], [((600, 600), ())]]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_a_scaler_never_makes_an_optimizer_wait_for_the_gpu(name):
    holder = nn.ParameterList(nn.Parameter(p.detach().cuda()) for p in sum(random_params(), []))
    groups = parameter_groups([holder], 1e-4)
    optimizer = build_optimizer(name, groups, lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    before = [p.detach().clone() for p in holder]
    for value in (torch.inf, 1.0):
        scaler.scale(torch.zeros((), device="cuda"))
        for p in holder:
            p.grad = torch.full_like(p, value)
        torch.cuda.set_sync_debug_mode("error")
        try:
            scaler.step(optimizer)
            scaler.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for p, old in zip(holder, before, strict=True):
            assert torch.equal(p, old) == (value == torch.inf)


@pytest.mark.gpu
def test_lars_never_waits_for_the_gpu():
    here = sum(random_params(), [])
    there = [nn.Parameter(p.detach().cuda()) for p in here]
    fill_grads(here, [], 0)
    for p, q in zip(here, there, strict=True):
        q.grad = None if p.grad is None else p.grad.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        Lars(there, lr=0.4, weight_decay=1e-4).step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    Lars(here, lr=0.4, weight_decay=1e-4).step()
    torch.testing.assert_close([p.cpu() for p in there], here)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_state_survives_a_safe_file(name, tmp_path):
    """Three steps, saved, loaded with weights_only, three more: as six at once, bit for bit."""

    def fresh():
        matrices, vectors = random_params()
        holder = nn.ParameterList([*matrices, *vectors])
        groups = parameter_groups([holder], 1e-4)
        return holder, build_optimizer(name, groups, lr=0.1)

    def advance(params, optimizer, steps):
        for step in steps:
            fill_grads(params, [], step)
            set_rates(optimizer, step, 10, 2, 1e-3)
            optimizer.step()

    whole, optimizer = fresh()
    advance(whole, optimizer, range(6))

    first, optimizer = fresh()
    advance(first, optimizer, range(3))
    torch.save((first.state_dict(), optimizer.state_dict()), tmp_path / "half.pt")
    second, optimizer = fresh()
    weights, state = torch.load(tmp_path / "half.pt", weights_only=True)
    second.load_state_dict(weights)
    optimizer.load_state_dict(state)
    advance(second, optimizer, range(3, 6))
    for a, b in zip(second, whole, strict=True):
        assert torch.equal(a, b)


def test_groups_hold_each_parameter_once():
    encoder = build_encoder("resnet_small", "cifar")
    projector = build_projector(
        "mlp", encoder.num_features, hidden=16, out=8, depth=3, batch_norm=True, dropout=0.0,
        latents=20, k=2, levels=None,
    )  # fmt: skip
    projector.trunk[0].weight.requires_grad_(False)
    decayed, plain = parameter_groups([encoder, projector, projector], weight_decay=1e-4)
    wanted = [*encoder.parameters(), *projector.parameters()]
    wanted = {id(p) for p in wanted if p.requires_grad}
    found = [id(p) for group in (decayed, plain) for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == wanted
    # By kind of layer rather than by number of dimensions.
    for module in [*encoder.modules(), *projector.modules()]:
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                norm = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
                vector = norm or name in ("bias", "pre_bias")
                assert any(p is q for q in (plain if vector else decayed)["params"])
    assert (decayed["weight_decay"], decayed["adapt"]) == (1e-4, True)
    assert (plain["weight_decay"], plain["adapt"]) == (0.0, False)


def test_the_probe_is_plain_sgd_at_its_own_rate():
    probe, twin = nn.Linear(6, 3), nn.Linear(6, 3)
    twin.load_state_dict(probe.state_dict())
    projector = nn.Linear(6, 4)
    groups = [*parameter_groups([projector], 0.1), probe_group(probe, peak=0.05)]
    lars = build_optimizer("lars", groups, lr=0.4, momentum=0.9, trust_coefficient=0.02)
    sgd = torch.optim.SGD(twin.parameters(), 0.05, momentum=0.9)
    features = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    set_rates(lars, step=2, total=10, warmup=2, start=3e-5)
    assert [group["lr"] for group in lars.param_groups] == [0.4, 0.4, 0.05]
    for _ in range(3):
        for layer, optimizer in ((probe, lars), (twin, sgd)):
            optimizer.zero_grad()
            layer(features).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(probe.weight, twin.weight)
    torch.testing.assert_close(probe.bias, twin.bias)


def test_a_constant_group_keeps_its_peak_while_the_others_follow_the_schedule():
    group = {"params": list(nn.Linear(2, 2).parameters()), "weight_decay": 0.0, "adapt": False}
    constant = {**group, "params": list(nn.Linear(2, 2).parameters()), "constant": True}
    optimizer = build_optimizer("sgd", [group, constant], lr=0.4, momentum=0.9)
    for step, rate in ((0, 0.1), (2, 0.4), (6, 0.2), (10, 0.0)):
        set_rates(optimizer, step, total=10, warmup=2, start=0.1)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([rate, 0.4])


@pytest.mark.parametrize(("total", "warmup"), [(100, 10), (7, 3), (50, 0)])
def test_schedule_equals_torch_schedulers(total, warmup):
    peak, start = 0.4, 3e-5
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(dummy, T_max=total - warmup)
    if warmup:
        line = torch.optim.lr_scheduler.LinearLR(dummy, start / peak, total_iters=warmup)
        cosine = torch.optim.lr_scheduler.SequentialLR(dummy, [line, cosine], [warmup])
    for step in range(total + 1):
        rate = warmup_cosine(step, total, warmup, peak, start)
        assert rate == pytest.approx(dummy.param_groups[0]["lr"], rel=1e-6, abs=1e-9)
        dummy.step()
        cosine.step()


def test_schedule_at_its_corners():
    assert warmup_cosine(0, 100, 10, 0.4, 3e-5) == 3e-5
    assert warmup_cosine(5, 100, 10, 0.4, 0.0) == pytest.approx(0.2)
    assert warmup_cosine(10, 100, 10, 0.4, 3e-5) == 0.4
    assert warmup_cosine(55, 100, 10, 0.4, 3e-5) == pytest.approx(0.2)
    assert warmup_cosine(100, 100, 10, 0.4, 3e-5) == 0.0
    assert warmup_cosine(101, 100, 10, 0.4, 3e-5) == 0.0
    half = warmup_cosine(3, 100, 2.5, 0.4, 0.0)  # a fractional warm-up
    assert half == pytest.approx(0.2 * (1 + math.cos(math.pi * 0.5 / 97.5)))
    assert warmup_cosine(4, 5, 10, 0.4, 0.0) == pytest.approx(0.16)  # warm-up beyond the end


@pytest.mark.parametrize(
    ("name", "kind"), [("lars", Lars), ("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)]
)
def test_each_optimizer_descends(name, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.randn(64, 8)
    y = x.sum(dim=1, keepdim=True)
    optimizer = build_optimizer(name, parameter_groups([model], 1e-4), 0.05)
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_unknown_optimizer_is_a_setting_error():
    with pytest.raises(SettingError, match="lars, sgd, adamw"):
        build_optimizer("adam", [], 0.1)


def test_an_impossible_count_of_steps_and_other_groups_are_refused_before_they_are_loaded() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.01)
    parameter.sum().backward()
    adam.step()
    whole = copy.deepcopy(adam.state_dict())
    whole["state"][0]["step"] = torch.tensor(-1.0)
    with pytest.raises(InputError, match="the optimizer's step of a parameter"):
        optim.load_optimizer(adam, whole)
    whole = copy.deepcopy(adam.state_dict())
    whole["param_groups"][0]["weight_decay"] = None
    with pytest.raises(InputError, match="weight_decay is None, not 0.01"):
        optim.load_optimizer(adam, whole)
    assert adam.param_groups[0]["weight_decay"] == 0.01
