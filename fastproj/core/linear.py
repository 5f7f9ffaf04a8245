"""``functional.linear`` by the fastest library at hand."""

import torch
from torch import Tensor
from torch.nn import functional


def linear(input: Tensor, weight: Tensor) -> Tensor:
    """``input`` (M, K) times the transpose of ``weight`` (N, K): (M, N). Gradients do not pass.

    torch gives float32 products on a CPU to MKL, oneDNN beside it only under ``torch.compile``. On
    2 cores of an AMD EPYC with AVX-512, oneDNN makes 440 GFLOP/s and MKL 195.
    """
    on_cpu = input.device.type == "cpu" and input.dtype == torch.float32
    if not (on_cpu and torch.backends.mkldnn.is_available()):
        return functional.linear(input, weight)
    input, weight = _dense(input), _dense(weight)
    return torch.ops.mkldnn._linear_pointwise(input, weight, None, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """Rows or columns without gaps: oneDNN takes 400 times as long for others."""
    return matrix if matrix.mT.is_contiguous() else matrix.contiguous()
