"""Intervals, tests and effect sizes for the numbers that reports give.

A comparison has two sources of chance: the training runs (seeds) and the test examples. Scores form a table
`(seeds, examples)`, in which every example was answered by every run: the two are crossed. What looks at one source
alone is too sure of itself, so [`crossed_interval`] and [`compare_crossed`] look at both.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, bootstrap, nct, norm, permutation_test, t

# Numbers drawn at a time: bounds the memory of resampling many examples.
DRAWN_AT_ONCE = 4_000_000


def proportion(successes: int, total: int, confidence: float = 0.95) -> dict[str, Any]:
    """A share with its Wilson score interval.

    The interval comes from inverting the normal test of a binomial proportion (Wilson 1927, "Probable inference, the
    law of succession, and statistical inference"). It stays within [0, 1] and keeps a width at 0 and 1, where the
    usual `p ± z·s` shrinks to a point.

    Args:
        successes: number of right answers, between 0 and `total`.
        total: number of independent trials, at least 1.
        confidence: two-sided confidence level, strictly between 0 and 1.

    Returns:
        `{"value": successes / total, "n": total, "interval": [low, high], "confidence": confidence,
        "method": "Wilson score"}`, ready for JSON.

    Raises:
        ValueError: if the counts are impossible or the confidence lies outside (0, 1).
    """
    if total < 1:
        raise ValueError(f"total is {total}; a share needs at least one trial")
    if not 0 <= successes <= total:
        raise ValueError(f"successes is {successes}; it must lie between 0 and total ({total})")
    _check_confidence(confidence)
    interval = binomtest(int(successes), int(total)).proportion_ci(confidence_level=confidence, method="wilson")
    return {
        "value": successes / total,
        "n": int(total),
        "interval": [float(interval.low), float(interval.high)],
        "confidence": confidence,
        "method": "Wilson score",
    }


def mean(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> dict[str, Any]:
    """A mean with Student's interval, for numbers that are no shares.

    Args:
        values: independent numbers, at least 2.
        confidence: two-sided confidence level, strictly between 0 and 1.

    Returns:
        `{"value": mean, "n": len(values), "interval": [low, high], "confidence": confidence, "method": "Student's t"}`,
        ready for JSON.

    Raises:
        ValueError: if there are fewer than two numbers or the confidence lies outside (0, 1).
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) < 2:
        raise ValueError(f"values have shape {numbers.shape}; an interval needs a row of at least two numbers")
    _check_confidence(confidence)
    middle, error = numbers.mean(), numbers.std(ddof=1) / np.sqrt(len(numbers))
    reach = t.ppf((1 + confidence) / 2, len(numbers) - 1) * error
    return {
        "value": float(middle),
        "n": len(numbers),
        "interval": [float(middle - reach), float(middle + reach)],
        "confidence": confidence,
        "method": "Student's t",
    }


