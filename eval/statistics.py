"""The statistics of a comparison: paired tests, bootstrap, Holm's correction, the minimum detectable effect.

Everything here takes arrays and returns numbers; which items are paired is decided in compare.py.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy  # which loads scipy.stats only once it is used

SIGNIFICANCE = 0.05  # a difference counts as one if its corrected p-value is below this
POWER = 0.8  # probability with which a minimum detectable effect is detected
RESAMPLES = 10_000  # of the bootstrap, behind an interval and a p-value
STDERR_RESAMPLES = 2000  # behind the standard error of a single score
FEW = 50  # with fewer degrees of freedom the bootstrap's intervals are widened as Student's t distribution is
FEW_CHANGED = 30  # with fewer items that one model got right and the other wrong, an interval is Bonett & Price's


def verdict(difference: float, p_value: float, higher_is_better: bool) -> str:
    """`better`, `worse` or `within noise`, from a difference and its corrected p-value."""
    if p_value >= SIGNIFICANCE:
        return "within noise"
    return "better" if (difference > 0) == higher_is_better else "worse"


def bits_per_byte(log_likelihoods: np.ndarray, sizes: np.ndarray) -> float:
    """Bits per byte of texts with these log-likelihoods (nats) and sizes (bytes), each of shape (texts,)."""
    return float(-log_likelihoods.sum() / sizes.sum() / math.log(2))


def bits_per_byte_stderr(log_likelihoods: np.ndarray, sizes: np.ndarray, seed: int = 0) -> float:
    """Standard deviation of `bits_per_byte` over bootstrap resamples of the texts."""
    draws = np.random.default_rng(seed).integers(0, len(sizes), size=(STDERR_RESAMPLES, len(sizes)))
    ratios = (log_likelihoods[draws].sum(axis=1) / sizes[draws].sum(axis=1)) / -math.log(2)
    return float(ratios.std())


def mean_stderr(values: np.ndarray) -> float | None:
    """Standard error of the mean of `values` (items,); None for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def share_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    found = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, "wilson")
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979, Scand. J. Statist. 6): p-values valid for the whole family, in input order."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """McNemar's exact test (1947, Psychometrika 12) of two 0/1 arrays over the same items.

    `gained` and `lost` are the items that only `ours` or only `theirs` got right.
    """
    gained, lost = int(((ours == 1) & (theirs == 0)).sum()), int(((ours == 0) & (theirs == 1)).sum())
    p_value = float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return {"gained": gained, "lost": lost, "p_value": p_value}


def bootstrap(values: np.ndarray, sizes: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """`values.sum() / sizes.sum()` of bootstrap resamples of (items,): shape (RESAMPLES,). Sizes None: means."""
    count = len(values)
    draws = (rng.integers(0, count, (100, count)) for _ in range(RESAMPLES // 100))
    if sizes is not None:
        return np.concatenate([values[drawn].sum(1) / sizes[drawn].sum(1) for drawn in draws])
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) > 8:
        return np.concatenate([values[drawn].mean(1) for drawn in draws])
    # With few distinct values (right or wrong) their counts in a resample are multinomial: no need to draw items.
    return rng.multinomial(count, counts / count, size=RESAMPLES) @ distinct / count


def effective_items(sizes: np.ndarray) -> float:
    """Kish's effective number of items (1965, Survey Sampling) that are weighted by `sizes` (items,)."""
    return float(sizes.sum() ** 2 / np.square(sizes).sum())


class Estimate(NamedTuple):
    """A difference, estimated from `items`, with bootstrap `draws` of it (resamples,); unknown if `freedom` <= 0."""

    value: float
    stderr: float
    freedom: float
    items: int
    draws: np.ndarray

    @property
    def p_value(self) -> float:
        """Of no difference: the larger of the bootstrap's and Student's t test's."""
        return max(bootstrap_p_value(self.draws), student(self.value, self.stderr, self.freedom))


def estimate(differences: np.ndarray, sizes: np.ndarray | None, rng: np.random.Generator) -> Estimate:
    """`differences.sum() / sizes.sum()` of (items,), with `jackknife`'s standard error; sizes None: ones, for a mean.

    Resampling n items gives (n - 1) / n of their variance, far too little where many parts of few items each are put
    together; so the draws are spread by that.
    """
    value, stderr, freedom = jackknife(differences, sizes)
    count = len(differences)
    draws = value + (bootstrap(differences, sizes, rng) - value) * math.sqrt(count / max(count - 1, 1))
    return Estimate(value, stderr, freedom, count, draws)


