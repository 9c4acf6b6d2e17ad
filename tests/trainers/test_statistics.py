"""Intervals and tests against definitions, hand-computed cases, scipy, and simulated worlds with known truths."""

import json
import math
import tracemalloc
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, t, ttest_1samp

from trainers.statistics import (
    Components,
    _relabellings,
    _squared_error,
    cohens_h,
    compare_crossed,
    crossed_bootstrap,
    crossed_interval,
    crossed_p_values,
    crossed_permutation,
    holm,
    mcnemar,
    mean,
    mean_interval,
    odds_ratio,
    paired_permutation,
    power,
    proportion,
    seeds_needed,
    variance_components,
)


def closed_form(successes: int, total: int, confidence: float) -> tuple[float, float]:
    z = norm.ppf(0.5 + confidence / 2)
    share = successes / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    width = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return centre - width, centre + width


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_matches_the_closed_form_and_holds_the_share(counts, confidence):
    successes, total = counts
    result = proportion(successes, total, confidence)
    low, high = result["interval"]
    assert result["value"] == successes / total
    assert 0 <= low <= result["value"] <= high <= 1
    assert (low, high) == pytest.approx(closed_form(successes, total, confidence), abs=1e-9)


def test_known_value():
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3: 81 of 263.
    assert proportion(81, 263)["interval"] == pytest.approx([0.2553, 0.3662], abs=5e-5)


def test_the_interval_keeps_a_width_at_the_ends():
    assert proportion(0, 20)["interval"] == pytest.approx([0, 0.1611], abs=5e-5)
    assert proportion(20, 20)["interval"] == pytest.approx([0.8389, 1], abs=5e-5)


