"""`nanophi ablate`: does the filter help? An experiment with arms, seeds, equal compute and error bars.

A filter changes two things: which text a model sees, and how often. Four arms of as many steps tell the two apart:

    all      everything: 1 / share times as many tokens, and as many fewer epochs
    best     the share of the text with the highest scores: what the recipe's filter keeps
    random   as much text, drawn at random
    worst    as much text with the lowest scores: a check that the measurement sees what must be there

With `--at decay` the arms differ only in what is read while the learning rate decays: all continue the run on all the
text of their seed and rate, which costs a decay and not a training, and leaves out what such trunks differ in.
`--candidate` adds an arm: a source, or a recipe with another filter. One that filters throughout is trained in full.

Text is cut to `epochs`, so that a small experiment repeats it as often as the run that it stands for. Every arm runs
under several seeds (initialisation, order, which documents are drawn) and two learning rates.

    OUTPUT/plan.json      written before anything is trained: arms, sizes, seeds, learning rates, targets, tests
    OUTPUT/items.json     which held-out documents the filter would keep
    OUTPUT/records/       one JSON file per finished run, with every item's log-likelihood
    OUTPUT/ablation.json|.md|.png   the answer (`ablation.py`) from these files alone, new after each run
    RUNS/NAME/ablation.json         a copy, if the recipe itself has been run there, for its report page
    RUNS/NAME-ARM-seed-S-lr-R/      run directories; documents, scores and tokenizer are made once and shared
    RUNS/NAME-ARM-decay-seed-S-...  those that continue another
    RUNS/NAME-ARM-measured/         the data from which the plan's sizes come

Called again it resumes. A plan is not changed: another question needs another OUTPUT. Runs of an earlier question that
are the same are used again; where one is another, this question's runs have a name of their own, NAME-1a2b3c4d.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from nanophi.core import formatting
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json, write_text
from nanophi.core.options import Jobs, OneRecipe, Overrides, Restart, Runs
from nanophi.core.recipe import Recipe, load_recipe
from nanophi.core.run import Report, RunDirectory, differences, now
from nanophi.experiments import records
from nanophi.pipeline import Pipeline

LOWER_RATE = 0.2  # the second learning rate, if none is named, in units of the recipe's
SAMPLE_TOKENS = 200_000  # of each arm, from which its bytes per token are measured for the plan
SAFETY = 0.98  # share of an arm's estimated tokens that the plan counts on
# Whether a source is read before the decay, and in it -> its phase.
PHASES = {(True, True): "all", (True, False): "stable", (False, True): "decay", (False, False): "none"}


def ablate(
    recipe: OneRecipe,
    seed: Annotated[list[int], Option(help="Seed of the runs; repeatable.")] = [0, 1, 2],
    learning_rate: Annotated[
        list[float], Option(help="Peak rate; repeatable (default: the recipe's and a fifth).")
    ] = [],
    epochs: Annotated[
        float | None, Option(help="How often a share is repeated (default: as in the recipe's run).")
    ] = None,
    tasks: Annotated[str, Option(help="Choice tasks that decide; 'none': held-out text does.")] = "arc_easy,hellaswag",
    at: Annotated[str | None, Option(metavar="decay", help="Filter only while the rate decays.")] = None,
    candidate: Annotated[
        list[str], Option(metavar="SOURCE_OR_RECIPE", help="Another text for the decay; repeatable.")
    ] = [],
    output: Annotated[Path | None, Option(help="Folder of the answer (default: ablations/NAME).")] = None,
    plan: Annotated[bool, Option("--plan", help="Write the plan and stop, before anything is trained.")] = False,
    jobs: Jobs = 1,
    restart: Restart = False,
    runs: Runs = Path("runs"),
    overrides: Overrides = [],
) -> None:
    """Measure whether the recipe's filter helps, with controls, seeds and error bars.

    The best share of the text is compared with a random share, the worst share and all of it, at equal compute.

    Example: nanophi ablate nano-phi-115m-fast --epochs 4 --seed 0 --seed 1 --seed 2
    """
    records.check_numbers(seed, learning_rate, epochs)
    resolved = load_recipe(recipe, overrides)
    if at not in (None, "decay") or (candidate and at is None):
        raise UserError(f"--at {at} is unknown; use --at decay" if at else "--candidate needs --at decay")
    own = resolved.training.learning_rate
    question = {
        "seeds": seed,
        "learning_rates": learning_rate or [own, float(f"{LOWER_RATE * own:.6g}")],
        "epochs_asked": epochs,
        "tasks": [] if tasks == "none" else [task.strip() for task in tasks.split(",")],
        "at": at,
        "candidates": find_candidates(resolved, candidate, overrides) or None,
    }
    output = output or Path("ablations") / resolved.name
    experiment = Ablation(resolved, runs, output, question, jobs, restart)
    planned = experiment.plan()
    if plan:
        typer.echo(output / "plan.json")
    else:
        typer.echo(f"\n{experiment.run(planned)['paragraph']}\n\n{output / 'ablation.md'}")


@dataclasses.dataclass
class Ablation:
    """One experiment on the filter of `recipe`: `quality.threshold`, or `quality.share` of the best.

    `question` is what the plan has of it; its learning rates are AdamW's (Muon's follow in proportion).
    """

    recipe: Recipe
    runs: Path
    output: Path
    question: Mapping[str, Any]
    jobs: int = 1
    restart: bool = False
    report: Report = print

    def plan(self) -> dict[str, Any]:
        """The plan in `output`, written there if there is none yet: one that follows the results is none.

        Raises `UserError` for an experiment that cannot be run, or that differs from the plan that is there.
        """
        self._check()
        plan = records.keep_plan(self.output, {"recipe": self.recipe.dump(), **self.question}, self._make_plan)
        self.report(describe_plan(plan))
        return plan

    def run(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Make the runs that have no record yet; the answer that `ablation.json` holds, or `UserError` if some fail."""
        from nanophi.experiments import ablation, ablation_render

        later = plan.get("branches", ())  # the trunks come first
        made_of = {key: arm_of(self.recipe, plan, *key) for key in ablation.keys_of(plan)}
        pipelines = {key: self._pipeline(recipe, key[0] in later) for key, recipe in made_of.items()}
        keys = {pipeline.recipe.name: key for key, pipeline in pipelines.items()}

        def finished(name: str) -> None:
            arm, seed, rate = keys[name]
            fields = {"arm": arm, "seed": seed, "learning_rate": rate, "unique_tokens": plan["tokens"][arm]}
            records.write_record(pipelines[keys[name]], plan["tasks"], self.output, **fields)
            ablation_render.write_answer(self.output)

        for branching in (False, True):
            made = {key: pipeline for key, pipeline in pipelines.items() if (key[0] in later) == branching}
            for key, pipeline in made.items():
                if not records.record_path(self.output, pipeline.recipe.name).exists():
                    self._prepare(pipeline, plan, *key)
            records.run_missing(list(made.values()), self.output, self.jobs, finished, self.report)
        result = ablation_render.write_answer(self.output)
        if (self.runs / self.recipe.name / "record.json").exists():
            write_json(self.runs / self.recipe.name / "ablation.json", result)
        return result

    def _pipeline(self, recipe: Recipe, branching: bool = False) -> Pipeline:
        report = records.without_repetition(self.report)
        return Pipeline(recipe, self.runs, report=report, restart=self.restart and not branching)

    def _prepare(self, pipeline: Pipeline, plan: Mapping[str, Any], arm: str, seed: int, rate: float) -> None:
        """A run's tokens, as many as planned, and for a branch what its trunk has learned."""
        from nanophi.training import continuation

        recipe, limit = pipeline.recipe, plan["tokens"][arm]
        with pipeline.run.lock():
            counts, branching = pipeline.tokens(), arm in plan.get("branches", ())
            read = counts["decay" if branching and "decay" in counts else "train"]
            if (rows := recipe.model_config_for().max_position_embeddings * read["rows"]) != limit:
                problem = f"{pipeline.path} has {rows:,} tokens in place of {limit:,}"
                raise UserError(f"{problem}; ask for more --epochs elsewhere")
            if branching:
                trunk = RunDirectory(self.runs / run_name(self.recipe, plan, "all", seed, rate))
                inputs = pipeline.inputs_of(pipeline.stages["training"])
                continuation.branch(pipeline.run, trunk, recipe.training, inputs)

    def _check(self) -> None:
        from nanophi.eval import suites
        from nanophi.training import arguments

        recipe, quality = self.recipe, self.recipe.quality
        at, tasks = self.question["at"], self.question["tasks"]
        if recipe.conversations:
            raise UserError(f"{recipe.name} trains on conversations, which no filter selects; name its base's recipe")
        if quality.threshold is None and quality.share in (None, 1):
            raise UserError(f"{recipe.name} keeps everything; set quality.threshold or quality.share to what you ask")
        if quality.select != "best":
            raise UserError("quality.select must be 'best'; the other shares are arms of the experiment")
        if at is None and quality.phase == "decay":
            raise UserError(f"{recipe.name} filters while the learning rate decays; add --at decay")
        if at and not 0 < recipe.training.decay_start < recipe.training.steps:
            raise UserError(f"{recipe.name}: --at decay needs training.schedule=wsd and a decay_fraction below 1")
        context = recipe.model_config_for().max_position_embeddings
        if problem := suites.context_problem([records.suite(tasks)], context):
            raise UserError(f"{recipe.name}: {problem}")
        arguments.check(recipe.training, self.runs / recipe.name, recipe.training_seed)
        if not (self.output / "plan.json").exists():
            records.check_tasks(recipe, tasks)

    def _make_plan(self, question: Mapping[str, Any]) -> dict[str, Any]:
        from nanophi.core.environment import environment
        from nanophi.data.quality_report import describe_rule
        from nanophi.experiments import ablation

        seen, context = records.tokens_seen(self.recipe), self.recipe.model_config_for().max_position_embeddings
        candidates = question["candidates"] or {}
        plan: dict[str, Any] = {"format": records.FORMAT, **question, "share": self.recipe.quality.share, "tokens": {}}
        plan["arms"] = [*ablation.ARMS, *candidates]
        throughout = [arm for arm, candidate in candidates.items() if candidate["throughout"]]
        plan["branches"] = [arm for arm in plan["arms"] if question["at"] and arm not in ("all", *throughout)]
        available, vocab_size = self._measure_arms(plan)
        before = seen // self.recipe.training.steps * self.recipe.training.decay_start
        read = {arm: seen - before if arm in plan["branches"] else seen for arm in plan["arms"]}
        plan["tokens"] = _sizes(available, plan["share"], question["epochs_asked"], read["best"], context)
        planned = [arm_of(self.recipe, plan, *key) for key in ablation.keys_of(plan)]
        tokens = sum(read[arm] for arm, _, _ in ablation.keys_of(plan))
        contrasts = ablation.CONTRASTS | {arm: (arm, "all") for arm in candidates}
        contrasts |= {f"decay or {arm}": ("best", arm) for arm in throughout}
        plan["name"] = records.name_of_runs(self.recipe, question, self.runs, planned)
        return plan | {
            "rule": describe_rule(self.recipe.quality),
            "tokens_seen": seen,
            "epochs": {arm: read[arm] / count for arm, count in plan["tokens"].items()},
            "vocab_size": vocab_size,
            "targets": _targets(self.recipe, question["tasks"]),
            "contrasts": {name: " - ".join(arms) for name, arms in contrasts.items()},
            "test": str(ablation.__doc__).split("\n\n", 1)[1].strip(),
            "planned": now(),
            "environment": environment(),
            "estimate": records.estimate(self.recipe, len(planned), tokens, vocab_size, self.jobs),
        }

    def _measure_arms(self, plan: dict[str, Any]) -> tuple[dict[str, int], int]:
        """Different tokens of each arm, and the tokenizer's size; sets the plan's `share`, writes `items.json`."""

        def measured(recipe: Recipe, arm: str) -> Pipeline:
            # Not in a run's own directory: its weights may be there, from an earlier experiment.
            return self._pipeline(Recipe(**{**recipe.dump(), "name": f"{self.recipe.name}-{arm}-measured"}))

        first = (plan["seeds"][0], plan["learning_rates"][0])
        if plan["share"] is None:  # the recipe's own filter tells what it keeps
            pipeline = measured(self.recipe, "all")
            with pipeline.run.lock():
                plan["share"] = pipeline.make("quality")["kept_bytes_fraction"]
        plan["tokens"] = dict.fromkeys(plan["arms"], SAMPLE_TOKENS)
        available = {}
        for arm in plan["arms"]:
            pipeline = measured(arm_of(self.recipe, {**plan, "branches": []}, arm, *first), arm)
            with pipeline.run.lock():
                counts = pipeline.tokens()
            phase = "decay" if arm in plan["branches"] else "stable"
            text = counts[phase if phase in counts else "train"]
            available[arm] = int(SAFETY * _kept_bytes(pipeline, phase) / text["bytes_per_token"])
            if arm == "best":
                _write_items(pipeline.path / "data", self.output / "items.json")
        return available, counts["vocab_size"]


