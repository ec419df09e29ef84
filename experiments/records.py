"""What every experiment keeps: a plan that is written before anything is trained, and a record of each finished run.

    OUTPUT/plan.json    the question, and what follows from it
    OUTPUT/records/     one JSON file per run, with every item's log-likelihood

Which runs an experiment has and what it makes of their records is its own (`ablate.py`, `ladder.py`).
"""

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanophi.core import formatting
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of, write_json, write_text
from nanophi.core.recipe import Recipe, checked, load_recipe
from nanophi.core.run import Report, differences
from nanophi.pipeline import Pipeline, train_side_by_side

FORMAT = 1
"""Version of the plan and the records."""
HELDOUT = "heldout_bits_per_byte"
MAX_SEED = (1 << 32) - 1


def keep_plan(
    output: Path,
    question: Mapping[str, Any],
    make: Callable[[Mapping[str, Any]], dict[str, Any]],
    parts: Iterable[str] = ("",),
) -> dict[str, Any]:
    """The plan in a folder, written there by `make` if there is none yet: one that follows the results is none.

    `parts`: where below `output` there may be records. Raises `UserError` if the folder cannot be written, if it has
    records without a plan, or if its plan is of another question.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); choose another --output") from None
    path = output / "plan.json"
    if not path.exists():
        if any(recorded(output / part) for part in parts):
            raise UserError(f"{path} is missing, but its runs have records; put it back, or name another --output")
        write_json(path, make(question))
    plan: dict[str, Any] = read_json(path)
    if (version := plan.get("format") if isinstance(plan, dict) else None) != FORMAT:
        raise UserError(f"{path} has format {version}, this version reads {FORMAT}; name another --output")
    # A recipe that was written by an earlier version lacks keys that it has the default of.
    planned = plan | {"recipe": checked(plan.get("recipe"), path).dump()}
    planned["recipe"]["data"] |= {key: question["recipe"]["data"][key] for key in ("workers", "engine")}
    if changed := differences({key: planned.get(key) for key in question}, question):
        raise UserError(f"{path}: planned otherwise ({changed[0]}); name another --output, or repeat what was planned")
    return plan


def name_of_runs(recipe: Recipe, question: Mapping[str, Any], runs: Path, planned: Sequence[Recipe]) -> str:
    """What the names of an experiment's runs begin with: the recipe's, or one of this question's own.

    `planned` are the runs under the recipe's name, of which one of another question may be there.
    """
    there = [(run, runs / run.name / "recipe.yaml") for run in planned]
    if any(file.exists() and load_recipe(file).dump() != run.dump() for run, file in there):
        return f"{recipe.name}-{sha256_of(question)[:8]}"
    return recipe.name


def check_numbers(
    seeds: Sequence[int],
    learning_rates: Sequence[float] = (),
    epochs: float | None = None,
    smallest: float | None = None,
    tokens_per_parameter: float | None = None,
) -> None:
    """Refuse numbers that no run can have. Raises `UserError`."""
    positive = (math.ulp(0.0), sys.float_info.max, "a number above 0")
    for option, values, (least, most, words) in (
        ("--seed", seeds, (0, MAX_SEED, f"from 0 to {MAX_SEED}")),
        ("--learning-rate", learning_rates, positive),
        ("--epochs", [epochs], positive),
        ("--smallest", [smallest], positive),
        ("--tokens-per-parameter", [tokens_per_parameter], (1, 10_000, "from 1 to 10,000")),
    ):
        if wrong := [value for value in values if value is not None and not least <= value <= most]:
            raise UserError(f"{option} {wrong[0]} must be {words}")
        if len(set(values)) < len(values):
            raise UserError(f"{option} has one value twice; every run needs its own")


def check_tasks(recipe: Recipe, tasks: Sequence[str]) -> None:
    """Refuse tasks whose data is missing, or that have no right answer with a likelihood. Raises `UserError`."""
    from nanophi.eval import suites

    if tasks:
        data = recipe.evaluation.data
        loaded = suites.load_suite(suites.find_suite(",".join(tasks)), data=Path(data) if data else None).tasks
        for name in tasks:
            if name not in loaded or loaded[name].OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
                raise UserError(f"--tasks {name} is no single task with a right answer whose likelihood is known")


def measured_speed(recipe: Recipe, jobs: int) -> float:
    """Tokens per second of each of so many trainings at once, from a few steps with the threads that it will have."""
    import torch

    from nanophi.core.jobs import cores
    from nanophi.training import estimate

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(max(1, min(threads, cores() // jobs)))
        return estimate.measured_speed(recipe, report=lambda line: None)
    finally:
        torch.set_num_threads(threads)


def estimate(recipe: Recipe, runs: int, tokens: int, vocab_size: int, jobs: int) -> dict[str, Any]:
    """What so many trainings of a recipe, on so many tokens together, will take here."""
    speed = measured_speed(Recipe(**{**recipe.dump(), "model": {**recipe.model, "vocab_size": vocab_size}}), jobs)
    hours = round(tokens / speed / jobs / 3600, 3)
    return {"runs": runs, "tokens": tokens, "tokens_per_second": round(speed, 1), "jobs": jobs, "hours": hours}


def tokens_seen(recipe: Recipe) -> int:
    """Tokens that a training by the recipe reads, repeated ones counted again."""
    return recipe.training.steps * recipe.training.batch_size * recipe.model_config_for().max_position_embeddings


def without_repetition(report: Report) -> Report:
    """`report`, without the lines that tell of every run that what all share is there already."""
    told = re.compile("up to date$| shared with ")
    return lambda line: None if told.search(line) else report(line)


def run_missing(
    pipelines: Sequence[Pipeline], output: Path, jobs: int, finished: Callable[[str], None], report: Report
) -> None:
    """Train and evaluate the runs that have no record yet, `jobs` at once, and tell how many are left.

    `finished` gets the name of each and writes its record.
    """
    waiting = [pipeline for pipeline in pipelines if not record_path(output, pipeline.recipe.name).exists()]
    before, began, done = len(pipelines) - len(waiting), time.monotonic(), 0
    if before:
        report(f"{before} of {len(pipelines)} runs were done before")

    def one(name: str) -> None:
        nonlocal done
        finished(name)
        done += 1
        left = len(waiting) - done
        seconds = (time.monotonic() - began) / done * left
        rest = f", about {formatting.duration(seconds)} left" if left else ""
        report(f"{before + done} of {len(pipelines)} runs done{rest}")

    if waiting:
        train_side_by_side(waiting, jobs, one)


def suite(tasks: Sequence[str]) -> str:
    """The suite that an experiment's runs are evaluated on: held-out text, and tasks."""
    return ",".join((HELDOUT, *tasks))


