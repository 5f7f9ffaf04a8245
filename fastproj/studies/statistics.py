"""What numbers of several runs allow one to say. Every function takes numbers, paired by seed.

Scores and gains are in one unit, points (hundredths of accuracy) where a sentence says so. Nothing
here knows of runs or files.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 2000  # of the bootstrap over images


class Gain(NamedTuple):
    """A mean of paired differences: an array of one entry per comparison, or a number each.

    ``low`` and ``high``: the t interval. ``p``: of the paired t test, two-sided. They are NaN where
    n is 1, and where all differences are equal, so that nothing is known about their spread.
    """

    n: int
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p: NDArray[np.float64]


def paired_gain(treated: ArrayLike, baseline: ArrayLike) -> Gain:
    """Mean difference of ``treated`` and ``baseline``, both (..., n), one entry per seed.

    The interval covers 95 %, from Student's t with n - 1 degrees of freedom.
    """
    treated, baseline = np.broadcast_arrays(np.asarray(treated, float), np.asarray(baseline, float))
    difference = treated - baseline
    n, mean = difference.shape[-1], difference.mean(-1)
    # Differences of equal numbers differ by a rounding; a spread of that size is no spread.
    equal = np.ptp(difference, axis=-1) <= 1e-12 * np.abs(treated).max(-1)
    unknown = np.full_like(mean, math.nan)
    if n < 2:
        return Gain(n, mean, unknown, unknown, unknown, unknown)
    std = np.where(equal, 0.0, difference.std(-1, ddof=1))
    error = np.where(equal, math.nan, std / math.sqrt(n))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * error
    p = 2 * stats.t.sf(np.abs(mean) / error, n - 1)
    return Gain(n, mean, std, mean - half, mean + half, p)


def pooled_std(groups: Sequence[ArrayLike]) -> float:
    """Standard deviation within groups, pooled by degrees of freedom; NaN if all have one entry."""
    arrays = [np.asarray(group, float) for group in groups]
    freedom = sum(len(a) - 1 for a in arrays)
    squares = sum(float(((a - a.mean()) ** 2).sum()) for a in arrays)
    return math.sqrt(squares / freedom) if freedom else math.nan


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """P values (..., m) of one family, adjusted by Holm's step-down [Holm 1979].

    The i-th smallest of m becomes max over j <= i of (m - j + 1) p_j, at most 1. NaN stays NaN and
    does not count.
    """
    p = np.asarray(p, float)
    m = (~np.isnan(p)).sum(-1, keepdims=True)
    order = np.argsort(p, axis=-1)  # NaN last
    ordered = np.take_along_axis(p, order, -1)
    factors = np.maximum(m - np.arange(p.shape[-1]), 1)
    stepped = np.minimum(np.maximum.accumulate(factors * ordered, axis=-1), 1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, stepped, -1)
    return adjusted


def image_interval(differences: ArrayLike, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean of ``differences`` (N,), one entry per val image.

    For two runs on the same images an entry is 1 (only the first is right), 0 or -1; for several
    seeds it is their mean. The interval says what the choice of images alone makes uncertain.
    """
    values = np.asarray(differences, float)
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, batch=50,
        method="percentile", vectorized=True, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def mcnemar(one: ArrayLike, other: ArrayLike) -> float:
    """P value, two-sided and exact, that two runs are right on equally many images [McNemar 1947].

    ``one``, ``other``: bool (N,), whether each run is right on the same N images. Only images on
    which one of the two is right count: under the hypothesis each falls to either with chance 1/2.
    """
    one, other = np.asarray(one, bool), np.asarray(other, bool)
    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    if only_one + only_other == 0:
        return 1.0
    return float(stats.binomtest(only_one, only_one + only_other).pvalue)


def paired_permutation(treated: ArrayLike, baseline: ArrayLike, seed: int = 0) -> float:
    """P value, two-sided, that exchanging the two scores of a pair changes nothing; both (n,).

    Assumes no distribution, unlike the t test. Exact to n = 13 pairs, which have fewer than 9,999
    ways to exchange them; beyond that as many are drawn. Five pairs cannot give less than 0.0625.
    """
    pairs = np.asarray(treated, float), np.asarray(baseline, float)
    found = stats.permutation_test(
        pairs, lambda a, b, axis: (a - b).mean(axis), permutation_type="samples", batch=50,
        n_resamples=9999, vectorized=True, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)


def power(gain: float, std: float, n: int) -> float:
    """Chance that n pairs show a true mean difference ``gain``, two-sided at 5 %, std of pairs."""
    bound = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    shift = abs(gain) / std * math.sqrt(n)
    return float(stats.nct.sf(bound, n - 1, shift) + stats.nct.cdf(-bound, n - 1, shift))


def seeds_needed(gain: float, std: float) -> int:
    """Seeds for a power of 80 % to see ``gain`` (not 0), two-sided at 5 %, from the noncentral t.

    ``std`` is that of the paired differences, above 0.
    """
    low, high = 1, 2
    while power(gain, std, high) < POWER:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power(gain, std, middle) < POWER else (low, middle)
    return high


def conclusion(gain: Gain, p_holm: float, published: float | None = None) -> str:
    """One sentence on what paired differences in points allow one to say.

    ``p_holm``: the p value, adjusted for the other arms of the table. ``published``: the gain that
    others found.
    """
    n, mean, low, high = gain.n, float(gain.mean), float(gain.low), float(gain.high)
    if n < 2:
        return f"{mean:+.2f} points with one seed, which has no interval: nothing can be concluded"
    if math.isnan(low):
        return f"all {n} differences are {mean:+.2f} points, so that their spread is not known"
    interval = f"{mean:+.2f} points ({low:+.2f} to {high:+.2f}, n = {n})"
    if low > 0 or high < 0:
        kind = "a gain" if low > 0 else "a loss"
        text = f"{kind} of {interval}"
        if not p_holm < 1 - CONFIDENCE:
            text = f"perhaps {text}: not significant after Holm's correction (p = {p_holm:.2g})"
    else:
        text = f"no gain larger than {high:.2f} and no loss larger than {-low:.2f} points (n = {n})"
    if published is None:
        return text
    if not low <= published <= high:
        return f"{text}; the published {published:+.2f} lies outside the interval"
    needed = seeds_needed(published, float(gain.std)) if published else math.inf
    if n < needed and low <= 0 <= high:
        return (
            f"{text}; the published {published:+.2f} could not be seen with n = {n}, it needs "
            f"about {needed} seeds"
        )
    return f"{text}; the published {published:+.2f} lies within the interval"
