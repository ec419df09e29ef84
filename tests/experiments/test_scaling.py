"""Predictions on invented data, whose law is known: the interval covers, and an unknown law is noticed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from nanophi.core.errors import UserError
from nanophi.experiments import scaling
from nanophi.experiments.scaling import Law, Point, effective_tokens

SIZES, RATIOS, SEEDS = (0.4e6, 0.8e6, 1.6e6, 3.2e6), (10, 20), (3, 3, 2, 2)
LAW = (0.8, 0.6 * 4e5**0.35, 0.35, 0.5 * 8e6**0.3, 0.3)
FAR = 1e12
"""Different tokens, so many that none repeats."""


def predict(points, target, documents=None):
    return Law(points, documents).predict(target)


def loss(law, parameters, tokens):
    rest, size, a, text, b = law
    return rest + size / parameters**a + text / tokens**b


def runs(rng, law=LAW, noise=0.004, sizes=SIZES, seeds=SEEDS, ratios=RATIOS, unique=FAR):
    """Runs of a ladder, whose lengths share half of their seed's luck as they share the beginning of a training."""
    points = []
    for rung, (parameters, count) in enumerate(zip(sizes, seeds, strict=True)):
        for seed in range(count):
            common = rng.normal()
            for ratio in ratios:
                luck = math.sqrt(0.5) * (common + rng.normal())
                tokens = ratio * parameters
                value = loss(law, parameters, effective_tokens(tokens, unique)) * math.exp(noise * luck)
                points.append(Point(rung, seed, parameters, tokens, unique, value))
    return points


def new_run(rng, law=LAW, noise=0.004, factor=2.0, unique=FAR):
    """A run `factor` times as large and long as the largest of `runs`."""
    parameters, tokens = factor * SIZES[-1], factor * SIZES[-1] * RATIOS[-1]
    value = loss(law, parameters, effective_tokens(tokens, unique)) * math.exp(noise * rng.normal())
    return Point(-1, 0, parameters, tokens, unique, value)


def some_law(rng):
    """Exponents, an E and a balance of the terms as published laws of language models have them."""
    a, b = rng.uniform(0.25, 0.45, 2)
    total, share = rng.uniform(1.2, 1.8), rng.uniform(0.4, 0.7)
    return rng.choice([0.4, 0.6, 0.8]), total * share * 4e5**a, a, total * (1 - share) * 8e6**b, b


def covered(draws, seed, noise, factor):
    rng, inside, halves = np.random.default_rng(seed), 0, []
    for _ in range(draws):
        law = some_law(rng)
        points, measured = runs(rng, law, noise), new_run(rng, law, noise, factor)
        low, high = predict(points, measured)["interval"]
        inside += low <= measured.loss <= high
        halves.append(math.log(high / low) / 2)
    return inside / draws, float(np.median(halves))


def test_the_interval_covers_what_follows_the_law():
    share, half = covered(200, seed=1, noise=0.004, factor=2)
    assert 0.90 <= share <= 0.99
    assert half < 0.03  # and is of use: 4 times the compute, within 3 %


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "factor"), [(0.002, 2), (0.01, 2), (0.004, 4), (0.01, 4), (0.004, 8)])
def test_the_interval_covers_with_other_noise_and_further_away(noise, factor):
    assert 0.88 <= covered(400, seed=2, noise=noise, factor=factor)[0] <= 0.99


def bent(point, bend):
    return dataclasses.replace(point, loss=point.loss * (1 + bend * math.sin(1.7 * math.log2(point.parameters))))


def test_a_law_that_no_form_fits_widens_the_interval_or_is_refused():
    rng, inside, straight, wide = np.random.default_rng(3), 0, [], []
    for _ in range(20):
        points, target = runs(rng), new_run(rng)
        straight.append(predict(points, target)["stderr"])
        law, measured = Law([bent(point, 0.02) for point in points]), bent(target, 0.02)
        found = law.predict(target)
        wide.append(found["stderr"])
        assert law.p_value < 0.05 and found["parts"]["lack of fit"] > found["parts"]["seed"]
        inside += found["interval"][0] <= measured.loss <= found["interval"][1]
        with pytest.raises(
            UserError, match=r"^no form of the law fits: sizes scatter around it by \d\.\d %, seeds by 0"
        ):
            predict([bent(point, 0.06) for point in points], target)
    assert inside >= 18
    assert np.median(wide) > 4 * np.median(straight)


