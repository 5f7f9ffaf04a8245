"""Training a detector, step by step, and what it finds afterwards."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastproj.core import dist
from fastproj.core.errors import InputError
from fastproj.core.progress import Progress
from fastproj.loaders.order import Order
from fastproj.models.finite import require_finite
from fastproj.training.optim import parameter_groups
from fastproj.transfer.batches import Sample, batches
from fastproj.transfer.detector import train_mode
from fastproj.transfer.scores import Detections
from fastproj.transfer.sets import Annotated

START = 1e-3  # of the peak rate, at step 0, as in detectron2
LISTEN = 20  # scored images between two looks at whether to stop


@dataclass(frozen=True)
class Plan:
    """``steps`` updates: rate ``lr``, a tenth of before from each milestone on."""

    steps: int
    lr: float
    milestones: Sequence[int] = ()
    warmup_steps: int = 0
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def rate(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0: a linear rise, then steps down."""
        rise = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        down = 0.1 ** sum(step >= milestone for milestone in self.milestones)
        return self.lr * (START + (1 - START) * rise) * down


class DetectorTrainer:
    """Updates of ``detector`` by SGD; on several ranks, gradients are averaged."""

    def __init__(
        self,
        detector: nn.Module,
        plan: Plan,
        device: torch.device,
        *,
        precision: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.detector, self.plan, self.device = detector.to(device), plan, device
        self.precision, self.seed, self.step = precision, seed, 0
        self.optimizer = torch.optim.SGD(
            parameter_groups([detector], plan.weight_decay), plan.lr, momentum=plan.momentum
        )
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=precision is torch.float16 and device.type == "cuda"
        )
        train_mode(detector)
        self.model = dist.replicated(detector, device)

    def train_step(self, batch: Sequence[Sample]) -> dict[str, Tensor]:
        """One update from this rank's images; the losses, ``loss`` their sum, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step)
        self._seed(self.step)
        losses = self._losses(self.model, batch)
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
        parts = self.detector.modules()
        norms = [part for part in parts if isinstance(part, _BatchNorm) and part.training]
        before = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for a mean over all batches
        for number, batch in enumerate(samples):
            self._seed(self.plan.steps + number)
            self._losses(self.detector, batch)
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum

    @torch.no_grad()
    def agree(self) -> None:
        """Give every rank the mean of the ranks' running statistics: they score alike."""
        for buffer in self.detector.buffers():
            if buffer.is_floating_point():
                buffer.copy_(dist.mean(buffer))

    def _losses(self, model: nn.Module, batch: Sequence[Sample]) -> dict[str, Tensor]:
        images = [_as_float(image, self.device) for image, _ in batch]
        targets = [{n: t.to(self.device) for n, t in target.items()} for _, target in batch]
        with torch.autocast(
            self.device.type, self.precision, enabled=self.precision is not torch.float32
        ):
            return model(images, targets)

    def _seed(self, step: int) -> None:
        """Seed what the detector draws, so that a resumed run draws the same."""
        address = np.random.SeedSequence([self.seed, step, dist.rank()])
        torch.manual_seed(int(address.generate_state(1)[0]))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "step": self.step,
            "detector": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the step at which ``state_dict`` returned ``state``; ignore other keys.

        Raises torch's own error for another detector's, ``InputError`` for what cannot be one.
        """
        step = state["step"]
        if type(step) is not int or not 0 <= step <= self.plan.steps:
            raise InputError(f"step {step} is none of a run of {self.plan.steps} steps")
        self.detector.load_state_dict(state["detector"])
        require_finite(self.detector.state_dict(), "detector")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = step


def _as_float(image: Tensor, device: torch.device) -> Tensor:
    return image.to(device).float().div_(255)


@torch.no_grad()
def detect(
    detector: nn.Module,
    images: Sequence[Annotated],
    device: torch.device,
    *,
    workers: int = 0,
    progress: str = "",
    stop: Callable[[bool], bool] = lambda agree: False,
) -> list[Detections] | None:
    """What ``detector`` finds in each of ``images``, on every rank; ranks share the images.

    None where ``stop(agree)`` said to leave; ``agree``: a call that every rank makes. ``progress``,
    unless empty, is the name under which progress is shown.
    """
    ranks = dist.world_size()
    order = Order(
        len(images), 1, shuffle=False, drop_last=False, rank=dist.rank(), world_size=ranks
    )
    own: dict[int, Detections] = {}
    detector.eval()
    shown = progress and dist.is_main()
    with Progress(len(images), progress) if shown else nullcontext() as bar:
        for step, batch in enumerate(batches(images, order, 0, workers=workers)):
            if batch:
                (found,) = detector([_as_float(image, device) for image, _ in batch])
                own[int(order.batch(0, step)[0])] = _plain(found)
            if bar:
                bar.update(min(ranks, len(images) - bar.done))
            if stop(step % LISTEN == 0):
                return None
    together = {number: found for part in dist.exchange(own) for number, found in part.items()}
    return [together[number] for number in range(len(images))]


def _plain(found: Mapping[str, Tensor]) -> Detections:
    """An image's detections on the CPU, its masks as run lengths."""
    plain: Detections = {name: found[name].cpu() for name in ("boxes", "scores", "labels")}
    if "masks" in found:
        pixels = (found["masks"][:, 0] > 0.5).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        plain["masks"] = mask.encode(np.asfortranarray(pixels))
    return plain
