"""ONNX: what differs from torch, or cannot be exported, is not written."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastproj.core.errors import InputError
from fastproj.evaluation.onnx import save_onnx

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")


class Flat(nn.Module):
    """Its mean over the image, and on the side a dropout."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(images, 0.5, self.training).mean((2, 3))


class Undecided(nn.Module):
    """Branches on pixel values, which no graph can hold."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


def test_it_is_exported_in_eval_mode_and_the_module_stays_as_it_was(tmp_path):
    module = Flat()
    assert save_onnx(module, tmp_path / "m.onnx", 8, {"stem": "none"}) < 1e-6
    assert module.training
    images = np.random.default_rng(0).normal(size=(5, 3, 4, 6)).astype("float32")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(None, {"images": images})
    np.testing.assert_allclose(found, images.mean((2, 3)), atol=1e-6)


def test_other_features_are_refused(tmp_path, monkeypatch):
    class Wrong(onnxruntime.InferenceSession):
        def run(self, *args):
            return [super().run(*args)[0] + 1e-2]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(InputError, match="features differ from torch's by 0.01, more than 0.0001"):
        save_onnx(Flat(), tmp_path / "m.onnx", 8)
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_cannot_be_exported_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot export the encoder to ONNX") as caught:
        save_onnx(Undecided(), tmp_path / "m.onnx", 8)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
    assert torch.is_grad_enabled()
