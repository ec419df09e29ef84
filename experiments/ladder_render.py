"""What a ladder's records say: the prediction, its test, and the answer as JSON, Markdown and a picture.

Everything comes from the plan and the records in a folder; the statistics are `scaling.py`'s.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from nanophi.core import formatting, markup, plots
from nanophi.core.files import read_json, sha256_of, sha256_of_file, write_json, write_text
from nanophi.core.run import now
from nanophi.experiments import ablation, records
from nanophi.experiments.scaling import Law, Point, check, entries_of

TARGETS = {
    "heldout": ("held-out text", "bits per byte"),
    "answers": ("right answers", "bits per byte"),
    "errors": ("wrong answers", "of all items"),
}
"""What is predicted, and its unit."""
CURVE = 25
"""Points of compute at which recipes are compared."""


class Ladder:
    """The plan and the fitted runs of one recipe, in its folder, and what follows from them."""

    def __init__(self, output: Path) -> None:
        self.output, self.plan = output, read_json(output / "plan.json")
        runs = [run for part in ("half", "full") for run in self._records(part)]
        self.runs = sorted(runs, key=lambda run: (run["rung"], run["tokens_seen"], run["seed"]))
        self.above = [task for task in self.plan["tasks"] if self._above_chance(task)]
        self.targets = ["heldout", *(["answers"] if self.plan["tasks"] else []), *(["errors"] if self.above else [])]
        size, own = self.plan["rungs"][-1], self.plan["target"]
        self.hidden = Point(-1, 0, size["parameters"], size["tokens"], own["unique_tokens"])
        self.recipe = Point(-1, 0, own["parameters"], own["tokens"], own["unique_tokens"])

    def _records(self, part: str) -> list[dict[str, Any]]:
        planned = [entry[1:] for entry in entries_of(self.plan) if entry[0] == part]
        return records.read_records(self.output / part, ("rung", "seed", "factor"), planned)

    def _above_chance(self, task: str) -> bool:
        """Whether all fitted runs answer a task better than guessing does, but not all of it."""
        found = [run["items"][task] for run in self.runs]
        return all(one["above_chance"] and min(one["correct"]) < 1 for one in found)

    def items(self, run: Mapping[str, Any], target: str) -> list[ablation.Items]:
        """A run's held-out documents; of each task the right answers, or as `errors` whether each item was wrong."""
        if target == "errors":
            wrong = [1 - np.array(run["items"][task]["correct"], float) for task in self.above]
            return [(-math.log(2) * values, np.ones(len(values))) for values in wrong]
        if target == "heldout":
            nats, sizes = np.array(run["items"][records.HELDOUT]["values"], float).T
            return [(nats, sizes)]
        bits = [np.array(run["items"][task]["values"], float) for task in self.plan["tasks"]]
        return [(-math.log(2) * values, np.ones(len(values))) for values in bits]

    def point(self, run: Mapping[str, Any], target: str) -> Point:
        """A record as a point of the law."""
        parameters, loss = self.plan["rungs"][run["rung"]]["parameters"], ablation.value(self.items(run, target))
        return Point(run["rung"], run["seed"], parameters, run["tokens_seen"], run["unique_tokens"], loss)

    @functools.cache  # noqa: B019
    def law(self, target: str) -> Law:
        """The law of a target. Raises `UserError` if the runs do not give one."""
        points = [self.point(run, target) for run in self.runs]
        check(points, [run["run"] for run in self.runs], self.plan["chance"] if target == "heldout" else math.inf)
        sets = list(zip(*(self.items(run, target) for run in self.runs), strict=True))
        draws = ablation.item_draws([each[0] for each in sets], np.random.default_rng(0))
        drawn = [ablation._resampled(counts, each) for counts, each in zip(draws, sets, strict=True)]
        return Law(points, np.mean(drawn, axis=0))

    def predict(self) -> dict[str, Any]:
        """The prediction for the hidden size and for the recipe, in units of the largest fitted compute."""
        targets = {}
        for name in self.targets:
            law, most = self.law(name), max(point.flops for point in self.law(name).points)
            targets[name] = {
                **{"hidden": law.predict(self.hidden), "hidden_ratio": self.hidden.flops / most},
                **{"recipe": law.predict(self.recipe), "ratio": self.recipe.flops / most},
                **{key: getattr(law, key) for key in ("backtests", "widened", "scatter", "p_value")},
                "coverage": float(np.mean([test["inside"] for test in law.backtests])),
            }
        if self.above:
            targets["errors"]["tasks"] = self.above
        made = sorted([run["run"], run["tokens_seen"], run["weights_sha256"]] for run in self.runs)
        hashes = {"plan_sha256": sha256_of_file(self.output / "plan.json"), "records_sha256": sha256_of(made)}
        return {"recipe": self.plan["recipe"], **hashes, "predicted": now(), "targets": targets, "rates": self._rates()}

    def _rates(self) -> list[dict[str, Any]]:
        """Bits per byte at other learning rates, more than at the recipe's own."""
        own = {(run["rung"], run["seed"], run["tokens_seen"]): self.point(run, "heldout").loss for run in self.runs}
        found = [
            {key: run[key] for key in ("rung", "factor")}
            | {"difference": self.point(run, "heldout").loss - own[run["rung"], run["seed"], run["tokens_seen"]]}
            for run in self._records("rates")
        ]
        return sorted(found, key=lambda one: (one["rung"], one["factor"]))

    def tested(self) -> dict[str, Any]:
        """The prediction that was written, the hidden size as measured, and the ratio of compute that this confirms."""
        written: dict[str, Any] = read_json(self.output / "prediction.json")
        for name, found in written["targets"].items():
            runs = self._records("hidden")
            measured, (low, high) = self.point(runs[0], name).loss, found["hidden"]["interval"]
            found |= {"measured": measured, "inside": low <= measured <= high}
            found["confirmed"] = found["ratio"] <= (found["hidden_ratio"] if found["inside"] else 1)
        return written

    def at(self, flops: float) -> Point:
        """Size and length at another compute, on the way from the largest fitted run to the recipe's own."""
        small, large = max(self.law("heldout").points, key=lambda point: point.flops), self.recipe
        share = math.log(flops / small.flops) / math.log(large.flops / small.flops)
        parameters = small.parameters * (large.parameters / small.parameters) ** share
        return Point(-1, 0, parameters, flops / 6 / parameters, large.unique)


