"""Checkpoints that solo-learn's own classes and Lightning's own Trainer wrote.

solo-learn 1.0.6 is not on the package index, which has 1.0.2 of 2021, so these tests skip where it
is not installed from its repository, with lightning, omegaconf and einops.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastproj import embed
from fastproj import evaluate as command
from fastproj.core.errors import InputError
from fastproj.evaluation.load import load_encoder
from fastproj.evaluation.results import read_evaluation
from fastproj.evaluation.weights import read_weights
from fastproj.prepare.encode import Store
from fastproj.runs.folder import RunFolder
from tests.support import betons

pytestmark = pytest.mark.filterwarnings("ignore")  # of solo-learn, timm and Lightning
HEADS: dict[str, dict[str, float]] = {
    "simclr": {"temperature": 0.2},
    "barlow_twins": {"lamb": 0.005, "scale_loss": 0.1},
    "byol": {"pred_hidden_dim": 8},
    "simsiam": {"pred_hidden_dim": 8, "temperature": 0.2},
}
COUNT, SIDE = 12, 32


class Noise(Dataset):
    """Batches as solo-learn's loaders give them: numbers, two crops each, labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, at: int) -> tuple[int, list[Tensor], int]:
        return at, list(torch.randn(2, 3, SIDE, SIDE)), at % 10


def trained(method: str, path: Path) -> nn.Module:
    """The backbone of two steps of ``method`` on a CIFAR ResNet-18, saved to ``path``."""
    methods: Any = pytest.importorskip("solo.methods", reason="solo-learn is not installed")
    omegaconf, lightning = map(pytest.importorskip, ("omegaconf", "lightning.pytorch"))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = methods.METHODS[method](
        omegaconf.OmegaConf.create(
            {
                "method": method,
                "backbone": {"name": "resnet18"},
                "data": {"dataset": "cifar10", "num_classes": 10, "num_large_crops": 2,
                         "num_small_crops": 0},
                "optimizer": {"name": "lars", "batch_size": 4, "lr": 0.3, "classifier_lr": 0.1,
                              "weight_decay": 1e-5, "kwargs": {"momentum": 0.9}},
                "scheduler": {"name": "warmup_cosine"},
                "momentum": {"base_tau": 0.99, "final_tau": 1.0},
                "max_epochs": 1,
                "method_kwargs": {"proj_hidden_dim": 8, "proj_output_dim": 8, **HEADS[method]},
            }
        )
    )  # fmt: skip
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(Noise(), 4))
    trainer.save_checkpoint(path)
    return model.backbone.eval()


@pytest.mark.parametrize("method", ["simclr", "barlow_twins", "byol"])
def test_embedded_features_are_those_of_its_own_backbone(method: str, tmp_path: Path) -> None:
    own = trained(method, tmp_path / "it.ckpt")
    sources = [betons.digit_like(np.random.default_rng(n), COUNT, SIDE, classes=3) for n in (0, 1)]
    for split, source in zip(("train", "val"), sources, strict=True):
        betons.write(replace(source, split=split), tmp_path, Store("raw"))
    train, val = (["--data." + split, f"{tmp_path}/{split}.beton"] for split in ("train", "val"))
    how = ["--eval.checkpoint", f"{tmp_path}/it.ckpt", "--eval.normalize", "imagenet",
           "--run.device", "cpu"]  # fmt: skip
    embed.main([*train, *how, "--embed.out", f"{tmp_path}/it.npz"])
    images = torch.from_numpy(np.asarray(sources[0].images))
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = own(((images / 255 - mean) / std).permute(0, 3, 1, 2)).numpy()
    with np.load(tmp_path / "it.npz") as found:
        np.testing.assert_allclose(found["features"], expected, rtol=1e-5, atol=1e-5)
    command.main([*train, *val, *how, "--eval.probes", "logistic", "--eval.out", f"{tmp_path}/out"])
    (row,) = read_evaluation(RunFolder(tmp_path / "out")).rows
    about = row.protocol["features"]["encoder"]
    assert (about["name"], about["stem"], about["padding"]) == ("ResNet-18", "cifar", 2)
    assert "120 of 120 weights match (key 'state_dict', prefix 'backbone.')" in about["weights"]


def test_simsiams_file_holds_code_and_its_weights_alone_are_read(tmp_path: Path) -> None:
    """Its scheduler's state has a partial of a function; the message says how to leave it out."""
    own = trained("simsiam", tmp_path / "it.ckpt")
    with pytest.raises(InputError, match="holds functools.partial, .* save its weights alone"):
        read_weights(tmp_path / "it.ckpt")
    whole = torch.load(tmp_path / "it.ckpt", weights_only=False)
    torch.save(whole["state_dict"], tmp_path / "new.pt")
    x = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        found = load_encoder(tmp_path / "new.pt").module.eval()(x)
        torch.testing.assert_close(found, own(x), rtol=1e-5, atol=1e-5)
