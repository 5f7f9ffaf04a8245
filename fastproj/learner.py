"""Encoder, projector, objective and online probe as one module: DDP and compile see one call."""

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastproj.encoder import Encoder
from fastproj.objective import Objective
from fastproj.projector import Projector
from fastproj.regulariser import Noise


class Pass(NamedTuple):
    """What one forward pass computes of V views of B images, the two large crops first."""

    mean: Tensor  # (V, B, d): the encoder's output
    sigma: Tensor | None  # of the noise on it, as ``Noise`` gives it
    features: Tensor  # (V, B, d): mean and noise, what the projector sees
    hidden: Tensor  # (V, B, w): what the projector's last layer sees
    projections: Tensor  # (V, B, o)


Penalty = Callable[[Pass], Tensor]


class Step(NamedTuple):
    """What a step needs of a forward pass, and what is watched."""

    terms: dict[str, Tensor]  # "objective" and every penalty: scalars, unweighted
    probe_loss: Tensor  # scalar: the online probe's cross-entropy on the two large crops
    probe_hits: Tensor  # scalar: its share of right answers
    features: Tensor  # (2, B, d), detached, noise and all
    projections: Tensor  # (V, B, o), detached
    teacher: Tensor | None  # (2, B, o)


def score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and share of right answers over the labelled samples; -1 is no label.

    ``logits`` (n, classes) float32, ``labels`` (n,) int64. Both 0 where nothing is labelled
    (STL-10's unlabelled split), so that the probe then learns nothing and disturbs nothing.
    """
    labelled = (labels >= 0).sum().clamp(min=1)
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / labelled
    return loss, (logits.detach().argmax(1) == labels).sum() / labelled


class Learner(nn.Module):
    """What is trained: encoder and projector, the objective's own parts, and a linear probe.

    ``noise`` makes the features stochastic. ``penalties`` see each pass; the trainer weighs them.
    An objective that wants a teacher gets one: a copy of encoder and projector that only
    ``update_teacher`` changes.
    """

    def __init__(
        self,
        encoder: Encoder,
        projector: Projector,
        objective: Objective,
        classes: int,
        noise: Noise | None = None,
        penalties: Mapping[str, Penalty] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.projector, self.objective = encoder, projector, objective
        self.noise, self.penalties = noise, dict(penalties or {})
        self.probe = nn.Linear(encoder.features, classes)
        self.teacher: nn.Sequential | None = None
        if objective.teacher:
            self.teacher = nn.Sequential(copy.deepcopy(encoder), copy.deepcopy(projector))
            self.teacher.requires_grad_(False)

    def forward(self, groups: tuple[Tensor, ...], labels: Tensor) -> Step:
        """``groups``: views of each crop size (views·B, 3, h, w), view-major; ``labels`` (B,).

        The probe sees detached features: it learns from them and teaches them nothing.
        """
        images = len(labels)
        mean = torch.cat([self.encoder(views) for views in groups])
        features, sigma = (mean, None) if self.noise is None else self.noise(mean)
        hidden = self.projector.hidden(features)
        projections = self.projector.head(hidden)

        def by_view(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, images))

        seen = Pass(
            by_view(mean),
            by_view(sigma) if sigma is not None and sigma.ndim == 2 else sigma,
            by_view(features),
            by_view(hidden),
            by_view(projections),
        )
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = by_view(self.teacher(groups[0]))
        terms = {"objective": self.objective(seen.projections, teacher, labels)}
        terms |= {name: penalty(seen) for name, penalty in self.penalties.items()}
        large = seen.mean[:2].detach()
        logits = self.probe(large.flatten(0, 1)).float()
        return Step(
            terms,
            *score(logits, labels.repeat(len(large))),
            seen.features[:2].detach(),
            seen.projections.detach(),
            teacher,
        )

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Every weight of the teacher to momentum · itself + (1 - momentum) · the student's.

        Its batch-norm statistics are its own, of what it has seen itself.
        """
        if self.teacher is not None:
            ours: list[Tensor] = [*self.encoder.parameters(), *self.projector.parameters()]
            theirs: list[Tensor] = [*self.teacher.parameters()]
            torch._foreach_lerp_(theirs, ours, 1 - momentum)
