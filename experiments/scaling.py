"""From the losses of small runs to that of a larger one: a law, its fit, and an interval that says how sure it is.

    L(N, D) = E + A / N^a + B / D^b

N counts the parameters that multiply: the output head, but not a separate table of input embeddings. The fit minimises
Huber's loss on the residuals of log L (Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556, appendix D.3). D is
discounted for repetition (Muennighoff et al. 2023, https://arxiv.org/abs/2305.16264, equation 5): with U different
tokens, read R more times after the first,

    D = U + U R* (1 - exp(-R / R*)),    R* = 15.39

A few small runs do not determine five numbers. The exponents and E therefore have weak priors, and the law is fitted in
three forms, which extrapolate differently: E free, E pinned to what larger models approach, and no E at all. Their
predictions are averaged, each weighted by exp(-BIC / 2).

The interval is one for a new run, at 95 %, from five sources whose variances add on the scale of log L: the seeds (the
new run's own), the parameters of the law, the spread over forms, the held-out documents (drawn again, relative to the
largest run on the same documents), and lack of fit: where the means of the runs of one size and length scatter around
the law more than their seeds explain (F test at 5 %), the residuals stand for the noise. It is then widened by what
rolling back-tests show, in which each size is predicted from those below. Nothing is trained or read here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats

from nanophi.core.errors import UserError
from nanophi.eval.statistics import SIGNIFICANCE

MIN_RUNGS = 4
REPETITION = 15.39
FORMS = {"E free": None, "E pinned": 0.6, "no E": 1e-6}
"""Bits per byte of E; 0.6: 1.82 nats per token of about 4.4 bytes (Besiroglu et al. 2024, arXiv 2404.10102)."""
EXPONENT, SHARE, FIXED = (math.log(0.3), 0.7), (math.log(0.5), 0.7), 1e-3
"""Priors, mean and deviation: of log a and log b, and of a free log E relative to the smallest loss; its
deviation if not free. Published exponents: 0.34 and 0.28 (Hoffmann), 0.35 and 0.37 (Besiroglu), less without E."""
HUBER, MIN_HUBER, MIN_NOISE = 1.5, 1e-3, 1e-4
"""Where the loss turns from a square into a line, in deviations of the seeds, and at least; the least of those."""
UNFIT, UNFIT_P = 0.02, 0.001
"""Scatter of the means around the law, as a share of the loss, and p-value, from which lack of fit is refused."""
DIVERGED = 1.2
"""Times the median loss of its size and length."""
RATES, RATE_SIZES = (1 / 1.5, 1.5), (0, 2)
"""Factors of both learning rates that are tried beside the recipe's own, and at which sizes."""
Entry = tuple[str, int, int, float]
"""A run: folder of its record, rung, seed, factor of its learning rates."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A run: rung (0 is the smallest), seed, N, tokens read, different tokens in the data, bits per byte."""

    rung: int
    seed: int
    parameters: float
    tokens: float
    unique: float
    loss: float = math.nan

    @property
    def flops(self) -> float:
        """6 N D, the usual measure of compute (attention's own products left out)."""
        return 6 * self.parameters * self.tokens

    @property
    def sizes(self) -> np.ndarray:
        """log N and log D, discounted for repetition."""
        return np.log([self.parameters, effective_tokens(self.tokens, self.unique)])


def entries_of(plan: Mapping[str, Any]) -> list[Entry]:
    """All runs of a plan, in their order."""
    *sizes, hidden = plan["rungs"]
    fitted = [(rung, seed) for rung, size in enumerate(sizes) for seed in size["seeds"]]
    entries: list[Entry] = [(part, rung, seed, 1.0) for part in ("half", "full") for rung, seed in fitted]
    first = plan["seeds"][0]
    entries += [("rates", rung, first, factor) for rung in RATE_SIZES if rung < len(sizes) for factor in RATES]
    return [*entries, *(("hidden", len(sizes), seed, 1.0) for seed in hidden["seeds"])]


def effective_tokens(tokens: float, unique: float) -> float:
    """D, discounted for repetition."""
    repeated = max(0.0, tokens / unique - 1)
    return min(tokens, unique) + unique * REPETITION * (1 - math.exp(-repeated / REPETITION))


def check(points: Sequence[Point], names: Sequence[str], ceiling: float) -> None:
    """Refuse runs (and their names) from which nothing can be predicted. Raises `UserError`.

    `ceiling` is the loss of a model that has learned nothing.
    """
    rungs = sorted({point.rung for point in points})
    if len(rungs) < MIN_RUNGS:
        raise UserError(f"a prediction needs {MIN_RUNGS} sizes, there are {len(rungs)}; add larger or smaller ones")
    if len({(point.rung, point.seed) for point in points}) == len(rungs):
        raise UserError("every size has one seed, so how far seeds differ is not known; run three at the smaller sizes")
    cells = _cells(points)
    for point, name in zip(points, names, strict=True):
        usual = float(np.median([other.loss for other in cells[point.rung, point.tokens]]))
        if not point.loss <= DIVERGED * usual:
            raise UserError(f"{name} has diverged ({point.loss:.3f} bits per byte); plan again with a lower rate")
    for rung in rungs:
        if (best := min(point.loss for point in points if point.rung == rung)) >= ceiling:
            what = f"({best:.3f} bits per byte, chance {ceiling:.3f})"
            raise UserError(f"size {rung + 1} has learned nothing {what}; train it longer")


