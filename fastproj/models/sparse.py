"""The sparse layer: an over-complete code of which each sample keeps its k largest latents.

The encoder's product and the selection of the largest latents are dense. The rest is computed
densely (scatter the kept values, then matrix products) or sparsely (kept latents only). Times of
one step on a CPU in float32: 512 rows, 512 -> 25,000 -> 512, k = 250, a quarter of the paper's
work; one thread of a shared Xeon with AVX-512, minimum of 4 repeats:

    encoder's product          171 ms
    selection                   40 ms with _select; ReLU and torch.topk 158
    decoder                     33 ms with embedding_bag; MKL's CSR product 46; dense 174
    gradients but the input's  136 ms with _gradients; CSR products and embedding_bag about 200
    gradient of the input       34 ms with embedding_bag; inside _gradients no faster
    forward and backward       439 ms; dense 1055; plain autograd 1270

The time of sparse arithmetic is proportional to k, that of dense is constant. They are equal at a k
of 6 to 10 % of the latents, for 512 -> 12,500 -> 512, 256 -> 4,096 -> 128 and 2,048 -> 6,250 ->
2,048 alike. On a GPU, where this has not been measured, everything is dense, with torch.topk.

Both hold at most two (rows × latents) tensors at once and keep none for the backward pass. Under
autocast the activations are float32 all the same: in bfloat16 the k-th largest often equals others,
and chance would select among them. Dense tensors after the selection are half precision.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.core.errors import SettingError

DENSE_SHARE = 1 / 16  # a CPU computes sparsely for k up to this fraction of the latents


class Sparse(nn.Module):
    """Rows (N, ``features``) -> (N, ``out``) through ``latents``, of which each row keeps ``k``.

    With untied linear layers Enc and Dec and a pre-bias b that is initialized to zero,

        out = Dec(TopK(ReLU(Enc(x - b)))) + b

    [arXiv 2503.00507; PKU-ML/Projector_Theory]. A row keeps min(k, number of positive latents), no
    more if values tie. ``+ b`` is added only if ``out`` equals ``features``; for other widths it
    cannot be, and Dec's own bias serves instead.

    ``k`` is a count, or a fraction of the latents if below 1. Input of any floating dtype. Under
    autocast the output is float32. Latents are selected from float32 activations; dense products
    after the selection run in autocast's dtype.

    Raises ``SettingError`` for a ``k`` that is neither, or above ``latents``.
    """

    def __init__(self, features: int, latents: int, out: int, k: float) -> None:
        super().__init__()
        self.k = count(k, latents)
        self.in_features, self.out_features = features, out
        self.encoder = nn.Linear(features, latents)
        self.pre_bias = nn.Parameter(torch.zeros(features))
        # Transposed compared with nn.Linear, so a latent's weights are contiguous.
        bound = latents**-0.5  # as nn.Linear's
        self.decoder = nn.Parameter(torch.empty(latents, out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.encoder.weight, self.encoder.bias
        out = _Code.apply(x - self.pre_bias, weight, bias, self.decoder, self.k) + self.bias
        return out + self.pre_bias if self.out_features == self.in_features else out

    @torch.no_grad()
    def active(self, x: Tensor) -> Tensor:
        """Latents kept by at least one row of ``x`` (N, ``features``): bool (``latents``,)."""
        activations = _activations(x - self.pre_bias, self.encoder.weight, self.encoder.bias)
        values, index = _largest(activations, self.k)
        rows = torch.zeros(len(self.decoder), device=x.device)
        return rows.index_add_(0, index.flatten(), (values != 0).flatten().float()) > 0


def count(k: float, latents: int) -> int:
    """Latents kept per row: ``k`` itself, or if below 1 this fraction of them, at least one.

    Raises ``SettingError`` if ``k`` is at least 1 and not a whole number, not positive, or above
    ``latents``.
    """
    if 0 < k < 1:
        return max(1, round(k * latents))
    if not (k >= 1 and float(k).is_integer()):
        raise SettingError(f"projector.k: {k:g} is neither a whole count nor a fraction below 1")
    if k > latents:
        raise SettingError(f"projector.k: {k:g} of only {latents} latents: lower k, or raise them")
    return int(k)


class _Code(torch.autograd.Function):
    """x (N, features) -> the kept latents' values times ``decoder``'s rows (N, out)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, decoder: Tensor, k: int
    ) -> Tensor:
        values, index = _largest(_activations(x, weight, bias), k)
        is_sparse = _is_sparse(values, len(decoder))
        if not is_sparse:
            values = values.to(_product_dtype(x))
        ctx.save_for_backward(x, weight, decoder, values, index)
        if is_sparse:
            return _weighted_rows(values, index, decoder)
        return _scatter(values, index, len(decoder)) @ decoder.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, decoder, values, index = ctx.saved_tensors
        if _is_sparse(values, len(decoder)):
            d_values, d_weight, d_bias, d_decoder = _gradients(
                grad.to(decoder.dtype), x, values.to(decoder.dtype), index, decoder
            )
            return _weighted_rows(d_values, index, weight), d_weight, d_bias, d_decoder, None
        dtype = values.dtype
        grad = grad.to(dtype)
        code = _scatter(values, index, len(decoder))
        d_decoder = code.T @ grad
        torch.mm(grad, decoder.T.to(dtype), out=code)  # from here on, ``code`` is its gradient
        d_values = code.gather(1, index).where(values != 0, 0)
        code.zero_().scatter_(1, index, d_values)
        gradients = (code @ weight.to(dtype), code.T @ x.to(dtype), code.sum(0), d_decoder)
        # In the inputs' dtype, which differs from autocast's.
        return *(g.to(x.dtype) for g in gradients), None


