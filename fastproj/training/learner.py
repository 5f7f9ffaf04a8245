"""Encoder, projector, objective and online probe as one module, for DDP and torch.compile."""

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastproj.models.encoders import num_features
from fastproj.models.noise import Noise
from fastproj.models.norm import on_views
from fastproj.models.projector import as_projector
from fastproj.objective.methods import Objective, as_objective

LARGE = 2  # large crops per image: every objective compares two


class Activations(NamedTuple):
    """Outputs of one forward pass for V views of B images; the two large crops come first."""

    mean: Tensor  # (V, B, d): the encoder's output
    sigma: Tensor | None  # standard deviation of the noise on mean, from ``Noise``
    features: Tensor  # (V, B, d): mean plus noise, the projector's input
    hidden: Tensor  # (V, B, w): the input of the projector's last layer
    projections: Tensor  # (V, B, o)


Penalty = Callable[[Activations], Tensor]


class StepOutput(NamedTuple):
    """Results of a forward pass for the training step and the diagnostics."""

    terms: dict[str, Tensor]  # "objective" and every penalty: scalars, unweighted
    probe_loss: Tensor  # scalar: the online probe's cross-entropy on the two large crops
    probe_hits: Tensor  # scalar: its accuracy on them, as ``score`` has it
    features: Tensor  # (2, B, d), detached, with noise
    projections: Tensor  # (V, B, o), detached
    teacher: Tensor | None  # (2, B, o)


def score(logits: Tensor, labels: Tensor, labeled: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy per labeled sample; label -1 means unlabeled.

    ``logits`` (n, classes) float32, ``labels`` (n,) int64. The sums are divided by ``labeled`` · n,
    the number to be expected where this fraction of the set is labeled: so the mean over batches
    and ranks is that of the set, however few labels each of them has. Both are 0 if no sample is
    labeled (STL-10's unlabeled split), so the probe does not train.
    """
    count = (labeled or 1) * len(labels)
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / count
    return loss, (logits.detach().argmax(1) == labels).sum() / count


class Learner(nn.Module):
    """Everything that trains: encoder, projector, the objective's own layers and a linear probe.

    ``encoder`` maps (N, 3, h, w) to (N, ``num_features``), any module with this attribute.
    ``projector`` is one of ``build_projector``, or any module (N, num_features) -> (N, d);
    ``objective`` one of ``build_objective``, or a function ``f(z1, z2) -> loss`` of the two large
    crops' projections (B, d). ``classes`` is the probe's number of classes. ``noise`` makes the
    features stochastic. ``penalties`` are named functions of each forward pass
    (``training.penalties``), which the trainer weighs. An objective that asks for a teacher gets a
    copy of encoder and projector, which only ``update_teacher`` changes.

    ``bn_per_view``: encoder, projector, predictor and teacher are called once per view (small crops
    too), so batch norm normalizes each view by its own statistics and updates its running ones once
    per view, as in Projector_Theory, solo-learn and lightly. Otherwise all views of one crop size
    go through the encoder together, and all views through the rest, in fewer calls, as in SwAV's
    code. The two are different methods: their losses and gradients differ.

    Raises ``InputError`` for an encoder without ``num_features``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        objective: Objective | Callable[[Tensor, Tensor], Tensor],
        classes: int,
        noise: Noise | None = None,
        penalties: Mapping[str, Penalty] | None = None,
        bn_per_view: bool = False,
    ) -> None:
        super().__init__()
        self.labeled = 1.0  # fraction of the training images; a trainer knows them
        width = num_features(encoder)
        self.encoder, self.projector = encoder, as_projector(projector, width)
        self.objective = as_objective(objective)
        self.bn_per_view = self.objective.bn_per_view = bn_per_view
        self.noise, self.penalties = noise, dict(penalties or {})
        self.probe = nn.Linear(width, classes)
        self.teacher: nn.Sequential | None = None
        if self.objective.teacher:
            self.teacher = nn.Sequential(copy.deepcopy(encoder), copy.deepcopy(self.projector))
            self.teacher.requires_grad_(False)

    def forward(self, views: tuple[Tensor, ...], labels: Tensor) -> StepOutput:
        """``views``: one tensor per crop size, (views·B, 3, h, w), view-major; ``labels`` (B,).

        The probe sees detached features, so it never changes the encoder.
        """
        images = len(labels)

        def run(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return on_views(part, x, images, self.bn_per_view)

        mean = torch.cat([run(self.encoder, x) for x in views])
        features, sigma = (mean, None) if self.noise is None else self.noise(mean)
        hidden = run(self.projector.hidden, features)
        projections = run(self.projector.head, hidden)

        def by_view(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, images))

        seen = Activations(
            by_view(mean),
            by_view(sigma) if sigma is not None and sigma.ndim == 2 else sigma,
            by_view(features),
            by_view(hidden),
            by_view(projections),
        )
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = by_view(run(self.teacher, views[0]))
        terms = {"objective": self.objective(seen.projections, teacher, labels)}
        terms |= {name: penalty(seen) for name, penalty in self.penalties.items()}
        large = seen.mean[:LARGE].detach()
        logits = self.probe(large.flatten(0, 1)).float()
        return StepOutput(
            terms,
            *score(logits, labels.repeat(len(large)), self.labeled),
            seen.features[:LARGE].detach(),
            seen.projections.detach(),
            teacher,
        )

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Each teacher weight becomes momentum · itself + (1 - momentum) · the student's weight.

        The teacher's batch-norm statistics are its own.
        """
        if self.teacher is not None:
            ours: list[Tensor] = [*self.encoder.parameters(), *self.projector.parameters()]
            theirs: list[Tensor] = [*self.teacher.parameters()]
            torch._foreach_lerp_(theirs, ours, 1 - momentum)
