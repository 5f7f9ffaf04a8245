import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.models import resnet18

from fastproj.export import main
from fastproj.prepare.encode import Store
from fastproj.settings import RUN, load
from fastproj.train import train
from fastproj.training.build import build_learner
from tests.support.betons import digit_like, write


def test_torchvision_takes_the_exported_encoder(tmp_path):
    """The file alone, in torchvision's own ResNet, gives the features the learner gives."""
    source = digit_like(np.random.default_rng(0), 20, 12, 4)
    beton = write(source, tmp_path / "data", Store("raw"))
    options = {
        "data.train": beton.path, "run.dir": tmp_path, "run.name": "r", "run.device": "cpu",
        "model.encoder": "resnet18", "model.stem": "imagenet", "views.size": 32,
        "views.blur_prob": 0,
        "projector.latents": 32, "projector.kind": "none", "projector.levels": 3,
        "optim.batch_size": 8, "optim.epochs": 1,
    }  # fmt: skip
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    settings = load(RUN, argv, "test", "")
    run = train(settings)
    main([str(run)])

    tensors = load_file(run / "encoder.safetensors")
    model = resnet18(num_classes=2)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
    model.fc = torch.nn.Identity()
    ours = build_learner(settings, 4).encoder
    ours.load_state_dict(tensors)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), ours.eval()(images))

    about = safe_open(run / "encoder.safetensors", "pt").metadata()
    assert (about["encoder"], about["stem"], about["step"]) == ("resnet18", "imagenet", "2")
    assert about["mean"] == str(beton.manifest.mean)
