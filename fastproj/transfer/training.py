"""Training on an encoder, step by step, and a look at each image afterwards."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastproj.core import dist
from fastproj.core.errors import InputError
from fastproj.core.progress import Progress
from fastproj.loaders.order import Order
from fastproj.models.finite import require_finite
from fastproj.transfer.batches import Sample, batches

T = TypeVar("T")
LISTEN = 20  # scored images between two looks at whether to stop


class Plan(Protocol):
    """How long and how fast: ``steps`` updates of the optimizer, at the rate of each step."""

    @property
    def steps(self) -> int: ...

    def rate(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the module's trainable parameters."""


def train_mode(module: nn.Module) -> None:
    """Put ``module`` in training mode, but for what has weights and none to train."""
    module.train()
    for part in module.modules():
        weights = [weight.requires_grad for weight in part.parameters()]
        if weights and not any(weights):
            part.eval()


class Trainer:
    """Updates of ``module``; on several ranks, gradients are averaged.

    ``module``: in training mode, images (a list of (3, h, w), float in [0, 1]) and targets give a
    dictionary of losses.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        device: torch.device,
        *,
        precision: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.module, self.plan, self.device = module.to(device), plan, device
        self.precision, self.seed, self.step = precision, seed, 0
        self.optimizer = plan.optimizer(module)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=precision is torch.float16 and device.type == "cuda"
        )
        train_mode(module)
        self._replica = dist.replicated(module, device)

    def train_step(self, batch: Sequence[Sample]) -> dict[str, Tensor]:
        """One update from this rank's images; the losses, ``loss`` their sum, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step)
        self._seed(self.step)
        losses = self._losses(self._replica, batch)
        loss = torch.stack(list(losses.values())).sum()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        return {"loss": loss.detach()} | {name: term.detach() for name, term in losses.items()}

    @torch.no_grad()
    def calibrate(self, samples: Iterable[Sequence[Sample]]) -> None:
        """Take batch norm's running statistics anew, as their mean over ``samples``.

        What is frozen keeps its own. detectron2 calls it precise batch norm; MoCo's protocols score
        after it [Wu and Johnson 2021, arXiv 2105.07576, section 3].
        """
        parts = self.module.modules()
        norms = [part for part in parts if isinstance(part, _BatchNorm) and part.training]
        before = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for a mean over all batches
        for number, batch in enumerate(samples):
            self._seed(self.plan.steps + number)
            self._losses(self.module, batch)
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum

    @torch.no_grad()
    def agree(self) -> None:
        """Give every rank the mean of the ranks' running statistics: they score alike."""
        for buffer in self.module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(dist.mean(buffer))

    def _losses(self, model: nn.Module, batch: Sequence[Sample]) -> dict[str, Tensor]:
        images = [as_float(image, self.device) for image, _ in batch]
        targets = [{n: t.to(self.device) for n, t in target.items()} for _, target in batch]
        with torch.autocast(
            self.device.type, self.precision, enabled=self.precision is not torch.float32
        ):
            return model(images, targets)

    def _seed(self, step: int) -> None:
        """Seed what the module draws, so that a resumed run draws the same."""
        address = np.random.SeedSequence([self.seed, step, dist.rank()])
        torch.manual_seed(int(address.generate_state(1)[0]))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "step": self.step,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the step at which ``state_dict`` returned ``state``; ignore other keys.

        Raises torch's own error for another module's, ``InputError`` for what cannot be one.
        """
        step = state["step"]
        if type(step) is not int or not 0 <= step <= self.plan.steps:
            raise InputError(f"step {step} is none of a run of {self.plan.steps} steps")
        self.module.load_state_dict(state["module"])
        require_finite(self.module.state_dict(), "module")
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # nothing where the run so far had another precision
            self.scaler.load_state_dict(state["scaler"])
        self.step = step


def as_float(image: Tensor, device: torch.device) -> Tensor:
    """Pixels in [0, 1] on the device, float32 of the same shape."""
    return image.to(device).float().div_(255)


@torch.no_grad()
def each(
    images: Sequence[T],
    read: Callable[[T], Sample],
    look: Callable[[int, Sample], None],
    *,
    workers: int = 0,
    progress: str = "",
    stop: Callable[[bool], bool] = lambda agree: False,
) -> bool:
    """Call ``look(number, sample)`` with every image, once; ranks share the images.

    False where ``stop(agree)`` said to leave; ``agree``: a call that every rank makes.
    ``progress``, unless empty, is the name under which progress is shown.
    """
    ranks = dist.world_size()
    order = Order(
        len(images), 1, shuffle=False, drop_last=False, rank=dist.rank(), world_size=ranks
    )
    shown = progress and dist.is_main()
    with Progress(len(images), progress) if shown else nullcontext() as bar:
        for step, batch in enumerate(batches(images, order, 0, read=read, workers=workers)):
            for sample in batch:  # none, where the other ranks have the last images
                look(int(order.batch(0, step)[0]), sample)
            if bar:
                bar.update(min(ranks, len(images) - bar.done))
            if stop(step % LISTEN == 0):
                return False
    return True