def _activations(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Enc(x): (N, latents), float32 whatever autocast says (float64 stays float64)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with ``x``: autocast's, if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _is_sparse(values: Tensor, latents: int) -> bool:
    return values.device.type == "cpu" and values.shape[1] <= DENSE_SHARE * latents


def _scatter(values: Tensor, index: Tensor, latents: int) -> Tensor:
    return values.new_zeros(len(values), latents).scatter_(1, index, values)


def _weighted_rows(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Σ_j values[n, j] · weight[index[n, j]]: (N, k) twice and (latents, d) -> (N, d)."""
    values = values.to(weight.dtype)
    return F.embedding_bag(index, weight, mode="sum", per_sample_weights=values)


def _largest(activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row (N, latents), unsorted: values (N, k), index int64 (N, k).

    Values that are not positive become 0. Indices of a row are distinct. May overwrite
    ``activations``.
    """
    if activations.device.type != "cpu":
        return activations.relu_().topk(k, sorted=False)
    return _select(activations, k)


# torch.compile cannot trace NumPy and numba: these are custom operators with fake (shape) versions.


@torch.library.custom_op("fastproj::select", mutates_args=())
def _select(activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``_largest`` on a CPU, float32 or float64."""
    from fastproj.models.sparse_kernels import select_rows

    values, index = _empty_selection(activations, k)
    _in_threads(select_rows, len(values), activations, values, index)
    return values, index


@_select.register_fake
def _empty_selection(activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = activations.new_empty(len(activations), k)
    return values, torch.empty_like(values, dtype=torch.int64)


@torch.library.custom_op("fastproj::sparse_gradients", mutates_args=())
def _gradients(
    grad: Tensor, x: Tensor, values: Tensor, index: Tensor, decoder: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of values, weight, bias and decoder, given the output's ``grad`` (N, out)."""
    from fastproj.models.sparse_kernels import by_latent, latent_gradients

    gradients = _empty_gradients(grad, x, values, index, decoder)
    starts, order = map(torch.from_numpy, by_latent(values.numpy(), index.numpy(), len(decoder)))
    gradients[0].zero_()  # the others are overwritten completely
    _in_threads(latent_gradients, len(decoder), starts, order, grad, x, values, decoder, *gradients)
    return gradients


@_gradients.register_fake
def _empty_gradients(
    grad: Tensor, x: Tensor, values: Tensor, index: Tensor, decoder: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    latents, out = decoder.shape
    sizes = values.shape, (latents, x.shape[1]), (latents,), (latents, out)
    d_values, d_weight, d_bias, d_decoder = (x.new_empty(size) for size in sizes)
    return d_values, d_weight, d_bias, d_decoder


def _in_threads(kernel: Callable[..., None], total: int, *tensors: Tensor) -> None:
    """Run ``kernel(first, last, *arrays)`` over parts of 0 … ``total``, in torch's thread count.

    Not numba's own parallel loops: FFCV's threads use those, and if two Python threads do so
    without TBB or OpenMP installed, numba ends the process.
    """
    arrays = [tensor.detach().contiguous().numpy() for tensor in tensors]
    threads = torch.get_num_threads()
    if threads == 1:
        return kernel(0, total, *arrays)
    ends = np.linspace(0, total, 4 * threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda first, last: kernel(first, last, *arrays), ends[:-1], ends[1:]))
