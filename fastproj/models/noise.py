"""Stochastic features: Gaussian noise on each feature while training."""

import math

import torch
from torch import Tensor, nn

from fastproj.core.errors import InputError

SIGMA_RANGE = 10.0  # a learned sigma stays within this factor of the given one, either way


class Noise(nn.Module):
    """Adds Gaussian noise to features while training.

    ``kind`` ``fixed``: standard deviation ``sigma`` everywhere. ``learned``: σ depends on the mean,
    σ = sigma · ``SIGMA_RANGE`` ** tanh(W·mean + b), with W and b initialized to zero. It starts at
    ``sigma`` and stays within a factor of ten of it [derived]. ``sigma`` is in the features' units.

    Without a divergence term this is the control experiment: noise alone.
    """

    sigma: Tensor

    def __init__(self, features: int, kind: str, sigma: float) -> None:
        super().__init__()
        if kind not in ("fixed", "learned"):
            raise InputError(f"superfluous.noise: no {kind!r}; choose fixed or learned")
        if not 0 < sigma < math.inf:
            raise InputError(f"superfluous.sigma: {sigma} is not above 0 and finite")
        self.register_buffer("sigma", torch.tensor(float(sigma)), persistent=False)
        self.exponent: nn.Linear | None = None
        if kind == "learned":
            self.exponent = nn.Linear(features, features)
            nn.init.zeros_(self.exponent.weight)
            nn.init.zeros_(self.exponent.bias)

    def forward(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """``mean`` (N, d) to a sample (N, d) of its dtype, and σ: (N, d) if learned, else a scalar.

        σ is float32 (float64 for a float64 mean). The noise comes from torch's global generator; in
        eval mode the sample is the mean itself.
        """
        sigma = self._sigma(mean)
        if not self.training:
            return mean, sigma
        return mean + (sigma * torch.randn_like(mean)).to(mean.dtype), sigma

    def _sigma(self, mean: Tensor) -> Tensor:
        if self.exponent is None:
            return self.sigma
        dtype = torch.promote_types(mean.dtype, torch.float32)
        with torch.autocast(mean.device.type, enabled=False):
            return self.sigma * (math.log(SIGMA_RANGE) * self.exponent(mean.to(dtype)).tanh()).exp()