class Law:
    """The forms of the law, fitted to `points` (the largest last), and their average.

    `documents`: the points' losses when the held-out documents are drawn again, (resamples, points).

    Attributes:
        backtests: each size from the third on, at each of its lengths, predicted from the sizes below.
        widened: the factor by which they widen the interval.
        scatter, p_value: of the means around the law, and whether seeds explain it.

    Raises:
        UserError: if no form fits.
    """

    def __init__(self, points: Sequence[Point], documents: np.ndarray | None = None, backtests: bool = True) -> None:
        self.points, self.documents = points, documents
        sizes = np.array([point.sizes for point in points])
        self.centre = sizes.mean(axis=0)
        self.sizes, self.y = sizes - self.centre, np.log([point.loss for point in points])
        cells = list(_cells(points))
        self.cell = np.array([cells.index((point.rung, point.tokens)) for point in points])
        self.counts, self.freedom = np.bincount(self.cell), len(points) - len(cells)
        deviations = self.y - self.means(self.y)[self.cell]
        self.noise = max(math.sqrt(float(deviations @ deviations) / max(1, self.freedom)), MIN_NOISE)
        self.fits = [_Fit(self, form) for form, rest in FORMS.items() if (rest or 0) < 0.9 * np.exp(self.y.min())]
        noise = min(fit.noise for fit in self.fits)
        bic = np.array([fit.square / noise**2 + fit.free * math.log(len(points)) for fit in self.fits])
        self.weights = np.exp(-0.5 * (bic - bic.min()))
        self.weights /= self.weights.sum()
        best = self.fits[int(self.weights.argmax())]
        self.scatter, self.p_value = best.scatter, best.p_value
        if self.p_value < UNFIT_P and self.scatter > UNFIT:
            raise UserError(
                f"no form of the law fits: sizes scatter around it by {100 * self.scatter:.1f} %, seeds by "
                f"{100 * self.noise:.1f} %; look at the smallest size, and leave it out in another plan"
            )
        self.backtests = _backtests(points) if backtests else []
        self.widened = max(1.0, math.sqrt(np.mean([test["z"] ** 2 for test in self.backtests] or [0])))

    def means(self, values: np.ndarray) -> np.ndarray:
        """Over the runs of one size and length."""
        return np.asarray(np.bincount(self.cell, values) / self.counts)

    def predict(self, target: Point) -> dict[str, Any]:
        """The loss of one run of a size and length.

        Returns:
            `value`, `interval` (95 %), `stderr` of log L, its `parts`, `freedom`, `line` (what a straight line through
            the last two sizes says), and per form `value`, `weight`, `E`, `A`, `B`, `a`, `b` in `forms`.
        """
        weights, at = self.weights, (target.sizes - self.centre)[None]
        values = np.array([_log_loss(fit.u, at)[0] for fit in self.fits])
        slopes = [_gradient(fit.u, at)[0] for fit in self.fits]
        spreads = np.array([slope @ fit.covariance @ slope for fit, slope in zip(self.fits, slopes, strict=True)])
        excess = np.array([fit.noise**2 / self.noise**2 - 1 for fit in self.fits])
        mean, moved = float(weights @ values), np.zeros(1)
        if self.documents is not None:
            # How the prediction follows each run's loss, and how it and the largest run move together.
            pull = weights @ np.array([fit.pull @ slope for fit, slope in zip(self.fits, slopes, strict=True)])
            moved = (np.log(self.documents) - self.y) @ (pull - np.eye(len(self.y))[-1])
        parts = {
            "seed": self.noise**2,
            "law": float(weights @ spreads),
            "forms": float(weights @ (values - mean) ** 2),
            "documents": float(moved.var()),
            "lack of fit": float(weights @ (excess * (spreads + self.noise**2))),
        }
        freedom = max(1.0, float(weights @ [fit.freedom for fit in self.fits]))
        stderr = self.widened * math.sqrt(sum(parts.values()))
        half = stderr * float(scipy.stats.t(freedom).isf(SIGNIFICANCE / 2))
        forms = zip(self.fits, values, weights, strict=True)
        return {
            "value": math.exp(mean),
            "interval": [math.exp(mean - half), math.exp(mean + half)],
            "stderr": stderr,
            "parts": {name: math.sqrt(variance) for name, variance in parts.items()},
            "freedom": freedom,
            "line": straight_line(self.points, target),
            "forms": {fit.form: {"value": math.exp(v), "weight": float(w), **fit.law(self)} for fit, v, w in forms},
        }


