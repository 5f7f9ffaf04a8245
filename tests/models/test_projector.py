import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastproj.core.errors import InputError, SettingError
from fastproj.core.table import hyperparameters
from fastproj.models import PROJECTORS
from fastproj.models.projector import Discretize, build_projector

DEFAULTS = {
    "hidden": 40, "out": 16, "depth": 2, "batch_norm": False, "dropout": 0.0, "latents": None,
    "k": 0.1, "levels": None,
}  # fmt: skip


def build(kind, features=24, **changed):
    torch.manual_seed(0)
    named = {**hyperparameters(PROJECTORS[kind]), **dict.fromkeys(("latents", "k", "levels"))}
    given = {option: value for option, value in DEFAULTS.items() if option in named}
    if changed.get("latents"):
        given["out"] = DEFAULTS["out"]
    return build_projector(kind, features, **{**given, **changed})


def names(stage: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in stage.children()]


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("latents", [None, 100])
@pytest.mark.parametrize("kind", PROJECTORS)
def test_shape_is_as_stated_and_head_follows_hidden(kind, latents, levels):
    if kind == "direct" and latents:
        return
    projector = build(kind, latents=latents, levels=levels)
    features = torch.randn(5, 24)
    out = projector(features)
    assert out.shape == (5, projector.out_features)
    assert projector.out_features == (24 if kind == "none" and not latents else 16)
    projector.eval()  # BatchNorm's statistics of a batch move
    hidden = projector.hidden(features)
    assert torch.equal(projector.head(hidden), projector(features))
    assert hidden.shape == (5, 40 if kind in ("mlp", "barlow") else 24)


def test_simclr_default_is_linear_relu_linear():
    projector = build("mlp", 512, hidden=2048, out=256)
    assert names(projector.trunk) == ["Linear", "ReLU"]
    shapes = [tuple(p.shape) for p in projector.parameters()]
    assert shapes == [(2048, 512), (2048,), (256, 2048), (256,)]
    features = torch.randn(3, 512)
    first, last = projector.trunk[0], projector.last
    by_hand = (features @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    torch.testing.assert_close(projector(features), by_hand)


def test_barlow_is_its_paper_s():
    projector = build("barlow", 32, hidden=64, out=48)
    block = ["Linear", "BatchNorm1d", "ReLU"]
    assert names(projector.trunk) == [*block, *block]
    assert [p.shape for p in projector.parameters() if p.ndim > 1] == [(64, 32), (64, 64), (48, 64)]
    assert projector.trunk[0].bias is projector.trunk[3].bias is None  # BatchNorm has its own


def test_dropout_follows_each_hidden_relu():
    projector = build("mlp", depth=3, dropout=0.2)
    assert names(projector.trunk) == ["Linear", "ReLU", "Dropout"] * 2
    ones = projector.trunk[2](torch.ones(1000, 40))
    assert set(ones.unique().tolist()) == {0.0, 1.25}  # kept units stand for the dropped
    assert 0.18 < (ones == 0).float().mean() < 0.22


def test_depth_one_is_one_linear_layer():
    for projector in (build("mlp", depth=1, batch_norm=True), build("linear")):
        assert names(projector.trunk) == [] and isinstance(projector.last, nn.Linear)


@pytest.mark.parametrize("levels", [None, 5])
@pytest.mark.parametrize("kind", ["mlp", "none", "direct"])
def test_output_norm_standardizes_each_coordinate_over_the_batch(kind, levels):
    """As solo-learn's MoCo v3 and SimSiam end their projectors: no scale, no shift, no bias."""
    projector, plain = (
        build(kind, output_norm=norm, levels=levels if norm else None) for norm in (True, False)
    )
    plain.load_state_dict(projector.state_dict(), strict=False)
    features = 3 + 2 * torch.randn(9, 24, generator=torch.Generator().manual_seed(0))
    z = plain(features).detach().double()
    wanted = (z - z.mean(0)) / ((z - z.mean(0)).square().mean(0) + 1e-5).sqrt()
    if levels:
        wanted = Discretize(levels)(wanted)
    torch.testing.assert_close(projector(features).double(), wanted, rtol=1e-4, atol=1e-5)
    own = {name for name, _ in projector.norm.named_parameters()}
    assert not own and "last.bias" not in projector.state_dict()
    assert (plain.last.bias is not None) if kind == "mlp" else True


def test_none_and_direct_have_no_parameters():
    features = torch.randn(3, 24)
    assert torch.equal(build("none")(features), features)
    assert torch.equal(build("direct", out=5)(features), features[:, :5])
    assert not [*build("none").parameters(), *build("direct").parameters()]


def test_sparse_stands_where_the_last_linear_layer_stood():
    alone = build("none", 32, latents=100, out=8)
    assert names(alone.trunk) == [] and alone.last.encoder.weight.shape == (100, 32)
    behind = build("mlp", 32, hidden=64, batch_norm=True, latents=100, k=7)
    assert names(behind.trunk) == ["Linear", "BatchNorm1d", "ReLU"]
    assert behind.last.encoder.weight.shape == (100, 64) and behind.last.k == 7


def test_first_weight_meets_the_features():
    for kind, changed, units in (
        ("mlp", {}, 40), ("barlow", {"latents": 100}, 40), ("linear", {}, 16),
        ("none", {"latents": 100}, 100), ("linear", {"latents": 100}, 100),
    ):  # fmt: skip
        projector = build(kind, 24, **changed)
        weight = projector.first_weight()
        assert weight.shape == (units, 24) and weight.requires_grad
        with torch.no_grad():
            weight.zero_()
        projector.eval()
        same = projector(torch.randn(4, 24))
        torch.testing.assert_close(same, same[:1].expand_as(same))  # nothing else sees them
    for kind in ("none", "direct"):
        with pytest.raises(InputError, match="no weight"):
            build(kind, levels=3).first_weight()


def test_wrong_settings_are_setting_errors():
    for kind, changed, said in (
        ("mpl", {}, "none, direct, linear, mlp, barlow"),
        ("mlp", {"depth": 0}, "projector.depth"),
        ("direct", {"out": 25}, "first 25 of 24 features"),
        ("direct", {"latents": 100}, "projector.latents"),
        ("mlp", {"levels": 1}, "projector.levels"),
        ("none", {"latents": 100, "k": 1.5}, "projector.k"),
        ("none", {"latents": 100, "k": 101}, "projector.k"),
    ):
        with pytest.raises(SettingError, match=said) as raised:
            build(kind, **changed)
        assert "\n" not in str(raised.value)


# Discretize


def formula(z: float, levels: int) -> tuple[float, float]:
    """The output and its gradient, one coordinate at a time in float64."""
    s = (levels - 1) * (1 - 1e-3) / 2
    o = 0.5 if levels % 2 == 0 else 0.0
    inner = math.tanh(z + math.tan(o / s))
    half = levels // 2
    return float(np.round(inner * s - o)) / half, (1 - inner**2) * s / half


@settings(max_examples=60, deadline=None)
@given(
    levels=st.integers(2, 40),
    z=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=20),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_discretize_is_its_formula(levels, z, dtype):
    exact = np.array(z)
    out, slope = np.array([formula(v, levels) for v in z]).T
    x = torch.tensor(z, dtype=dtype, requires_grad=True)
    seen = Discretize(levels)(x)
    assert seen.dtype == dtype and seen.abs().max() <= 1
    (seen * torch.arange(1, len(z) + 1)).sum().backward()
    near = 1e-5 * levels  # of a rounding's edge, where precision decides
    s, o = (levels - 1) * (1 - 1e-3) / 2, (levels % 2 == 0) / 2
    bounded = np.tanh(exact + math.tan(o / s)) * s - o
    clear = np.abs(bounded - np.floor(bounded) - 0.5) > near
    np.testing.assert_allclose(seen.detach().numpy()[clear], out[clear], rtol=0, atol=1e-7)
    weighted = slope * np.arange(1, len(z) + 1)
    np.testing.assert_allclose(x.grad.numpy(), weighted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 30])
