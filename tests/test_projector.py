import pytest
import torch
from torch import nn

from fastproj.errors import SettingError
from fastproj.projector import PROJECTORS, build_projector


def kinds(projector: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in projector.children()]


@pytest.mark.parametrize("kind", PROJECTORS)
def test_shape_is_as_stated(kind):
    projector = build_projector(kind, 24, hidden=40, out=16, depth=3, batch_norm=True)
    assert projector(torch.randn(5, 24)).shape == (5, projector.out_features)
    assert projector.out_features == (24 if kind == "none" else 16)


def test_simclr_default_is_linear_relu_linear():
    projector = build_projector("mlp", 512, hidden=2048, out=256, depth=2, batch_norm=False)
    assert kinds(projector) == ["Linear", "ReLU", "Linear"]
    shapes = [tuple(p.shape) for p in projector.parameters()]
    assert shapes == [(2048, 512), (2048,), (256, 2048), (256,)]
    features = torch.randn(3, 512)
    first, _, last = projector
    by_hand = (features @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    torch.testing.assert_close(projector(features), by_hand)


def test_barlow_shape_has_batch_norm_before_each_relu():
    projector = build_projector("mlp", 32, hidden=64, out=64, depth=3, batch_norm=True)
    block = ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds(projector) == [*block, *block, "Linear"]


def test_depth_one_is_one_linear_layer():
    assert kinds(build_projector("mlp", 8, 16, 4, depth=1, batch_norm=True)) == ["Linear"]
    assert kinds(build_projector("linear", 8, 16, 4, depth=2, batch_norm=True)) == ["Linear"]


def test_none_is_the_identity_without_parameters():
    projector = build_projector("none", 8, 16, 4, 2, False)
    features = torch.randn(3, 8)
    assert torch.equal(projector(features), features)
    assert not list(projector.parameters())


def test_wrong_settings_are_setting_errors():
    with pytest.raises(SettingError, match="mlp, linear, none"):
        build_projector("mpl", 8, 16, 4, 2, False)
    with pytest.raises(SettingError, match="projector.depth"):
        build_projector("mlp", 8, 16, 4, 0, False)