def test_fields_are_plain_values():
    result = proportion(3, 4, confidence=0.9)
    assert json.loads(json.dumps(result)) == result
    assert list(result) == ["value", "n", "interval", "confidence", "method"]
    assert (result["n"], result["confidence"], result["method"]) == (4, 0.9, "Wilson score")


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ((0, 0), "at least one"),
        ((5, 4), "between 0 and total"),
        ((-1, 4), "between 0"),
        ((1, 2, 1.0), "between 0 and 1"),
    ],
)
def test_impossible_counts_are_refused(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        proportion(*arguments)


def scores(draws: int, seeds: int, examples: int, between_runs: float, between_examples: float, shares=(0.6, 0.6)):
    """Right and wrong answers of two models, `(draws, seeds, examples)` each, with known expected shares.

    A latent normal variable holds an effect of the run, one of the example (half of it common to both models) and
    noise; an answer is right where it is positive.
    """
    random = np.random.default_rng(seeds * examples + draws)
    common = random.normal(size=(draws, 1, examples))
    scale = math.sqrt(1 + between_runs**2 + 2 * between_examples**2)
    tables = []
    for share in shares:
        latent = norm.ppf(share) * scale + random.normal(size=(draws, seeds, examples))
        latent += between_runs * random.normal(size=(draws, seeds, 1))
        latent += between_examples * (common + random.normal(size=(draws, 1, examples)))
        tables.append((latent > 0).astype(float))
    return tables


# Runs that differ, examples that differ, both, and neither; 2,000 draws each.
WORLDS = [(0.0, 1.0), (0.3, 0.0), (0.1, 1.0), (0.0, 0.0)]


@pytest.mark.parametrize(("between_runs", "between_examples"), WORLDS)
def test_crossed_intervals_cover(between_runs, between_examples):
    first, second = scores(2000, 5, 150, between_runs, between_examples)
    for table, truth in ((first - second, 0.0), (first, 0.6)):
        _, low, high = crossed_bootstrap(table, resamples=1000)
        assert 0.93 <= np.mean((low <= truth) & (truth <= high)) <= 0.97


@pytest.mark.parametrize(("between_runs", "between_examples"), WORLDS)
def test_false_positives_are_rare(between_runs, between_examples):
    p_values = crossed_p_values(*scores(2000, 5, 150, between_runs, between_examples), resamples=1000)
    assert np.mean(p_values <= 0.05) <= 0.06
    assert p_values.min() > 0


def test_a_test_of_one_source_of_chance_alone_would_be_too_sure():
    """Why both are looked at: where runs differ, swaps of examples reject half the time instead of once in 20."""
    first, second = scores(300, 5, 150, 0.3, 0.0)
    rejected = [paired_permutation(one, 500)[0] <= 0.05 for one in (first - second).mean(1)]
    assert np.mean(rejected) > 0.3


def test_a_real_difference_is_found():
    p_values = crossed_p_values(*scores(300, 5, 400, 0.0, 1.0, shares=(0.7, 0.6)), resamples=1000)
    assert np.mean(p_values <= 0.05) > 0.9


def test_a_single_seed_leaves_the_chance_of_the_examples():
    table = scores(1, 1, 200, 0.0, 1.0)[0][0]
    result = crossed_interval(table, resamples=20000)
    expected = norm.ppf(0.975) * math.sqrt(table.var(ddof=1) / 200)
    assert result["interval"] == pytest.approx([table.mean() - expected, table.mean() + expected], abs=0.01)
    assert result["method"] == "bootstrap over examples"


def test_crossed_interval_is_reproducible_and_bounded():
    table = scores(1, 5, 40, 0.2, 1.0, shares=(0.97, 0.5))[0][0]
    result = crossed_interval(table, bounds=(0, 1))
    assert result == crossed_interval(table, bounds=(0, 1))
    assert crossed_interval(table)["interval"][1] > 1 == result["interval"][1]
    wide = scores(1, 5, 40, 0.2, 1.0)[0][0]
    assert crossed_interval(wide)["interval"] != crossed_interval(wide, seed=1)["interval"]
    assert json.loads(json.dumps(result)) == result


def test_equal_scores_still_have_an_interval():
    result = crossed_interval(np.zeros((5, 100)), bounds=(-1, 1))
    assert result["value"] == 0
    assert result["interval"] == pytest.approx([-2 * 0.0370, 2 * 0.0370], abs=1e-3)
    alternating = np.indices((2, 30)).sum(0) % 2
    low, high = crossed_interval(alternating, bounds=(0, 1))["interval"]
    assert low < 0.5 < high, "rows that cancel out leave no variance to resample"
    same = compare_crossed(np.ones((5, 20)), np.ones((5, 20)))
    assert (same["p_value"], same["p_value_of"]["examples_only"]) == (1.0, 1.0)


def test_variance_components_by_hand():
    # Searle's estimates of a 2 x 3 table: rows differ by 2, columns are 0, 1, 2 (mean square 2), no rest.
    table = np.array([[0.0, 1, 2], [2, 3, 4]])
    parts = variance_components(table)
    assert parts == pytest.approx((6 / 3, 2 / 2, 0.0))
    assert parts.of_mean(2, 3) == pytest.approx(2 / 2 + 1 / 3)


def test_variance_components_find_what_was_put_in():
    random = np.random.default_rng(0)
    table = random.normal(size=(60, 1)) * 2 + random.normal(size=(1, 2000)) * 3 + random.normal(size=(60, 2000))
    assert variance_components(table) == pytest.approx((4, 9, 1), rel=0.25)


def test_crossed_bootstrap_takes_many_tables_at_once():
    tables = np.stack([scores(1, 5, 30, 0.3, 1.0)[0][0], scores(2, 5, 30, 0.3, 1.0)[0][1]])
    together = np.array(crossed_bootstrap(tables, resamples=200))
    alone = np.array([crossed_bootstrap(table, resamples=200) for table in tables]).T
    np.testing.assert_allclose(together, alone, atol=1e-12)


def test_resampling_in_portions_changes_nothing_but_memory(monkeypatch):
    from trainers import statistics

    first, second = (table[0] for table in scores(1, 5, 50, 0.3, 1.0))
    whole = crossed_permutation(first, second, resamples=300)
    monkeypatch.setattr(statistics, "DRAWN_AT_ONCE", 1000)
    assert crossed_permutation(first, second, resamples=300) == pytest.approx(whole, abs=0.1)
    mean, low, high = crossed_bootstrap(first, resamples=300)
    assert low < mean < high


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=9))
def test_permutation_of_pairs_is_the_count_over_all_swaps(differences):
    swapped = [np.mean(np.multiply(signs, differences)) for signs in product((-1, 1), repeat=len(differences))]
    expected = np.mean(np.abs(swapped) >= abs(np.mean(differences)) - 1e-12)
    p_value, method = paired_permutation(differences)
    assert p_value == pytest.approx(expected)
    assert method == "exact"


