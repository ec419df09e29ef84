"""`nanophi ablate`: does the filter help? An experiment with arms, seeds, equal compute and error bars.

A filter changes two things at once: which text a model sees, and how often it sees it, since less text is repeated more
often in the same number of steps. Four arms tell the two apart:

    all      everything
    best     the share of the text with the highest scores: what the recipe's filter keeps
    random   as much text, drawn at random
    worst    as much text with the lowest scores: a check that the measurement sees what must be there

All arms train for the same number of steps. The shares have the same number of different tokens, and so the same number
of epochs; `all` has 1 / share times as many tokens, and as many fewer epochs. So that a small experiment repeats its
text as often as the run that it stands for, the text is cut: `epochs` says how often a share is repeated, and each arm
gets tokens accordingly, in documents drawn at random from its own. Every arm runs under several seeds (initialisation,
order, which documents are drawn) and two learning rates, because a conclusion may depend on one of them.

    OUTPUT/plan.json      written before anything is trained: arms, sizes, seeds, learning rates, targets, tests
    OUTPUT/items.json     what the items are: sizes, and which held-out documents the filter would keep
    OUTPUT/records/       one JSON file per finished run, with every item's log-likelihood
    OUTPUT/ablation.json|.md|.png   the answer (`ablation.py`) from these files alone, new after each run
    RUNS/NAME/ablation.json         a copy, if the recipe itself has been run there, for its report page
    RUNS/NAME-ARM-seed-S-lr-R/      run directories; documents, scores and tokenizer are made once and shared

Called again it resumes. A plan is not changed: another question needs another OUTPUT.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from nanophi.core import formatting
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json, write_text
from nanophi.core.options import Jobs, OneRecipe, Overrides, Runs
from nanophi.core.recipe import Recipe, load_recipe
from nanophi.experiments import records
from nanophi.experiments.records import FORMAT, Report
from nanophi.pipeline import Pipeline

LOWER_RATE = 0.2
"""The second learning rate, if none is named, in units of the recipe's."""
SAMPLE_TOKENS = 200_000
"""Of each arm, from which its bytes per token are measured for the plan."""
SAFETY = 0.98
"""Share of an arm's estimated tokens that the plan counts on."""
MAX_SEED = (1 << 32) - 1

Key = tuple[str, int, float]
"""A run: arm, seed, learning rate."""


def _seeds(values: list[int]) -> list[int]:
    for value in values:
        if value > MAX_SEED:
            raise UserError(f"--seed {value} must be from 0 to {MAX_SEED}")
    return _distinct("seed", values)


def _rates(values: list[float]) -> list[float]:
    return _distinct("learning rate", [_positive("--learning-rate", value) for value in values])


