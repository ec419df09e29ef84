"""What a ladder's records say: the prediction, its test, and the answer as JSON, Markdown and a picture.

Everything comes from the plan and the records in a folder; the statistics are `scaling.py`'s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanophi.core import formatting, markup, plots
from nanophi.core.files import read_json, sha256_of, sha256_of_file, write_json, write_text
from nanophi.experiments import ablation, records
from nanophi.experiments.scaling import Law, Point, check

TITLES = {"heldout": "held-out text", "answers": "right answers"}
UNCONFIRMED = " (not confirmed at this scale)"
CURVE = 25
"""Points of compute at which recipes are compared."""


def predict(output: Path) -> dict[str, Any]:
    """The prediction of one recipe from its finished runs, for the hidden size and for the recipe itself.

    Raises:
        UserError: if nothing can be predicted from them.
    """
    from nanophi.core.run import now

    plan = read_json(output / "plan.json")
    runs = [run for part in ("half", "full") for run in records.read_records(output / part)]
    found: dict[str, Any] = {
        "format": plan["format"],
        "recipe": plan["recipe"],
        "plan_sha256": sha256_of_file(output / "plan.json"),
        "records_sha256": sha256_of(sorted([run["run"], run["tokens_seen"], run["weights_sha256"]] for run in runs)),
        "predicted": now(),
        "targets": {},
    }
    for name in ("heldout", *(["answers"] if plan["tasks"] else [])):
        law = fit(output, name)
        found["targets"][name] = {
            **{key: law.predict(point) for key, point in (("hidden", hidden(plan)), ("recipe", target(plan)))},
            **{"backtests": law.backtests, "widened": law.widened, "scatter": law.scatter, "p_value": law.p_value},
            "coverage": float(np.mean([test["inside"] for test in law.backtests])),
        }
    return found | {"rates": _rates(output, runs)}


def fit(output: Path, name: str) -> Law:
    """The law of a target, from a recipe's finished runs. Raises `UserError` if they do not give one."""
    plan = read_json(output / "plan.json")
    runs = [run for part in ("half", "full") for run in records.read_records(output / part)]
    runs = sorted(runs, key=lambda run: (run["rung"], run["tokens_seen"], run["seed"]))
    items = [_items(run, name, plan) for run in runs]
    points = [point_of(run, plan, name) for run in runs]
    check(points, [run["run"] for run in runs], plan["chance"] if name == "heldout" else math.inf)
    draws = ablation.item_draws(items[0], np.random.default_rng(0))
    parts = [ablation._resampled(drawn, [sets[index] for sets in items]) for index, drawn in enumerate(draws)]
    return Law(points, np.mean(parts, axis=0))


def _items(run: Mapping[str, Any], name: str, plan: Mapping[str, Any]) -> list[Any]:
    """A run's items, as `ablation.Items`: held-out documents, or the right answers of each task."""
    if name == "heldout":
        return [tuple(np.array(run["items"][records.HELDOUT]["values"], float).T)]
    bits = [np.array(run["items"][task]["values"], float) for task in plan["tasks"]]
    return [(-math.log(2) * values, np.ones(len(values))) for values in bits]


def point_of(run: Mapping[str, Any], plan: Mapping[str, Any], name: str) -> Point:
    """A record as a point of the law."""
    size, loss = plan["rungs"][run["rung"]], ablation.value(_items(run, name, plan))
    return Point(run["rung"], run["seed"], size["parameters"], run["tokens_seen"], run["unique_tokens"], loss)


def hidden(plan: Mapping[str, Any]) -> Point:
    """The hidden size."""
    size = plan["rungs"][-1]
    return Point(len(plan["rungs"]) - 1, 0, size["parameters"], size["tokens"], plan["target"]["unique_tokens"])


def target(plan: Mapping[str, Any]) -> Point:
    """The recipe itself."""
    return Point(len(plan["rungs"]), 0, *(plan["target"][key] for key in ("parameters", "tokens", "unique_tokens")))


