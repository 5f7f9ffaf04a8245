"""Batch normalization over all ranks, on every device; and of each view on its own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastproj.core import dist
from fastproj.core.errors import InputError


class SyncBatchNorm(_BatchNorm):
    """Batch normalization whose mean and biased variance are over all ranks' samples.

    Two ranks compute what one rank would with both halves of the batch, gradients included. Every
    rank must give the same number of samples. ``nn.SyncBatchNorm`` does the same, but does not run
    on a CPU, and on a GPU every call syncs with the host (torch 2.15 masks the ranks' counts).
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm needs (N, C, ...), not {tuple(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same shape and dtype, normalized."""
        if not self.training or dist.world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        axes = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        own = torch.stack(torch.var_mean(values, axes, correction=0))
        variances, means = dist.gather(own[None]).unbind(1)  # (ranks, C) each, in one collective
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        count = x.numel() // x.shape[1] * dist.world_size()
        self._track(mean.detach(), variance.detach() * count / max(count - 1, 1))
        y = (values - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        # All our modules keep running statistics. Without a momentum: the mean over all batches.
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class SyncBatchNormAct(SyncBatchNorm):
    """The same, then the modules ``drop`` and ``act``, as timm's ``BatchNormAct2d`` has them."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def synchronize(module: nn.Module) -> None:
    """Replace every batch normalization below ``module`` by ``SyncBatchNorm``, in place.

    Parameters and buffers stay the same objects with the same names. Raises ``InputError`` for a
    batch norm that computes something else as well.
    """
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
            kind: type[SyncBatchNorm] = SyncBatchNorm
            if all(isinstance(getattr(child, part, None), nn.Module) for part in ("drop", "act")):
                kind = SyncBatchNormAct
            elif type(child).forward is not _BatchNorm.forward:
                raise InputError(
                    f"model.sync_bn: {name} is a {type(child).__name__}, which computes more than "
                    "batch norm: set model.sync_bn false"
                )
            sync = kind(
                child.num_features, child.eps, child.momentum, child.affine,
                child.track_running_stats,
            )  # fmt: skip
            sync._parameters, sync._buffers = child._parameters, child._buffers
            sync._modules = child._modules
            setattr(module, name, sync.train(child.training))
        else:
            synchronize(child)


def on_views(part: Callable[[Tensor], Tensor], x: Tensor, images: int, per_view: bool) -> Tensor:
    """``part(x)`` for V views ``x`` (V·images, ...), view-major: in one call, or one per view.

    With ``per_view``, batch norm takes mean and variance over one view's images and updates its
    running statistics V times.
    """
    return torch.cat([part(view) for view in x.split(images)]) if per_view else part(x)
