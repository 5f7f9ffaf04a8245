"""Methods: a loss with its own modules and state.

Predictors, queues of keys and prototypes belong to ``learner.objective``, so they are optimized,
checkpointed and moved to the device with the learner. A method that needs a momentum copy of
encoder and projector sets ``teacher``.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastproj.core import dist
from fastproj.core.errors import InputError, SettingError
from fastproj.core.table import hyperparameters
from fastproj.models.norm import on_views
from fastproj.objective import OBJECTIVES
from fastproj.objective.losses import (
    byol,
    cross_entropy,
    info_nce,
    moco_v3,
    normalize,
    simsiam,
    sinkhorn,
    sup_con,
    swav,
)


class Objective(nn.Module, ABC):
    """From projections to a loss. ``width`` is the projections' width.

    ``teacher``: needs the projections of a momentum encoder, whose momentum goes from ``momentum``
    at the first step to ``momentum_end`` at the last, along a cosine. ``local_crops``: can use more
    than two crops. ``constant_rate``: the learning rate of its own parameters neither warms up nor
    decays. ``needs_labels``: cannot train on images without labels. ``bn_per_view``: modules with
    batch norm see one view at a time; the learner sets it (see ``Learner``).
    """

    teacher = False
    momentum: float = 1.0
    momentum_end: float = 1.0
    local_crops = False
    constant_rate = False
    needs_labels = False
    bn_per_view = False

    @abstractmethod
    def forward(self, z: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        """The loss, a scalar of at least float32.

        ``z`` (V, B, width): projections, the two large crops first; ``teacher`` (2, B, width): the
        momentum encoder's, without gradient; ``labels`` int64 (B,), -1 for no label.
        """

    def begin_epoch(self, epoch: int) -> None:  # noqa: B027  most have nothing to do
        """Called before the first step of ``epoch`` (counted from 0), and on resuming inside it."""

    def before_update(self) -> None:  # noqa: B027
        """Called once per optimizer step, before the update and with gradients ready."""

    def after_update(self, z: Tensor, teacher: Tensor | None) -> None:  # noqa: B027
        """Called once per optimizer step, after the update, with this rank's projections."""


class TwoViews(Objective):
    """A loss ``f(z1, z2, **settings)`` without parts of its own."""

    def __init__(self, loss: Callable[..., Tensor], /, **settings: float) -> None:
        super().__init__()
        self.loss, self.settings = loss, settings

    def forward(self, z: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        return self.loss(z[0], z[1], **self.settings)


class SupCon(Objective):
    """Supervised contrastive learning, the upper reference [arXiv 2004.11362]."""

    needs_labels = True

    def __init__(self, width: int, temperature: float = 0.2) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, z: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        return sup_con(z, labels, self.temperature)


class Supervised(Objective):
    """Cross-entropy of a linear classifier on the projections, the upper reference.

    The mean over views and images. Without a projector (kind ``none``) the classifier sees the
    features: a supervised encoder.
    """

    needs_labels = True

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, classes)

    def forward(self, z: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        return cross_entropy(self.classifier(z), labels)


def predictor(width: int, hidden: int, bias: bool = True) -> nn.Sequential:
    """Linear-BN-ReLU-Linear; ``bias``: of the last layer."""
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, width, bias=bias),
    )


class Predicting(Objective):
    """An objective with a predictor (N, width) -> (N, width)."""

    predictor: nn.Sequential

    def predict(self, z: Tensor) -> Tensor:
        """The predictor's outputs for projections (V, B, width), in one pass or one per view."""
        p = on_views(self.predictor, z.flatten(0, 1), z.shape[1], self.bn_per_view)
        return p.unflatten(0, z.shape[:2])