def straight_line(points: Sequence[Point], target: Point) -> float:
    """What the line through the last two sizes' longest runs says, log loss against log compute."""
    last = list({rung: members for (rung, _), members in _cells(points).items()}.values())[-2:]
    (x0, y0), (x1, y1) = ((math.log(members[0].flops), _mean(members)) for members in last)
    return math.exp(y1 + (y1 - y0) / (x1 - x0) * (math.log(target.flops) - x1))


def _backtests(points: Sequence[Point]) -> list[dict[str, Any]]:
    tests = []
    for rung in sorted({point.rung for point in points})[2:]:
        law = Law([point for point in points if point.rung < rung], backtests=False)
        for (_, tokens), members in _cells([point for point in points if point.rung == rung]).items():
            found, measured = law.predict(members[0]), _mean(members)
            low, high = found["interval"]
            # The normal deviate that is as rare as this one of Student's.
            rare = scipy.stats.t(found["freedom"]).sf(abs(measured - math.log(found["value"])) / found["stderr"])
            test = {"rung": rung, "tokens": tokens, "z": float(scipy.stats.norm.isf(max(1e-12, rare)))}
            test |= {key: found[key] for key in ("value", "interval")}
            tests.append(test | {"measured": math.exp(measured), "inside": low <= math.exp(measured) <= high})
    return tests


def _cells(points: Sequence[Point]) -> dict[tuple[int, float], list[Point]]:
    """Runs that differ in their seed alone, by rung and tokens."""
    keys = sorted({(point.rung, point.tokens) for point in points})
    return {key: [point for point in points if (point.rung, point.tokens) == key] for key in keys}


def _mean(points: Sequence[Point]) -> float:
    return float(np.mean([math.log(point.loss) for point in points]))


class _Fit:
    """One form of the law, fitted: `u` is log A, log a, log B, log b and log E."""

    def __init__(self, law: Law, form: str) -> None:
        self.form, floor, rest = form, math.exp(law.y.min()), FORMS[form]
        self.free = 5 if rest is None else 4
        prior = np.array([0, EXPONENT[0], 0, EXPONENT[0], math.log(rest or math.exp(SHARE[0]) * floor)])
        ridge = law.noise / np.array([np.inf, EXPONENT[1], np.inf, EXPONENT[1], FIXED if rest else SHARE[1]])

        def residuals(u: np.ndarray) -> np.ndarray:
            return np.concatenate([_log_loss(u, law.sizes) - law.y, ridge * (u - prior)])

        def jacobian(u: np.ndarray) -> np.ndarray:
            return np.concatenate([_gradient(u, law.sizes), np.diag(ridge)])

        half = math.log((floor - math.exp(prior[4])) / 2)
        start, delta = prior + np.array([half, 0, half, 0, 0]), max(MIN_HUBER, HUBER * law.noise)
        self.u = scipy.optimize.least_squares(residuals, start, jacobian, loss="huber", f_scale=delta).x
        left, slopes, runs = residuals(self.u), jacobian(self.u), len(law.y)
        curvature = np.linalg.pinv(slopes.T @ slopes)
        self.covariance, self.pull, self.square = (
            law.noise**2 * curvature,
            slopes[:runs] @ curvature,
            float(left @ left),
        )
        lack, fitted = float(law.counts @ law.means(left[:runs]) ** 2), len(law.counts) - self.free
        self.scatter, self.p_value, self.noise, self.freedom = math.sqrt(lack / runs), 1.0, law.noise, law.freedom
        if fitted > 0 and law.freedom > 0:
            ratio = lack / fitted / law.noise**2
            self.p_value = float(scipy.stats.f.sf(ratio, fitted, law.freedom))
            if self.p_value < SIGNIFICANCE:
                self.noise, self.freedom = math.sqrt(ratio) * law.noise, fitted

    def law(self, law: Law) -> dict[str, float]:
        """The numbers of the formula: its terms at N = D = 1, and the exponents."""
        numbers = [*_terms(self.u, -law.centre[None])[:, 0], *np.exp(self.u[[1, 3]])]
        return {name: float(number) for name, number in zip("ABEab", numbers, strict=True)}


def _terms(u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """A / N^a, B / D^b and E at sizes (points, 2): (3, points)."""
    powers = np.exp(u[[0, 2]] - np.exp(u[[1, 3]]) * sizes)
    return np.stack([*powers.T, np.full(len(sizes), np.exp(u[4]))])


def _log_loss(u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(_terms(u, sizes).sum(axis=0)))


def _gradient(u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Of log L by the parameters, (points, parameters)."""
    size, text, rest = terms = _terms(u, sizes)
    by_exponent = -np.exp(u[[1, 3]]) * sizes * terms[:2].T
    return np.stack([size, by_exponent[:, 0], text, by_exponent[:, 1], rest], axis=1) / terms.sum(axis=0)[:, None]
