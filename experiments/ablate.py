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

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from nanophi.core import formatting
from nanophi.core.environment import environment
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of, write_json, write_text
from nanophi.core.recipe import Recipe
from nanophi.core.run import now
from nanophi.data.selection import describe_rule
from nanophi.experiments import ablation_render
from nanophi.pipeline import Pipeline, train_side_by_side

FORMAT = 1
"""Version of the plan, the items and the records."""
TASKS = ("arc_easy", "hellaswag")
"""Multiple-choice tasks whose right answers are the primary target."""
HELDOUT = "heldout_bits_per_byte"
LOWER_RATE = 0.2
"""The second learning rate, if none is named, in units of the recipe's."""
SAMPLE_TOKENS = 200_000
"""Of each arm, from which its bytes per token are measured for the plan."""
SAFETY = 0.98
"""Share of an arm's estimated tokens that the plan counts on."""


def ablate(
    recipe: Recipe,
    runs: Path,
    output: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    learning_rates: Sequence[float] = (),
    epochs: float | None = None,
    tasks: Sequence[str] = TASKS,
    jobs: int = 1,
    plan_only: bool = False,
    report: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Run the experiment, or what is left of it, and write the answer.

    Args:
        recipe: with the filter in question: `quality.threshold`, or `quality.share` of the best.
        runs: folder for the run directories.
        output: folder for plan, records and answer.
        seeds: of the runs; one alone gives no interval.
        learning_rates: peak rates of AdamW's parameters (Muon's follows in proportion); none: the recipe's, and
            `LOWER_RATE` times that.
        epochs: how often a share is repeated; None: as often as the recipe's own run repeats what its filter keeps.
        tasks: lm-eval's multiple-choice tasks; none: all held-out text together is the primary target.
        jobs: runs at once, each with one GPU or its share of the cores.
        plan_only: write the plan and stop, so that it can be published first.
        report: called with one line for each thing worth telling.

    Returns:
        what `ablation.json` holds; None with `plan_only`.

    Raises:
        UserError: for an experiment that cannot be run or that differs from the plan in `output`; for runs that fail,
            after the others have ended.
    """
    from nanophi.eval import suites
    from nanophi.experiments import ablation
    from nanophi.training import arguments

    if recipe.conversations:
        raise UserError(f"{recipe.name} trains on conversations, which no filter selects; name the recipe of its base")
    if recipe.quality.threshold is None and (recipe.quality.share is None or recipe.quality.share == 1):
        raise UserError(
            f"{recipe.name} keeps everything; set quality.threshold or quality.share to what is in question"
        )
    if recipe.quality.select != "best":
        raise UserError("quality.select must be 'best'; the other shares are arms of the experiment")
    for name, values in (("seed", seeds), ("learning rate", learning_rates)):
        if len(set(values)) < len(values):
            raise UserError(f"a {name} is named twice; every run needs its own")
    own = recipe.training.learning_rate
    rates = list(learning_rates) or [own, float(f"{LOWER_RATE * own:.6g}")]
    for seed in seeds:
        if not 0 <= seed < 1 << 32:
            raise UserError(f"--seed {seed} must be from 0 to {(1 << 32) - 1}")
    for rate in rates:
        if not 0 < rate < math.inf:
            raise UserError(f"--learning-rate {rate:g} must be a number above 0")
    if epochs is not None and not 0 < epochs < math.inf:
        raise UserError(f"--epochs {epochs:g}: a share must be repeated more than 0 times")
    if problem := suites.context_problem([_suite(tasks)], recipe.model_config_for().max_position_embeddings):
        raise UserError(f"{recipe.name}: {problem}")
    question = {
        "recipe": recipe.dump(),
        "seeds": list(seeds),
        "learning_rates": rates,
        "epochs_asked": epochs,
        "tasks": list(tasks),
    }
    arguments.check(recipe.training, runs / recipe.name, recipe.training_seed)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); choose another --output") from None
    plan = _plan(question, recipe, runs, output, jobs, report)
    if plan_only:
        return None
    keys = [(arm, seed, rate) for seed in seeds for rate in rates for arm in ablation.ARMS]
    pipelines = {}
    for key in keys:
        arm_recipe = arm_of(recipe, plan, *key)
        pipelines[arm_recipe.name] = (key, Pipeline(arm_recipe, runs, report=_without_repetition(report)))
    waiting = [name for name in pipelines if not _record_path(output, name).exists()]
    if len(waiting) < len(pipelines):
        report(f"{len(pipelines) - len(waiting)} of {len(pipelines)} runs were done before")
    began, left = time.monotonic(), list(waiting)

    def finished(name: str) -> None:
        key, pipeline = pipelines[name]
        record(pipeline, key, plan, output)
        left.remove(name)
        ablation_render.write_answer(output)
        done = len(waiting) - len(left)
        seconds = (time.monotonic() - began) / done * len(left)
        rest = f", about {formatting.duration(seconds)} left" if left else ""
        report(f"{len(pipelines) - len(left)} of {len(pipelines)} runs done{rest}")

    if waiting:
        train_side_by_side([pipelines[name][1] for name in waiting], jobs, finished)
    result = ablation_render.write_answer(output)
    if (runs / recipe.name / "record.json").exists():
        write_json(runs / recipe.name / "ablation.json", result)
    return result


def _suite(tasks: Sequence[str]) -> str:
    return ",".join((HELDOUT, *tasks))


def _without_repetition(report: Callable[[str], None]) -> Callable[[str], None]:
    """`report`, without the lines that say of every run that what all share is there already."""
    return lambda line: None if line.endswith("up to date") or " shared with " in line else report(line)


def arm_of(recipe: Recipe, plan: Mapping[str, Any], arm: str, seed: int, rate: float) -> Recipe:
    """The recipe of one run.

    Args:
        recipe: of the experiment.
        plan: of which `share`, `tokens` (by arm, None: not limited) and `tasks` count.
        arm, seed, rate: which run.
    """
    values = recipe.dump()
    training, steps = values["training"], recipe.training.steps
    values["name"] = f"{recipe.name}-{arm}-seed-{seed}-lr-{rate:g}"
    values["data"]["max_tokens"] = plan["tokens"][arm]
    share = {"share": None, "select": "best"} if arm == "all" else {"share": plan["share"], "select": arm}
    values["quality"] |= {"threshold": None, **share}
    training["muon_learning_rate"] *= rate / training["learning_rate"]
    # Only the end is measured, and by the evaluation.
    training |= {"learning_rate": rate, "seed": seed, "keep_steps": [], "eval_steps": steps + 1}
    values["evaluation"]["suites"] = [_suite(plan["tasks"])]
    values["card"]["title"] = None
    return Recipe(**values)


# The plan


def _plan(
    question: dict[str, Any],
    recipe: Recipe,
    runs: Path,
    output: Path,
    jobs: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """The plan in `output`, written there if there is none yet."""
    path = output / "plan.json"
    if path.exists():
        plan = read_json(path)
        _check_same(plan, question, path)
    else:
        plan = _make_plan(question, recipe, runs, output, report)
        plan["estimate"] = _estimate(recipe, plan, jobs)
        write_json(path, plan)
    report(describe_plan(plan))
    return plan


def _check_same(plan: Mapping[str, Any], question: Mapping[str, Any], path: Path) -> None:
    """Refuse an experiment that differs from its plan: a plan that follows the results is none."""
    if plan.get("format") != FORMAT:
        raise UserError(f"{path} has format {plan.get('format')}, this version reads {FORMAT}; name another --output")
    before, now_ = dict(plan), dict(question)
    # A recipe that was written by an earlier version lacks keys that it has the default of.
    before["recipe"] = Recipe(**plan["recipe"]).dump()
    for key in ("workers", "engine"):
        before["recipe"]["data"][key] = now_["recipe"]["data"][key]
    for key, value in now_.items():
        if before[key] != value:
            where = key.replace("_", " ")
            if key == "recipe":
                sections = [section for section in value if before[key][section] != value[section]]
                where = f"values in the recipe's {sections[0]}"
            raise UserError(f"{path}: planned with other {where}; name another --output, or repeat what was planned")


def _make_plan(
    question: dict[str, Any], recipe: Recipe, runs: Path, output: Path, report: Callable[[str], None]
) -> dict[str, Any]:
    from nanophi.experiments import ablation

    _check_tasks(recipe, question["tasks"])
    config, training = recipe.model_config_for(), recipe.training
    length = config.max_position_embeddings
    seen = training.steps * training.batch_size * length
    plan: dict[str, Any] = {"format": FORMAT, **question, "share": recipe.quality.share, "tokens": {}}
    seed, rate = question["seeds"][0], question["learning_rates"][0]
    quiet = _without_repetition(report)
    if plan["share"] is None:
        own = Pipeline(_renamed(recipe, f"{recipe.name}-all-seed-{seed}-lr-{rate:g}"), runs, report=quiet)
        with own.run.lock():
            plan["share"] = own.make("quality")["kept_bytes_fraction"]
    available = {}
    for arm in ablation.ARMS:
        plan["tokens"] = dict.fromkeys(ablation.ARMS, SAMPLE_TOKENS)
        pipeline = Pipeline(arm_of(recipe, plan, arm, seed, rate), runs, report=quiet)
        with pipeline.run.lock():
            pipeline.write_recipe()
            counts = pipeline.prepare()
            kept = pipeline.make("quality")["kept_bytes"]
        available[arm] = int(SAFETY * kept / counts["train"]["bytes_per_token"])
        if arm == "best":
            _write_items(pipeline, plan, output)
    most = min(*(available[arm] for arm in ("best", "random", "worst")), available["all"] * plan["share"])
    asked = question["epochs_asked"]
    unique = min(most, available["best"]) if asked is None else seen / asked
    if unique > most:
        raise UserError(
            f"--epochs {asked:g} needs {unique:,.0f} different tokens in every share, but there are {most:,.0f}; "
            f"ask for {seen / most:.2f} epochs or more"
        )
    unique = int(unique) // length * length
    if unique < length:
        raise UserError(f"every share has less than one row of {length} tokens; ask for fewer --epochs or add text")
    tokens = dict.fromkeys(ablation.ARMS, unique)
    tokens["all"] = int(unique / plan["share"]) // length * length
    plan |= {
        "rule": describe_rule(recipe.quality),
        "arms": list(ablation.ARMS),
        "tokens": tokens,
        "tokens_seen": seen,
        "epochs": {arm: seen / count for arm, count in tokens.items()},
        "vocab_size": counts["vocab_size"],
        "targets": _targets(recipe, question["tasks"]),
        "contrasts": {name: " - ".join(arms) for name, arms in ablation.CONTRASTS.items()},
        "test": str(ablation.__doc__).split("\n\n", 1)[1].strip(),
        "planned": now(),
        "environment": environment(),
    }
    return plan


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


def _renamed(recipe: Recipe, name: str) -> Recipe:
    return Recipe(**{**recipe.dump(), "name": name})


def _targets(recipe: Recipe, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is measured, the primary target first: fixed before there is anything to measure."""
    from nanophi.eval import catalogue

    targets: dict[str, dict[str, Any]] = {}
    if tasks:
        names = " and ".join(catalogue.title(task) for task in tasks)
        targets["answers"] = {"title": f"right answers, {names}"}
    targets["heldout"] = {"title": "held-out text, all"}
    targets["kept"] = {"title": "held-out text that the filter keeps"}
    targets["dropped"] = {"title": "held-out text that the filter drops"}
    held = [source for source in recipe.data.sources if source.heldout]
    for source in held:
        if len(held) > 1:
            name = source.name or source.hub or source.files
            targets[f"source:{name}"] = {"title": f"held-out source {name}", "source": name}
    return {name: {**target, "primary": number == 0} for number, (name, target) in enumerate(targets.items())}