def _rates(output: Path, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Loss at other learning rates, relative to the same run at the recipe's own."""
    plan, found = read_json(output / "plan.json"), []
    for run in records.read_records(output / "rates"):
        same = ("rung", "seed", "tokens_seen")
        own = next(other for other in runs if all(other[key] == run[key] for key in same))
        losses = [point_of(each, plan, "heldout").loss for each in (run, own)]
        found.append({key: run[key] for key in ("rung", "factor")} | {"difference": losses[0] - losses[1]})
    return sorted(found, key=lambda one: (one["rung"], one["factor"]))


def write_answer(output: Path, names: Sequence[str]) -> dict[str, Any]:
    """`ladder.json`, `.md` and `.png` of the recipes whose folders are in `output`."""
    laws = {name: fit(output / name, "heldout") for name in names}
    plans = {name: read_json(output / name / "plan.json") for name in names}
    result: dict[str, Any] = {"recipes": {name: _tested(output / name, plans[name]) for name in names}}
    first = names[0]
    result["differences"] = {
        other: difference(laws[other], plans[other], laws[first], plans[first]) for other in names[1:]
    }
    result["paragraph"] = " ".join([
        *(_sentence(name, entry) for name, entry in result["recipes"].items()),
        *(_compared(other, first, found) for other, found in result["differences"].items()),
    ])  # fmt: skip
    write_json(output / "ladder.json", result)
    write_text(output / "ladder.md", to_markdown(result, plans))
    draw(laws, plans, result, output / "ladder.png")
    return result


def _tested(output: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's prediction, with the hidden size as measured and what that confirms."""
    entry, runs = read_json(output / "prediction.json"), records.read_records(output / "hidden")
    largest = max(point.flops for point in fit(output, "heldout").points)
    for name, found in entry["targets"].items():
        measured = float(np.mean([point_of(run, plan, name).loss for run in runs]))
        low, high = found["hidden"]["interval"]
        found["measured"], found["inside"] = measured, low <= measured <= high
        found["confirmed"] = hidden(plan).flops / largest if found["inside"] else 1.0
        found["ratio"] = target(plan).flops / largest
    return entry


def path(plan: Mapping[str, Any], law: Law, flops: float) -> Point:
    """The recipe's own size and length at another compute, between those of its largest fitted run and its own."""
    small, large = max(law.points, key=lambda point: point.flops), target(plan)
    share = math.log(flops / small.flops) / math.log(large.flops / small.flops)
    parameters = small.parameters * (large.parameters / small.parameters) ** share
    return Point(-1, 0, parameters, flops / 6 / parameters, large.unique)


def difference(ours: Law, our_plan: Mapping[str, Any], theirs: Law, their_plan: Mapping[str, Any]) -> dict[str, Any]:
    """`ours - theirs` in bits per byte, at equal compute up to the smaller recipe's, and where its sign changes."""
    least = min(point.flops for law in (ours, theirs) for point in law.points)
    most = min(target(plan).flops for plan in (our_plan, their_plan))
    curve = []
    for flops in np.geomspace(least, most, CURVE).tolist():
        a, b = (law.predict(path(plan, law, flops)) for law, plan in ((ours, our_plan), (theirs, their_plan)))
        error = 1.96 * math.hypot(a["stderr"] * a["value"], b["stderr"] * b["value"])
        value = a["value"] - b["value"]
        curve.append({"flops": flops, "value": value, "interval": [value - error, value + error]})
    changes = [one["flops"] for one, next_ in itertools.pairwise(curve) if one["value"] * next_["value"] < 0]
    return {"curve": curve, "sign_changes": changes}


def _sentence(name: str, entry: Mapping[str, Any]) -> str:
    parts = []
    for kind, found in entry["targets"].items():
        tested, confirmed = found["hidden"], "" if found["ratio"] <= found["confirmed"] else UNCONFIRMED
        parts.append(
            f"On {TITLES[kind]} the hidden size was predicted at {_interval(tested)} bits per byte and measured at "
            f"{found['measured']:.4f}, {'inside' if found['inside'] else 'outside'} the interval (a straight line: "
            f"{tested['line']:.4f}); of the back-tests {formatting.percent(found['coverage'], 0)} were inside. "
            f"Predicted for the recipe, at {formatting.figure(found['ratio'])} times the largest fitted compute: "
            f"{_interval(found['recipe'])}{confirmed}."
        )
    return f"{name}: {' '.join(parts)}"


def _interval(found: Mapping[str, Any]) -> str:
    return "{:.4f} [{:.4f}, {:.4f}]".format(found["value"], *found["interval"])


def _compared(ours: str, theirs: str, found: Mapping[str, Any]) -> str:
    last, changes = found["curve"][-1], found["sign_changes"]
    where = f"changes sign at about {changes[-1]:.1g} FLOP" if changes else "keeps its sign"
    return f"{ours} - {theirs} at {last['flops']:.2g} FLOP: {_interval(last)} bits per byte; it {where}."


def to_markdown(result: Mapping[str, Any], plans: Mapping[str, Any]) -> str:
    """The whole answer: paragraph, picture, predictions, forms, back-tests, learning rates, method."""
    lines = ["# Predicted from smaller runs", result["paragraph"], "![Loss against compute](ladder.png)"]
    for name, entry in result["recipes"].items():
        rows = [
            [
                *(f"{TITLES[kind]}, {size}", _interval(found[size]), f"{found[size]['line']:.4f}"),
                ", ".join(f"{part} {100 * value:.2f}" for part, value in found[size]["parts"].items()),
                ", ".join(f"{form} {one['value']:.4f}" for form, one in found[size]["forms"].items()),
            ]
            for kind, found in entry["targets"].items()
            for size in ("hidden", "recipe")
        ]
        head = ("predicted", "bits per byte [95 %]", "straight line", "parts of the error (%)", "forms")
        tests = [
            [str(test["rung"] + 1), formatting.size(test["tokens"]), _interval(test), f"{test['measured']:.4f}"]
            for test in entry["targets"]["heldout"]["backtests"]
        ]
        rates = [[str(one["rung"] + 1), f"{one['factor']:.2f}", f"{one['difference']:+.4f}"] for one in entry["rates"]]
        lines += [
            f"## {markup.text(name)}",
            markup.table(head, rows),
            "Back-tests on held-out text, each size predicted from those below:",
            markup.table(("size", "tokens", "predicted", "measured"), tests),
            "Other learning rates, bits per byte more than at the recipe's own:",
            markup.table(("size", "factor", "difference"), rates),
            f"Planned {plans[name]['planned']}, predicted {entry['predicted']}, before the hidden size was trained.",
        ]
    return "\n\n".join([*lines, "## Method", next(iter(plans.values()))["method"]]) + "\n"


def draw(laws: Mapping[str, Law], plans: Mapping[str, Any], result: Mapping[str, Any], file: Path) -> None:
    """Loss against compute: the runs, the law and its band, and the hidden size as measured."""
    with plots.picture(file, 8, 5) as figure:
        axes = figure.subplots()
        for (name, law), colour in zip(laws.items(), itertools.cycle(plots.SERIES), strict=False):
            plan, longest = plans[name], {point.rung: point for point in law.points}
            axes.plot([p.flops for p in law.points], [p.loss for p in law.points], ".", color=colour)
            beyond = np.geomspace(2 * hidden(plan).flops, max(4 * hidden(plan).flops, target(plan).flops), 9)
            at = [*longest.values(), hidden(plan), *(path(plan, law, flops) for flops in beyond.tolist())]
            found, x = [law.predict(point) for point in at], [point.flops for point in at]
            axes.plot(x, [one["value"] for one in found], color=colour, label=name)
            low, high = np.array([one["interval"] for one in found]).T
            axes.fill_between(x, low, high, color=colour, alpha=0.15)
            measured = result["recipes"][name]["targets"]["heldout"]["measured"]
            axes.plot(hidden(plan).flops, measured, "D", color=colour, label=f"{name}, hidden size")
        axes.set(xscale="log", xlabel="training FLOP (6 N D)", ylabel="held-out bits per byte")
        axes.legend()