def test_permutation_by_drawing_agrees_with_scipy_and_is_never_zero():
    random = np.random.default_rng(3)
    values = random.normal(0.2, 1, size=40)
    p_value, method = paired_permutation(values, resamples=20000)
    assert p_value == pytest.approx(ttest_1samp(values, 0).pvalue, abs=0.02)
    assert method == "Monte Carlo, 20000 draws"
    assert paired_permutation(np.ones(60), resamples=999)[0] == pytest.approx(1 / 1000, abs=1e-3)
    assert paired_permutation(np.ones(60), resamples=999)[0] > 0
    assert paired_permutation([0.0, 0.0])[0] == 1


def test_mean_interval_agrees_with_t_and_covers():
    random = np.random.default_rng(1)
    values = random.normal(5, 2, size=400)
    result = mean_interval(values)
    half = t.ppf(0.975, 399) * values.std(ddof=1) / 20
    assert result["interval"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.03)
    skewed = [mean_interval(random.exponential(size=60), resamples=300)["interval"] for _ in range(400)]
    assert 0.90 <= np.mean([low <= 1 <= high for low, high in skewed]) <= 0.98
    assert mean_interval([2, 2, 2])["interval"] == [2, 2]


def test_mcnemar_is_the_binomial_test():
    # 12 against 3 discordant pairs: 2 * P(X <= 3), X ~ Binomial(15, 1/2) = 2 * 576 / 32768.
    assert mcnemar(12, 3) == pytest.approx(2 * 576 / 32768)
    assert mcnemar(0, 0) == 1


def test_effect_sizes_by_hand():
    assert cohens_h(0.5, 0.25) == pytest.approx(math.pi / 2 - math.pi / 3)
    assert cohens_h(1, 0) == pytest.approx(math.pi)
    assert odds_ratio(3, 4, 1, 4) == pytest.approx(3.5 * 3.5 / (1.5 * 1.5))
    assert odds_ratio(2, 4, 2, 4) == 1
    first, second = np.array([[1, 1, 0, 1.0]]), np.array([[1, 0, 0, 0.0]])
    result = compare_crossed(first, second)
    assert result["difference"]["value"] == 0.5
    assert result["effect"]["discordant"] == {"only_first": 2, "only_second": 0, "of": 4}
    assert result["components"] is None


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04; then made monotone.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_power_is_what_a_simulation_finds():
    parts = Components(seeds=0.0004, examples=0.02, residual=0.1)
    predicted = power(0.05, parts, seeds=6, examples=200)
    random = np.random.default_rng(0)
    tables = 0.05 + random.normal(size=(2000, 6, 200)) * math.sqrt(parts.residual)
    tables += random.normal(size=(2000, 6, 1)) * math.sqrt(parts.seeds)
    tables += random.normal(size=(2000, 1, 200)) * math.sqrt(parts.examples)
    variance, freedom, _ = _squared_error(tables)
    found = 2 * t.sf(np.abs(tables.mean((-1, -2))) / np.sqrt(variance), freedom) <= 0.05
    assert found.mean() == pytest.approx(predicted, abs=0.04)
    assert power(0.0, parts, 6, 200) == pytest.approx(0.05, abs=1e-6)


def test_seeds_needed_is_the_least_number():
    parts = Components(seeds=0.002, examples=0.01, residual=0.1)
    needed = seeds_needed(0.05, parts, examples=1000)
    assert power(0.05, parts, needed, 1000) >= 0.8 > power(0.05, parts, needed - 1, 1000)
    assert seeds_needed(0.01, parts, examples=20) is None, "no number of runs makes up for 20 examples"


def test_a_difference_without_chance_is_always_found():
    still = Components(0, 0, 0)
    assert (power(0.1, still, 5, 10), power(0.0, still, 5, 10)) == (1.0, 0.0)


def test_relabelling_of_many_runs_leaves_as_many_on_each_side():
    labels = _relabellings(8, 4000, np.random.default_rng(0))
    assert labels.shape == (4000, 16)
    assert (labels.sum(axis=1) == 0).all()
    assert set(np.unique(labels)) == {-1, 1}
    # Each run is taken for the first model's half of the time, and two runs together in 7 of 30 cases.
    assert np.abs(labels.mean(axis=0)).max() < 0.06
    assert (labels[:, 0] + labels[:, 9] == 2).mean() == pytest.approx(7 / 30, abs=0.03)


