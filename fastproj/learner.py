"""Encoder, projector and online probe as one module, so that DDP and compile see one call."""

from torch import Tensor, nn

from fastproj.encoder import Encoder
from fastproj.projector import Projector


class Learner(nn.Module):
    """What is trained: the encoder and its projector, and a linear probe that watches them."""

    def __init__(self, encoder: Encoder, projector: Projector, classes: int) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector
        self.probe = nn.Linear(encoder.features, classes)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Views (n, 3, h, w) to projections (n, d) and the probe's logits (n, classes).

        The probe sees detached features: it learns from them and teaches them nothing.
        """
        features = self.encoder(views)
        return self.projector(features), self.probe(features.detach())
