"""What ``sparse`` computes on a CPU, in numba: imported when first called, so a GPU needs no numba.

The functions take arrays, and parts of rows or latents, so that threads share the work.
"""

import numba
import numpy as np

Array = np.ndarray

STRIDE = 32  # every 32nd latent is sampled to guess the k-th largest; 16 to 64 are equally fast


@numba.njit(nogil=True, cache=True)
def _above(row: Array, floor: float, found: Array, where: Array) -> int:
    n = 0
    for j in range(len(row)):
        if not row[j] <= floor:  # includes NaN, so that a diverged run is noticed
            found[n], where[n] = row[j], j
            n += 1
    return n


@numba.njit(nogil=True, cache=True)
def select_rows(first: int, last: int, activations: Array, values: Array, index: Array) -> None:
    latents, k = activations.shape[1], values.shape[1]
    found = np.empty(latents, activations.dtype)
    where = np.empty(latents, np.int64)
    for r in range(first, last):
        row = activations[r]
        # Guess the k-th largest, slightly too low, from a sample: few latents exceed it.
        sample = row[::STRIDE].copy()
        wanted = k / STRIDE
        rank = len(sample) - min(int(wanted + 3 * np.sqrt(wanted)) + 2, len(sample))
        guess = np.partition(sample, rank)[rank]
        n = _above(row, guess, found, where) if guess > 0 else 0
        if n < k:
            n = _above(row, 0, found, where)
        kept = 0
        if n > k:
            least = np.partition(found[:n], n - k)[n - k]
            ties = k  # becomes the number of latents equal to the least that are kept
            for i in range(n):
                ties -= not found[i] <= least
            for i in range(n):
                tie = found[i] == least
                if kept < k and (not found[i] <= least or (tie and ties > 0)):
                    values[r, kept], index[r, kept] = found[i], where[i]
                    kept += 1
                    ties -= tie
        else:
            values[r, :n], index[r, :n] = found[:n], where[:n]
            kept = n
            for j in range(latents):
                if kept < k and row[j] <= 0:
                    values[r, kept], index[r, kept] = 0, j
                    kept += 1


@numba.njit(nogil=True, cache=True)
def by_latent(values: Array, index: Array, latents: int) -> tuple[Array, Array]:
    """Where each latent's entries start, and the flat positions of nonzero values by latent."""
    flat, latent = values.ravel(), index.ravel()
    starts = np.zeros(latents + 1, np.int64)
    for i in range(len(flat)):
        if flat[i] != 0:
            starts[latent[i] + 1] += 1
    starts = np.cumsum(starts)
    free = starts[:-1].copy()
    order = np.empty(starts[-1], np.int64)
    for i in range(len(flat)):
        if flat[i] != 0:
            order[free[latent[i]]] = i
            free[latent[i]] += 1
    return starts, order


# Sums may be reordered; otherwise they are not vectorized.
@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def latent_gradients(
    first: int, last: int, starts: Array, order: Array, grad: Array, x: Array, values: Array,
    decoder: Array, d_values: Array, d_weight: Array, d_bias: Array, d_decoder: Array,
) -> None:  # fmt: skip
    k = values.shape[1]
    for latent in range(first, last):
        d_weight[latent], d_bias[latent], d_decoder[latent] = 0, 0, 0
        weights, of_weights, of_weight = decoder[latent], d_decoder[latent], d_weight[latent]
        for i in order[starts[latent] : starts[latent + 1]]:
            r, j = i // k, i % k
            g, features, value = grad[r], x[r], values[r, j]
            slope = value * 0  # d loss / d value; starts as 0 of its dtype
            for c in range(len(g)):
                slope += g[c] * weights[c]
                of_weights[c] += value * g[c]
            for c in range(len(features)):
                of_weight[c] += slope * features[c]
            d_bias[latent] += slope
            d_values[r, j] = slope