def _estimate(recipe: Recipe, plan: Mapping[str, Any], jobs: int) -> dict[str, Any]:
    """What the trainings will take, from a few steps on this machine with the threads that a run will have."""
    import torch

    from nanophi.core.processes import cores
    from nanophi.training import estimate

    sized = Recipe(**{**recipe.dump(), "model": {**recipe.model, "vocab_size": plan["vocab_size"]}})
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(max(1, min(threads, cores() // jobs)))
        speed = estimate.measure(sized, report=lambda line: None)
    finally:
        torch.set_num_threads(threads)
    runs = len(plan["arms"]) * len(plan["seeds"]) * len(plan["learning_rates"])
    return {
        "runs": runs,
        "tokens": runs * plan["tokens_seen"],
        "tokens_per_second": round(speed, 1),
        "jobs": jobs,
        "hours": round(runs * plan["tokens_seen"] / speed / jobs / 3600, 3),
    }


def describe_plan(plan: Mapping[str, Any]) -> str:
    """The plan in a few lines, with what it will take."""
    epochs, estimate = plan["epochs"], plan["estimate"]
    size = {arm: formatting.size(count) for arm, count in plan["tokens"].items()}
    return "\n".join(
        [
            f"filter: {plan['rule']} (share {formatting.percent(plan['share'])})",
            f"each share: {size['best']} different tokens, {epochs['best']:.2f} epochs; "
            f"all: {size['all']} and {epochs['all']:.2f}",
            f"{estimate['runs']} runs of {formatting.size(plan['tokens_seen'])} tokens: "
            f"arms {', '.join(plan['arms'])}; seeds {', '.join(map(str, plan['seeds']))}; "
            f"learning rates {', '.join(f'{rate:g}' for rate in plan['learning_rates'])}",
            f"training takes about {formatting.duration(3600 * estimate['hours'])} at "
            f"{estimate['tokens_per_second']:,.0f} tokens/s a run, {estimate['jobs']} at once; evaluation comes on top",
        ]
    )


# The records


def _write_items(pipeline: Pipeline, plan: Mapping[str, Any], output: Path) -> None:
    """`items.json`: the held-out documents, and which of them the filter would keep."""
    from nanophi.data import documents

    kept = pq.read_table(pipeline.path / "data/quality/heldout.parquet").to_pylist()
    keep = {row["id"]: bool(row["kept"]) for row in kept}
    rows = documents.heldout(pipeline.path / "data/documents", ("id", "source"))
    items = {
        "format": FORMAT,
        "heldout": [{"id": row["id"], "source": row["source"], "kept": keep[row["id"]]} for row in rows],
    }
    write_text(output / "items.json", _compact(items))


def record(pipeline: Pipeline, key: tuple[str, int, float], plan: Mapping[str, Any], output: Path) -> None:
    """Write a finished run's record: what it was trained on, and every item's log-likelihood (nats) and size."""
    from nanophi.core.names import step_name
    from nanophi.eval.results import ANSWER_METRIC, item_values, read_result, run_result_name

    recipe = pipeline.recipe
    result = read_result(
        pipeline.path / "evals" / run_result_name(step_name(recipe.training.steps), _suite(plan["tasks"]))
    )
    history = read_json(pipeline.path / "training.json")["summary"]
    tokens = read_json(pipeline.path / "data/tokens/tokens.json")["train"]
    limit = plan["tokens"][key[0]]
    if tokens["rows"] * recipe.model_config_for().max_position_embeddings != limit:
        raise UserError(
            f"{pipeline.path} has {tokens['tokens']:,} different tokens instead of {limit:,}; ask for more --epochs in "
            "another --output"
        )
    items: dict[str, Any] = {}
    for task in (HELDOUT, *plan["tasks"]):
        values = item_values(result, task, "bits_per_byte" if task == HELDOUT else ANSWER_METRIC)
        if not values:
            raise UserError(f"task '{task}' has no right answer whose likelihood is known; name other --tasks")
        ordered = sorted(values)
        items[task] = {
            "numbers": [number for number, _ in ordered],
            "sha256": sha256_of([hashed for _, hashed in ordered]),
            "values": [_rounded(values[item]) for item in ordered],
        }
    arm, seed, rate = key
    content = {
        "format": FORMAT,
        "run": recipe.name,
        "arm": arm,
        "seed": seed,
        "learning_rate": rate,
        "unique_tokens": limit,
        "documents": tokens["documents"],
        **{name: history[name] for name in ("tokens_seen", "epochs", "seconds", "final_loss", "weights_sha256")},
        "shared": {stage: pipeline.run.stage_key(stage) for stage in ("documents", "scores", "tokenizer")},
        "environment": environment(),
        "items": items,
    }
    write_text(_record_path(output, recipe.name), _compact(content))


def _rounded(value: Any) -> Any:
    return [round(value[0], 4), int(value[1])] if isinstance(value, list | tuple) else round(value, 6)


def _compact(value: Any) -> str:
    """JSON with one line for each key of the first level, so that thousands of numbers do not fill as many lines."""
    lines = [f"{json.dumps(key)}: {json.dumps(item, separators=(',', ':'))}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _record_path(output: Path, name: str) -> Path:
    return output / "records" / f"{name}.json"
