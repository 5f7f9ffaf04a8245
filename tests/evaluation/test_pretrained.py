"""An encoder on the disk: what is missing or no number is named, and never exported."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastproj.core.errors import InputError
from fastproj.evaluation.pretrained import (
    Pretrained,
    load_pretrained,
    of_checkpoint,
    save_pretrained,
)
from fastproj.models.encoders import build_encoder


@pytest.fixture
def pretrained() -> Pretrained:
    weights = build_encoder("resnet_small", "cifar").state_dict()
    file = Path("step-3.pt")
    return Pretrained(
        encoder="resnet_small", stem="cifar", size=None, mean=(0.5,) * 3, std=(0.2,) * 3,
        step=3, epoch=1, weights=weights, file=file,
    )  # fmt: skip


def test_a_whole_encoder_is_exported_and_read(pretrained: Pretrained, tmp_path: Path) -> None:
    save_pretrained(pretrained, tmp_path / "e.safetensors")
    read = load_pretrained(tmp_path / "e.safetensors").build().state_dict()
    assert all(torch.equal(x, read[name]) for name, x in pretrained.weights.items())


@pytest.mark.parametrize("damage", ["missing", "too many", "shape", "nan", "text"])
def test_what_is_no_encoder_is_not_exported(
    pretrained: Pretrained, tmp_path: Path, damage: str
) -> None:
    weights = dict(pretrained.weights)
    name = next(iter(weights))
    words = "step-3.pt: its encoder is not what its settings say"
    if damage == "missing":
        weights.pop(name)
    elif damage == "too many":
        weights["more"] = torch.zeros(1)
    elif damage == "shape":
        weights[name] = torch.zeros(2)
    elif damage == "nan":
        weights[name] = weights[name].clone().fill_(torch.nan)
        words = f"step-3.pt: its encoder: {name} holds NaN or infinity"
    else:
        weights[name] = "x"  # type: ignore[assignment]
    with pytest.raises(InputError, match=words) as refused:
        save_pretrained(replace(pretrained, weights=weights), tmp_path / "e.safetensors")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "state", [{"settings": {}}, {"settings": "x"}, {"settings": torch.zeros(1)}]
)
def test_a_foreign_checkpoint_is_one_line(state: dict) -> None:
    with pytest.raises(InputError, match="step-3.pt is no whole checkpoint of fastproj.train"):
        of_checkpoint({"encoder": {}, **state}, Path("step-3.pt"))


@pytest.mark.parametrize("change", [{"projector": {}}, {"encoder": 7}], ids=str)
def test_settings_that_tell_of_nothing_are_one_line(pretrained: Pretrained, change: dict) -> None:
    damaged = replace(pretrained, **change)
    with pytest.raises(InputError, match="step-3.pt tells of no encoder or projector") as refused:
        damaged.build()
        damaged.build_projector()
    assert "\n" not in str(refused.value)
