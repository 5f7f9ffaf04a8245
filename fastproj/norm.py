"""Batch normalisation over all ranks, on every device."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastproj import dist


class HostSyncBatchNorm(_BatchNorm):
    """What ``nn.SyncBatchNorm`` does, for a CPU, which that one refuses.

    Mean and biased variance of each channel are those of all ranks' samples, so that two ranks
    compute what one rank would with both halves of the batch, gradients included. Every rank
    must give the same number of samples.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm needs (N, C, ...), not {tuple(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same shape, normalised."""
        if not self.training or dist.world() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        axes = [0, *range(2, x.ndim)]
        count = x.numel() // x.shape[1] * dist.world()
        shape = [1, -1] + [1] * (x.ndim - 2)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = dist.total(values.sum(axes)) / count
        centred = values - mean.view(shape)
        variance = dist.total(centred.square().sum(axes)) / count
        self._track(mean.detach(), variance.detach() * count / max(count - 1, 1))
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.momentum is None:
            raise NotImplementedError("batch norm without running statistics of fixed momentum")
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)


def synchronise(module: nn.Module) -> None:
    """Let every batch normalisation below ``module``, already on its device, see all ranks.

    In place: parameters and buffers are the same objects before and after, under the same names.
    """
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            on_host = child.running_mean is None or child.running_mean.device.type == "cpu"
            sync = (HostSyncBatchNorm if on_host else nn.SyncBatchNorm)(
                child.num_features, child.eps, child.momentum, child.affine,
                child.track_running_stats,
            )  # fmt: skip
            sync._parameters, sync._buffers = child._parameters, child._buffers
            setattr(module, name, sync.train(child.training))
        else:
            synchronise(child)
