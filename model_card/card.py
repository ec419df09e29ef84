"""The model card: README.md, rendered from the shipped records through `template.md`, with its figures.

The card is a pure function of the records that are shipped with it. Whoever has them can render it again and must get
the same text: that is how `nanophi verify` checks it.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jinja2

from nanophi.core import formatting, markup
from nanophi.core.errors import UserError
from nanophi.core.files import write_text
from nanophi.core.names import is_hub_id
from nanophi.eval import catalogue, results
from nanophi.eval.results import ANSWER_METRIC
from nanophi.model_card import figures, metadata
from nanophi.model_card.consistency import contradictions
from nanophi.model_card.records import (
    ShippedRecords,
    collect,
    every_score,
    final_checkpoint,
    hardware,
    leading_scores,
    title,
    training_sources,
    write_records,
)

TEMPLATE = Path(__file__).parent / "template.md"


def build(run: Path, output: Path, checkpoint: Path | None = None, repo_id: str | None = None) -> dict[str, Any]:
    """Write `README.md`, `figures/`, `records/` and, where the Hub takes them, `.eval_results/`.

    Args:
        run: the run directory.
        output: folder to write in.
        checkpoint: the checkpoint that the card describes; None: the last one.
        repo_id: where it will be on the Hub; None: what the recipe says.

    Returns:
        `{"characters": length of the card, "figures": [names], "evaluations": number of metric rows}`.

    Raises:
        UserError: if a record is missing, records contradict each other, or the Hub would refuse the metadata.
    """
    records = collect(run, checkpoint or final_checkpoint(run))
    if repo_id is not None:
        records["run.json"] |= {"repo_id": repo_id, "folder": None}
    wrong = contradictions(records)
    if wrong:
        raise UserError(f"{run}: the records contradict each other: {'; '.join(wrong)}")
    text = render(records)
    wrong = metadata.problems(text)
    if wrong:
        raise UserError(f"{run}: the card is not fit to publish: {'; '.join(wrong)}")
    output.mkdir(parents=True, exist_ok=True)
    write_records(records, output / "records")
    names = figures.build(records, output / "figures")
    write_text(output / "README.md", text)
    for name, content in metadata.eval_results_files(records).items():
        write_text(output / ".eval_results" / name, content)
    return {"characters": len(text), "figures": names, "evaluations": len(leading_scores(records))}


@functools.cache
def compile_template(text: str) -> jinja2.Template:
    """A card's template, compiled: that takes longer than to render it, and a push renders several cards."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        finalize=_present,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update({name: _demanding(function) for name, function in FILTERS.items()})
    return environment.from_string(text)


def render(records: ShippedRecords) -> str:
    """README.md of a release. Raises `UserError` if the template asks for something that no record says."""
    template = compile_template(TEMPLATE.read_text(encoding="utf-8"))
    rows, every = leading_scores(records), every_score(records)
    evaluations = [value for name, value in records.items() if name.startswith("evals/")]
    utilisations = [entry["mfu"] for entry in records["training.json"]["log"] if entry["mfu"] is not None]
    recipe, run = records["recipe.yaml"], records["run.json"]
    published = is_hub_id(run["repo_id"])
    try:
        return template.render(
            metadata=metadata.header(records).to_yaml(line_break="\n"),
            datasets=metadata.public_datasets(recipe),
            recipe=recipe,
            run=run,
            name=run["repo_id"].rpartition("/")[2],
            published=published,
            place=run["repo_id"] if published else run["folder"],
            model=records["model.json"],
            training=records["training.json"],
            checkpoint=records["checkpoint.json"],
            sources=training_sources(recipe),
            revisions=records["revisions.json"],
            documents=records.get("documents.json"),
            quality=records.get("quality.json"),
            tokens=records.get("tokens.json"),
            comparison=records.get("comparison.json"),
            differences=differences(records.get("comparison.json")),
            sample=records.get("sample.json"),
            chat=records.get("conversations.json"),
            rows=rows,
            tasks=[row for row in every if not row["task"].startswith("mmlu_")],
            subjects=[row for row in every if row["task"].startswith("mmlu_")],
            harness=", ".join(sorted({value["lm_eval_version"] for value in evaluations})),
            heldout=next((value["nanophi"]["heldout"] for value in evaluations if "heldout" in value["nanophi"]), None),
            leaderboard=leaderboard(records),
            benchmarks=any(not row["task"].startswith(("answers_", "heldout_")) for row in rows),
            by_source=by_source(records),
            noise=noise(rows),
            answers=right_answers(records),
            mfu=statistics.median(utilisations) if utilisations else None,
            hardware=hardware(records),
            figures=figures.names(records),
        )
    except jinja2.UndefinedError as error:
        raise UserError(f"the card needs a value that no record holds: {error.message}") from None


def leaderboard(records: ShippedRecords) -> dict[str, Any] | None:
    """The six tasks of Open LLM Leaderboard v1 and their average; None unless all their items were run.

    Returns:
        `{"average", "stderr", "scores": [(title on the board, score)]}`, shares of one.
    """
    for name, record in records.items():
        found = results.leading_scores(record) if name.startswith("evals/") else []
        average = results.average_score(found)
        if average and average.items == average.of:
            values = {score.task: score.value for score in found}
            scores = [
                (entry.leaderboard.title, values[task]) for task, entry in catalogue.TASKS.items() if entry.leaderboard
            ]
            return {"average": average.value, "stderr": average.stderr, "scores": scores}
    return None


