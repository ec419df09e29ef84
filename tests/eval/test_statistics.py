"""Statistics against scipy, by hand, and by simulation."""

import math

import numpy as np
import pytest
import scipy.stats

from nanophi.eval import statistics


def test_mcnemar_is_the_binomial_test_of_the_discordant_items():
    rng = np.random.default_rng(3)
    a, b = (rng.random(300) < 0.5).astype(float), (rng.random(300) < 0.4).astype(float)
    found = statistics.mcnemar(a, b)
    gained, lost = int((a > b).sum()), int((a < b).sum())
    assert (found["gained"], found["lost"]) == (gained, lost)
    assert found["p_value"] == pytest.approx(scipy.stats.binomtest(gained, gained + lost, 0.5).pvalue)
    assert statistics.mcnemar(a, a)["p_value"] == 1


def test_bootstrap_of_means_and_ratios():
    rng = np.random.default_rng(4)
    values = rng.normal(0.3, 2.0, 500)
    for sample in (values, np.sign(values)):
        draws = statistics.bootstrap(sample, None, np.random.default_rng(0))
        assert draws.mean() == pytest.approx(sample.mean(), abs=0.01)
        assert draws.std() == pytest.approx(sample.std() / math.sqrt(len(sample)), rel=0.03)
    low, high = statistics.interval(statistics.estimate(values, None, rng))
    assert low < values.mean() < high
    assert [low, high] == pytest.approx(
        scipy.stats.t.interval(0.95, 499, values.mean(), scipy.stats.sem(values)), rel=0.1
    )
    sizes = rng.integers(100, 1000, 100).astype(float)
    differences = sizes * rng.normal(0, 0.1, 100)
    draws = statistics.bootstrap(differences, sizes, np.random.default_rng(0))
    assert draws.mean() == pytest.approx(differences.sum() / sizes.sum(), abs=3e-3)
    # The ratio estimator's standard error by the delta method.
    ratio = differences.sum() / sizes.sum()
    expected = np.sqrt(np.square(differences - ratio * sizes).sum()) / sizes.sum()
    assert draws.std() == pytest.approx(expected, rel=0.1)


def test_for_items_of_equal_size_student_is_the_paired_t_test():
    differences = np.random.default_rng(5).normal(0.1, 1, 100)
    expected = scipy.stats.ttest_1samp(differences, 0).pvalue

    def p_value(differences, sizes):
        return statistics.student(*statistics.jackknife(differences, sizes))

    assert p_value(differences, np.full(100, 500.0)) == p_value(differences, None) == pytest.approx(expected)
    assert p_value(np.zeros(5), np.ones(5)) == 1
    assert p_value(np.ones(1), np.ones(1)) == 1


def test_the_mean_of_two_parts_is_tested_as_by_welch():
    rng = np.random.default_rng(7)
    one, two = rng.normal(0.4, 1, 7), rng.normal(0.5, 3, 12)
    found = statistics.mean_estimate([statistics.estimate(part, None, rng) for part in (one, two)], rng)
    welch = scipy.stats.ttest_ind(one, -two, equal_var=False)
    assert found.value == pytest.approx((one.mean() + two.mean()) / 2) and found.items == 19
    assert found.freedom == pytest.approx(welch.df)
    assert statistics.student(found.value, found.stderr, found.freedom) == pytest.approx(welch.pvalue)
    assert found.draws.mean() == pytest.approx(found.value, abs=0.03)
    assert found.draws.std() == pytest.approx(found.stderr, rel=0.03), "also the interval's width"
    # Bits per byte, of texts of equal size: the same.
    ratios = [statistics.estimate(part, np.full(len(part), 3.0), rng) for part in (3 * one, 3 * two)]
    assert statistics.mean_estimate(ratios, rng)[:4] == pytest.approx(found[:4])