def _sizes(available: Mapping[str, int], share: float, epochs: float | None, seen: int, context: int) -> dict[str, int]:
    """Different tokens of each arm's runs, in whole rows. Raises `UserError` if there is not enough text."""
    most = min(*(count for arm, count in available.items() if arm != "all"), available["all"] * share)
    unique = most if epochs is None else seen / epochs
    if unique > most:
        raise UserError(
            f"--epochs {epochs:g} needs {unique:,.0f} different tokens in every share, but there are "
            f"{most:,.0f}; ask for {seen / most:.2f} epochs or more"
        )
    unique = int(unique) // context * context
    if not unique:
        raise UserError(f"every share has less than one row of {context} tokens; ask for fewer --epochs or add text")
    return dict.fromkeys(available, unique) | {"all": int(unique / share) // context * context}


def find_candidates(recipe: Recipe, names: Sequence[str], overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Arm -> its section `quality`, the phase of each source, and whether it filters `throughout`.

    `names` are those of sources, or recipes. Raises `UserError` for a recipe that differs in more.
    """
    from nanophi.data.sources import name_of
    from nanophi.experiments.ablation import ARMS, CONTRASTS

    found: dict[str, dict[str, Any]] = {}
    sources = recipe.data.sources
    for name in names:
        if name in [name_of(source) for source in sources if not source.heldout]:
            unfiltered = {"threshold": None, "share": None, "select": "best", "phase": "all"}
            arm, quality = name, recipe.quality.model_copy(update=unfiltered)
            phases = [s.phase if s.heldout else PHASES[s.reads("stable"), name_of(s) == name] for s in sources]
        else:
            other = load_recipe(name, overrides)
            arm, quality, phases = other.name, other.quality, [source.phase for source in other.data.sources]
            if changed := differences(_before_the_decay(recipe), _before_the_decay(other)):
                raise UserError(f"--candidate {name}: it may differ in quality and the decay's sources ({changed[0]})")
        arm = re.sub(r"[^A-Za-z0-9._-]+", "-", arm).strip("-._")
        if arm in (*found, *ARMS):
            raise UserError(f"--candidate {name}: there is an arm {arm}; give it another name")
        if arm in (*CONTRASTS, "check", ""):
            raise UserError(f"--candidate {name}: an arm cannot be called '{arm}'; give it another name")
        throughout = quality.phase == "all" and (quality.threshold, quality.share) != (None, None)
        found[arm] = {"quality": quality.model_dump(mode="json"), "phases": phases, "throughout": throughout}
    return found


def _before_the_decay(recipe: Recipe) -> dict[str, Any]:
    """A recipe without what a candidate may change."""
    values = {key: value for key, value in recipe.dump().items() if key not in ("name", "card", "quality")}
    for source, values_of_source in zip(recipe.data.sources, values["data"]["sources"], strict=True):
        values_of_source["phase"] = source.reads("stable")
    return values


def _kept_bytes(pipeline: Pipeline, phase: str) -> int:
    """Bytes of the documents that the filter keeps of the sources which a phase reads."""
    from nanophi.data import sources

    of_name = sources.of_documents(pipeline.recipe.data.sources, pipeline.path / "data/documents")
    kept = read_json(pipeline.path / "data/quality/quality.json")["sources"]
    return sum(entry["kept_bytes"] for name, entry in kept.items() if of_name[name].reads(phase))


def run_name(recipe: Recipe, plan: Mapping[str, Any], arm: str, seed: int, rate: float) -> str:
    """Name of a run of the experiment on a recipe."""
    decay = "-decay" if arm in plan.get("branches", ()) else ""
    return f"{plan.get('name', recipe.name)}-{arm}{decay}-seed-{seed}-lr-{rate:g}"


def arm_of(recipe: Recipe, plan: Mapping[str, Any], arm: str, seed: int, rate: float) -> Recipe:
    """The recipe of one run. Of the plan `share`, `tokens` (by arm, None: not limited) and `tasks` count.

    Where it has them, so do `name`, `branches` and `candidates`.
    """
    values = recipe.dump()
    training, steps = values["training"], recipe.training.steps
    values["name"] = run_name(recipe, plan, arm, seed, rate)
    share = {"share": None, "select": "best"} if arm == "all" else {"share": plan["share"], "select": arm}
    values["quality"] |= {"threshold": None, **share, "phase": "decay" if arm in plan.get("branches", ()) else "all"}
    if candidate := (plan.get("candidates") or {}).get(arm):
        values["quality"] = dict(candidate["quality"])
        for source, phase in zip(values["data"]["sources"], candidate["phases"], strict=True):
            source["phase"] = phase
    values["data"] |= {"max_tokens": plan["tokens"][arm], "max_decay_tokens": None}
    if arm in plan.get("branches", ()):
        values["data"] |= {"max_tokens": plan["tokens"]["all"], "max_decay_tokens": plan["tokens"][arm]}
    training["muon_learning_rate"] *= rate / training["learning_rate"]
    # Only the end is measured, and by the evaluation.
    training |= {"learning_rate": rate, "seed": seed, "keep_steps": [], "eval_steps": steps + 1}
    values["evaluation"]["suites"] = [records.suite(plan["tasks"])]
    values["card"]["title"] = None
    return Recipe(**values)


def _targets(recipe: Recipe, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is measured, the primary target first: fixed before there is anything to measure."""
    from nanophi.data.sources import name_of
    from nanophi.eval import catalogue

    answers = {"title": f"right answers, {' and '.join(catalogue.title(task) for task in tasks)}"}
    targets: dict[str, dict[str, Any]] = {"answers": answers} if tasks else {}
    parts = {"heldout": ", all", "kept": " that the filter keeps", "dropped": " that the filter drops"}
    targets |= {name: {"title": f"held-out text{words}"} for name, words in parts.items()}
    names = [name_of(source) for source in recipe.data.sources if source.heldout]
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
    write_text(path, records.compact({"format": records.FORMAT, "heldout": heldout}))


def describe_plan(plan: Mapping[str, Any]) -> str:
    """The plan in a few lines, with what it will take."""
    epochs, estimate = plan["epochs"], plan["estimate"]
    size = {arm: formatting.size(count) for arm, count in plan["tokens"].items()}
    hours = estimate["hours"] * estimate["runs"] * plan["tokens_seen"] / estimate["tokens"]
    full = f" ({formatting.duration(3600 * hours)} if no run continued another)" if plan.get("branches") else ""
    return (
        f"filter: {plan['rule']} (share {formatting.percent(plan['share'])})\n"
        f"each share: {size['best']} different tokens, {epochs['best']:.2f} epochs; "
        f"all: {size['all']} and {epochs['all']:.2f}\n"
        f"{estimate['runs']} runs of {formatting.size(plan['tokens_seen'])} tokens: "
        f"arms {', '.join(plan['arms'])}; seeds {', '.join(map(str, plan['seeds']))}; "
        f"learning rates {', '.join(f'{rate:g}' for rate in plan['learning_rates'])}\n"
        f"training takes about {formatting.duration(3600 * estimate['hours'])}{full} at "
        f"{estimate['tokens_per_second']:,.0f} tokens/s a run, {estimate['jobs']} at once; evaluation comes on top"
    )
