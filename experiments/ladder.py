"""`nanophi ladder`: small versions of a recipe are trained, and the recipe's own loss is predicted from them.

Each size has about twice the parameters of the last, in the recipe's own shape and with its settings scaled
(`core/dial.py`), and is trained for half and for all of its tokens; under WSD the longer run continues the shorter one
from where its rate began to fall. Two sizes are also trained at other learning rates. Then the law is fitted
(`scaling.py`), the prediction is written, and only then a larger size is trained, hidden until now, which tests it.

    OUTPUT/NAME/plan.json         per recipe, before anything is trained: sizes, tokens, seeds, fit, refusals, price
    OUTPUT/NAME/half|full|rates|hidden/records/   one JSON file per finished run, with every item's log-likelihood
    OUTPUT/NAME/prediction.json   written once, before the hidden size is trained
    OUTPUT/ladder.json|.md|.png   the answer (`ladder_render.py`) from these files alone
    RUNS/NAME/ladder.json         the prediction, which the report of the recipe's own run is compared with

Called again it resumes. A plan is not changed: another question needs another OUTPUT.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from nanophi.core import dial, formatting
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_file, write_json
from nanophi.core.options import Jobs, Overrides, Recipes, Runs
from nanophi.core.recipe import Recipe, load_recipe
from nanophi.experiments import records, scaling
from nanophi.experiments.records import FORMAT, Report
from nanophi.pipeline import Pipeline

LENGTHS = {"half": 0.5, "full": 1.0, "rates": 0.5, "hidden": 1.0}
"""Folder of records -> share of a size's tokens."""
RATES, RATE_SIZES = (1 / 1.5, 1.5), (0, 2)
"""Factors of both learning rates that are tried beside the recipe's own, and at which sizes."""
HIDDEN = 4
"""Compute of the hidden size, in units of the largest fitted one, at least."""
SMALLEST = 64
"""The recipe's parameters over the smallest size's, if it is not named."""


def ladder(
    recipes: Recipes,
    smallest: Annotated[float | None, Option(min=1, help="Parameters of the smallest size (default: 1/64).")] = None,
    sizes: Annotated[int, Option(min=1, help="Fitted sizes, each twice the last.")] = scaling.MIN_RUNGS,
    tokens_per_parameter: Annotated[float, Option(min=1, help="Of every size.")] = dial.TOKENS_PER_PARAMETER,
    seed: Annotated[list[int], Option(min=0, help="Of the smallest two sizes; two for the others.")] = [0, 1, 2],
    tasks: Annotated[str, Option(help="Multiple-choice tasks whose right answers are predicted too.")] = "none",
    price: Annotated[float | None, Option(min=0, help="Dollars per hour (default: the recipe's, if any).")] = None,
    output: Annotated[
        Path | None, Option(help="Where the answer goes. [default: ladders/NAME]", show_default=False)
    ] = None,
    plan: Annotated[bool, Option("--plan", help="Write the plan with its price and stop.")] = False,
    jobs: Jobs = 1,
    runs: Runs = Path("runs"),
    overrides: Overrides = [],
) -> None:
    """Predict a recipe's loss from small versions of it, with an interval that a larger one tests.

    Several recipes are compared: which is better at which compute.

    Example: nanophi ladder nano-phi-d12 --plan
    """
    from nanophi.experiments import ladder_render

    resolved = [load_recipe(recipe, overrides) for recipe in recipes]
    output = Path("ladders") / resolved[0].name if output is None else output
    names = [] if tasks == "none" else [task.strip() for task in tasks.split(",")]
    options = {"sizes": sizes, "tokens_per_parameter": tokens_per_parameter, "seeds": seed, "tasks": names}
    ladders = [Ladder(recipe, runs, output / recipe.name, options, smallest, price, jobs) for recipe in resolved]
    plans = [each.plan() for each in ladders]
    if plan:
        return
    for each, planned in zip(ladders, plans, strict=True):
        each.run(planned)
    answer = ladder_render.write_answer(output, [recipe.name for recipe in resolved])
    typer.echo(f"\n{answer['paragraph']}\n\n{output / 'ladder.md'}")