class Byol(Predicting):
    """BYOL [arXiv 2006.07733]: predict the momentum encoder's projection of the other view."""

    teacher = True

    def __init__(
        self,
        width: int,
        predictor_hidden: int = 4096,
        momentum: float = 0.99,
        momentum_end: float = 1.0,
    ) -> None:
        super().__init__()
        self.momentum, self.momentum_end = momentum, momentum_end
        self.predictor = predictor(width, predictor_hidden)

    def forward(self, z: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        assert teacher is not None
        p1, p2 = self.predict(z[:2])
        return byol(p1, p2, teacher[0], teacher[1])


class SimSiam(Predicting):
    """SimSiam [arXiv 2011.10566]: predict the other view's projection, which gets no gradient.

    The predictor's learning rate does not decay (the paper, section 4.2).
    """

    constant_rate = True

    def __init__(self, width: int, predictor_hidden: int = 4096) -> None:
        super().__init__()
        self.predictor = predictor(width, predictor_hidden)

    def forward(self, z: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        p1, p2 = self.predict(z[:2])
        return simsiam(p1, p2, z[0], z[1])


class QueueObjective(Objective):
    """An objective with a queue: two projections of each of all ranks' last ``queue`` samples."""

    queue: Tensor
    seen: Tensor

    def __init__(self, width: int, queue: int) -> None:
        super().__init__()
        keys = normalize(torch.randn(2 * queue, width))
        self.register_buffer("queue", keys.view(2, queue, width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # samples ever remembered

    def remember(self, projections: Tensor) -> None:
        """Replace the oldest entries by all ranks' ``projections`` (2, B, width), normalized.

        Their order does not depend on the world size.
        """
        size = self.queue.shape[1]
        if size == 0:
            return
        every = dist.gather(projections.detach().transpose(0, 1).contiguous())[-size:]
        place = (self.seen + torch.arange(len(every), device=every.device)) % size
        for queue, keys in zip(self.queue, every.unbind(1), strict=True):
            queue[place] = normalize(keys.to(queue.dtype))
        self.seen += len(every)


class MocoV2Plus(QueueObjective):
    """MoCo v2 with a symmetric loss ("v2+") [arXiv 1911.05722, 2003.04297; solo-learn].

    As in solo-learn, each view has its own queue. Keys are not shuffled before batch normalization:
    use ``model.sync_bn`` if the batch per rank is small.
    """

    teacher = True

    def __init__(
        self,
        width: int,
        temperature: float = 0.2,
        queue: int = 0,
        momentum: float = 0.99,
        momentum_end: float = 1.0,
    ) -> None:
        if queue < 1:
            raise SettingError("objective.queue: mocov2plus needs one, say --objective.queue 32768")
        super().__init__(width, queue)
        self.temperature = temperature
        self.momentum, self.momentum_end = momentum, momentum_end

    def forward(self, z: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        assert teacher is not None
        first = info_nce(z[0], teacher[1], self.queue[1], self.temperature)
        second = info_nce(z[1], teacher[0], self.queue[0], self.temperature)
        return (first + second) / 2

    def after_update(self, z: Tensor, teacher: Tensor | None) -> None:
        assert teacher is not None
        self.remember(teacher)


class MocoV3(Predicting):
    """MoCo v3 [arXiv 2104.02057]: a predictor, a momentum encoder, negatives of the batch.

    The predictor is the authors' and solo-learn's. ``predictor_norm``: it ends in a batch norm
    without scale and shift, as the authors' for a ViT does, and not that for a ResNet. Their
    projector ends in one for both (``build_projector``'s ``output_norm``).
    """

    teacher = True

    def __init__(
        self,
        width: int,
        temperature: float = 0.2,
        predictor_hidden: int = 4096,
        predictor_norm: bool = False,
        momentum: float = 0.99,
        momentum_end: float = 1.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.momentum, self.momentum_end = momentum, momentum_end
        self.predictor = predictor(width, predictor_hidden, bias=False)
        if predictor_norm:
            self.predictor.append(nn.BatchNorm1d(width, affine=False))

    def forward(self, z: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        assert teacher is not None
        q1, q2 = self.predict(z[:2])
        return moco_v3(q1, q2, teacher[0], teacher[1], self.temperature)


class Swav(QueueObjective):
    """SwAV [arXiv 2006.09882]: predict one crop's assignment to prototypes from another crop.

    Every rank computes the assignments of the global batch; from ``queue_epoch`` on the queue takes
    part, if there is one and it is full. Prototypes have unit norm and are not updated during the
    first ``freeze_epochs``.

    Without ``weight_norm`` each update changes the prototypes by their whole gradient, and they are
    normalized after it [the authors' main_swav.py]. With it, prototype c is v / ‖v‖ of a trained
    vector v whose norm is free: torch's weight normalization with g fixed at 1 [solo-learn]. The
    forward pass is the same. The gradient of v is (g - (g·c) c) / ‖v‖ for a gradient g of c: it has
    no part along c, and is smaller for a longer v.
    """

    local_crops = True

    def __init__(
        self,
        width: int,
        temperature: float = 0.2,
        prototypes: int = 3000,
        sinkhorn_steps: int = 3,
        epsilon: float = 0.05,
        freeze_epochs: int = 1,
        queue: int = 0,
        queue_epoch: int = 15,
        weight_norm: bool = False,
    ) -> None:
        super().__init__(width, queue)
        self.weight_norm = weight_norm
        self.temperature, self.epsilon, self.steps = temperature, epsilon, sinkhorn_steps
        self.freeze_epochs, self.queue_epoch = freeze_epochs, queue_epoch
        self.epoch = self.remembered = 0
        self.frozen = self.remembers = False  # bools: the forward pass is compiled once per value
        self.prototypes = nn.Linear(width, prototypes, bias=False)
        self._normalize()

    def _normalize(self) -> None:
        if not self.weight_norm:
            with torch.no_grad():
                self.prototypes.weight.copy_(normalize(self.prototypes.weight))

    def _unit(self) -> Tensor:
        """The prototypes (K, width) with unit norm."""
        weight = self.prototypes.weight
        return normalize(weight) if self.weight_norm else weight

    def begin_epoch(self, epoch: int) -> None:
        self.frozen = epoch < self.freeze_epochs
        self.epoch, self.remembered = epoch, int(self.seen)
        self._look()

    def _look(self) -> None:
        full = self.remembered >= self.queue.shape[1] > 0
        self.remembers = full and self.epoch >= self.queue_epoch

    def forward(self, z: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            dtype = torch.promote_types(z.dtype, torch.float32)
            prototypes = self._unit()
            views = normalize(z.to(dtype).flatten(0, 1))
            scores = F.linear(views, prototypes).unflatten(0, z.shape[:2])
            with torch.no_grad():
                codes = torch.stack(
                    [self._codes(scores[view], view, prototypes) for view in (0, 1)]
                )
        return swav(scores, codes, self.temperature)

    def _codes(self, scores: Tensor, view: int, prototypes: Tensor) -> Tensor:
        """Assignments (B, prototypes) of this rank's samples in one view."""
        every = dist.gather(scores.detach())
        count = len(every)
        if self.remembers:
            every = torch.cat([every, F.linear(self.queue[view], prototypes)])
        codes = sinkhorn(every, self.epsilon, self.steps)[:count]
        return codes.view(dist.world_size(), -1, codes.shape[1])[dist.rank()]

    def before_update(self) -> None:
        if self.frozen:
            self.prototypes.weight.grad = None

    def after_update(self, z: Tensor, teacher: Tensor | None) -> None:
        self._normalize()
        self.remember(z[:2])
        self.remembered += z.shape[1] * dist.world_size()
        self._look()


def as_objective(loss: Objective | Callable[..., Tensor]) -> Objective:
    """An ``Objective`` as it is; a function ``f(z1, z2) -> loss`` of two views as one."""
    return loss if isinstance(loss, Objective) else TwoViews(loss)


def build_objective(
    name: str, width: int, classes: int | None = None, /, **options: Any
) -> Objective:
    """The objective ``name`` over projections (V, B, ``width``) with the options that it names.

    ``classes``: the number of classes, for ``supervised`` (any class whose constructor has this
    parameter without a default). Raises ``SettingError`` for a name that is not in ``OBJECTIVES``,
    and ``InputError`` if ``classes`` is missing.
    """
    entry = OBJECTIVES[name]
    if not isinstance(entry, type):
        return TwoViews(entry, **options)
    if "classes" in inspect.signature(entry).parameters.keys() - hyperparameters(entry):
        if classes is None:
            raise InputError(f"objective {name} needs the number of classes, the third argument")
        options["classes"] = classes
    return entry(width, **options)
