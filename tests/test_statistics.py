"""Intervals cover what they promise, tests agree with closed forms, and edges are defined."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness import statistics

counts = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
times = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12)


@given(counts)
def test_wilson_is_the_closed_form(pair):
    successes, n = pair
    z, share = stats.norm.ppf(0.975), successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = statistics.wilson_interval(successes, n)
    assert (low, high) == pytest.approx((center - reach, center + reach), abs=1e-12)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1


@given(counts)
def test_wilson_is_symmetric_in_right_and_wrong(pair):
    successes, n = pair
    low, high = statistics.wilson_interval(successes, n)
    mirrored = statistics.wilson_interval(n - successes, n)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.97])
def test_wilson_covers_in_simulation(share):
    n = 400
    drawn = np.random.default_rng(1).binomial(n, share, size=2000)
    ends = {s: statistics.wilson_interval(s, n) for s in set(drawn.tolist())}
    covered = np.mean([ends[s][0] <= share <= ends[s][1] for s in drawn])
    assert 0.93 <= covered <= 0.97


def test_wilson_has_the_widths_the_anchors_state():
    for n, points in ((50_000, 0.35), (10_000, 0.78), (1_000, 2.5)):
        low, high = statistics.wilson_interval(round(0.8 * n), n)
        assert 50 * (high - low) == pytest.approx(points, rel=0.02)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (5, 4), (-1, 4)])
def test_wilson_refuses_what_is_no_fraction(successes, n):
    with pytest.raises(ValueError, match="not a fraction"):
        statistics.wilson_interval(successes, n)


def bits(only_a: int, only_b: int, both: int = 30, neither: int = 10):
    """Right/wrong bits of two models with the given table."""
    a = [1] * only_a + [0] * only_b + [1] * both + [0] * neither
    b = [0] * only_a + [1] * only_b + [1] * both + [0] * neither
    return a, b


@given(st.integers(0, 25), st.integers(0, 25))
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    test = statistics.mcnemar(*bits(only_a, only_b))
    m = only_a + only_b
    tail = sum(math.comb(m, k) for k in range(min(only_a, only_b) + 1)) / 2**m
    assert test.p_value == pytest.approx(min(1.0, 2 * tail))
    assert (test.n, test.only_a, test.only_b) == (40 + m, only_a, only_b)
    assert test.difference == (only_a - only_b) / (40 + m)
    assert test.odds == (only_a / only_b if only_b else None)


@given(st.integers(0, 25), st.integers(0, 25))
def test_mcnemar_changes_sign_when_models_change_places(only_a, only_b):
    a, b = bits(only_a, only_b)
    there, back = statistics.mcnemar(a, b), statistics.mcnemar(b, a)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.difference == -back.difference
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]))


def test_mcnemar_interval_covers_in_simulation():
    chances = [0.06, 0.03, 0.7, 0.21]  # only a, only b, both, neither
    generator, hits = np.random.default_rng(2), 0
    for only_a, only_b, both, neither in generator.multinomial(300, chances, size=600):
        low, high = statistics.mcnemar(*bits(only_a, only_b, both, neither)).interval
        hits += low <= 0.03 <= high
    assert 0.92 <= hits / 600 <= 0.98


def test_mcnemar_of_a_model_with_itself_finds_nothing():
    test = statistics.mcnemar([1, 0, 1, 1], [1, 0, 1, 1])
    assert (test.p_value, test.difference, test.odds) == (1.0, 0.0, None)
    assert test.interval[0] < 0 < test.interval[1]


@pytest.mark.parametrize(("a", "b"), [([], []), ([1, 0], [1]), ([[1]], [[0]])])
def test_mcnemar_refuses_bits_that_do_not_pair(a, b):
    with pytest.raises(ValueError, match="equally long"):
        statistics.mcnemar(a, b)


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = np.random.default_rng(3).normal(10, 2, 200)
    low, high = statistics.bootstrap_interval(values, np.mean, resamples=4000)
    reach = 1.96 * values.std() / math.sqrt(200)
    assert low == pytest.approx(values.mean() - reach, abs=0.05)
    assert high == pytest.approx(values.mean() + reach, abs=0.05)


def test_bootstrap_of_the_median_covers_in_simulation():
    generator = np.random.default_rng(4)
    covered = 0
    for repeat in range(300):
        values = generator.exponential(size=25)
        low, high = statistics.bootstrap_interval(values, resamples=400, seed=repeat)
        covered += low <= math.log(2) <= high
    assert 0.90 <= covered / 300 <= 0.99


def test_bootstrap_draws_whole_rounds():
    """Ten samples of a round that say the same are one piece of evidence, not ten."""
    rounds = np.random.default_rng(5).normal(1, 0.1, size=(12, 1))
    once = statistics.bootstrap_interval(rounds[:, 0])
    tenfold = statistics.bootstrap_interval(np.repeat(rounds, 10, axis=1))
    as_if_independent = statistics.bootstrap_interval(np.repeat(rounds, 10))
    assert once == tenfold
    assert np.ptp(as_if_independent) < 0.6 * np.ptp(once)


@given(times, st.floats(0.01, 100))
@settings(max_examples=40)
def test_bootstrap_scales_with_its_values_and_repeats(values, factor):
    interval = statistics.bootstrap_interval(values, resamples=100)
    assert interval == statistics.bootstrap_interval(values, resamples=100)
    assert min(values) <= interval[0] <= interval[1] <= max(values)
    scaled = statistics.bootstrap_interval(np.multiply(values, factor), resamples=100)
    assert scaled == pytest.approx(np.multiply(interval, factor))


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf], 3.0])
def test_bootstrap_refuses_what_has_no_spread(values):
    with pytest.raises(ValueError, match=r"rounds: (at least 2|all must be finite)"):
        statistics.bootstrap_interval(values)


def test_paired_ratio_cancels_a_slow_machine():
    """A machine that slows down fourfold in the middle changes both sides of each pair."""
    generator = np.random.default_rng(6)
    load = np.where(np.arange(20) < 10, 1.0, 4.0)[:, None]
    a = 3.0 * load * generator.normal(1, 0.01, (20, 10))
    b = 2.0 * load * generator.normal(1, 0.01, (20, 10))
    estimate = statistics.paired_ratio(a, b)
    assert estimate.value == pytest.approx(1.5, rel=0.01)
    assert estimate.interval[0] <= 1.5 <= estimate.interval[1]
    assert estimate.half_width < 0.01 and estimate.n == 20
    assert statistics.median_estimate(a).half_width > 0.3


@given(times)
@settings(max_examples=30)
def test_paired_ratio_of_a_thing_with_itself_is_one(values):
    estimate = statistics.paired_ratio(values, values, resamples=50)
    assert (estimate.value, estimate.interval, estimate.half_width) == (1.0, (1.0, 1.0), 0.0)


def test_paired_ratio_refuses_what_does_not_pair():
    with pytest.raises(ValueError, match="equal shapes"):
        statistics.paired_ratio([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="positive"):
        statistics.paired_ratio([1, 2], [0, 2])


def test_mann_whitney_sees_a_shift_and_no_shift():
    values = np.random.default_rng(7).normal(size=(2, 60))
    assert statistics.mann_whitney(values[0], values[1]) > 0.05
    assert statistics.mann_whitney(values[0], values[1] + 2) < 1e-6


def test_mean_std_over_three_seeds_is_the_textbook_t_interval():
    summary = statistics.mean_std([80.0, 81.0, 82.0])
    assert (summary.mean, summary.std, summary.n) == (81.0, 1.0, 3)
    reach = 4.302652729911275 / math.sqrt(3)  # t quantile with 2 degrees of freedom
    assert summary.interval == pytest.approx((81 - reach, 81 + reach))


def test_one_seed_has_a_mean_and_no_spread():
    assert statistics.mean_std([80.0]) == statistics.SeedSummary(80.0, None, None, 1)
    with pytest.raises(ValueError, match="at least 1"):
        statistics.mean_std([])


def test_paired_seeds_see_what_unpaired_seeds_hide():
    a, b = np.array([70.0, 75.0, 80.0]), np.array([69.0, 74.1, 78.9])
    paired = statistics.paired_means(a, b)
    assert paired.difference == pytest.approx(1.0)
    assert paired.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert paired.p_value < 0.01 < stats.ttest_ind(a, b).pvalue
    assert paired.interval[0] > 0
    assert statistics.paired_means(b, a).interval[1] < 0


def test_paired_seeds_with_equal_differences_are_decided():
    assert statistics.paired_means([1, 2, 3], [1, 2, 3]).p_value == 1.0
    assert statistics.paired_means([2, 3, 4], [1, 2, 3]).p_value == 0.0
    with pytest.raises(ValueError, match="at least 2"):
        statistics.paired_means([1], [2])
    with pytest.raises(ValueError, match="equal lengths"):
        statistics.paired_means([1, 2], [1, 2, 3])


def test_many_comparisons_are_corrected():
    p_values = [0.01, 0.02, 0.03, 0.5]
    assert statistics.adjust_p_values(p_values) == pytest.approx([0.04, 0.04, 0.04, 0.5])
    assert len(statistics.adjust_p_values([])) == 0


points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(points)
def test_front_is_what_the_definition_says(models):
    """Cost to the left, gain up, against the definition written as two loops."""
    front = statistics.pareto_front(models, (False, True))
    for mine, on_front in zip(models, front, strict=True):
        beaten = any(
            o[0] <= mine[0] and o[1] >= mine[1] and (o[0] < mine[0] or o[1] > mine[1])
            for o in models
        )
        assert on_front == (not beaten)
    assert front.any()


def test_front_works_on_stacks_and_names_its_axes():
    stack = np.random.default_rng(8).integers(0, 4, size=(3, 2, 6, 3))
    whole = statistics.pareto_front(stack, (True, False, False))
    for i, j in itertools.product(range(3), range(2)):
        alone = statistics.pareto_front(stack[i, j], (True, False, False))
        assert (whole[i, j] == alone).all()
    with pytest.raises(ValueError, match="do not have 2 axes"):
        statistics.pareto_front(stack, (True, False))


def exact(values):
    return np.stack([values, values], axis=-1)


def test_front_probability_without_doubt_is_the_front():
    values = np.array([[1.0, 70], [2, 80], [3, 75], [1, 70]])
    found = statistics.front_probability(values, exact(values), (False, True))
    assert found.tolist() == [1, 1, 0, 1]


def test_front_probability_of_a_tie_is_a_half():
    """Same cost, same accuracy with the same interval: each leads in half of the draws."""
    values = np.array([[1.0, 80], [1, 80], [1, 60]])
    intervals = exact(values)
    intervals[:, 1] = [[79, 81], [79, 81], [59, 61]]
    found = statistics.front_probability(values, intervals, (False, True), resamples=4000)
    assert found[:2] == pytest.approx([0.5, 0.5], abs=0.03)
    assert found[0] + found[1] == pytest.approx(1) and found[2] == 0


def test_front_probability_knows_the_size_of_an_interval():
    """Two standard errors apart: b leads with the chance of a normal variable above sqrt 2."""
    values = np.array([[1.0, 80], [1, 82]])
    intervals = exact(values)
    intervals[:, 1] = values[:, 1, None] + 1.96 * np.array([-1.0, 1.0])
    found = statistics.front_probability(values, intervals, (False, True), resamples=20_000)
    assert found[1] == pytest.approx(stats.norm.cdf(math.sqrt(2)), abs=0.01)


def test_front_probability_refuses_broken_intervals():
    values = np.array([[1.0, 80.0]])
    with pytest.raises(ValueError, match="below its start"):
        statistics.front_probability(values, [[[1, 1], [81, 79]]], (False, True))
    with pytest.raises(ValueError, match="do not fit"):
        statistics.front_probability(values, [[1, 1]], (False, True))
    with pytest.raises(ValueError, match="finite"):
        statistics.front_probability(values, [[[1, 1], [79, math.nan]]], (False, True))