def test_parts_of_one_item_are_items_themselves():
    rng = np.random.default_rng(8)
    values = rng.normal(0.3, 1, 30)
    found = statistics.mean_estimate([statistics.estimate(values[i : i + 1], None, rng) for i in range(30)], rng)
    expected = scipy.stats.ttest_1samp(values, 0)
    assert statistics.student(found.value, found.stderr, found.freedom) == pytest.approx(expected.pvalue)
    assert found.draws.std() == pytest.approx(scipy.stats.sem(values), rel=0.03)
    assert (found.freedom, found.items) == (29, 30)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert statistics.holm([]) == []


@pytest.mark.parametrize(("tests", "items"), [(1, 200), (5, 200), (1, 6)])
def test_the_minimum_detectable_effect_is_detected_four_times_in_five(tests, items):
    """By simulation: a true effect of that size passes the hardest of Holm's steps in 80 % of experiments."""
    rng = np.random.default_rng(6)
    effect = statistics.minimum_detectable_effect(1 / math.sqrt(items), tests=tests, freedom=items - 1)
    samples = rng.normal(effect, 1, (4000, items))
    p_values = scipy.stats.ttest_1samp(samples, 0, axis=1).pvalue
    detected = (p_values < statistics.SIGNIFICANCE / tests).mean()
    assert detected == pytest.approx(statistics.POWER, abs=0.02 if items > 6 else 0.05)


@pytest.mark.parametrize("tests", [1, 2, 7, 30])
def test_fewest_items_that_mcnemar_can_tell(tests):
    count = statistics.fewest_discordant(tests)
    p_values = [statistics.mcnemar(np.ones(n), np.zeros(n))["p_value"] for n in (count - 1, count)]
    assert p_values[1] < statistics.SIGNIFICANCE / tests <= p_values[0]


COVERED = {
    "normal": (lambda rng, n: (rng.normal(0.3, 1, n), None), 0.3),
    "texts of unequal size": (lambda rng, n: ratio(rng, np.ceil(rng.lognormal(6, 1, n))), 0.3),
    "many answers changed": (lambda rng, n: (rng.choice([1.0, 0, -1], n, p=[0.4, 0.4, 0.2]), None), 0.2),
    "few answers changed": (lambda rng, n: (rng.choice([1.0, 0, -1], n, p=[0.06, 0.9, 0.04]), None), 0.02),
}


def ratio(rng, sizes):
    return sizes * rng.normal(0.3, 1, len(sizes)), sizes


@pytest.mark.parametrize("kind", COVERED)
@pytest.mark.parametrize("items", [3, 8, 20, 80])
def test_intervals_cover_what_they_claim(items, kind, monkeypatch):
    """By simulation: 95 % of the 95 % intervals hold the true difference, also of few items; none has no width."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    rng = np.random.default_rng(items)
    make, truth = COVERED[kind]
    covered = 0
    for _ in range(600):
        differences, sizes = make(rng, items)
        found = statistics.estimate(differences, sizes, rng)
        shares = "answers" in kind and np.count_nonzero(differences) < statistics.FEW_CHANGED
        known = found._replace(freedom=math.inf)
        low, high = statistics.interval_of_shares(known) if shares else statistics.interval(found)
        assert low < high
        covered += low <= truth <= high
    assert covered / 600 > 0.925  # 2.8 standard errors of 600 intervals below 95 %


def test_the_interval_of_shares_is_bonett_and_prices():
    """Their formula, with one item more gained and one more lost."""
    differences = np.array([1.0] * 5 + [-1.0] * 2 + [0.0] * 13)
    found = statistics.estimate(differences, None, np.random.default_rng(0))._replace(freedom=math.inf)
    gained, lost = 6 / 22, 3 / 22
    half = 1.96 * math.sqrt((gained + lost - (gained - lost) ** 2) / 22)
    expected = [gained - lost - half, gained - lost + half]
    assert statistics.interval_of_shares(found) == pytest.approx(expected, abs=0.01)
