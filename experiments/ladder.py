"""`nanophi ladder`: small versions of a recipe are trained, and the recipe's own loss is predicted from them.

Each size has about twice the parameters of the last, in the recipe's own shape and with its settings scaled
(`core/dial.py`), and is trained for half and for all of its tokens; under WSD the longer run continues the shorter one
from where its rate began to fall. Two sizes are also trained at other learning rates. Then the law is fitted
(`scaling.py`), the prediction is written, and only then a larger size is trained, hidden until now, which tests it.

    OUTPUT/NAME/plan.json         per recipe, before anything is trained: sizes, tokens, seeds, fit, refusals, price
    OUTPUT/NAME/half|full|rates|hidden/records/   one JSON file per finished run, with every item's log-likelihood
    OUTPUT/NAME/prediction.json   written once, before the hidden size is trained
    OUTPUT/ladder.json|.md|.png   the answer (`ladder_render.py`) from these files alone
    RUNS/NAME/prediction.json     what the recipe's own run is compared with, in its report and card

Called again it resumes. A plan is not changed: another question needs another OUTPUT. Runs of an earlier question that
are the same are used again; where one is another, this question's runs have a name of their own, NAME-1a2b3c4d.
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
from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import read_json, sha256_of_file, write_json
from nanophi.core.options import Jobs, Overrides, Recipes, Runs
from nanophi.core.recipe import Recipe, check_distinct, load_recipe
from nanophi.core.run import Report, RunDirectory
from nanophi.experiments import records, scaling
from nanophi.experiments.scaling import Entry, entries_of
from nanophi.pipeline import Pipeline

LENGTHS = {"half": 0.5, "full": 1.0, "rates": 0.5, "hidden": 1.0}
"""Folder of records -> share of a size's tokens."""
HIDDEN, SMALLEST = 4, 64
"""Compute of the hidden size over the largest fitted one's, at least; the recipe's parameters over the smallest's."""


