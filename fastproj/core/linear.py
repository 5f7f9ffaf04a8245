"""``functional.linear`` by the fastest library at hand."""

import torch
from torch import Tensor
from torch.nn import functional


def linear(input: Tensor, weight: Tensor) -> Tensor:
    """``input`` (M, K) times the transpose of ``weight`` (N, K): (M, N). Gradients do not pass.

    ``weight`` may be what ``pack`` made of it. Products of bfloat16 are summed up in float32 and
    rounded once. torch gives float32 products on a CPU to MKL, oneDNN
    beside it only under ``torch.compile``. On 2 cores of an AMD EPYC with AVX-512, oneDNN makes 440
    GFLOP/s and MKL 195.
    """
    if not _onednn(input):
        return functional.linear(input, weight)
    if not weight.is_mkldnn:
        weight = _dense(weight)
    return torch.ops.mkldnn._linear_pointwise(_dense(input), weight, None, "none", [], "")


def pack(weight: Tensor) -> Tensor:
    """A copy of ``weight`` in the layout in which oneDNN computes, for ``linear`` only.

    Else every product makes one: with 10 rows of ``input`` that is half of the time, with 160 a
    tenth (on the machine above). Where ``linear`` does not use oneDNN it is ``weight`` itself.
    """
    if not _onednn(weight):
        return weight
    rows = 256  # of ``input``, for which the layout is chosen; any number will do later
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)


def _onednn(matrix: Tensor) -> bool:
    if matrix.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if matrix.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return matrix.dtype == torch.float32


def _dense(matrix: Tensor) -> Tensor:
    """Rows or columns without gaps: oneDNN takes 400 times as long for others."""
    return matrix if matrix.mT.is_contiguous() else matrix.contiguous()
