"""The trainer: the parts of a run, the training step, and the state that a checkpoint saves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastproj.augment.views import Augmentation
from fastproj.core import dist
from fastproj.core.device import choose_precision
from fastproj.core.errors import InputError
from fastproj.loaders import Batch, Crop, Loader
from fastproj.models.finite import require_finite
from fastproj.objective.penalties import proximal_step_
from fastproj.training.diagnostics import Diagnostics
from fastproj.training.learner import Learner, StepOutput
from fastproj.training.optim import cosine, linear, load_optimizer, set_rates


class Trainer:
    """Trains a learner on a loader's batches.

    Args:
        learner: the model to train. It is moved to the loader's device, in channels-last memory.
        loader: batches of crops on the device; this rank's part of each step.
        optimizer: over the learner's parameters. A group's ``peak`` (by default its ``lr``) is its
            highest learning rate; ``constant: True`` in a group leaves the rate there.
        augmentations: one per crop size of the loader.
        epochs: length of the run and of its schedules.
        warmup_epochs: length of the linear warm-up; a cosine schedule to 0 follows.
        warmup_lr: learning rate of step 0.
        penalty_weights: the weight of each of the learner's penalties, or its first and last
            weight (linear over the run).
        proximal: ``columns`` or ``rows`` of the projector's first weight shrink by a proximal step
            after each update, with the weight that ``penalty_weights`` gives ``sparsehead``.
        accumulate: parts that a step is split into, each with its own negatives.
        crops: returns the loader's crops for an epoch (from 0); None: crops do not change.
        diagnostics: what is measured of features and projections, to be read at an epoch's end by
            ``diagnostics.report()``; None: ``Diagnostics(learner.projector)``.
        diagnostics_every: epochs between diagnostics, which cost each step of their epoch; 0:
            never.
        precision: autocast's dtype; None: chosen for the device.
        compile: compile learner and augmentations in place, so state dict keys do not change,
            and the crops where a GPU makes them.
        graphs: also record CUDA graphs (one GPU).
        seed: of views, dropout and noise; each step and rank derives its own.

    Raises ``InputError`` (a ``ValueError``) for arguments that contradict each other.

    Example:
        >>> trainer = Trainer(learner, loader, torch.optim.SGD(learner.parameters(), 0.1), [views])
        >>> for _ in range(trainer.epochs):
        ...     for batch in trainer.epoch():
        ...         metrics = trainer.train_step(batch)
    """

    def __init__(
        self,
        learner: Learner,
        loader: Loader,
        optimizer: torch.optim.Optimizer,
        augmentations: Sequence[Augmentation],
        *,
        epochs: int = 200,
        warmup_epochs: float = 10.0,
        warmup_lr: float = 3e-5,
        penalty_weights: Mapping[str, Sequence[float]] | None = None,
        proximal: str | None = None,
        accumulate: int = 1,
        crops: Callable[[int], Sequence[Crop]] | None = None,
        diagnostics: Diagnostics | None = None,
        diagnostics_every: int = 1,
        precision: torch.dtype | None = None,
        compile: bool = False,
        graphs: bool = False,
        seed: int = 0,
    ) -> None:
        self.learner, self.loader, self.optimizer = learner, loader, optimizer
        self.device = loader.device
        learner.labeled = float((loader.beton.label >= 0).mean())
        self.epochs, self.warmup_epochs, self.warmup_lr = epochs, warmup_epochs, warmup_lr
        self.proximal = proximal
        self.penalty_weights = dict(penalty_weights or {})
        self.accumulate, self.crops, self.graphs, self.seed = accumulate, crops, graphs, seed
        self._check(len(augmentations))
        learner.to(self.device)
        learner.to(memory_format=torch.channels_last)
        self.augmentations = [augmentation.to(self.device) for augmentation in augmentations]
        self.diagnostics = diagnostics or Diagnostics(learner.projector)
        self.diagnostics_every = diagnostics_every
        self.precision = precision or choose_precision("auto", self.device)
        if self.device.type == "cuda" and self.precision is not torch.float32:
            for augmentation in self.augmentations:
                # Autocast would round views to this type at the first layer, after twice the bytes
                # were written and read.
                augmentation.dtype = self.precision
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.precision is torch.float16 and self.device.type == "cuda"
        )
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
        self.generator = torch.Generator(self.device)
        self.step = 0  # updates done
        if compile or graphs:
            self._compile()
        self.model = dist.replicated(learner, self.device)  # checkpoints have rank 0's buffers

    def _check(self, augmentations: int) -> None:
        if self.graphs and (dist.world_size() > 1 or self.device.type != "cuda"):
            raise InputError(
                f"CUDA graphs are for one GPU, not {dist.world_size()} rank(s) on "
                f"{self.device.type}: compile without them (--train.compile true)"
            )
        if augmentations != len(self.loader.crops):
            raise InputError(
                f"{augmentations} augmentation(s) for {len(self.loader.crops)} crop size(s): give "
                "one for each"
            )
        if self.loader.order.batch_size % self.accumulate:
            raise InputError(
                f"a batch of {self.loader.order.batch_size} cannot be split into "
                f"{self.accumulate} parts: make it a multiple"
            )
        unweighted = self.learner.penalties.keys() - self.penalty_weights.keys()
        if unweighted:
            raise InputError(f"penalty_weights lacks {', '.join(sorted(unweighted))}")

    def _compile(self) -> None:
        # We compile the whole learner at once. On a CPU (ResNet-10, 128 images, 20 interleaved
        # steps): 1.08 times eager's speed; the encoder alone 1.04, each block alone 0.80. On a warm
        # start, tracing and loading took 4 to 7 s (3 starts). Shapes are fixed, except for crops
        # that grow.
        self.learner.compile(dynamic=False, mode="reduce-overhead" if self.graphs else None)
        for augmentation in self.augmentations:
            augmentation.compile()  # for a GPU: a CPU has native code
        self.loader.compile()

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.epochs * len(self.loader)

    def epoch(self) -> Iterator[Batch]:
        """The batches of the epoch at the loader's cursor; after a resume, the rest of them."""
        epoch = self.loader.cursor[0]
        if self.crops is not None:
            self.loader.crops = tuple(self.crops(epoch))
        self.learner.objective.begin_epoch(epoch)
        if self.loader.cursor[1] == 0:
            self.diagnostics.clear()
        return iter(self.loader)

    def views(self, batch: Batch, samples: int) -> list[Tensor]:
        """The views that ``train_step(batch)`` will train on, as images to look at.

        One float tensor (V, n, 3, h, w) in [0, 1] per crop size, of the batch's first ``samples``
        (of its first part, where ``accumulate`` splits the step). Training is not changed.
        """
        self._seed()
        return [
            augmentation.denormalize(views.unflatten(0, (crop.num_views, -1))[:, :samples].float())
            for augmentation, views, crop in zip(
                self.augmentations, self._augment(batch)[0], self.loader.crops, strict=True
            )
        ]

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One update from this rank's batch.

        Returns scalars that are still on the device: ``loss`` (the weighted sum), ``online_probe``
        (its accuracy) and, with penalties, every unweighted term.
        """
        self.set_rates()
        self._seed()
        if self.graphs:  # from here on, outputs of the last step's graphs may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        parts: list[StepOutput] = []
        metrics: list[dict[str, Tensor]] = []
        for views, labels in zip(
            self._augment(batch), batch.labels.chunk(self.accumulate), strict=True
        ):
            # Ranks sum their gradients once per step, in the last part's backward pass.
            last = len(parts) + 1 == self.accumulate
            if not last and isinstance(self.model, DistributedDataParallel):
                with self.model.no_sync():
                    part, values = self._part(views, labels)
            else:
                part, values = self._part(views, labels)
            parts.append(part)
            metrics.append(values)
        self.learner.objective.before_update()
        updated = self._update()
        self.optimizer.zero_grad()
        self._after_update(parts, updated)
        self.step += 1
        return {name: torch.stack([m[name] for m in metrics]).mean() for name in metrics[0]}

    def set_rates(self) -> None:
        """Set the learning rates of the next step."""
        warmup = min(self.warmup_epochs * len(self.loader), self.total_steps)
        set_rates(self.optimizer, self.step, self.total_steps, warmup, self.warmup_lr)

    def _seed(self) -> None:
        """Seed from (seed, step, rank), so a resumed run draws the same numbers."""
        address = [self.seed, self.step, dist.rank()]
        views, rest = np.random.SeedSequence(address).generate_state(2).tolist()
        self.generator.manual_seed(views)
        torch.manual_seed(rest)  # for dropout and the noise of stochastic features

    @torch.no_grad()
    def _augment(self, batch: Batch) -> list[tuple[Tensor, ...]]:
        """The views of each crop size, split along the batch into ``accumulate`` parts."""
        parts: list[list[Tensor]] = []
        for augmentation, crops in zip(self.augmentations, batch.crops, strict=True):
            params = augmentation.sample(len(batch.labels), self.generator)
            by_view = augmentation(crops, params).unflatten(0, (-1, len(batch.labels)))
            parts.append(
                [
                    part.flatten(0, 1).contiguous(memory_format=torch.channels_last)
                    for part in by_view.chunk(self.accumulate, 1)
                ]
            )
        return list(zip(*parts, strict=True))

    def _part(
        self, views: tuple[Tensor, ...], labels: Tensor
    ) -> tuple[StepOutput, dict[str, Tensor]]:
        """Forward and backward of one part of a step."""
        with torch.autocast(
            self.device.type, self.precision, enabled=self.precision is not torch.float32
        ):
            step: StepOutput = self.model(views, labels)
        loss = step.terms["objective"]
        for name, term in step.terms.items():
            if name != "objective":
                loss = loss + self._penalty_weight(name) * term
        self.scaler.scale((loss + step.probe_loss) / self.accumulate).backward()
        terms = {name: term.detach() for name, term in step.terms.items()}
        metrics = {"loss": loss.detach(), "online_probe": step.probe_hits}
        return step, metrics | terms if len(terms) > 1 else metrics

    def _penalty_weight(self, name: str) -> float:
        return linear(self.penalty_weights[name], self.step / self.total_steps)

    def _update(self) -> bool:
        """Step the optimizer; False where the scaler skipped it, as gradients were not finite."""
        if not self.scaler.is_enabled():
            self.optimizer.step()
            return True
        before = self.scaler.get_scale()  # waits for the GPU, as the scaler's own step does
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before

    def _after_update(self, parts: list[StepOutput], updated: bool) -> None:
        """Updates after the optimizer, once per step for any number of ranks and parts.

        Where the scaler skipped the update, nothing else moves either.
        """
        epoch = self.step // len(self.loader)
        # torch.cat copies even a single part; the next step overwrites a CUDA graph's own tensors.
        projections = torch.cat([part.projections for part in parts], 1)
        if updated:
            self._move_the_rest(parts, projections)
        if self.diagnostics_every and (epoch + 1) % self.diagnostics_every == 0:
            features = torch.cat([part.features for part in parts], 1)
            self.diagnostics.watch(features, projections[: len(features)])

    def _move_the_rest(self, parts: list[StepOutput], projections: Tensor) -> None:
        """The proximal step, the teacher, and what the objective keeps."""
        if self.proximal:
            # The step size is the schedule's rate, not scaled by LARS, AdamW or momentum.
            shrink = self.optimizer.param_groups[0]["lr"] * self._penalty_weight("sparsehead")
            proximal_step_(self.learner.projector.first_weight(), self.proximal, shrink)
        objective, progress = self.learner.objective, self.step / self.total_steps
        self.learner.update_teacher(cosine(objective.momentum, objective.momentum_end, progress))
        teachers = [part.teacher for part in parts if part.teacher is not None]
        teacher = torch.cat(teachers, 1) if teachers else None
        self.learner.objective.after_update(projections, teacher)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; the learner's parts by their names."""
        return {
            "step": self.step,
            "epoch": self.loader.cursor[0],
            "cursor": list(self.loader.cursor),
            **{name: part.state_dict() for name, part in self.learner.named_children()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the step at which ``state_dict`` returned ``state``; ignore other keys.

        Raises torch's own error if the state is of another architecture, and ``InputError`` if its
        weights are not finite or its step is not the loader's.
        """
        epoch, place = state["cursor"]
        step = state["step"]
        whole = all(type(number) is int and number >= 0 for number in (epoch, place, step))
        if not whole or step != epoch * len(self.loader) + place or step > self.total_steps:
            raise InputError(
                f"step {step} of the state is not step {place} of epoch {epoch} with "
                f"{len(self.loader)} steps per epoch: it is of another run, or damaged"
            )
        for name, part in self.learner.named_children():
            part.load_state_dict(state[name])
            require_finite(part.state_dict(), name)
        load_optimizer(self.optimizer, state["optimizer"])
        if state["scaler"]:  # nothing where the run so far had another precision
            self.scaler.load_state_dict(state["scaler"])
        self.step = step
        self.loader.seek(epoch, place)