def mean_estimate(parts: Sequence[Estimate], rng: np.random.Generator) -> Estimate:
    """The unweighted mean of independent differences, with Satterthwaite (1946)'s degrees of freedom.

    A part of a single item has no variance of its own: then the parts themselves are drawn.
    """
    values, items = np.array([part.value for part in parts]), sum(part.items for part in parts)
    if any(part.items < 2 for part in parts):
        return estimate(values, None, rng)._replace(items=items)
    variances = np.square([part.stderr for part in parts])
    total = float(variances.sum())
    freedom = total**2 / float((np.square(variances) / [part.freedom for part in parts]).sum()) if total else math.inf
    draws = np.mean([part.draws for part in parts], axis=0)
    return Estimate(float(values.mean()), math.sqrt(total) / len(parts), freedom, items, draws)


def jackknife(differences: np.ndarray, sizes: np.ndarray | None = None) -> tuple[float, float, float]:
    """A ratio of sums, as in `estimate`, its standard error by the jackknife, and its degrees of freedom.

    These are of Kish's effective number of items: with few of them, or few that make up most of the bytes, the
    bootstrap alone is overconfident. For items of equal size the figures are those of the paired t test.
    """
    sizes = np.ones(len(differences)) if sizes is None else sizes
    count, total = len(sizes), sizes.sum()
    ratio = float(differences.sum() / total)
    if count < 2:
        return ratio, 0.0, 0.0
    moved = (differences - ratio * sizes) / (total - sizes)
    stderr = math.sqrt((count - 1) / count * np.square(moved - moved.mean()).sum())
    return ratio, stderr, effective_items(sizes) - 1


def student(value: float, stderr: float, freedom: float) -> float:
    """p-value of Student's t test that a difference with this standard error is zero."""
    if freedom <= 0 or value == 0:
        return 1.0
    return float(2 * scipy.stats.t.sf(abs(value) / stderr, freedom)) if stderr else 0.0


def interval(found: Estimate) -> list[float] | None:
    """The 95 % confidence interval of a difference; None where nothing varied from which to tell.

    The bootstrap's quantiles; of few items spread to the width of Student's t (Hesterberg 2015, The American
    Statistician 69), since they cover 91 % by themselves with 8 items.
    """
    if found.freedom <= 0 or not found.stderr:
        return None
    tails = [SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2]
    low, high = np.quantile(found.draws, tails)
    if found.freedom < FEW:
        student = scipy.stats.t.ppf(tails[1], found.freedom)
        wider, half = student / scipy.stats.norm.ppf(tails[1]), student * found.stderr
        low = min(found.value + wider * (low - found.value), found.value - half)
        high = max(found.value + wider * (high - found.value), found.value + half)
    return [float(low), float(high)]


def interval_of_shares(found: Estimate) -> list[float]:
    """The 95 % confidence interval of a difference of shares (of right answers), of which few changed.

    As if one more item were gained and one lost (Bonett & Price 2012, J. Educ. Behav. Stat. 37): that nothing
    changed in these items, or all in one direction, proves no certainty about others.
    """
    more = found.items + 2
    value = found.value * found.items / more
    stderr = math.sqrt((found.stderr * found.items / more) ** 2 + 2 / more**2)
    distribution = scipy.stats.t(found.freedom) if 0 < found.freedom < FEW else scipy.stats.norm
    half = distribution.isf(SIGNIFICANCE / 2) * stderr
    return [float(max(-1.0, value - half)), float(min(1.0, value + half))]


def bootstrap_p_value(draws: np.ndarray) -> float:
    """Two-sided p-value of no difference, from bootstrap `draws` (resamples,) of the difference."""
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return min(1.0, 2 * float(tail + 1) / (len(draws) + 1))


def minimum_detectable_effect(stderr: float, *, tests: int = 1, freedom: float = math.inf) -> float:
    """The smallest true difference that a test detects with probability `POWER` (Bloom 1995, Evaluation Review 19).

    Of `tests` that are corrected together, it passes Holm's first and hardest step. `freedom` is that of `stderr`.
    """
    distribution = scipy.stats.t(freedom)
    return float(stderr * (distribution.isf(SIGNIFICANCE / tests / 2) + distribution.isf(1 - POWER)))


def fewest_discordant(tests: int = 1) -> int:
    """The fewest items that must change, all in one direction, before one of `tests` by McNemar finds a difference."""
    return math.floor(1 - math.log2(SIGNIFICANCE / tests)) + 1