def ladder(
    recipes: Recipes,
    smallest: Annotated[float | None, Option(min=1, help="Parameters of the smallest size (default: 1/64).")] = None,
    sizes: Annotated[int, Option(min=1, help="Fitted sizes, each twice the last.")] = scaling.MIN_RUNGS,
    tokens_per_parameter: Annotated[float, Option(min=1, help="Of every size.")] = dial.TOKENS_PER_PARAMETER,
    seed: Annotated[list[int], Option(help="Of the smallest two sizes.")] = [0, 1, 2],
    tasks: Annotated[str, Option(help="Multiple-choice tasks whose right answers are predicted too.")] = "none",
    output: Annotated[Path, Option(help="Where plans, records and the answer go.")] = Path("ladders"),
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

    records.check_numbers(seed, smallest=smallest, tokens_per_parameter=tokens_per_parameter)
    resolved = [load_recipe(recipe, overrides) for recipe in recipes]
    check_distinct(resolved)
    names = [] if tasks == "none" else [task.strip() for task in tasks.split(",")]
    options: dict[str, Any] = {"sizes": sizes, "smallest": smallest, "tokens_per_parameter": tokens_per_parameter}
    options |= {"seeds": seed, "tasks": names}
    ladders = [Ladder(recipe, runs, output / recipe.name, options, jobs) for recipe in resolved]
    plans = [each.plan() for each in ladders]
    if not plan:
        for each, planned in zip(ladders, plans, strict=True):
            each.run(planned)
        answer = ladder_render.write_answer(output, [recipe.name for recipe in resolved])
        typer.echo(f"\n{answer['paragraph']}\n\n{output / 'ladder.md'}")


@dataclasses.dataclass
class Ladder:
    """The ladder of one recipe; `output` is its own folder, `options` the question."""

    recipe: Recipe
    runs: Path
    output: Path
    options: Mapping[str, Any]
    jobs: int = 1
    report: Report = print

    def plan(self) -> dict[str, Any]:
        """The plan in `output`, written there if there is none yet. Raises `UserError` if it cannot be carried out."""
        if self.recipe.conversations:
            raise UserError(f"{self.recipe.name} trains on conversations; name the recipe of its base")
        plan = records.keep_plan(self.output, {"recipe": self.recipe.dump(), **self.options}, self._make_plan, LENGTHS)
        price, path = plan["estimate"], self.output / "plan.json"
        cost = "no price known (training.dollars_per_hour)" if price["dollars"] is None else f"${price['dollars']:.2f}"
        self.report(
            f"{self.recipe.name}: {', '.join(formatting.size(rung['parameters']) for rung in plan['rungs'])} parameters"
            f" (the last size hidden); {price['runs']} runs, {price['flops']:.2g} FLOP, about "
            f"{formatting.duration(3600 * price['hours'])} with {price['jobs']} at once, {cost}\n"
            f"{path} (SHA-256 {sha256_of_file(path)[:12]})"
        )
        return plan

    def run(self, plan: Mapping[str, Any]) -> None:
        """Make the runs that have no record yet, and the prediction before the hidden one."""
        from nanophi.experiments import ladder_render

        path = self.output / "prediction.json"
        if records.recorded(self.output / "hidden") and not path.exists():
            raise UserError(f"{path} is missing, but the hidden size is measured; put it back, or use another --output")
        for part in ("half", "full", "rates"):
            self._make(plan, part)
        found = ladder_render.Ladder(self.output).predict()
        if not path.exists():
            write_json(path, found)
        written = _check_prediction(path, found)
        heldout = written["targets"]["heldout"]
        own = {key: heldout["recipe"][key] for key in ("value", "interval")} | {"ratio": heldout["ratio"]}
        own |= {"recipe": plan["recipe"], "predicted": written["predicted"]}
        run = RunDirectory(self.runs / self.recipe.name)
        if run.weights() or run.inputs_of("training") is not None:
            self.report(f"{run.path} has begun its training: no prediction is written there")
        else:
            write_json(run.path / "prediction.json", own)
        self._make(plan, "hidden")

    def _make(self, plan: Mapping[str, Any], part: str) -> None:
        quiet, made = records.without_repetition(self.report), {}
        for entry in entries_of(plan):
            if entry[0] == part:
                recipe = run_of(self.recipe, plan, entry)
                made[recipe.name] = Pipeline(recipe, self.runs, report=quiet), entry
                if part == "full" and not records.record_path(self.output / part, recipe.name).exists():
                    self._continue(made[recipe.name][0], run_of(self.recipe, plan, ("half", *entry[1:])))

        def finished(name: str) -> None:
            pipeline, (_, rung, seed, factor) = made[name]
            unique = read_json(pipeline.path / "data/tokens/tokens.json")["train"]["tokens"]
            fields = {"rung": rung, "seed": seed, "factor": factor, "unique_tokens": unique}
            records.write_record(pipeline, plan["tasks"], self.output / part, **fields)

        waiting = [pipeline for pipeline, _ in made.values()]
        records.run_missing(waiting, self.output / part, self.jobs, finished, self.report)

    def _continue(self, pipeline: Pipeline, half: Recipe) -> None:
        """Under WSD, give a run that has not begun what the one of half its length had learned before its decay."""
        from nanophi.training import continuation

        trunk = RunDirectory(self.runs / half.name)
        if half.training.schedule == "wsd" and (inputs := trunk.inputs_of("training")) is not None:
            with pipeline.run.lock():
                continuation.branch(pipeline.run, trunk, half.training, inputs)

    def _make_plan(self, question: Mapping[str, Any]) -> dict[str, Any]:
        from nanophi.core.environment import environment
        from nanophi.core.run import now

        recipe, vocab = self.recipe, self.recipe.model_config_for().vocab_size
        plan: dict[str, Any] = {"format": records.FORMAT, **question, "name": recipe.name}
        plan["rungs"] = rungs_of(recipe, question)
        entries = entries_of(plan)
        fitted = [scaling.Point(rung, seed, 1, 1, 1, 1.0) for part, rung, seed, _ in entries if part == "full"]
        scaling.check(fitted, [recipe.name] * len(fitted), math.inf)
        planned = [run_of(recipe, plan, entry) for entry in entries]
        plan["name"] = records.name_of_runs(recipe, question, self.runs, planned)
        first = Pipeline(run_of(recipe, plan, entries[0]), self.runs, report=records.without_repetition(self.report))
        first.check("evaluation")
        records.check_tasks(recipe, plan["tasks"])
        with first.run.lock():
            counts = first.tokens()
        if (count := max(counts["vocab_size"], recipe.model.get("vocab_size", 0))) != vocab:
            raise UserError(
                f"{recipe.name}: its tokenizer has {count} tokens, not {vocab}; set model.vocab_size={count}"
            )
        # Under WSD the longer run continues the shorter one; counted as if it did not.
        sizes = [(LENGTHS[part], plan["rungs"][rung]) for part, rung, _, _ in entries]
        flops = sum(share * size["tokens"] * size["flops_per_token"] for share, size in sizes)
        speed = records.measured_speed(run_of(recipe, plan, entries[-1]), self.jobs)
        hours = flops / (speed * plan["rungs"][-1]["flops_per_token"]) / self.jobs / 3600
        price = recipe.training.dollars_per_hour
        unique = counts["train"]["tokens"]
        plan["target"] = {"parameters": dial.multiplying(vars(recipe.model_config_for()), vocab)}
        plan["target"] |= {"tokens": records.tokens_seen(recipe), "unique_tokens": unique}
        plan["estimate"] = {"runs": len(entries), "flops": flops, "jobs": self.jobs, "hours": round(hours, 3)}
        plan["estimate"] |= {"dollars": price and round(hours * price, 2)}
        return plan | {
            "chance": math.log2(vocab) / counts["heldout"]["bytes_per_token"],
            "method": str(scaling.__doc__).split("\n\n", 1)[1].strip(),
            "refusals": f"fewer than {scaling.MIN_RUNGS} sizes; one seed; {scaling.DIVERGED} times the median loss; "
            f"a size that learned nothing; a significant scatter above {scaling.UNFIT:.0%}",
            "planned": now(),
            "environment": environment(),
        }


def _check_prediction(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """The prediction in a file. Raises `UserError` if it is not what the plan and the records give now, `found`."""
    written: dict[str, Any] = read_json(path)
    with user_errors(f"{path} is not what nanophi ladder wrote; put that back"):
        for key, what in (("plan_sha256", "another plan"), ("records_sha256", "other records")):
            if written[key] != found[key]:
                raise UserError(f"{path} was made from {what} than is there now; put that back")
        # Other libraries round otherwise.
        pairs = zip(_figures(written), _figures(found), strict=True)
        if not all(math.isclose(then, now, rel_tol=0.01) for then, now in pairs):
            raise UserError(f"{path} has other figures than the records give now; put both back")
    return written


def _figures(prediction: Mapping[str, Any]) -> list[float]:
    """Every predicted value, and the ends of its interval."""
    found = [target[size] for target in prediction["targets"].values() for size in ("hidden", "recipe")]
    return [number for one in found for number in (one["value"], *one["interval"])]


def rungs_of(recipe: Recipe, question: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Shape, settings and seeds of each size; the hidden one is the last. Raises `UserError` for a recipe too small."""
    from nanophi.training.budget import flops_per_token

    training, config = recipe.training, recipe.model_config_for()
    context, vocab, model = config.max_position_embeddings, config.vocab_size, vars(config)
    rates, own = (training.learning_rate, training.muon_learning_rate), dial.multiplying(model, vocab)
    anchor = dial.Anchor(config.hidden_size, records.tokens_seen(recipe), training.batch_size * context, *rates)
    rungs: list[dict[str, Any]] = []
    wanted, count = question["smallest"] or own / SMALLEST, question["sizes"]
    least = dial.multiplying(dial.smaller(model, vocab, 1), vocab)
    while len(rungs) <= count:
        if wanted > own:
            remedy = "name a smaller --smallest"
            if rungs and rungs[0]["parameters"] <= least:
                remedy = f"its vocabulary of {vocab} sets that size: use a smaller one, or a larger recipe"
            raise UserError(
                f"{recipe.name} has {formatting.size(own)} parameters that multiply, too few for {count} sizes and a "
                f"hidden one above the smallest; {remedy}"
            )
        shape, hidden = dial.smaller(model, vocab, wanted), len(rungs) == count
        parameters = dial.multiplying(shape, vocab)
        if rungs and parameters < math.sqrt(HIDDEN if hidden else 2) * rungs[-1]["parameters"]:
            wanted *= 1.05
            continue
        settings = dial.scaled(anchor, shape["hidden_size"], question["tokens_per_parameter"] * parameters, context)
        rows = training.micro_batch_size or settings["batch_size"]
        settings["micro_batch_size"] = max(n for n in range(1, rows + 1) if settings["batch_size"] % n == 0)
        size: dict[str, Any] = {"model": shape, "training": settings, "parameters": parameters}
        size["seeds"] = question["seeds"][: 1 if hidden else 2 if len(rungs) > 1 else None]
        size["tokens"] = settings["steps"] * settings["batch_size"] * context
        rungs.append(size | {"flops_per_token": flops_per_token(recipe.model_config_for(**shape), context)})
        wanted = 2 * parameters
    if own * anchor.tokens < parameters * size["tokens"]:
        raise UserError(
            f"{recipe.name} costs {6 * own * anchor.tokens:.2g} FLOP, less than the hidden size that tests its ladder "
            f"({6 * parameters * size['tokens']:.2g}): train it itself, or lower --tokens-per-parameter or --smallest"
        )
    return rungs


def run_of(recipe: Recipe, plan: Mapping[str, Any], entry: Entry) -> Recipe:
    """The recipe of one run."""
    part, rung, seed, factor = entry
    values, size = recipe.dump(), plan["rungs"][rung]
    training = values["training"] = {**values["training"], **size["training"]}
    steps = max(1, round(LENGTHS[part] * training["steps"]))
    values["name"] = f"{plan.get('name', recipe.name)}-{formatting.size(size['parameters'])}-seed-{seed}"
    if part == "rates":
        values["name"] += f"-rate-{factor:.2f}"
    elif "name" in plan or training["schedule"] != "wsd":
        values["name"] += f"-{part}"  # early plans, without a name, have both lengths in one directory under WSD
    training |= {key: factor * training[key] for key in ("learning_rate", "muon_learning_rate")}
    training |= {"seed": seed, "keep_steps": [], "eval_steps": steps + 1}
    training["save_steps"] = max(1, min(training["save_steps"], training["steps"] // 4))
    training["logging_steps"] = max(1, min(training["logging_steps"], steps // 10))
    training |= {"warmup_steps": min(training["warmup_steps"], steps - 1), "steps": steps}
    values["model"] |= size["model"]
    values["evaluation"]["suites"] = [records.suite(plan["tasks"])]
    values["card"]["title"] = None
    return Recipe(**values)