@dataclasses.dataclass
class Ladder:
    """The ladder of one recipe; `output` is its own folder."""

    recipe: Recipe
    runs: Path
    output: Path
    options: Mapping[str, Any]
    smallest: float | None = None
    price: float | None = None
    jobs: int = 1
    report: Report = print

    def plan(self) -> dict[str, Any]:
        """The plan in `output`, written there if there is none yet. Raises `UserError` if it cannot be carried out."""
        if self.recipe.conversations:
            raise UserError(f"{self.recipe.name} trains on conversations; name the recipe of its base")
        question = {"recipe": self.recipe.dump(), **self.options, "smallest": self.smallest}
        plan = records.keep_plan(self.output, question, self._make_plan)
        price = plan["estimate"]
        cost = "no price known, name --price" if price["dollars"] is None else f"${price['dollars']:.2f}"
        self.report(
            f"{self.recipe.name}: {', '.join(formatting.size(rung['parameters']) for rung in plan['rungs'])} parameters "
            f"(the last size hidden); {price['runs']} runs, {price['flops']:.2g} FLOP, about "
            f"{formatting.duration(3600 * price['hours'])} with {price['jobs']} at once, {cost}\n"
            f"{self.output / 'plan.json'} {sha256_of_file(self.output / 'plan.json')[:12]}"
        )
        return plan

    def run(self, plan: Mapping[str, Any]) -> None:
        """Make the runs that have no record yet, and the prediction before the hidden one."""
        from nanophi.experiments import ladder_render

        for part in ("half", "full", "rates"):
            self._make(plan, part)
        path, found = self.output / "prediction.json", ladder_render.predict(self.output)
        if path.exists() and read_json(path)["records_sha256"] != found["records_sha256"]:
            raise UserError(f"{path} was made from other records than are there now; put them back")
        if not path.exists():
            write_json(path, found)
        write_json(self.runs / self.recipe.name / "ladder.json", read_json(path))
        self._make(plan, "hidden")

    def _make(self, plan: Mapping[str, Any], part: str) -> None:
        quiet = records.without_repetition(self.report)
        entries = {run_of(self.recipe, plan, entry).name: entry for entry in entries_of(plan) if entry[0] == part}
        made = [Pipeline(run_of(self.recipe, plan, entry), self.runs, report=quiet) for entry in entries.values()]
        named = {pipeline.recipe.name: pipeline for pipeline in made}

        def finished(name: str) -> None:
            _, rung, seed, factor = entries[name]
            unique = read_json(named[name].path / "data/tokens/tokens.json")["train"]["tokens"]
            fields = {"rung": rung, "seed": seed, "factor": factor, "unique_tokens": unique}
            records.write_record(named[name], plan["tasks"], self.output / part, **fields)

        records.run_missing(made, self.output / part, self.jobs, finished, self.report)

    def _make_plan(self, question: Mapping[str, Any]) -> dict[str, Any]:
        from nanophi.core.environment import environment
        from nanophi.core.run import now
        from nanophi.training.estimate import measured_speed

        recipe = self.recipe
        plan: dict[str, Any] = {"format": FORMAT, **question, "rungs": self._rungs(question)}
        entries = entries_of(plan)
        fitted = [
            scaling.Point(r, s, 0, LENGTHS[part], 1, 1.0) for part, r, s, _ in entries if part in ("half", "full")
        ]
        scaling.check(fitted, [""] * len(fitted), math.inf)
        first = Pipeline(run_of(recipe, plan, entries[0]), self.runs, report=records.without_repetition(self.report))
        first.check("evaluation")
        with first.run.lock():
            counts = first.tokens()
        # Under WSD the longer run continues the shorter one; counted as if it did not.
        flops = dict.fromkeys(LENGTHS, 0.0)
        for part, rung, _, _ in entries:
            size = plan["rungs"][rung]
            flops[part] += LENGTHS[part] * size["tokens"] * size["flops_per_token"]
        largest = run_of(recipe, plan, entries[-1])
        speed = measured_speed(largest, report=lambda line: None) * plan["rungs"][-1]["flops_per_token"]
        hours = sum(flops.values()) / speed / self.jobs / 3600
        price = recipe.training.dollars_per_hour if self.price is None else self.price
        return plan | {
            "target": {
                "parameters": dial.multiplying(recipe.model, self._vocab()),
                "tokens": records.tokens_seen(recipe),
                "unique_tokens": counts["train"]["tokens"],
            },
            "chance": math.log2(self._vocab()) / counts["heldout"]["bytes_per_token"],
            "method": str(scaling.__doc__).split("\n\n", 1)[1].strip(),
            "refusals": f"fewer than {scaling.MIN_RUNGS} sizes; one seed; a run above {scaling.DIVERGED} times its "
            "like's median; a size that learned nothing; a significant scatter above "
            f"{formatting.percent(scaling.UNFIT, 0)}",
            "planned": now(),
            "environment": environment(),
            "estimate": {
                **{"runs": len(entries), "flops": sum(flops.values()), "flops_by_part": flops, "jobs": self.jobs},
                **{"hours": round(hours, 3), "dollars": None if price is None else round(hours * price, 2)},
            },
        }

    def _vocab(self) -> int:
        return int(self.recipe.model_config_for().vocab_size)

    def _rungs(self, question: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Shape, settings and seeds of each size; the hidden one is the last."""
        from nanophi.training.budget import flops_per_token

        recipe, training, vocab = self.recipe, self.recipe.training, self._vocab()
        model = {key: getattr(recipe.model_config_for(), key) for key in dial.SHAPE}
        context, own = recipe.model_config_for().max_position_embeddings, dial.multiplying(model, vocab)
        rates = training.learning_rate, training.muon_learning_rate
        anchor = dial.Anchor(model["hidden_size"], records.tokens_seen(recipe), training.batch_size * context, *rates)
        rungs: list[dict[str, Any]] = []
        wanted, count = self.smallest or own / SMALLEST, question["sizes"]
        while len(rungs) <= count:
            shape = dial.smaller(model, vocab, wanted)
            parameters = dial.multiplying(shape, vocab)
            least = math.sqrt(HIDDEN if len(rungs) == count else 2) * rungs[-1]["parameters"] if rungs else 0
            if wanted > own:
                raise UserError(
                    f"{recipe.name} has {formatting.size(own)} parameters that multiply, too few for {count} sizes and "
                    "a hidden one above the smallest; name a smaller --smallest"
                )
            if parameters < least:
                wanted *= 1.05
                continue
            tokens = question["tokens_per_parameter"] * parameters
            settings = dial.scaled(anchor, shape["hidden_size"], tokens, context)
            rows = training.micro_batch_size or settings["batch_size"]
            settings["micro_batch_size"] = max(n for n in range(1, rows + 1) if settings["batch_size"] % n == 0)
            seeds = question["seeds"][: 1 if len(rungs) == count else 2 if len(rungs) > 1 else None]
            rungs.append({
                "model": shape, "training": settings, "parameters": parameters, "seeds": seeds,
                "tokens": settings["steps"] * settings["batch_size"] * context,
                "flops_per_token": flops_per_token(recipe.model_config_for(**shape), context),
            })  # fmt: skip
            wanted = 2 * parameters
        return rungs


Entry = tuple[str, int, int, float]
"""A run: folder of its record, rung, seed, factor of its learning rates."""


def entries_of(plan: Mapping[str, Any]) -> list[Entry]:
    """All runs of a plan, in their order."""
    rungs, first = plan["rungs"], plan["seeds"][0]
    fitted = [(rung, seed) for rung, size in enumerate(rungs[:-1]) for seed in size["seeds"]]
    entries: list[Entry] = [(part, rung, seed, 1.0) for part in ("half", "full") for rung, seed in fitted]
    entries += [("rates", rung, first, factor) for rung in RATE_SIZES if rung < len(rungs) - 1 for factor in RATES]
    return [*entries, *(("hidden", len(rungs) - 1, seed, 1.0) for seed in rungs[-1]["seeds"])]


def run_of(recipe: Recipe, plan: Mapping[str, Any], entry: Entry) -> Recipe:
    """The recipe of one run."""
    part, rung, seed, factor = entry
    values, size = recipe.dump(), plan["rungs"][rung]
    training = values["training"]
    training |= size["training"]
    steps = max(1, round(LENGTHS[part] * training["steps"]))
    values["name"] = f"{recipe.name}-{formatting.size(size['parameters'])}-seed-{seed}"
    if part == "rates":
        values["name"] += f"-rate-{factor:.2f}"
        for key in ("learning_rate", "muon_learning_rate"):
            training[key] *= factor
    elif training["schedule"] != "wsd":
        values["name"] += f"-{part}"  # a schedule that no longer run can continue
    training |= {"steps": steps, "seed": seed, "keep_steps": [], "eval_steps": steps + 1}
    training["save_steps"] = max(1, min(training["save_steps"], training["steps"] // 4))
    training["logging_steps"] = max(1, min(training["logging_steps"], steps // 10))
    training["warmup_steps"] = min(training["warmup_steps"], steps - 1)
    values["model"] |= size["model"]
    values["evaluation"]["suites"] = [records.suite(plan["tasks"])]
    values["card"]["title"] = None
    return Recipe(**values)
