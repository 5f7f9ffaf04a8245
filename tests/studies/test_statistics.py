"""Statistics of studies against textbook cases, hand-made numbers, scipy, and simulated studies."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from fastproj.studies.statistics import (
    Gain,
    conclusion,
    holm,
    image_interval,
    mcnemar,
    paired_gain,
    paired_permutation,
    pooled_std,
    power,
    seeds_needed,
)

# Hours of sleep gained with two drugs, ten patients [Student 1908], and what R's t.test says of it.
SLEEP = (
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
)


def test_students_own_data_has_the_published_interval() -> None:
    gain = paired_gain(*SLEEP)
    assert gain.n == 10
    assert gain.mean == pytest.approx(-1.58)
    assert (gain.low, gain.high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-7)
    assert gain.p == pytest.approx(0.002833, abs=1e-6)


def test_three_pairs_by_hand() -> None:
    """Differences 1, 3, 2: mean 2, standard deviation 1, t(0.975, 2) = 4.302653."""
    gain = paired_gain([11, 23, 32], [10, 20, 30])
    assert (gain.mean, gain.std) == pytest.approx((2, 1))
    half = 4.302653 / math.sqrt(3)
    assert (gain.low, gain.high) == pytest.approx((2 - half, 2 + half), abs=1e-6)
    # With 2 degrees of freedom: p = 1 - t / sqrt(2 + t^2), t = 2 sqrt(3).
    assert gain.p == pytest.approx(1 - math.sqrt(12 / 14))


def test_many_comparisons_at_once_are_each_alone() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 3, 6)), rng.normal(size=(3, 6))
    together = paired_gain(a, b)
    for i, j in itertools.product(range(4), range(3)):
        theirs = stats.ttest_rel(a[i, j], b[j])
        interval = theirs.confidence_interval(0.95)
        assert together.p[i, j] == pytest.approx(theirs.pvalue)
        assert (together.low[i, j], together.high[i, j]) == pytest.approx(tuple(interval))


@pytest.mark.parametrize("pairs", [([0.5], [0.4]), ([0.7, 0.5], [0.5, 0.3])])
def test_where_no_spread_is_known_there_is_no_interval(pairs: tuple[list[float], ...]) -> None:
    gain = paired_gain(*pairs)
    assert all(map(math.isnan, (gain.low, gain.high, gain.p)))
    assert gain.mean == pytest.approx(pairs[0][0] - pairs[1][0])


def test_the_pooled_standard_deviation_weighs_by_freedom() -> None:
    # Squares 2 (1 degree of freedom) and 8 (2), one group of one entry.
    assert pooled_std([[1, 3], [0, 2, 4], [7]]) == pytest.approx(math.sqrt(10 / 3))
    assert math.isnan(pooled_std([[1], [2]]))


def test_holm_by_hand() -> None:
    # Sorted .005, .01, .03, .04: times 4, 3, 2, 1 is .02, .03, .06, .04; the last is raised to .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == pytest.approx([1, 1])
    found = holm([[0.01, math.nan, 0.02], [0.02, 0.01, 0.03]])
    assert found[0, [0, 2]] == pytest.approx([0.02, 0.02]) and math.isnan(found[0, 1])
    assert found[1] == pytest.approx([0.04, 0.03, 0.04])
    assert len(holm([])) == 0


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    """Adjusted p of i: the largest, over all sets of hypotheses with i, of their Bonferroni p."""
    rng = np.random.default_rng(2)
    sets = [s for n in range(1, 6) for s in itertools.combinations(range(5), n)]
    for p in rng.random((20, 5)) ** 3:
        bonferroni = {s: min(1, len(s) * p[list(s)].min()) for s in sets}
        expected = [max(bonferroni[s] for s in sets if i in s) for i in range(5)]
        assert holm(p) == pytest.approx(expected)


@pytest.mark.slow
def test_the_bootstrap_of_images_covers_the_true_difference() -> None:
    """400 pairs of runs on 300 images each, the second 3 points better."""
    rng = np.random.default_rng(3)
    chance = rng.random((400, 300, 1))  # an image that is hard is hard for both
    right = chance < np.array([0.80, 0.83])
    covered = 0
    for seed, (one, other) in enumerate(right.transpose(0, 2, 1).astype(float)):
        low, high = image_interval(other - one, seed)
        covered += low <= 0.03 <= high
    assert covered / 400 == pytest.approx(0.95, abs=0.045)


def test_the_bootstrap_of_images_is_near_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(4000) < 0.8, rng.random(4000) < 0.78
    difference = a.astype(float) - b
    half = 1.959964 * difference.std() / math.sqrt(4000)
    low, high = image_interval(difference)
    assert (low, high) == pytest.approx(
        (difference.mean() - half, difference.mean() + half), abs=0.1 * half
    )
    assert image_interval(difference) == (low, high)  # seeded
    assert image_interval(np.zeros(50)) == (0, 0)


def test_mcnemar_is_the_binomial_sum() -> None:
    # 1 image on which only the first is right, 8 on which only the second is, 20 on which both are.
    one = [True] * 1 + [False] * 8 + [True] * 20
    other = [False] * 1 + [True] * 8 + [True] * 20
    assert mcnemar(one, other) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar(one, one) == 1


def test_the_permutation_counts_every_exchange_of_signs() -> None:
    differences = np.array([0.3, 0.8, -0.1, 0.5, 0.9, 0.2])
    means = [np.mean(differences * s) for s in itertools.product([1, -1], repeat=6)]
    extreme = np.mean([abs(m) >= abs(differences.mean()) - 1e-12 for m in means])
    found = paired_permutation(differences, np.zeros(6))
    assert found == pytest.approx(extreme)
    assert paired_permutation([1, 2, 3, 4, 5.5], [0, 0, 0, 0, 0]) == pytest.approx(2 / 2**5)


@pytest.mark.parametrize(("gain", "seeds"), [(0.26, 86), (0.69, 14), (1.03, 8), (-0.26, 86)])
def test_seeds_needed_for_the_papers_gains(gain: float, seeds: int) -> None:
    assert seeds_needed(gain, 0.85) == seeds
    assert power(gain, 0.85, seeds) >= 0.8 > power(gain, 0.85, seeds - 1)


def test_power_is_the_share_of_simulated_studies_that_see_the_gain() -> None:
    rng = np.random.default_rng(0)
    gain = paired_gain(rng.normal(0.69, 0.85, (20_000, 9)), 0)
    assert np.mean(gain.p < 0.05) == pytest.approx(power(0.69, 0.85, 9), abs=0.012)


def made(mean: float, std: float, n: int = 8) -> Gain:
    """A gain of exactly this mean and standard deviation."""
    values = np.linspace(-1, 1, n)
    return paired_gain(mean + std * values / values.std(ddof=1), 0)


@pytest.mark.parametrize(
    ("mean", "std", "p", "published", "words"),
    [
        (0.1, 0.84, 1, 0.26, "no gain larger than 0.80 and no loss larger than 0.60 points (n = 8);"
         " the published +0.26 could not be seen with n = 8, it needs about 84 seeds"),
        (0.1, 0.84, 1, 1.03, "no gain larger than 0.80 and no loss larger than 0.60 points (n = 8);"
         " the published +1.03 lies outside the interval"),
        (0.3, 0.4, 1, 0.5, "no gain larger than 0.63 and no loss larger than 0.03 points (n = 8);"
         " the published +0.50 lies within the interval"),
        (1.0, 0.4, 0.001, 1.03, "a gain of +1.00 points (+0.67 to +1.33, n = 8); the published"
         " +1.03 lies within the interval"),
        (-1.0, 0.4, 0.001, None, "a loss of -1.00 points (-1.33 to -0.67, n = 8)"),
        (1.0, 1.0, 0.12, None, "perhaps a gain of +1.00 points (+0.16 to +1.84, n = 8): not"
         " significant after Holm's correction (p = 0.12)"),
    ],
)  # fmt: skip
def test_a_sentence_says_what_the_data_allow(
    mean: float, std: float, p: float, published: float | None, words: str
) -> None:
    assert conclusion(made(mean, std), p, published) == words


def test_a_sentence_claims_nothing_from_one_seed_or_from_equal_differences() -> None:
    assert "nothing can be concluded" in conclusion(paired_gain([2], [1]), math.nan, 0.3)
    assert "spread is not known" in conclusion(paired_gain([2, 3], [1, 2]), math.nan, 0.3)


def test_intervals_cover_and_holm_keeps_the_family_in_simulated_studies() -> None:
    """2,000 studies of 5 arms and a baseline, 8 seeds, paired by a common effect of the seed."""
    rng = np.random.default_rng(1)
    studies, arms, seeds = 2000, 5, 8
    common = rng.normal(0, 1, (studies, 1, seeds))
    baseline = common + rng.normal(0, 0.6, (studies, 1, seeds))
    noise = common + rng.normal(0, 0.6, (studies, arms, seeds))
    gains = np.array([0, 0.26, 0.69, 1.03, -0.5])

    known = paired_gain(noise + gains[:, None], baseline)
    covered = (known.low <= gains) & (gains <= known.high)
    error = math.sqrt(0.95 * 0.05 / studies)
    assert covered.mean(0) == pytest.approx(0.95, abs=4 * error)

    none = paired_gain(noise, baseline)  # no arm has a gain: any claim is false
    assert np.mean(none.p < 0.05) == pytest.approx(0.05, abs=4 * error)
    plain, family = ((p < 0.05).any(1).mean() for p in (none.p, holm(none.p)))
    assert family < 0.05 + 3 * error
    assert plain > 0.12  # what Holm is for

    # Where some arms do gain, no more than 5 % of the studies claim one of the others.
    some = holm(paired_gain(noise + np.array([0, 0, 0, 1.5, 3])[:, None], baseline).p) < 0.05
    assert some[:, :3].any(1).mean() < 0.05 + 3 * error
    assert some[:, 4].mean() > 0.99
