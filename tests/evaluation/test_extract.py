"""Features at several depths and crops, folded and kept, against plain loops."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as T

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.evaluation import extract
from fastproj.evaluation.cache import Cache, digest
from fastproj.evaluation.depths import AtDepths, depths_of
from fastproj.evaluation.extract import Extractor
from fastproj.evaluation.features import Features
from fastproj.evaluation.fold import folded
from fastproj.evaluation.load import LoadedEncoder
from fastproj.models.encoders import Encoder, build_encoder
from fastproj.models.frozen import frozen
from fastproj.models.projector import build_projector
from fastproj.prepare.encode import Store
from tests.support import betons

CPU = torch.device("cpu")
NORM = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)
COUNT, SIDE = 21, 12


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    source = betons.digit_like(np.random.default_rng(0), COUNT, SIDE, classes=3)
    return betons.write(source, Path(tmp_path_factory.mktemp("beton")), Store("raw"))


def images(beton: Beton) -> Tensor:
    """Normalized images (N, 3, h, w), read without any loader."""
    stored = np.stack([beton.stored(i).reshape(SIDE, SIDE, 3) for i in range(COUNT)])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORM)
    return (torch.from_numpy(stored).permute(0, 3, 1, 2) / 255 - mean) / std


def small() -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder("resnet_small", "cifar")
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    encoder(torch.randn(8, 3, SIDE, SIDE))  # statistics other than the initial ones
    return encoder.eval()


def loaded(encoder: nn.Module, projector: nn.Module | None = None) -> LoadedEncoder:
    return LoadedEncoder(encoder, {"name": "it"}, "ours", small, projector=projector)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_folding_changes_no_feature_and_no_given_module() -> None:
    encoder, x = small(), torch.randn(4, 3, SIDE, SIDE)
    before = digest(encoder)
    once = folded(encoder)
    assert not [m for m in once.modules() if isinstance(m, nn.BatchNorm2d)]
    assert digest(encoder) == before and encoder.bn1.training is False
    double = encoder.double()
    with torch.no_grad():
        torch.testing.assert_close(
            once(x), double(x.double()).float(), rtol=1e-5, atol=1e-5
        )  # float64, not folded


class Shared(nn.Module):
    """Its norm follows two convolutions, and its second convolution's output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.norm(self.norm(self.a(x))))
        return (self.other(y) + y).flatten(1)


class Branching(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x)).flatten(1) if x.sum() > 0 else self.b(x).flatten(1)


@pytest.mark.parametrize("kind", [Shared, Branching])
def test_what_cannot_be_folded_stays(kind: type[Shared]) -> None:
    torch.manual_seed(0)
    module = kind()
    module.train()(torch.randn(4, 3, 5, 5).abs())
    same = folded(module)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in same.modules()) == 2
    x = torch.randn(4, 3, 5, 5).abs()
    close(same(x), module.eval()(x))


def test_every_depth_equals_its_own_computation(beton: Beton) -> None:
    encoder = small()
    projector = build_projector(
        "mlp", encoder.num_features, hidden=8, out=6, depth=3, batch_norm=True, dropout=0.5
    )
    projector(encoder(torch.randn(16, 3, SIDE, SIDE)))
    depths = depths_of(encoder, projector)
    assert depths == [*("layer1", "layer2", "layer3", "layer4"), "h", "hidden1", "hidden2", "z"]
    found = Extractor(SIDE, CPU).encode(beton, loaded(encoder, projector), depths, NORM)
    x, expected = images(beton), {}
    with frozen(encoder), frozen(projector), torch.no_grad():
        for name, child in encoder.named_children():
            x = child(x)
            expected[name] = x.mean((2, 3)) if name.startswith("layer") else x
        expected["h"] = x
        one, two, last = projector.trunk[:4], projector.trunk[4:], projector.last
        expected["hidden1"] = one(x)
        expected["hidden2"] = two(one(x))
        expected["z"] = last(two(one(x)))
    for depth in depths:
        close(found[depth].features, expected[depth])
        assert torch.equal(found[depth].labels, torch.from_numpy(beton.label))


def test_a_depth_that_there_is_not() -> None:
    encoder = small()
    with pytest.raises(InputError, match=r"has no z; it has layer1.*h \(no projector"):
        AtDepths(encoder, ["h", "z"])
    with pytest.raises(InputError, match="has no layer5; it has layer1, .*, h, z$"):
        AtDepths(encoder, ["layer5"], build_projector("linear", 256, out=3))


