"""Linear heads that train side by side on the same inputs, one per learning rate."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastproj.training.optim import warmup_cosine


class Heads:
    """G softmax-regression heads in one tensor ``weights`` (G, classes, d+1), the bias last.

    All logits are one matrix product and the gradient of the mean cross-entropy is in closed form,
    so more learning rates cost little beside the encoder. Every head starts as ``nn.Linear`` does,
    uniform in ±1/√d, with the same numbers. ``trust_coefficient`` None: torch's SGD with momentum;
    a number: LARS as ``training.optim.Lars`` computes it, for each head by its own norms. Biases
    are neither decayed nor scaled.
    """

    def __init__(
        self,
        num: int,
        classes: int,
        features: int,
        *,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        bound = features**-0.5
        generator = torch.Generator().manual_seed(seed)
        start = torch.empty(classes, features + 1).uniform_(-bound, bound, generator=generator)
        self.weights = start.to(device, dtype).repeat(num, 1, 1)
        self.velocity = torch.zeros_like(self.weights)
        self.momentum, self.trust_coefficient = momentum, trust_coefficient
        self.decay = torch.full((features + 1,), weight_decay, dtype=dtype, device=device)
        self.decay[-1] = 0

    def step(self, features: Tensor, labels: Tensor, rates: Tensor) -> None:
        """One update from ``features`` (B, d) and ``labels`` int64 (B,); ``rates`` (G,)."""
        weights, rates = self.weights, rates.view(-1, 1, 1)
        num, classes, _ = weights.shape
        x = with_ones(features)
        logits = (x @ weights.flatten(0, 1).T).view(len(x), num, classes)
        target = functional.one_hot(labels, classes).to(x.dtype).unsqueeze(1)
        # The gradient of the mean cross-entropy: (softmax - target)' x / B.
        error = logits.softmax(-1).sub_(target).div_(len(x))
        gradient = (error.flatten(1).T @ x).view_as(weights)
        update = torch.addcmul(gradient, self.decay, weights)
        if self.trust_coefficient is not None:
            update[..., :-1] *= self._trust_ratios(gradient, rates)
        self.velocity.mul_(self.momentum).add_(update)
        weights.sub_(rates * self.velocity)

    def _trust_ratios(self, gradient: Tensor, rates: Tensor) -> Tensor:
        """(G, 1, 1): the formula of ``Lars``, with the norms of each head's matrix."""
        weight, grad = (
            torch.linalg.vector_norm(each[..., :-1], dim=(1, 2), keepdim=True)
            for each in (self.weights, gradient)
        )
        rate = self.trust_coefficient * weight / (grad + self.decay[0] * weight + 1e-8)
        rate = torch.where((weight > 0) & (grad > 0), rate, 1.0)
        return (rate / rates).clamp(max=1.0)


def with_ones(features: Tensor) -> Tensor:
    """(N, d) to (N, d+1): a last column of ones, which a head's last column multiplies."""
    return functional.pad(features, (0, 1), value=1.0)


def multistep(rates: Sequence[float], epoch: int, milestones: Sequence[int]) -> list[float]:
    """The ``rates`` in ``epoch`` (from 0): a tenth from each milestone on, as ``MultiStepLR``."""
    return [rate * 0.1 ** sum(epoch >= milestone for milestone in milestones) for rate in rates]


def warmed_up(
    rates: Sequence[float], steps: range, total: int, warmup: float, start: float
) -> list[list[float]]:
    """One list per step: each peak of ``rates`` on its own warm-up and half cosine."""
    return [[warmup_cosine(step, total, warmup, peak, start) for peak in rates] for step in steps]
