"""From the losses of small runs to that of a larger one: a law, its fit, and an interval that says how sure it is.

    L(N, D) = E + A / N^a + B / D^b

N counts the parameters that multiply: the output head, but not a separate table of input embeddings. The fit minimises
Huber's loss on the residuals of log L (Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556, appendix D.3). D is
discounted for repetition (Muennighoff et al. 2023, https://arxiv.org/abs/2305.16264, equation 5): with U different
tokens, read R more times after the first,

    D = U + U R* (1 - exp(-R / R*)),    R* = 15.39

A few small runs do not determine five numbers. The exponents and E therefore have weak priors (`EXPONENT`, `SHARE`),
and the law is fitted in three forms, which extrapolate differently: E free, E pinned to what larger models approach
(`PINNED`), and no E at all. Their predictions are averaged, each weighted by exp(-BIC / 2).

The interval is one for a new run, at 95 %, from five sources whose variances add on the scale of log L: the seeds (the
new run's own), the parameters of the law, the spread over forms, the held-out documents (drawn again, relative to the
largest run on the same documents), and lack of fit: where the means of the runs of one size and length scatter around
the law more than their seeds explain, the residuals stand for the noise (an F test at 5 %). It is then widened by what
rolling back-tests show, in which each size is predicted from those below. Nothing is trained or read here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats

from nanophi.core.errors import UserError
from nanophi.eval.statistics import SIGNIFICANCE

MIN_RUNGS = 4
REPETITION = 15.39
"""R* of Muennighoff et al. 2023."""
PINNED = 0.6
"""Bits per byte: 1.82 nats per token of about 4.4 bytes (Besiroglu et al. 2024, https://arxiv.org/abs/2404.10102)."""
FORMS = {"E free": None, "E pinned": PINNED, "no E": 0.0}
EXPONENT = (math.log(0.3), 0.7)
"""Prior of log a and log b. Published: 0.34 and 0.28 (Hoffmann), 0.35 and 0.37 (Besiroglu), with E; without it less."""
SHARE = (math.log(0.5), 0.7)
"""Prior of log E, relative to the smallest loss."""
HUBER = 1.5
"""Where the loss turns from a square into a line, in standard deviations of the seeds; at least `MIN_HUBER`."""
MIN_HUBER = 1e-3
MIN_NOISE = 1e-4
UNFIT, UNFIT_P = 0.02, 0.001
"""Scatter of the means around the law, as a share of the loss, and p-value, from which lack of fit is refused."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A finished run: rung (0 is the smallest), seed, N, tokens read, different tokens among them, bits per byte."""

    rung: int
    seed: int
    parameters: float
    tokens: float
    unique: float
    loss: float

    @property
    def flops(self) -> float:
        """6 N D, the usual measure of compute (attention's own products left out)."""
        return 6 * self.parameters * self.tokens


def effective_tokens(tokens: float, unique: float) -> float:
    """D, discounted for repetition."""
    if tokens <= unique:
        return tokens
    return unique * (1 + REPETITION * (1 - math.exp(-(tokens / unique - 1) / REPETITION)))


def check(points: Sequence[Point], names: Sequence[str], ceiling: float | None = None) -> None:
    """Refuse runs from which nothing can be predicted. Raises `UserError`, naming the run.

    Args:
        names: of the runs.
        ceiling: the loss of a model that has learned nothing; None: not known.
    """
    rungs = sorted({point.rung for point in points})
    if len(rungs) < MIN_RUNGS:
        raise UserError(f"a prediction needs {MIN_RUNGS} sizes, there are {len(rungs)}; add larger or smaller ones")
    if len({(point.rung, point.seed) for point in points}) == len(rungs):
        raise UserError("every size has one seed, so how far seeds differ is not known; run three at the smaller sizes")
    cells = _cells(points)
    for point, name in zip(points, names, strict=True):
        if not math.isfinite(point.loss) or point.loss > 1.2 * float(
            np.median([other.loss for other in cells[_cell(point)]])
        ):
            raise UserError(
                f"{name} has diverged (bits per byte {point.loss:.3f}); lower its learning rate in another plan"
            )
    for rung in rungs:
        best = min(point.loss for point in points if point.rung == rung)
        if ceiling is not None and best >= ceiling:
            raise UserError(
                f"size {rung + 1} has learned nothing (bits per byte {best:.3f}, chance {ceiling:.3f}); train it longer"
            )


def predict(
    points: Sequence[Point],
    target: Point,
    documents: np.ndarray | None = None,
    backtests: bool = True,
) -> dict[str, Any]:
    """The loss of one run of `target`'s size and length (its own loss and seed do not count).

    Args:
        documents: the runs' losses when the held-out documents are drawn again, (resamples, points).

    Returns:
        `value`, `interval` (95 %), `stderr` of log L, its `parts`, `freedom`, `forms` (per form: `value`, `weight`,
        `E`, `A`, `a`, `B`, `b`), `line` (`straight_line`), `lack_of_fit` (`scatter` of the means, `p_value`),
        `backtests` (a list: rung, value, interval, measured, inside), `coverage` and `widened`, the factor from them.

    Raises:
        UserError: if no form fits.
    """
    tests = rolling(points) if backtests else []
    # A back-test is as far from its prediction as one standard deviation, on average; less is no reason to narrow.
    widened = max(1.0, math.sqrt(np.mean([test["z"] ** 2 for test in tests]))) if tests else 1.0
    return {
        **_Average(points).predict(target, documents, widened),
        "line": straight_line(points, target),
        "backtests": tests,
        "coverage": float(np.mean([test["inside"] for test in tests])) if tests else None,
        "widened": widened,
    }


def rolling(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Each size from the third on, at each of its lengths, predicted from the sizes below and compared."""
    tests = []
    for rung in sorted({point.rung for point in points})[2:]:
        average = _Average([point for point in points if point.rung < rung])
        for (_, tokens), members in _cells([point for point in points if point.rung == rung]).items():
            found = average.predict(members[0])
            measured = float(np.mean([math.log(point.loss) for point in members]))
            low, high = found["interval"]
            tests.append({
                "rung": rung, "tokens": tokens, "value": found["value"], "interval": [low, high],
                "measured": math.exp(measured), "inside": low <= math.exp(measured) <= high,
                "z": _normal((measured - math.log(found["value"])) / found["stderr"], found["freedom"]),
            })  # fmt: skip
    return tests


def straight_line(points: Sequence[Point], target: Point) -> float:
    """What the line through the last two sizes' longest runs says, log loss against log compute."""
    cells = _cells(points)
    top = []
    for rung in sorted({rung for rung, _ in cells})[-2:]:
        members = cells[max(cell for cell in cells if cell[0] == rung)]
        top.append((math.log(members[0].flops), float(np.mean([math.log(point.loss) for point in members]))))
    (x0, y0), (x1, y1) = top
    return math.exp(y1 + (y1 - y0) / (x1 - x0) * (math.log(target.flops) - x1))


def _normal(t: float, freedom: float) -> float:
    """The normal deviate that is as rare as one of Student's."""
    return float(np.sign(t) * scipy.stats.norm.isf(max(1e-12, scipy.stats.t(freedom).sf(abs(t)))))


def _cell(point: Point) -> tuple[int, float]:
    return point.rung, point.tokens


def _cells(points: Sequence[Point]) -> dict[tuple[int, float], list[Point]]:
    """Runs that differ in their seed alone."""
    cells: dict[tuple[int, float], list[Point]] = {}
    for point in points:
        cells.setdefault(_cell(point), []).append(point)
    return dict(sorted(cells.items()))


class _Data:
    """The runs as arrays, and what their seeds say of the noise."""

    def __init__(self, points: Sequence[Point]) -> None:
        logs = np.log([[p.parameters, effective_tokens(p.tokens, p.unique), p.loss] for p in points])
        self.centre = logs[:, :2].mean(axis=0)
        self.sizes, self.losses, self.y = logs[:, :2] - self.centre, np.exp(logs[:, 2]), logs[:, 2]
        cells = list(_cells(points))
        self.cell = np.array([cells.index(_cell(point)) for point in points])
        self.counts = np.bincount(self.cell)
        self.freedom = len(points) - len(cells)
        deviations = self.y - self.means(self.y)[self.cell]
        self.noise = max(math.sqrt(float(deviations @ deviations) / max(1, self.freedom)), MIN_NOISE)

    def means(self, values: np.ndarray) -> np.ndarray:
        """Over the runs of one size and length."""
        return np.asarray(np.bincount(self.cell, values) / self.counts)

    def at(self, point: Point) -> np.ndarray:
        """N and D of a run, as `sizes` has them."""
        return np.log([point.parameters, effective_tokens(point.tokens, point.unique)]) - self.centre


class _Fit:
    """One form of the law, fitted: `u` is log A, log a, log B, log b and, unless it is pinned, log E."""

    def __init__(self, data: _Data, form: str) -> None:
        self.form, self.pinned, self.centre = form, FORMS[form], data.centre
        free, floor = self.pinned is None, float(data.losses.min())
        share = math.exp(SHARE[0]) if self.pinned is None else self.pinned / floor
        prior = np.array([0, EXPONENT[0], 0, EXPONENT[0], *([SHARE[0] + math.log(floor)] if free else [])])
        scale = np.array([np.inf, EXPONENT[1], np.inf, EXPONENT[1], *([SHARE[1]] if free else [])])
        ridge = data.noise / scale

        def residuals(u: np.ndarray) -> np.ndarray:
            return np.concatenate([self.log_loss(u, data.sizes) - data.y, ridge * (u - prior)])

        def jacobian(u: np.ndarray) -> np.ndarray:
            return np.concatenate([self.gradient(u, data.sizes), np.diag(ridge)])

        half = math.log((1 - share) / 2 * floor)
        start = prior + np.array([half, 0, half, 0, 0][: len(prior)])
        delta = max(MIN_HUBER, HUBER * data.noise)
        self.u = scipy.optimize.least_squares(residuals, start, jacobian, loss="huber", f_scale=delta).x
        left, slopes = residuals(self.u), jacobian(self.u)
        runs = len(data.y)
        curvature = np.linalg.pinv(slopes.T @ slopes)
        self.covariance, self.pull = data.noise**2 * curvature, slopes[:runs] @ curvature
        self.square = float(left @ left)
        lack, fitted = float(data.counts @ data.means(left[:runs]) ** 2), len(data.counts) - len(self.u)
        self.scatter, self.p_value, self.noise, self.freedom = math.sqrt(lack / runs), 1.0, data.noise, data.freedom
        if fitted > 0 and data.freedom > 0:
            ratio = lack / fitted / data.noise**2
            self.p_value = float(scipy.stats.f.sf(ratio, fitted, data.freedom))
            if self.p_value < SIGNIFICANCE:
                self.noise, self.freedom = math.sqrt(ratio) * data.noise, fitted

    def terms(self, u: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
        """A / N^a, B / D^b and E."""
        return (
            np.exp(u[0] - np.exp(u[1]) * sizes[:, 0]),
            np.exp(u[2] - np.exp(u[3]) * sizes[:, 1]),
            np.exp(u[4]) if self.pinned is None else self.pinned,
        )

    def log_loss(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Log L at sizes (points, 2)."""
        return np.asarray(np.log(sum(self.terms(u, sizes))))

    def gradient(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Of log L by the parameters, (points, parameters)."""
        size, text, rest = self.terms(u, sizes)
        columns = [size, -np.exp(u[1]) * sizes[:, 0] * size, text, -np.exp(u[3]) * sizes[:, 1] * text]
        columns += [np.full(len(size), rest)] if self.pinned is None else []
        return np.stack(columns, axis=1) / (size + text + rest)[:, None]

    @property
    def law(self) -> dict[str, float]:
        """The numbers of the formula."""
        a, b = (float(np.exp(self.u[index])) for index in (1, 3))
        factors = (
            float(np.exp(self.u[index] + power * centre))
            for index, power, centre in zip((0, 2), (a, b), self.centre, strict=True)
        )
        return dict(
            zip(
                ("E", "A", "B", "a", "b"), (float(self.terms(self.u, np.zeros((1, 2)))[2]), *factors, a, b), strict=True
            )
        )


class _Average:
    """The forms that can be fitted, and their average.

    Raises:
        UserError: if no form fits.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.data = data = _Data(points)
        self.fits = [_Fit(data, form) for form, pinned in FORMS.items() if (pinned or 0) < 0.9 * data.losses.min()]
        noise = min(fit.noise for fit in self.fits)
        bic = np.array([fit.square / noise**2 + len(fit.u) * math.log(len(points)) for fit in self.fits])
        self.weights = np.exp(-0.5 * (bic - bic.min()))
        self.weights /= self.weights.sum()
        self.best = best = self.fits[int(self.weights.argmax())]
        if best.p_value < UNFIT_P and best.scatter > UNFIT:
            raise UserError(
                f"no form of the law fits: sizes scatter around it by {100 * best.scatter:.1f} %, seeds by "
                f"{100 * data.noise:.1f} %; look at the smallest size, and leave it out in another plan"
            )

    def predict(self, target: Point, documents: np.ndarray | None = None, widened: float = 1.0) -> dict[str, Any]:
        """What `predict` says but for straight line and back-tests."""
        data, weights, at = self.data, self.weights, self.data.at(target)[None]
        values = np.array([fit.log_loss(fit.u, at)[0] for fit in self.fits])
        slopes = [fit.gradient(fit.u, at)[0] for fit in self.fits]
        spreads = np.array([slope @ fit.covariance @ slope for fit, slope in zip(self.fits, slopes, strict=True)])
        excess = np.array([fit.noise**2 / data.noise**2 - 1 for fit in self.fits])
        mean = float(weights @ values)
        parts = {
            "seed": data.noise**2,
            "law": float(weights @ spreads),
            "forms": float(weights @ (values - mean) ** 2),
            "documents": 0.0,
            "lack of fit": float(weights @ (excess * (spreads + data.noise**2))),
        }
        if documents is not None:
            moved = np.log(documents) - data.y
            # How the prediction follows each run's loss.
            pulls = [fit.pull @ slope for fit, slope in zip(self.fits, slopes, strict=True)]
            parts["documents"] = float((moved @ (weights @ np.array(pulls)) - moved[:, -1]).var())
        freedom = max(1.0, float(weights @ [fit.freedom for fit in self.fits]))
        stderr = widened * math.sqrt(sum(parts.values()))
        half = stderr * float(scipy.stats.t(freedom).isf(SIGNIFICANCE / 2))
        return {
            "value": math.exp(mean),
            "interval": [math.exp(mean - half), math.exp(mean + half)],
            "stderr": stderr,
            "parts": {name: math.sqrt(variance) for name, variance in parts.items()},
            "freedom": freedom,
            "forms": {
                fit.form: {"value": math.exp(value), "weight": float(weight), **fit.law}
                for fit, value, weight in zip(self.fits, values, weights, strict=True)
            },
            "lack_of_fit": {"scatter": self.best.scatter, "p_value": self.best.p_value},
        }
