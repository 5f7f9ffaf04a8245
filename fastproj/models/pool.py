"""Max-pool whose kernels stay torch's own where a model is compiled.

Inductor (torch 2.15) decomposes the backward pass of a 3 × 3 max-pool into a scatter with atomics
into a float32 tensor in another memory format. For Inductor a custom operator is closed.
"""

import torch
from torch import Tensor, nn


@torch.library.custom_op("fastproj::max_pool", mutates_args=())
def _max_pool(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """The largest values of (N, c, h, w) and where they were."""
    return torch.ops.aten.max_pool2d_with_indices(x, [kernel] * 2, [stride] * 2, [padding] * 2)


@_max_pool.register_fake
def _(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.max_pool2d_with_indices(x, [kernel] * 2, [stride] * 2, [padding] * 2)


@torch.library.custom_op("fastproj::max_pool_backward", mutates_args=())
def _max_pool_backward(
    grad: Tensor, x: Tensor, indices: Tensor, kernel: int, stride: int, padding: int
) -> Tensor:
    return torch.ops.aten.max_pool2d_with_indices_backward(
        grad, x, [kernel] * 2, [stride] * 2, [padding] * 2, [1, 1], False, indices
    )


@_max_pool_backward.register_fake
def _(
    grad: Tensor, x: Tensor, indices: Tensor, kernel: int, stride: int, padding: int
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)


def _keep(ctx: object, inputs: tuple[Tensor, int, int, int], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.sizes = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(x, output[1])  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(output[1])  # type: ignore[attr-defined]


def _backward(ctx: object, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, indices = ctx.saved_tensors  # type: ignore[attr-defined]
    return _max_pool_backward(grad, x, indices, *ctx.sizes), None, None, None  # type: ignore[attr-defined]


_max_pool.register_autograd(_backward, setup_context=_keep)


class MaxPool2d(nn.MaxPool2d):
    """torch's, with square windows; compiled, it is still the library's kernel."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return super().forward(input)
        return _max_pool(input, self.kernel_size, self.stride, self.padding)[0]