def write_record(pipeline: Pipeline, tasks: Sequence[str], output: Path, **fields: Any) -> None:
    """A finished run's record: what it was trained on, and every item's log-likelihood (nats) and size (bytes).

    Of a task it also has which items were answered correctly, and whether these are more than guessing gives.

    `tasks` are those that it was evaluated on beside held-out text; `fields` what the experiment wants to know of it.
    """
    from nanophi.core.environment import environment
    from nanophi.core.names import step_name
    from nanophi.eval.results import ANSWER_METRIC, item_values, leading_scores, read_result, run_result_name

    recipe = pipeline.recipe
    step = step_name(recipe.training.steps)
    result = read_result(pipeline.path / "evals" / run_result_name(step, suite(tasks)))
    items: dict[str, Any] = {}
    for task in (HELDOUT, *tasks):
        values = item_values(result, task, "bits_per_byte" if task == HELDOUT else ANSWER_METRIC)
        if not values:
            raise UserError(f"task '{task}' has no right answer whose likelihood is known; name other --tasks")
        ordered = sorted(values)
        items[task] = {
            "numbers": [number for number, _ in ordered],
            "sha256": sha256_of([hashed for _, hashed in ordered]),
            "values": [_rounded(values[item]) for item in ordered],
        }
    for score in leading_scores(result):
        if score.percent and score.task in items:
            values = item_values(result, score.task, score.metric)
            correct = [_rounded(values[item]) for item in sorted(values)]
            items[score.task] |= {"correct": correct, "above_chance": score.against_chance == "above"}
    history = read_json(pipeline.path / "training.json")["summary"]
    content = {
        "format": FORMAT,
        "run": recipe.name,
        **fields,
        "documents": read_json(pipeline.path / "data/tokens/tokens.json")["train"]["documents"],
        **{name: history[name] for name in ("tokens_seen", "epochs", "seconds", "final_loss", "weights_sha256")},
        **{name: history[name] for name in ("decay_epochs",) if name in history},
        "shared": {stage: pipeline.run.key(stage) for stage in ("documents", "scores", "tokenizer")},
        "environment": environment(),
        "items": items,
    }
    write_text(record_path(output, recipe.name), compact(content))


def _rounded(value: Any) -> Any:
    return [round(value[0], 4), int(value[1])] if isinstance(value, list | tuple) else round(value, 6)


def compact(value: Mapping[str, Any]) -> str:
    """JSON with one line for each key of the first level, so that thousands of numbers do not fill as many lines."""
    lines = [f"{json.dumps(key)}: {json.dumps(item, separators=(',', ':'))}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def record_path(output: Path, name: str) -> Path:
    """The record of the run with this name."""
    return output / "records" / f"{name}.json"


def recorded(output: Path) -> list[Path]:
    """The files of the finished runs' records."""
    return sorted((output / "records").glob("*.json"))


def read_records(output: Path, fields: Sequence[str], planned: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """The records of the finished runs; `planned`: the values of `fields` that they may have, each one of them.

    Raises `UserError` if there is none yet, or one that was not planned.
    """
    records: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in recorded(output):
        record = read_json(path)
        key = tuple(record.get(field) for field in fields) if isinstance(record, dict) else ()
        if key not in planned or key in records or record.get("run") != path.stem:
            raise UserError(f"{path} is not a record of a planned run; move it away")
        records[key] = record
    if not records:
        raise UserError(f"{output} holds no record of a finished run; run the experiment again")
    return list(records.values())