def test_discretize_takes_exactly_its_levels(levels):
    z = torch.linspace(-60, 60, 200_001)
    values = Discretize(levels)(z).unique()
    assert len(values) == levels
    # Evenly spaced, whole multiples of 1 / (L // 2), from -1 on; an even L has none at +1.
    wanted = torch.arange(levels) / (levels // 2) - 1
    torch.testing.assert_close(values, wanted)


def test_two_levels_are_minus_one_and_zero_parted_near_minus_1_56():
    edge = -math.tan(0.5 / 0.4995)
    out = Discretize(2)(torch.tensor([edge - 0.01, edge + 0.01, 0.0, -50.0, 50.0]))
    assert out.tolist() == [-1, 0, 0, -1, 0]


def test_three_levels_send_small_coordinates_to_zero():
    assert Discretize(3)(torch.tensor([-0.54, 0.54, -0.56, 0.56])).tolist() == [0, 0, -1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_discretize_lifts_half_precision(dtype):
    z = torch.linspace(-4, 4, 999).to(dtype)
    assert torch.equal(Discretize(30)(z), Discretize(30)(z.float()))


# Compile, precision, state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "latents", "k"),
    [
        ("mlp", None, 1),
        ("linear", 200, 0.05),
        ("mlp", 200, 0.05),
        ("linear", 200, 0.5),  # dense arithmetic, which is a GPU's whatever k is
    ],
)
def test_compiled_in_place_equals_eager(kind, latents, k):
    torch.compiler.reset()
    own = {"batch_norm": True} if kind == "mlp" else {}
    eager = build(kind, latents=latents, levels=5, k=k, **own).double()
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True)
    features, grad = torch.randn(2, 9, 24, dtype=torch.float64)
    grad = grad[:, : eager.out_features]
    for projector in (eager, compiled):
        projector(features).backward(grad)
    torch.testing.assert_close(compiled(features), eager(features))
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    copy.deepcopy(compiled)  # a momentum teacher is one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("latents", [None, 100, 4000])
@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_autocast_is_near_float32(kind, latents, dtype):
    projector = build(kind, latents=latents, k=10)
    features = torch.randn(64, 24)
    plain = projector(features)
    with torch.autocast("cpu", dtype):
        half = projector(features)
    # In norm: latents that tie in half precision change places.
    assert (half - plain).norm() < (0.2 if latents else 0.02) * plain.norm()
    half.float().square().sum().backward()
    for p in projector.parameters():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all()


def test_the_state_dict_s_names_are_the_stages_names():
    keys = list(build("mlp", latents=100, levels=3).state_dict())
    assert keys == [
        "trunk.0.weight", "trunk.0.bias", "last.pre_bias", "last.decoder", "last.bias",
        "last.encoder.weight", "last.encoder.bias",
    ]  # fmt: skip