@pytest.mark.parametrize("kind", ["five", "ten"])
def test_five_and_ten_crops_are_torchvisions(beton: Beton, kind: str) -> None:
    encoder, side = small(), 8
    extractor = Extractor(side, CPU, crops=kind, crop_fraction=side / SIDE)
    found = extractor.encode(beton, loaded(encoder), ["h"], NORM)["h"]
    cut: Callable[..., tuple[Tensor, ...]] = T.five_crop if kind == "five" else T.ten_crop
    with frozen(encoder), torch.no_grad():
        crops = [encoder(crop) for crop in cut(images(beton), [side, side])]
    assert len(crops) == (5 if kind == "five" else 10)
    close(found.features, torch.stack(crops).mean(0))


def test_five_crops_of_a_photograph_lie_in_its_corners(tmp_path: Path) -> None:
    from fastproj.loaders import Five
    from fastproj.loaders.boxes import draw

    source = betons.photographs(np.random.default_rng(0), tmp_path / "photos", 3)
    beton = betons.write(source, tmp_path, Store("jpeg", quality=90))
    (boxes,) = draw([Five(8, 0.5)], beton, np.arange(3), seed=0, epoch=0)
    for image, (width, height) in enumerate(zip(beton.width, beton.height, strict=True)):
        side = round(min(width, height) * 0.5)
        corners = T.five_crop(torch.arange(height * width).view(1, height, width), [side, side])
        for box, corner in zip(boxes[:, image], corners, strict=True):
            top, left = divmod(int(corner[0, 0, 0]), int(width))
            near = 0 if corner is not corners[-1] else 1  # torchvision rounds its center
            assert np.abs(box - [top, left, side, side]).max() <= near


def test_crops_that_would_all_be_the_same() -> None:
    with pytest.raises(InputError, match="five of whole images are all the same"):
        Extractor(SIDE, CPU, crops="five")
    with pytest.raises(InputError, match="no 'seven'"):
        Extractor(SIDE, CPU, crops="seven")


def test_features_are_computed_once_and_checked(
    beton: Beton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    calls = []
    real = extract.features
    monkeypatch.setattr(extract, "features", lambda *a, **k: calls.append(1) or real(*a, **k))
    encoder = small()
    extractor = Extractor(SIDE, CPU, cache=Cache(tmp_path / "features"))
    first = extractor.encode(beton, loaded(encoder), ["h", "layer1"], NORM)
    again = extractor.encode(beton, loaded(encoder), ["layer1"], NORM)
    assert len(calls) == 1 and torch.equal(again["layer1"].features, first["layer1"].features)
    assert torch.equal(again["layer1"].labels, first["h"].labels)
    assert not list(tmp_path.rglob("*.tmp")) and len(list(tmp_path.rglob("*.pt"))) == 2

    # Whatever they depend on makes them anew: crop, normalization, weights, data.
    replace(extractor, crop_fraction=0.5).encode(beton, loaded(encoder), ["h"], NORM)
    extractor.encode(beton, loaded(encoder), ["h"], (NORM[1], NORM[0]))
    nn.init.zeros_(encoder.layer4.conv1.weight)
    extractor.encode(beton, loaded(encoder), ["h"], NORM)
    other = replace(beton, manifest=replace(beton.manifest, content="other"))
    extractor.encode(other, loaded(encoder), ["h"], NORM)
    assert len(calls) == 5

    for path in (tmp_path / "features").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    anew = extractor.encode(beton, loaded(small()), ["h"], NORM)["h"]
    assert len(calls) == 6 and torch.equal(anew.features, first["h"].features)
    assert "cannot be used (wrong checksum" in capsys.readouterr().err


def test_a_cache_of_another_key_or_place(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cache, some = Cache(tmp_path), Features(torch.ones(2, 3), torch.tensor([0, 1]))
    cache.store({"a": 1}, some)
    assert cache.load({"a": 2}) is None and capsys.readouterr().err == ""
    next(tmp_path.iterdir()).rename(cache._path({"a": 2}))
    assert cache.load({"a": 2}) is None
    assert "it holds those of another key" in capsys.readouterr().err
    (tmp_path / "file").touch()
    Cache(tmp_path / "file").store({"a": 1}, some)  # computing them was not for nothing
    assert "note: features are not kept: cannot write" in capsys.readouterr().err


def test_the_digest_sees_weights_names_and_structure() -> None:
    torch.manual_seed(0)
    line = nn.Linear(2, 2)
    digests = {digest(line), digest(nn.Sequential(line)), digest(line.bfloat16())}
    nn.init.ones_(line.weight)
    assert len({*digests, digest(line)}) == 4