def _positive(option: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise UserError(f"{option} {value:g} must be a number above 0")
    return value


def _distinct(name: str, values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise UserError(f"a {name} is named twice; every run needs its own")
    return values


def ablate(
    recipe: OneRecipe,
    seed: Annotated[list[int], Option(min=0, callback=_seeds, help="Seed of the runs; repeatable.")] = [0, 1, 2],
    learning_rate: Annotated[
        list[float],
        Option(callback=_rates, help="Peak learning rate; repeatable. Default: the recipe's and a fifth of it."),
    ] = [],
    epochs: Annotated[
        float | None,
        Option(
            callback=lambda value: value if value is None else _positive("--epochs", value),
            help="How often a share of the text is repeated. Default: as in the recipe's own run.",
        ),
    ] = None,
    tasks: Annotated[
        str, Option(help="Multiple-choice tasks whose right answers decide, or 'none': held-out text decides.")
    ] = "arc_easy,hellaswag",
    output: Annotated[
        Path | None, Option(help="Where plan, records and answer go. [default: ablations/NAME]", show_default=False)
    ] = None,
    plan: Annotated[bool, Option("--plan", help="Write the plan and stop, before anything is trained.")] = False,
    jobs: Jobs = 1,
    runs: Runs = Path("runs"),
    overrides: Overrides = [],
) -> None:
    """Measure whether the recipe's filter helps, with controls, seeds and error bars.

    The best share of the text is compared with a random share, the worst share and all of it, at equal compute.

    Example: nanophi ablate nano-phi-115m-fast --epochs 4 --seed 0 --seed 1 --seed 2
    """
    resolved = load_recipe(recipe, overrides)
    output = Path("ablations") / resolved.name if output is None else output
    names = [] if tasks == "none" else [task.strip() for task in tasks.split(",")]
    experiment = Ablation(resolved, runs, output, seed, learning_rate, epochs, names, jobs)
    planned = experiment.plan()
    if plan:
        typer.echo(output / "plan.json")
    else:
        typer.echo(f"\n{experiment.run(planned)['paragraph']}\n\n{output / 'ablation.md'}")


@dataclasses.dataclass
class Ablation:
    """One experiment.

    Attributes:
        recipe: with the filter in question: `quality.threshold`, or `quality.share` of the best.
        learning_rates: peak rates of AdamW's parameters (Muon's follows in proportion); none: the recipe's, and
            `LOWER_RATE` times that.
        tasks: lm-eval's multiple-choice tasks; none: all held-out text together is the primary target.
    """

    recipe: Recipe
    runs: Path
    output: Path
    seeds: Sequence[int] = (0, 1, 2)
    learning_rates: Sequence[float] = ()
    epochs: float | None = None
    tasks: Sequence[str] = ("arc_easy", "hellaswag")
    jobs: int = 1
    report: Report = print

    def plan(self) -> dict[str, Any]:
        """The plan in `output`, written there if there is none yet.

        Raises:
            UserError: for an experiment that cannot be run, or that differs from the plan that is there.
        """
        self._check()
        own = self.recipe.training.learning_rate
        question = {
            "recipe": self.recipe.dump(),
            "seeds": list(self.seeds),
            "learning_rates": list(self.learning_rates) or [own, float(f"{LOWER_RATE * own:.6g}")],
            "epochs_asked": self.epochs,
            "tasks": list(self.tasks),
        }
        plan = records.keep_plan(self.output, question, self._make_plan)
        self.report(describe_plan(plan))
        return plan

    def run(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Make the runs that have no record yet, and return the answer: what `ablation.json` holds.

        Raises:
            UserError: for runs that fail, after the others have ended.
        """
        from nanophi.experiments import ablation_render

        quiet = records.without_repetition(self.report)
        keys = [(arm, seed, rate) for seed in plan["seeds"] for rate in plan["learning_rates"] for arm in plan["arms"]]
        pipelines = {key: Pipeline(arm_of(self.recipe, plan, *key), self.runs, report=quiet) for key in keys}
        named = {pipeline.recipe.name: (pipeline, key) for key, pipeline in pipelines.items()}

        def finished(name: str) -> None:
            self._record(*named[name], plan)
            ablation_render.write_answer(self.output)

        records.run_missing(list(pipelines.values()), self.output, self.jobs, finished, self.report)
        result = ablation_render.write_answer(self.output)
        if (self.runs / self.recipe.name / "record.json").exists():
            write_json(self.runs / self.recipe.name / "ablation.json", result)
        return result

    def _check(self) -> None:
        from nanophi.eval import suites
        from nanophi.training import arguments

        recipe, quality = self.recipe, self.recipe.quality
        if recipe.conversations:
            raise UserError(
                f"{recipe.name} trains on conversations, which no filter selects; name the recipe of its base"
            )
        if quality.threshold is None and (quality.share is None or quality.share == 1):
            raise UserError(
                f"{recipe.name} keeps everything; set quality.threshold or quality.share to what is in question"
            )
        if quality.select != "best":
            raise UserError("quality.select must be 'best'; the other shares are arms of the experiment")
        context = recipe.model_config_for().max_position_embeddings
        if problem := suites.context_problem([records.suite(self.tasks)], context):
            raise UserError(f"{recipe.name}: {problem}")
        arguments.check(recipe.training, self.runs / recipe.name, recipe.training_seed)

    def _make_plan(self, question: Mapping[str, Any]) -> dict[str, Any]:
        from nanophi.core.environment import environment
        from nanophi.core.run import now
        from nanophi.data.quality_report import describe_rule
        from nanophi.experiments import ablation

        recipe, seen = self.recipe, records.tokens_seen(self.recipe)
        _check_tasks(recipe, self.tasks)
        plan = {"format": FORMAT, **question, "share": recipe.quality.share, "tokens": {}}
        available, vocab_size = self._measure_arms(plan)
        plan["tokens"] = self._sizes(available, plan["share"], seen)
        runs = len(ablation.ARMS) * len(plan["seeds"]) * len(plan["learning_rates"])
        return plan | {
            "rule": describe_rule(recipe.quality),
            "arms": list(ablation.ARMS),
            "tokens_seen": seen,
            "epochs": {arm: seen / count for arm, count in plan["tokens"].items()},
            "vocab_size": vocab_size,
            "targets": _targets(recipe, self.tasks),
            "contrasts": {name: " - ".join(arms) for name, arms in ablation.CONTRASTS.items()},
            "test": str(ablation.__doc__).split("\n\n", 1)[1].strip(),
            "planned": now(),
            "environment": environment(),
            "estimate": records.estimate(recipe, runs, vocab_size, self.jobs),
        }

    def _measure_arms(self, plan: dict[str, Any]) -> tuple[dict[str, int], int]:
        """Different tokens of each arm, and the tokenizer's size; sets the plan's `share`, writes `items.json`."""
        from nanophi.experiments import ablation

        recipe, quiet = self.recipe, records.without_repetition(self.report)
        seed, rate = plan["seeds"][0], plan["learning_rates"][0]
        if plan["share"] is None:
            own = Recipe(**{**recipe.dump(), "name": run_name(recipe, "all", seed, rate)})
            pipeline = Pipeline(own, self.runs, report=quiet)
            with pipeline.run.lock():
                plan["share"] = pipeline.make("quality")["kept_bytes_fraction"]
        plan["tokens"] = dict.fromkeys(ablation.ARMS, SAMPLE_TOKENS)
        available = {}
        for arm in ablation.ARMS:
            pipeline = Pipeline(arm_of(recipe, plan, arm, seed, rate), self.runs, report=quiet)
            with pipeline.run.lock():
                counts = pipeline.tokens()
                kept = pipeline.make("quality")["kept_bytes"]
            available[arm] = int(SAFETY * kept / counts["train"]["bytes_per_token"])
            if arm == "best":
                _write_items(pipeline.path / "data", self.output / "items.json")
        return available, counts["vocab_size"]

    def _sizes(self, available: Mapping[str, int], share: float, seen: int) -> dict[str, int]:
        """Different tokens of each arm's runs, in whole rows. Raises `UserError` if there is not enough text."""
        length = self.recipe.model_config_for().max_position_embeddings
        most = min(*(available[arm] for arm in ("best", "random", "worst")), available["all"] * share)
        unique = min(most, available["best"]) if self.epochs is None else seen / self.epochs
        if unique > most:
            raise UserError(
                f"--epochs {self.epochs:g} needs {unique:,.0f} different tokens in every share, but there are "
                f"{most:,.0f}; ask for {seen / most:.2f} epochs or more"
            )
        unique = int(unique) // length * length
        if unique < length:
            raise UserError(f"every share has less than one row of {length} tokens; ask for fewer --epochs or add text")
        return dict.fromkeys(available, unique) | {"all": int(unique / share) // length * length}

    def _record(self, pipeline: Pipeline, key: Key, plan: Mapping[str, Any]) -> None:
        arm, seed, rate = key
        tokens = read_json(pipeline.path / "data/tokens/tokens.json")["train"]
        limit = plan["tokens"][arm]
        if tokens["rows"] * self.recipe.model_config_for().max_position_embeddings != limit:
            raise UserError(
                f"{pipeline.path} has {tokens['tokens']:,} different tokens instead of {limit:,}; ask for more "
                "--epochs in another --output"
            )
        fields = {"arm": arm, "seed": seed, "learning_rate": rate, "unique_tokens": limit}
        records.write_record(pipeline, plan["tasks"], self.output, **fields)


def run_name(recipe: Recipe, arm: str, seed: int, rate: float) -> str:
    """Name of a run of the experiment on a recipe."""
    return f"{recipe.name}-{arm}-seed-{seed}-lr-{rate:g}"


def arm_of(recipe: Recipe, plan: Mapping[str, Any], arm: str, seed: int, rate: float) -> Recipe:
    """The recipe of one run. Of the plan `share`, `tokens` (by arm, None: not limited) and `tasks` count."""
    values = recipe.dump()
    training, steps = values["training"], recipe.training.steps
    values["name"] = run_name(recipe, arm, seed, rate)
    values["data"]["max_tokens"] = plan["tokens"][arm]
    share = {"share": None, "select": "best"} if arm == "all" else {"share": plan["share"], "select": arm}
    values["quality"] |= {"threshold": None, **share}
    training["muon_learning_rate"] *= rate / training["learning_rate"]
    # Only the end is measured, and by the evaluation.
    training |= {"learning_rate": rate, "seed": seed, "keep_steps": [], "eval_steps": steps + 1}
    values["evaluation"]["suites"] = [records.suite(plan["tasks"])]
    values["card"]["title"] = None
    return Recipe(**values)


def _check_tasks(recipe: Recipe, tasks: Sequence[str]) -> None:
    """Refuse tasks whose data is missing, or that have no right answer with a likelihood, before any training."""
    from nanophi.eval import suites

    if not tasks:
        return
    data = recipe.evaluation.data
    loaded = suites.load_suite(suites.find_suite(",".join(tasks)), data=Path(data) if data else None)
    for name in tasks:
        if name not in loaded.tasks:
            raise UserError(f"--tasks {name} is a group; name its tasks one by one")
        if loaded.tasks[name].OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
            raise UserError(f"--tasks {name} has no right answer whose likelihood is known; name other tasks")


def _targets(recipe: Recipe, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is measured, the primary target first: fixed before there is anything to measure."""
    from nanophi.eval import catalogue

    answers = {"title": f"right answers, {' and '.join(catalogue.title(task) for task in tasks)}"}
    targets: dict[str, dict[str, Any]] = {
        **({"answers": answers} if tasks else {}),
        "heldout": {"title": "held-out text, all"},
        "kept": {"title": "held-out text that the filter keeps"},
        "dropped": {"title": "held-out text that the filter drops"},
    }
    names = [source.name or source.hub or source.files for source in recipe.data.sources if source.heldout]
    if len(names) > 1:
        targets |= {f"source:{name}": {"title": f"held-out source {name}", "source": name} for name in names}
    return {name: {**target, "primary": number == 0} for number, (name, target) in enumerate(targets.items())}


def _write_items(data: Path, path: Path) -> None:
    """The held-out documents of a run's data, and which of them the filter would keep."""
    import pyarrow.parquet as pq

    from nanophi.data import documents

    keep = {row["id"]: bool(row["kept"]) for row in pq.read_table(data / "quality/heldout.parquet").to_pylist()}
    rows = documents.heldout(data / "documents", ("id", "source"))
    heldout = [{"id": row["id"], "source": row["source"], "kept": keep[row["id"]]} for row in rows]
    write_text(path, records.compact({"format": FORMAT, "heldout": heldout}))


def describe_plan(plan: Mapping[str, Any]) -> str:
    """The plan in a few lines, with what it will take."""
    epochs, estimate = plan["epochs"], plan["estimate"]
    size = {arm: formatting.size(count) for arm, count in plan["tokens"].items()}
    return (
        f"filter: {plan['rule']} (share {formatting.percent(plan['share'])})\n"
        f"each share: {size['best']} different tokens, {epochs['best']:.2f} epochs; "
        f"all: {size['all']} and {epochs['all']:.2f}\n"
        f"{estimate['runs']} runs of {formatting.size(plan['tokens_seen'])} tokens: "
        f"arms {', '.join(plan['arms'])}; seeds {', '.join(map(str, plan['seeds']))}; "
        f"learning rates {', '.join(f'{rate:g}' for rate in plan['learning_rates'])}\n"
        f"training takes about {formatting.duration(3600 * estimate['hours'])} at "
        f"{estimate['tokens_per_second']:,.0f} tokens/s a run, {estimate['jobs']} at once; evaluation comes on top"
    )
