import pytest
import torch
import torchvision
from torch import nn

from fastproj.core.errors import SettingError
from fastproj.models.encoders import ENCODERS, STEMS, build_encoder


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("name", ENCODERS)
def test_features_have_the_stated_width(name, stem):
    encoder = build_encoder(name, stem).eval()
    with torch.no_grad():
        features = encoder(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, encoder.num_features)


def torchvision_resnet(name: str, stem: str) -> nn.Module:
    """Torchvision's own class, made headless by hand."""
    resnet = getattr(torchvision.models, name)(weights=None)
    if stem == "cifar":
        resnet.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
        resnet.maxpool = nn.Identity()
    resnet.fc = nn.Identity()
    return resnet


@pytest.mark.parametrize(
    ("name", "stem", "size"),
    [("resnet18", "imagenet", 64), ("resnet18", "cifar", 16), ("resnet50", "imagenet", 32)],
)
def test_torchvision_computes_the_same_with_the_same_weights(name, stem, size):
    """Loaded by torchvision's own names, in training mode (batch statistics)."""
    torch.manual_seed(0)
    theirs = torchvision_resnet(name, stem)
    ours = build_encoder(name, stem)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("name", ENCODERS)
def test_residual_branches_start_alive(name):
    """No zero-initialized BatchNorm: every residual branch has a say from the first step."""
    for module in build_encoder(name, "cifar").modules():
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))


def test_the_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_encoder("resnet_small", "cifar").parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_small_resnet_keeps_the_signal_in_scale():
    """He-initialized: after the stem's BatchNorm, features neither vanish nor explode."""
    torch.manual_seed(0)
    features = build_encoder("resnet_small", "cifar")(torch.randn(64, 3, 32, 32))
    assert 0.1 < features.std() < 10


def test_small_resnet_works_in_channels_last():
    torch.manual_seed(0)
    encoder = build_encoder("resnet_small", "cifar").eval()
    images = torch.randn(4, 3, 32, 32)
    expected = encoder(images)
    encoder.to(memory_format=torch.channels_last)
    got = encoder(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_unknown_names_are_setting_errors():
    with pytest.raises(SettingError, match="resnet_small"):
        build_encoder("resnet19", "cifar")
    with pytest.raises(SettingError, match="imagenet, cifar"):
        build_encoder("resnet18", "cinema")