def test_power_where_the_other_tail_is_far_out():
    # scipy 1.17 has no value for the noncentral t distribution's lower tail at some of these.
    parts = Components(seeds=0.0, examples=0.008, residual=0.0168)
    chances = [power(difference, parts, seeds=5, examples=500) for difference in np.linspace(0, 0.08, 81)]
    assert np.isfinite(chances).all()
    assert (np.diff(chances) >= -1e-12).all()
    assert chances[-1] == pytest.approx(1)
    assert seeds_needed(0.05, parts, examples=500) <= 3


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: mean_interval([1.0]), "at least two"),
        (lambda: mean_interval([1.0, math.nan]), "not finite"),
        (lambda: crossed_interval(np.ones(3)), r"expected \(seeds, examples\)"),
        (lambda: crossed_interval(np.ones((2, 3)), confidence=1), "between 0 and 1"),
        (lambda: variance_components(np.ones((1, 3))), "at least 2 seeds"),
        (lambda: compare_crossed(np.ones((2, 3)), np.ones((2, 4))), "need the same"),
        (lambda: compare_crossed(np.full((2, 3), 0.5), np.ones((2, 3))), "0 or 1"),
        (lambda: paired_permutation([]), "at least one"),
        (lambda: mcnemar(-1, 2), "counts"),
        (lambda: cohens_h(1.1, 0), "between 0 and 1"),
        (lambda: odds_ratio(5, 4, 1, 4), "between 0 and total"),
        (lambda: holm([1.2]), "between 0 and 1"),
        (lambda: power(0.1, Components(0, 0, 1), 1, 10), "two of each"),
        (lambda: seeds_needed(0.1, Components(0, 0, 1), 10, chance=1), "strictly between"),
    ],
)
def test_misuse_is_told(call, rule):
    with pytest.raises(ValueError, match=rule):
        call()


def test_mean_with_student_interval():
    values = [1.0, 2.0, 4.0, 9.0]
    found = mean(values, confidence=0.9)
    low, high = ttest_1samp(values, 0).confidence_interval(0.9)
    assert (found["value"], found["n"], found["method"]) == (4.0, 4, "Student's t")
    assert found["interval"] == pytest.approx([low, high])
    assert mean([3.0, 3.0])["interval"] == [3.0, 3.0]
    for wrong in ([1.0], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="at least two numbers"):
            mean(wrong)
    with pytest.raises(ValueError, match="confidence is 1"):
        mean(values, confidence=1)


def test_an_interval_of_many_scores_needs_little_memory():
    """The jackknife of so many values would be a matrix of 0.8 GB."""
    values = np.random.default_rng(0).random(10_000)
    tracemalloc.start()
    found = mean_interval(values, resamples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    low, high = found["interval"]
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 100, rel=0.15)


def test_a_draw_as_far_as_the_observation_counts():
    """Both examples differ by one: half of the swaps give a mean as far from 0, none one that is further."""
    p_value = crossed_permutation(np.ones((1, 2)), np.zeros((1, 2)), resamples=4000)
    assert p_value == pytest.approx(0.5, abs=0.03)


def test_a_p_value_of_draws_is_never_zero():
    """No draw of 100 gives the same sign for 40 examples: the observation itself still counts as one."""
    assert crossed_permutation(np.ones((1, 40)), np.zeros((1, 40)), resamples=100) == pytest.approx(1 / 101)


def test_runs_count_by_the_fourth_root_of_their_share():
    """A plain rewrite of the draws, with draws of its own: swapped examples, and runs dealt anew."""
    rng = np.random.default_rng(1)
    first = (rng.random((3, 12)) < 0.75).astype(float) + 0.1 * rng.standard_normal((3, 1))
    second = (rng.random((3, 12)) < 0.5).astype(float) + 0.1 * rng.standard_normal((3, 1))
    difference, count = first - second, 20000
    share = _squared_error(difference)[2]
    assert 0.05 < share < 0.6, "the share must tell its roots apart"
    swaps = rng.choice([-1.0, 1.0], size=(count, 12))
    labels = np.array([rng.permutation([1.0] * 3 + [-1.0] * 3) for _ in range(count)])
    runs = np.concatenate([first.mean(1), second.mean(1)])
    drawn = (swaps * difference.mean(0)).mean(1) + share**0.25 * (labels @ runs) / 3
    expected = (np.abs(drawn) >= abs(difference.mean())).mean()
    found = crossed_permutation(first, second, resamples=20000)
    assert found == pytest.approx(expected, abs=0.015)
    narrower = (swaps * difference.mean(0)).mean(1) + share**0.5 * (labels @ runs) / 3
    assert abs((np.abs(narrower) >= abs(difference.mean())).mean() - expected) > 0.03, "too alike to tell"
