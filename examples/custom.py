"""An encoder, a projector, a loss, an augmentation and images of one's own in fastproj's trainer.

``python examples/custom.py`` trains them for a few steps on random images.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fastproj as fp


class Encoder(nn.Sequential):
    """Any module (N, 3, h, w) -> (N, num_features) will do; timm's models have this attribute."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, self.num_features, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )  # fmt: skip


def cosine_distance(z1: Tensor, z2: Tensor) -> Tensor:
    """A loss of two views' projections (B, d). This one alone collapses: the rest is up to you."""
    return 1 - nn.functional.cosine_similarity(z1.float(), z2.float()).mean()


class Noisy(fp.Augmentation):
    """The usual operations, then noise of one gray level."""

    def forward(self, crops: Tensor, params: object) -> Tensor:
        images = super().forward(crops, params)
        return images + torch.randn_like(images) / 255


def main(folder: Path, steps: int = 5) -> list[float]:
    """The losses of ``steps`` steps on 256 random images."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (256, 32, 32, 3), dtype=np.uint8)  # or a list of file paths
    source = fp.Source("train", ("even", "odd"), images, labels=np.arange(256) % 2)
    beton = fp.write_beton(source, folder, dataset="random")

    encoder = Encoder()
    projector = nn.Sequential(nn.Linear(encoder.num_features, 32), nn.BatchNorm1d(32))
    learner = fp.Learner(encoder, projector, cosine_distance, classes=2)
    loader = fp.open_loader(beton, [fp.Crop(24, num_views=2)], batch_size=32)
    augmentation = Noisy([fp.View(), fp.View()], beton.manifest.mean, beton.manifest.std)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    trainer = fp.Trainer(learner, loader, optimizer, [augmentation], epochs=1, warmup_epochs=0)
    losses = []
    for _, batch in zip(range(steps), trainer.epoch(), strict=False):
        losses.append(trainer.train_step(batch)["loss"].item())
    loader.close()
    return losses


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print("losses:", ", ".join(f"{loss:.4f}" for loss in main(Path(folder))))