def right_answers(records: ShippedRecords) -> list[dict[str, Any]]:
    """Bits per byte of the right answers of every task that has some: title, value, stderr, items."""
    evaluations = [record for name, record in records.items() if name.startswith("evals/")]
    scores = [score for record in evaluations for score in results.answer_scores(record)]
    return [
        {"title": score.title, "items": score.items, "value": score.value, "stderr": score.stderr}
        for score in sorted(scores, key=lambda score: catalogue.position(score.task))
    ]


def differences(comparison: dict[str, Any] | None) -> dict[str, list[dict[str, Any]]] | None:
    """Label -> one row per task: its difference from the baseline, and whether that is more than noise."""
    if comparison is None:
        return None
    rows: dict[str, list[dict[str, Any]]] = {}
    answers = [{"task": task, **row} for task, row in comparison.get("answers", {}).items()]
    for row in (*catalogue.main_rows(comparison), *answers):
        answer = f" ({catalogue.metric_name(ANSWER_METRIC)})" if row["metric"] == ANSWER_METRIC else ""
        for label, entry in row["differences"].items():
            rows.setdefault(label, []).append(
                {
                    "title": catalogue.row_title(row) + answer,
                    "difference": catalogue.difference(entry, row["metric"]),
                    "detectable": catalogue.metric(entry.get("minimum_detectable_effect"), row["metric"]),
                    "p": formatting.p_value(entry["p_corrected"]),
                    "verdict": entry["verdict"],
                }
            )
    return rows


def by_source(records: ShippedRecords) -> dict[str, Any] | None:
    """Held-out bits per byte of the compared models by source; None unless two or more were measured.

    Returns:
        `{"labels": names of the models, "rows": [{"source", "documents", "kept": share of the source's bytes that the
        filter kept, None if it is not trained on, "scores": cells in the order of the labels}]}`.
    """
    comparison = records.get("comparison.json") or {}
    heldout = comparison.get("heldout") or {}
    labels = [label for label in comparison.get("labels", []) if label in heldout]
    if len(labels) < 2:
        return None
    filtered, rows = records.get("quality.json", {}).get("sources", {}), []
    for source in sorted({source for label in labels for source in heldout[label]["by_source"]}):
        parts = [heldout[label]["by_source"].get(source) for label in labels]
        trained = filtered.get(source)
        rows.append(
            {
                "source": source,
                "documents": max(part["documents"] for part in parts if part is not None),
                "kept": trained["kept_bytes"] / trained["bytes"] if trained and trained["bytes"] else None,
                "scores": [bits_per_byte(part) or "-" for part in parts],
            }
        )
    return {"labels": labels, "rows": rows}


def bits_per_byte(part: dict[str, Any] | None) -> str:
    """Bits per byte of a part of the held-out text, with the standard error if it is of several documents."""
    if part is None:
        return ""
    stderr = part["bits_per_byte_stderr"] if part["documents"] > 1 else None
    return catalogue.score({"value": part["bits_per_byte"], "stderr": stderr}, "bits_per_byte")


def noise(rows: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Tasks by whether guessing explains their score: `above` and `within` two standard errors of chance."""
    tasks: dict[str, list[str]] = {"above": [], "within": []}
    for row in rows:
        if row["chance"] is not None and row["stderr"]:
            above = row["value"] - row["chance"] > 2 * row["stderr"]
            tasks["above" if above else "within"].append(row["title"])
    return tasks


# Filters of the template


def _present(value: Any) -> Any:
    """What an expression of the template yields, unless that is nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise jinja2.UndefinedError(f"an expression of {TEMPLATE.name} is {value}")
    return value


def _demanding(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, but a missing value is reported instead of failing as a type."""

    def call(value: Any, *arguments: Any) -> Any:
        if isinstance(value, jinja2.Undefined):
            str(value)  # StrictUndefined raises with the name.
        return function(value if function in OPTIONAL else _present(value), *arguments)

    return call


def _verdicts(rows: list[dict[str, Any]]) -> str:
    """`better on "a", "b"; worse on "c"`, what is empty left out; in quotes, as titles have commas of their own."""
    parts = []
    for verdict in ("better", "worse", "within noise"):
        tasks = [f'"{row["title"]}"' for row in rows if row["verdict"] == verdict]
        if tasks:
            parts.append(f"{verdict} on {', '.join(tasks)}")
    return "; ".join(parts)


def _source_name(source: dict[str, Any]) -> str:
    return source["name"] or source["hub"] or source["files"] or source["embedded"]


def _cell(entry: dict[str, Any] | None, metric: str) -> str:
    return catalogue.score(entry, metric) or "-"


FILTERS: dict[str, Any] = {
    "bits_per_byte": bits_per_byte,
    "code": markup.code,
    "code_cell": lambda value: markup.code(value, cell=True),
    "decimal": formatting.decimal,
    "duration": formatting.duration,
    "figure": formatting.figure,
    "fenced": markup.fenced,
    "integer": formatting.integer,
    "literal": lambda text: json.dumps(text, ensure_ascii=False),
    "metric": catalogue.metric,
    "metric_name": catalogue.metric_name,
    "on_hub": lambda source: source["hub"] is not None and is_hub_id(source["hub"]),
    "percent": formatting.percent,
    "plain": lambda text: re.sub(r"[{}\\`]", "", text),
    "score": _cell,
    "shell": shlex.quote,
    "size": formatting.size,
    "source_name": _source_name,
    "text": markup.text,
    "title": title,
    "rows": catalogue.main_rows,
    "row_title": catalogue.row_title,
    "verdicts": _verdicts,
}

OPTIONAL = (catalogue.metric, _cell)
"""Filters for values that may be missing."""