def write_answer(output: Path, names: Sequence[str]) -> dict[str, Any]:
    """`ladder.json`, `.md` and `.png` of the recipes whose folders are in `output`; the first is the baseline."""
    ladders = {name: Ladder(output / name) for name in names}
    first, *others = ladders.values()
    result: dict[str, Any] = {
        "recipes": {name: ladder.tested() for name, ladder in ladders.items()},
        "differences": {
            other.output.name: {"baseline": first.output.name, **difference(other, first)} for other in others
        },
        "planned": first.plan["planned"],
        "method": first.plan["method"],
    }
    write_json(output / "ladder.json", result)
    page = Path(__file__).with_name("ladder.md").read_text(encoding="utf-8")
    shown = {"interval": _interval, "text": markup.text, "formatting": formatting, "targets": TARGETS}
    shown["asked"] = {name: ladder.plan["tasks"] for name, ladder in ladders.items()}
    text = jinja2.Template(page, keep_trailing_newline=True, trim_blocks=True).render(**result, **shown)
    write_text(output / "ladder.md", text)
    draw(ladders, result, output / "ladder.png")
    return {**result, "paragraph": text.split("\n\n")[1]}


def difference(ours: Ladder, theirs: Ladder) -> dict[str, Any]:
    """`ours - theirs` in bits per byte at equal compute, and where its sign changes.

    From the largest fitted run, where the way to a recipe begins (`at`), to the smaller recipe; there may be nothing.
    """
    least = max(point.flops for ladder in (ours, theirs) for point in ladder.law("heldout").points)
    most, curve = min(ours.recipe.flops, theirs.recipe.flops), []
    for flops in np.geomspace(least, most, CURVE).tolist() if least < most else ():
        a, b = (ladder.law("heldout").predict(ladder.at(flops)) for ladder in (ours, theirs))
        value, error = a["value"] - b["value"], 1.96 * math.hypot(a["stderr"] * a["value"], b["stderr"] * b["value"])
        curve.append({"flops": flops, "value": value, "interval": [value - error, value + error]})
    changes = [one["flops"] for one, then in itertools.pairwise(curve) if one["value"] * then["value"] < 0]
    return {"curve": curve, "sign_changes": changes}


def _interval(found: Mapping[str, Any]) -> str:
    return "{:.4f} [{:.4f}, {:.4f}]".format(found["value"], *found["interval"])


def draw(ladders: Mapping[str, Ladder], result: Mapping[str, Any], file: Path) -> None:
    """Loss against compute: the runs, the law and its band, and the hidden size as measured."""
    with plots.picture(file, 8, 5) as figure:
        axes = figure.subplots()
        for (name, ladder), colour in zip(ladders.items(), itertools.cycle(plots.SERIES), strict=False):
            law, hidden = ladder.law("heldout"), ladder.hidden
            axes.plot([p.flops for p in law.points], [p.loss for p in law.points], ".", color=colour)
            beyond = np.geomspace(2 * hidden.flops, max(4 * hidden.flops, ladder.recipe.flops), 9).tolist()
            at = [*{point.rung: point for point in law.points}.values(), hidden, *map(ladder.at, beyond)]
            found, x = [law.predict(point) for point in at], [point.flops for point in at]
            axes.plot(x, [one["value"] for one in found], color=colour, label=name)
            low, high = np.array([one["interval"] for one in found]).T
            axes.fill_between(x, low, high, color=colour, alpha=0.15)
            measured = result["recipes"][name]["targets"]["heldout"]["measured"]
            axes.plot(hidden.flops, measured, "D", color=colour, label=f"{name}, hidden size")
        axes.set(xscale="log", xlabel="training FLOP (6 N D)", ylabel="held-out bits per byte")
        axes.legend()