def test_without_noise_the_law_is_found():
    points = runs(np.random.default_rng(0), noise=0.0)
    target = new_run(np.random.default_rng(0), noise=0.0, factor=4)
    found = predict(points, target)
    assert found["value"] == pytest.approx(target.loss, rel=1e-3)
    free = found["forms"]["E free"]
    assert free["weight"] > 0.2 and sum(form["weight"] for form in found["forms"].values()) == pytest.approx(1)
    law = [free[key] for key in ("E", "A", "a", "B", "b")]
    for point in points:
        assert loss(law, point.parameters, point.tokens) == pytest.approx(point.loss, rel=2e-3)
    # A straight line does not know that the loss has a floor.
    assert found["line"] < 0.99 * target.loss


def test_repeated_tokens_count_less():
    """Muennighoff et al. 2023: up to four passes are worth almost as much as new text, forty are not."""
    assert effective_tokens(5e6, 1e7) == 5e6 and effective_tokens(1e7, 1e7) == 1e7
    assert effective_tokens(4e7, 1e7) == pytest.approx(3.73e7, rel=0.01)
    assert effective_tokens(4e8, 1e7) < 0.4 * 4e8
    assert effective_tokens(1e12, 1e7) == pytest.approx(1e7 * (1 + scaling.REPETITION))
    rng = np.random.default_rng(0)
    points = runs(rng, noise=0.0, unique=1e7)
    target = new_run(rng, noise=0.0, factor=2, unique=1e7)
    assert predict(points, target)["value"] == pytest.approx(target.loss, rel=1e-3)


def test_documents_that_move_the_prediction_widen_it():
    rng = np.random.default_rng(0)
    points, target = runs(rng), new_run(rng)
    losses = np.array([point.loss for point in points])
    parts = {
        # All runs alike: the target, measured on the same documents, moves along.
        "alike": losses * np.exp(0.01 * rng.normal(size=(200, 1))),
        "by size": losses * np.exp(0.01 * rng.normal(size=(200, 4)))[:, [point.rung for point in points]],
    }
    parts = {name: predict(points, target, drawn)["parts"]["documents"] for name, drawn in parts.items()}
    assert parts["alike"] < 0.003 < 0.01 < parts["by size"]


def test_back_tests_predict_each_size_from_those_below():
    rng = np.random.default_rng(0)
    points = runs(rng)
    law = Law(points)
    assert [(test["rung"], test["tokens"] / SIZES[test["rung"]]) for test in law.backtests] == [
        (2, 10), (2, 20), (3, 10), (3, 20),
    ]  # fmt: skip
    assert law.widened >= 1 and all(type(test["inside"]) is bool for test in law.backtests)
    changed = [dataclasses.replace(p, loss=p.loss * (1.5 if p.rung == 3 else 1)) for p in points]
    again = scaling._backtests(changed)
    assert again[:2] == law.backtests[:2]  # what lies above a size does not count
    assert not any(test["inside"] for test in again[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda points: [p for p in points if p.rung < 3], "a prediction needs 4 sizes, there are 3; add larger"),
        (lambda points: [p for p in points if p.seed == 0], "every size has one seed, so how far seeds differ is not"),
        (
            lambda points: [dataclasses.replace(points[0], loss=math.nan), *points[1:]],
            r"run-0 has diverged \(nan bits per byte\); plan again with a lower rate",
        ),
        (
            lambda points: [*points[:-1], dataclasses.replace(points[-1], loss=2 * points[-1].loss)],
            r"run-\d+ has diverged \([\d.]+ bits per byte\)",
        ),
        (
            lambda points: [dataclasses.replace(p, loss=8.2) if p.rung == 0 else p for p in points],
            r"size 1 has learned nothing \(8\.200 bits per byte, chance 8\.000\)",
        ),
    ],
)
def test_runs_from_which_nothing_can_be_predicted(change, message):
    points = runs(np.random.default_rng(0))
    scaling.check(points, [f"run-{number}" for number in range(len(points))], ceiling=8.0)
    broken = change(points)
    with pytest.raises(UserError, match=message) as raised:
        scaling.check(broken, [f"run-{number}" for number in range(len(broken))], ceiling=8.0)
    assert "\n" not in str(raised.value)