def mean_interval(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> dict[str, Any]:
    """A mean with its bootstrap interval, bias-corrected and accelerated (Efron 1987), for scores that are no counts.

    Args:
        values: one score per independent unit, `(n,)`, at least two of them.
        confidence: two-sided confidence level, strictly between 0 and 1.
        resamples: number of bootstrap samples.
        seed: of the samples; the same seed gives the same interval.

    Returns:
        As [`proportion`]. Where all values are equal the interval is that point.

    Raises:
        ValueError: for fewer than two values, one that is not finite, or an impossible confidence.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values has shape {values.shape}; a bootstrap needs a list of at least two")
    _check(values, confidence)
    low = high = float(values[0])
    if np.ptp(values) > 0:
        found = bootstrap(
            (values,),
            np.mean,
            confidence_level=confidence,
            n_resamples=resamples,
            # Without it the jackknife holds a square matrix of the values, and the bootstrap one row a resample.
            batch=max(1, DRAWN_AT_ONCE // len(values)),
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    return {
        "value": float(values.mean()),
        "n": len(values),
        "interval": [low, high],
        "confidence": confidence,
        "method": "BCa bootstrap",
    }


class Components(NamedTuple):
    """The parts of the variance of a table of scores; see [`variance_components`].

    Attributes:
        seeds: variance between runs, beyond what their answers to single examples explain.
        examples: variance between examples, beyond the same.
        residual: variance of a run's score on an example that neither explains.
    """

    seeds: float
    examples: float
    residual: float

    def of_mean(self, seeds: int, examples: int) -> float:
        """Variance of the mean over a table of this size."""
        return self.seeds / seeds + self.examples / examples + self.residual / (seeds * examples)


def _mean_squares(values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean, row effects, column effects, and the mean squares of rows, columns and residual.

    Args:
        values: `(..., seeds, examples)`, at least two of each.
    """
    seeds, examples = values.shape[-2:]
    mean = values.mean((-1, -2))
    rows = values.mean(-1) - mean[..., None]
    columns = values.mean(-2) - mean[..., None]
    rest = values - mean[..., None, None] - rows[..., :, None] - columns[..., None, :]
    of_rows = examples * (rows**2).sum(-1) / (seeds - 1)
    of_columns = seeds * (columns**2).sum(-1) / (examples - 1)
    of_rest = (rest**2).sum((-1, -2)) / ((seeds - 1) * (examples - 1))
    return mean, rows, columns, of_rows, of_columns, of_rest


def variance_components(values: np.ndarray) -> Components:
    """Split the variance of a table of scores between seeds, examples and the rest, by the analysis of variance.

    Args:
        values: `(seeds, examples)`, at least two of each.

    Returns:
        The unbiased estimates (Searle, Casella and McCulloch 1992, "Variance components", section 4.3), a negative one
        set to 0.

    Raises:
        ValueError: if the table is too small or holds a number that is not finite.
    """
    values = _table(values, "values", seeds=2)
    *_, of_rows, of_columns, of_rest = _mean_squares(values)
    seeds, examples = values.shape
    return Components(
        seeds=float(max(0.0, of_rows - of_rest) / examples),
        examples=float(max(0.0, of_columns - of_rest) / seeds),
        residual=float(of_rest),
    )


def _squared_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared standard error of the mean of a table, its degrees of freedom, and the runs' share of their own variance.

    The variance of the mean is `max(0, MS_rows - MS_rest) / (S N) + MS_columns / (S N)`: unbiased but for the cut at 0,
    which keeps the estimate at or above what the examples alone give. Degrees of freedom after Satterthwaite (1946).

    Args:
        values: `(..., seeds, examples)`. With a single seed the examples are all there is.
    """
    seeds, examples = values.shape[-2:]
    if seeds == 1:
        variance = values[..., 0, :].var(-1, ddof=1) / examples
        return variance, np.full(variance.shape, examples - 1.0), np.zeros(variance.shape)
    *_, of_rows, of_columns, of_rest = _mean_squares(values)
    excess = np.maximum(0.0, of_rows - of_rest)
    variance = (excess + of_columns) / (seeds * examples)
    counts = excess > 0
    below = of_columns**2 / (examples - 1)
    below = below + counts * (of_rows**2 / (seeds - 1) + of_rest**2 / ((seeds - 1) * (examples - 1)))
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = np.where(below > 0, (excess + of_columns) ** 2 / below, 1.0)
        share = np.where(of_rows > 0, excess / of_rows, 0.0)
    return variance, freedom, share


def crossed_bootstrap(
    values: np.ndarray, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bootstrap interval of the mean of a table of scores, over its runs and its examples.

    Whole runs and whole examples are drawn with replacement, an example together with the answers of all runs to it
    (the "pigeonhole" bootstrap of Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1). That
    distribution is too wide in its residual part (Owen, section 3) and too narrow for few runs, so its draws are moved
    away from the mean by one factor: to the unbiased variance of the mean, times t over normal quantile at the
    estimate's degrees of freedom (the expanded percentile interval of Hesterberg 2015, "What teachers should know about
    the bootstrap", section 4.3).

    Args:
        values: `(..., seeds, examples)`; any number of tables in front. With a single seed the interval covers the
            chance of the examples alone.
        confidence: two-sided confidence level.
        resamples: number of bootstrap samples.
        seed: of the samples.

    Returns:
        Mean, lower and upper end, each of shape `(...)`.
    """
    values = np.asarray(values, dtype=np.float64)
    _check(values, confidence)
    seeds, examples = values.shape[-2:]
    random = np.random.default_rng(seed)
    mean = values.mean((-1, -2))
    rows, columns = values.mean(-1) - mean[..., None], values.mean(-2) - mean[..., None]
    run_weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    drawn = []
    for size in _portions(resamples, examples):
        weights = random.multinomial(examples, np.full(examples, 1 / examples), size=size) / examples
        drawn.append(columns @ weights.T)
    moved = rows @ run_weights.T + np.concatenate(drawn, axis=-1)
    spread = (rows**2).sum(-1) / seeds**2 + (columns**2).sum(-1) / examples**2
    variance, freedom, _ = _squared_error(values)
    tail = (1 - confidence) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(spread > 0, np.sqrt(variance / spread), 0.0) * t.isf(tail, freedom) / norm.isf(tail)
    low, high = np.quantile(moved, [tail, 1 - tail], axis=-1) * factor
    return mean, mean + low, mean + high


def crossed_interval(
    values: np.ndarray,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> dict[str, Any]:
    """The mean of a table of scores with its interval over runs and examples; see [`crossed_bootstrap`].

    Args:
        values: `(seeds, examples)`, at least two examples.
        bounds: what the score can be; the interval is cut there. Where all resamples have the same mean, as when all
            entries of the table are equal, the bootstrap knows nothing, and the interval reaches as far as a change
            that none of so many examples showed: the Wilson interval of 0 in n, times the width of the bounds.

    Returns:
        As [`proportion`], with `n` the number of examples and `seeds`.

    Raises:
        ValueError: if the table is too small, holds a number that is not finite, or the confidence is impossible.
    """
    values = _table(values, "values")
    mean, low, high = (float(part) for part in crossed_bootstrap(values, confidence, resamples, seed))
    method = "crossed bootstrap over seeds and examples" if len(values) > 1 else "bootstrap over examples"
    if not low < high and math.isfinite(bounds[1] - bounds[0]):
        reach = proportion(0, values.shape[1], confidence)["interval"][1] * (bounds[1] - bounds[0])
        low, high, method = mean - reach, mean + reach, "Wilson score of no change in n examples"
    return {
        "value": mean,
        "n": int(values.shape[1]),
        "seeds": len(values),
        "interval": [max(low, bounds[0]), min(high, bounds[1])],
        "confidence": confidence,
        "method": method,
    }


def paired_permutation(
    differences: Sequence[float] | np.ndarray, resamples: int = 9999, seed: int = 0
) -> tuple[float, str]:
    """Permutation test of paired scores: is the mean difference further from 0 than swaps within pairs make it?

    Args:
        differences: one difference per independent pair, `(n,)`.
        resamples: swaps drawn; where no more than that exist all are taken and the test is exact.
        seed: of the draws.

    Returns:
        The two-sided p-value, never 0 (Phipson and Smyth 2010), and how it was computed: `"exact"` or
        `"Monte Carlo, <resamples> draws"`.

    Raises:
        ValueError: for no differences, or one that is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or len(values) < 1:
        raise ValueError(f"differences has shape {values.shape}; expected a list of at least one")
    _check(values)
    values = values[values != 0]  # a swap of equal scores changes nothing
    if len(values) < 2:
        return 1.0, "exact"
    exact = 2.0 ** len(values) <= resamples
    result = permutation_test(
        (values,),
        lambda signed, axis: np.mean(signed, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=math.inf if exact else resamples,
        batch=max(1, DRAWN_AT_ONCE // len(values)),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue), "exact" if exact else f"Monte Carlo, {resamples} draws"


def crossed_permutation(first: np.ndarray, second: np.ndarray, resamples: int = 4000, seed: int = 0) -> np.ndarray:
    """Permutation test of two tables of scores of the same examples, over runs and examples.

    Under the hypothesis that the two models are one, swapping the answers of the models to an example (in all runs
    at once) changes nothing, nor does exchanging whole runs between the models. A draw adds both: the mean difference
    after swapping at random examples, and the difference of the means after relabelling all runs, the latter times
    `share ** (1/4)` with the share of the variance between runs that the residual of the analysis of variance does not
    explain (0 if there is none: then runs differ by no more than their answers to single examples make them, which the
    swaps hold already).

    Args:
        first, second: `(..., seeds, examples)`, of the same shape.
        resamples: number of draws.
        seed: of the draws.

    Returns:
        Two-sided p-values `(...)`, `(1 + draws as far from 0) / (1 + draws)`.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    seeds, examples = first.shape[-2:]
    random = np.random.default_rng(seed)
    difference = first - second
    observed = np.abs(difference.mean((-1, -2)))
    means, parts = difference.mean(-2) / examples, []
    for size in _portions(resamples, examples):
        swaps = random.integers(0, 2, size=(size, examples), dtype=np.int8).astype(np.float64) * 2 - 1
        parts.append(means @ swaps.T)
    drawn = np.concatenate(parts, axis=-1)
    if seeds > 1:
        share = _squared_error(difference)[2]
        runs = np.concatenate([first.mean(-1), second.mean(-1)], axis=-1)
        drawn = drawn + share[..., None] ** 0.25 * (runs @ _relabellings(seeds, resamples, random).T) / seeds
    # Sums in another order differ in the last digits; equal is as far.
    return (1 + (np.abs(drawn) >= observed[..., None] - 1e-12).sum(-1)) / (1 + resamples)


def _relabellings(seeds: int, count: int, random: np.random.Generator) -> np.ndarray:
    """`(count, 2 seeds)` of +1 and -1: which of the runs are taken for the first model's."""
    if seeds <= 6:
        first = np.array(list(combinations(range(2 * seeds), seeds)))
        first = first[random.integers(len(first), size=count)]
    else:
        first = np.argsort(random.random((count, 2 * seeds)), axis=1)[:, :seeds]
    labels = np.full((count, 2 * seeds), -1.0)
    np.put_along_axis(labels, first, 1.0, axis=1)
    return labels


def crossed_p_values(first: np.ndarray, second: np.ndarray, resamples: int = 4000, seed: int = 0) -> np.ndarray:
    """The p-values that verdicts rest on: the larger of [`crossed_permutation`]'s and that of the t test with the
    standard error of [`crossed_bootstrap`]. Each alone rejects a little too often in another mix of the two sources of
    chance.

    Args:
        first, second: `(..., seeds, examples)`, of the same shape.

    Returns:
        Two-sided p-values `(...)`; 1 where the tables are equal.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    variance, freedom, _ = _squared_error(difference)
    with np.errstate(divide="ignore", invalid="ignore"):
        by_t = 2 * t.sf(np.abs(difference.mean((-1, -2))) / np.sqrt(variance), freedom)
    by_t = np.where(variance > 0, by_t, np.where(difference.mean((-1, -2)) == 0, 1.0, 0.0))
    return np.maximum(by_t, crossed_permutation(first, second, resamples, seed))


def compare_crossed(
    first: np.ndarray,
    second: np.ndarray,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
    binary: bool = True,
) -> dict[str, Any]:
    """Two models on the same examples: difference with interval, test and effect sizes.

    Args:
        first, second: scores `(seeds, examples)`; row s of both trained with the same seed, column i the same example.
        confidence: level of the interval.
        resamples, seed: of bootstrap and permutations.
        binary: scores are 0 or 1 (right or wrong); adds the effect sizes of shares and the discordant pairs.

    Returns:
        `difference` (as [`crossed_interval`]), `p_value`, `p_value_of` (what each test gave), `components` of the
        variance of the difference (`None` with a single seed), and for binary scores `effect`: `cohens_h`, `odds_ratio`
        and `discordant`.

    Raises:
        ValueError: if the tables differ in shape, are too small, or hold what they cannot.
    """
    first, second = _table(first, "first"), _table(second, "second")
    if first.shape != second.shape:
        raise ValueError(f"first has shape {first.shape} and second {second.shape}; pairs need the same")
    if binary and not np.isin([first, second], (0, 1)).all():
        raise ValueError("binary scores are 0 or 1")
    difference = first - second
    interval = crossed_interval(
        difference, confidence, resamples, seed, bounds=(-1.0, 1.0) if binary else (-math.inf, math.inf)
    )
    swap_p, swap_method = paired_permutation(difference.mean(0), resamples, seed)
    result: dict[str, Any] = {
        "difference": interval,
        "p_value": float(crossed_p_values(first, second, resamples, seed)),
        "p_value_of": {
            "runs_and_examples": float(crossed_permutation(first, second, resamples, seed)),
            "examples_only": swap_p,
            "examples_only_method": swap_method,
        },
        "components": dict(variance_components(difference)._asdict()) if len(first) > 1 else None,
    }
    if binary:
        only_first, only_second = int((first > second).sum()), int((second > first).sum())
        result["effect"] = {
            "cohens_h": cohens_h(float(first.mean()), float(second.mean())),
            "odds_ratio": odds_ratio(int(first.sum()), first.size, int(second.sum()), second.size),
            "discordant": {"only_first": only_first, "only_second": only_second, "of": int(first.size)},
        }
    return result


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact McNemar test of one run against another: two-sided p-value from the discordant pairs.

    Args:
        only_first: examples that only the first got right.
        only_second: examples that only the second got right.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"discordant pairs are counts, got {only_first} and {only_second}")
    total = only_first + only_second
    return float(binomtest(only_first, total).pvalue) if total else 1.0


def cohens_h(first: float, second: float) -> float:
    """Cohen's h of two shares, `2 asin √p - 2 asin √q` (Cohen 1988, section 6.2): 0.2 is small, 0.8 large."""
    for share in (first, second):
        if not 0 <= share <= 1:
            raise ValueError(f"a share lies between 0 and 1, got {share}")
    return 2 * math.asin(math.sqrt(first)) - 2 * math.asin(math.sqrt(second))


def odds_ratio(first: int, first_total: int, second: int, second_total: int) -> float:
    """Odds of the first share over those of the second, with 1/2 added to every count (Haldane 1956, Anscombe 1956)."""
    for right, total in ((first, first_total), (second, second_total)):
        if not 0 <= right <= total:
            raise ValueError(f"successes is {right}; it must lie between 0 and total ({total})")
    return (first + 0.5) * (second_total - second + 0.5) / ((second + 0.5) * (first_total - first + 0.5))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for testing several hypotheses at once (Holm 1979), in the given order.

    Rejecting where the adjusted value is at most α keeps the chance of any false rejection at or below α.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if ((p < 0) | (p > 1) | np.isnan(p)).any():
        raise ValueError("p-values lie between 0 and 1")
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    adjusted = np.empty_like(p)
    adjusted[order] = stepped
    return [float(value) for value in adjusted]


def power(difference: float, components: Components, seeds: int, examples: int, alpha: float = 0.05) -> float:
    """Chance that the two-sided t test over runs and examples finds a true mean difference.

    Args:
        difference: the true difference, in the score's unit.
        components: variance components of the difference, for example of a pilot; see [`variance_components`].
        seeds, examples: size of the planned table.
        alpha: level of the test.
    """
    if seeds < 2 or examples < 2:
        raise ValueError(f"{seeds} seeds and {examples} examples; the test needs two of each")
    variance = components.of_mean(seeds, examples)
    if variance <= 0:
        return 1.0 if difference else 0.0
    rows = examples * components.seeds + components.residual
    columns = seeds * components.examples + components.residual
    parts = (
        rows**2 / (seeds - 1),
        columns**2 / (examples - 1),
        components.residual**2 / ((seeds - 1) * (examples - 1)),
    )
    freedom = (rows + columns - components.residual) ** 2 / sum(parts)
    critical, shift = float(t.isf(alpha / 2, freedom)), abs(difference) / math.sqrt(variance)
    if shift > critical + 10:  # where the noncentral t distribution can no longer be computed
        return 1.0
    # The other tail is below the normal distribution's at -shift, and scipy gives NaN where it is far out.
    other_tail = nct.cdf(-critical, freedom, shift) if shift < 6 else 0.0
    return float(nct.sf(critical, freedom, shift) + other_tail)


def seeds_needed(
    difference: float,
    components: Components,
    examples: int,
    chance: float = 0.8,
    alpha: float = 0.05,
    most: int = 1000,
) -> int | None:
    """Fewest runs of each model with which a true difference is found with the wished chance; see [`power`].

    Returns:
        The number of seeds, at least 2, or `None` if `most` do not suffice: then the test split is too small, since
        the chance of its examples stays however many runs there are.
    """
    if not 0 < chance < 1:
        raise ValueError(f"chance is {chance}; it must lie strictly between 0 and 1")
    if power(difference, components, most, examples, alpha) < chance:
        return None
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        if power(difference, components, middle, examples, alpha) >= chance:
            high = middle
        else:
            low = middle
    return high


def _portions(draws: int, width: int) -> list[int]:
    """`draws` in portions of at most `DRAWN_AT_ONCE` numbers, each draw being `width` of them."""
    portion = max(1, DRAWN_AT_ONCE // width)
    return [min(portion, draws - start) for start in range(0, draws, portion)]


def _check(values: np.ndarray, confidence: float = 0.95) -> None:
    if not np.isfinite(values).all():
        raise ValueError("a score is not finite")
    _check_confidence(confidence)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie strictly between 0 and 1")


def _table(values: np.ndarray, name: str, seeds: int = 1) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < seeds or values.shape[1] < 2:
        raise ValueError(
            f"{name} has shape {values.shape}; expected (seeds, examples) with at least {seeds} seeds and 2 examples"
        )
    _check(values)
    return values
