"""timm's encoders go the whole way through the commands, and the bench says where one does not."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastproj.bench import Plan, encoders
from fastproj.data.beton import Beton, open_beton
from fastproj.prepare.encode import Store
from tests.support.betons import digit_like, photographs, write


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    source = digit_like(np.random.default_rng(0), 30, 16, 3)
    return write(source, tmp_path_factory.mktemp("small"), Store("raw"))


def plan(photos: Beton | None, small: Beton | None, repeats: int = 2) -> Plan:
    return Plan(photos, None, small, torch.device("cpu"), 1, repeats)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has imported torch already."""
    monkeypatch.setattr(encoders, "alone", lambda function, **given: function(**given))


@pytest.mark.usefixtures("here")
def test_a_model_is_measured_and_one_that_fails_is_missing(small: Beton) -> None:
    vit, gone = encoders.run(plan(None, small), {"test_vit": 32, "no_such_model": 32}, 8, 8)
    assert vit.rate and vit.slowest and vit.fastest and vit.slowest <= vit.rate <= vit.fastest
    assert vit.repeats == encoders.STOP and vit.peak_bytes and vit.peak_bytes > 10**8
    assert vit.note == "0.3 M parameters, 64 features" and not vit.missing
    assert "timm has no 'no_such_model'" in gone.missing and gone.rate is None
    assert vit.engine == "timm:test_vit"
    assert vit.case == "encoder: SimCLR, two crops of 32 px, batch 8, float32, AdamW"
    assert not encoders.run(plan(None, small), {"test_vit": 224})


@pytest.mark.usefixtures("here")
def test_a_resumed_run_that_is_another_and_foreign_weights_are_missing(
    small: Beton, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"test_vit": 32}
    with monkeypatch.context() as patch:
        patch.setattr(encoders, "_same", lambda one, other: False)
        (row,) = encoders.run(plan(None, small), models, 8, 8)
    assert "the resumed run is another one" in row.missing
    loaded_back = encoders.loaded_back

    def other(*given: Any) -> Any:
        model = loaded_back(*given)
        torch.nn.init.normal_(next(p for p in model.parameters() if p.ndim == 4))
        return model

    monkeypatch.setattr(encoders, "loaded_back", other)
    (row,) = encoders.run(plan(None, small), models, 8, 8)
    assert "timm's own model differs by" in row.missing


def test_checkpoints_are_compared_bit_for_bit() -> None:
    one: dict[str, Any] = {"step": 3, "settings": {"run.name": "a"},
                           "encoder": {"w": torch.ones(2)}, "optimizer": [{"lr": 0.1}]}  # fmt: skip
    for part, key, value in (("encoder", "w", torch.tensor([1, 1 + 1e-7])), ("x", "y", 1)):
        other = copy.deepcopy(one) | {"settings": {"run.name": "b"}}
        assert encoders._same(one, other)
        other.setdefault(part, {})[key] = value
        assert not encoders._same(one, other)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("name", encoders.MODELS)
def test_every_model_goes_the_whole_way(name: str, small: Beton) -> None:
    """At 32 pixels, each in a process of its own; ``make bench`` has 224."""
    (row,) = encoders.run(plan(None, small), {name: 32}, 8, 8)
    assert not row.missing and row.rate


def test_few_images_are_those_of_the_set(small: Beton, tmp_path: Path) -> None:
    photos = write(
        photographs(np.random.default_rng(0), tmp_path / "files", 5), tmp_path / "b",
        Store("jpeg", quality=90),
    )  # fmt: skip
    encoders._few(small, tmp_path, "train", 28, 4)
    few = open_beton(tmp_path / "train.beton")
    order = np.random.default_rng(0).permutation(30)
    assert few.label.tolist() == small.label[order[[28, 29, 0, 1]]].tolist()
    assert np.array_equal(few.stored(2), small.stored(order[0]))
    encoders._few(photos, tmp_path, "val", 3, 3)
    few = open_beton(tmp_path / "val.beton")
    order = np.random.default_rng(0).permutation(5)
    assert few.width.tolist() == photos.width[order[[3, 4, 0]]].tolist()
