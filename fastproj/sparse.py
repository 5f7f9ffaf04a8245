"""The sparse layer: an over-complete code of which a row keeps its largest latents.

After the encoder's product, 99 % of a (rows × latents) activation are zeros, and what follows can
leave them out. On a CPU of 4 cores, 512 rows and 512 -> 100,000 -> 512 with k = 1000 (seconds of
one core; quarter of the latents, so a row stands for all 4 cores' wall clock):
PLACEHOLDER
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.errors import SettingError

DENSE_SHARE = 1 / 16
STRIDE = 16


class Sparse(nn.Module):
    """Rows (N, ``features``) -> (N, ``out``) through ``latents``, of which a row keeps ``k``.

    With untied linear layers Enc and Dec, and a pre-bias b that starts from zero,

        out = Dec(TopK(ReLU(Enc(x - b)))) + b

    [arXiv 2503.00507; PKU-ML/Projector_Theory]. A row keeps min(k, its positive latents), no more
    where values tie. ``+ b`` only where ``out`` equals ``features``: elsewhere the widths forbid
    it, and Dec's own bias does the same.
    """

    def __init__(self, features: int, latents: int, out: int, k: float) -> None:
        super().__init__()
        self.k = count(k, latents)
        self.in_features, self.out_features = features, out
        self.encoder = nn.Linear(features, latents)
        self.pre_bias = nn.Parameter(torch.zeros(features))
        # A linear layer's weight transposed: a latent's weights lie together.
        bound = latents**-0.5  # as nn.Linear's
        self.decoder = nn.Parameter(torch.empty(latents, out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.encoder.weight, self.encoder.bias
        out = _Code.apply(x - self.pre_bias, weight, bias, self.decoder, self.k) + self.bias
        return out + self.pre_bias if self.out_features == self.in_features else out

    @torch.no_grad()
    def active(self, x: Tensor) -> Tensor:
        """Which latents at least one row of ``x`` (N, ``features``) keeps: bool (``latents``,)."""
        values, index = _largest(self.encoder(x - self.pre_bias), self.k)
        rows = torch.zeros(len(self.decoder), device=x.device)
        return rows.index_add_(0, index.flatten(), (values != 0).flatten().float()) > 0


def count(k: float, latents: int) -> int:
    """How many latents a row keeps: ``k`` itself, or below 1 this share of them, at least one.

    Raises ``SettingError`` where ``k`` is no whole number, not positive or above ``latents``.
    """
    if 0 < k < 1:
        return max(1, round(k * latents))
    if k < 1 or k != int(k):
        raise SettingError(f"projector.k: {k:g} is neither a whole count nor a share below 1")
    if k > latents:
        raise SettingError(f"projector.k: {k:g} of only {latents} latents: lower k, or raise them")
    return int(k)


class _Code(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, decoder: Tensor, k: int) -> Tensor:
        values, index = _largest(F.linear(x, weight, bias), k)
        ctx.save_for_backward(x, weight, decoder, values, index)
        if _is_dense(values, len(decoder)):
            return _scatter(values, index, len(decoder)) @ decoder.to(values.dtype)
        return _gather(values, index, decoder)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, decoder, values, index = ctx.saved_tensors
        if not _is_dense(values, len(decoder)):
            d_values, d_weight, d_bias, d_decoder = _gradients(
                grad.to(decoder.dtype), x, values.to(decoder.dtype), index, decoder
            )
            return _gather(d_values, index, weight), d_weight, d_bias, d_decoder, None
        grad = grad.to(values.dtype)
        code = _scatter(values, index, len(decoder))
        d_decoder = code.T @ grad
        torch.mm(grad, decoder.T.to(values.dtype), out=code)
        d_values = code.gather(1, index).where(values != 0, 0)
        code.zero_().scatter_(1, index, d_values)
        d_weight, d_bias = code.T @ x.to(code.dtype), code.sum(0)
        d_x = code @ weight.to(code.dtype)
        return (
            d_x.to(x.dtype), d_weight.to(weight.dtype), d_bias.to(weight.dtype),
            d_decoder.to(decoder.dtype), None,
        )  # fmt: skip


def _is_dense(values: Tensor, latents: int) -> bool:
    return values.device.type != "cpu" or values.shape[1] > DENSE_SHARE * latents


def _scatter(values: Tensor, index: Tensor, latents: int) -> Tensor:
    return values.new_zeros(len(values), latents).scatter_(1, index, values)


def _gather(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(
        index, weight, mode="sum", per_sample_weights=values.to(weight.dtype)
    )


def _largest(activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if activations.device.type != "cpu":
        return activations.relu_().topk(k, sorted=False)
    lifted = activations.to(torch.promote_types(activations.dtype, torch.float32))
    values, index = _select(lifted, k)
    return values.to(activations.dtype), index


def _in_threads(kernel: Callable[..., None], total: int, *tensors: Tensor | int) -> None:
    threads = torch.get_num_threads()
    args = [t.numpy() if isinstance(t, Tensor) else t for t in tensors]
    ends = np.linspace(0, total, min(4 * threads, total) + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda a, b: kernel(a, b, *args), ends[:-1], ends[1:]))


@torch.library.custom_op("fastproj::select", mutates_args=())
def _select(activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = activations.new_empty(len(activations), k)
    index = torch.empty_like(values, dtype=torch.int64)
    _in_threads(_select_rows, len(values), activations.detach().contiguous(), values, index)
    return values, index


@_select.register_fake
def _(activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = activations.new_empty(len(activations), k)
    return values, torch.empty_like(values, dtype=torch.int64)


@torch.library.custom_op("fastproj::sparse_gradients", mutates_args=())
def _gradients(
    grad: Tensor, x: Tensor, values: Tensor, index: Tensor, decoder: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    latents = len(decoder)
    d_values = torch.zeros_like(values)
    d_weight = x.new_empty(latents, x.shape[1])
    d_bias = x.new_empty(latents)
    d_decoder = torch.empty_like(decoder)
    starts, order = _by_latent(values.numpy(), index.numpy(), latents)
    _in_threads(
        _latent_gradients, latents, torch.from_numpy(starts), torch.from_numpy(order),
        grad.contiguous(), x.contiguous(), values, decoder.detach().contiguous(),
        d_values, d_weight, d_bias, d_decoder,
    )  # fmt: skip
    return d_values, d_weight, d_bias, d_decoder


@_gradients.register_fake
def _(
    grad: Tensor, x: Tensor, values: Tensor, index: Tensor, decoder: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    latents = len(decoder)
    return (
        torch.empty_like(values),
        x.new_empty(latents, x.shape[1]),
        x.new_empty(latents),
        torch.empty_like(decoder),
    )


@numba.njit(nogil=True, cache=True)
def _select_rows(first, last, activations, values, index):  # type: ignore[no-untyped-def]
    latents, k = activations.shape[1], values.shape[1]
    found = np.empty(latents, activations.dtype)
    where = np.empty(latents, np.int64)
    for r in range(first, last):
        row = activations[r]
        sample = row[::STRIDE].copy()
        wanted = k / STRIDE
        rank = min(int(wanted + 3 * np.sqrt(wanted)) + 2, len(sample))
        floor = np.partition(sample, len(sample) - rank)[len(sample) - rank]
        if not floor > 0:
            floor = 0
        n = 0
        for j in range(latents):
            if not row[j] <= floor:
                found[n], where[n] = row[j], j
                n += 1
        if n < k and floor > 0:
            n = 0
            for j in range(latents):
                if not row[j] <= 0:
                    found[n], where[n] = row[j], j
                    n += 1
        kept = 0
        if n <= k:
            values[r, :n] = found[:n]
            index[r, :n] = where[:n]
            kept = n
            for j in range(latents):
                if kept == k:
                    break
                if row[j] <= 0:
                    values[r, kept], index[r, kept] = 0, j
                    kept += 1
        else:
            least = np.partition(found[:n], n - k)[n - k]
            ties = k
            for i in range(n):
                if not found[i] <= least:
                    ties -= 1
            for i in range(n):
                tie = found[i] == least
                if kept < k and ((tie and ties > 0) or not found[i] <= least):
                    values[r, kept], index[r, kept] = found[i], where[i]
                    kept += 1
                    ties -= tie


@numba.njit(nogil=True, cache=True)
def _by_latent(values, index, latents):  # type: ignore[no-untyped-def]
    rows, k = values.shape
    starts = np.zeros(latents + 1, np.int64)
    for r in range(rows):
        for j in range(k):
            if values[r, j] != 0:
                starts[index[r, j] + 1] += 1
    starts = np.cumsum(starts)
    free = starts[:-1].copy()
    order = np.empty(starts[-1], np.int64)
    for r in range(rows):
        for j in range(k):
            if values[r, j] != 0:
                latent = index[r, j]
                order[free[latent]] = r * k + j
                free[latent] += 1
    return starts, order


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _latent_gradients(  # type: ignore[no-untyped-def]
    first, last, starts, order, grad, x, values, decoder, d_values, d_weight, d_bias, d_decoder
):
    k = values.shape[1]
    for latent in range(first, last):
        d_weight[latent], d_bias[latent], d_decoder[latent] = 0, 0, 0
        ours, of_ours, of_weight = decoder[latent], d_decoder[latent], d_weight[latent]
        for i in order[starts[latent] : starts[latent + 1]]:
            r, j = i // k, i % k
            g, features, value = grad[r], x[r], values[r, j]
            slope = value * 0
            for c in range(len(g)):
                slope += g[c] * ours[c]
                of_ours[c] += value * g[c]
            for c in range(len(features)):
                of_weight[c] += slope * features[c]
            d_bias[latent] += slope
            d_values[r, j] = slope
