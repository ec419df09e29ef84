"""Cross-checks a release's records: statements of two of them that cannot both be true, one line each.

Scores are derived from lm-eval's results wherever they are shown, so what is compared with them here are the figures
that others computed: the comparison, its items, and the held-out text by source.
"""

import math
from collections.abc import Iterator
from typing import Any

from nanophi.core.names import step_name
from nanophi.eval import results
from nanophi.eval.catalogue import HELDOUT_BITS
from nanophi.eval.compare import TABLES, recompute
from nanophi.eval.results import Score
from nanophi.eval.statistics import verdict
from nanophi.model_card.records import ShippedRecords, in_order, leading_scores

TOLERANCES = {"value": 1e-6, "stderr": 0.3}
"""Relative, of figures made again; others' are a bootstrap's 0.1. Of two items lm-eval's bootstrap finds 0.7 stderr."""


def contradictions(records: ShippedRecords) -> list[str]:
    """Statements of two records that cannot both be true, one line each."""
    recipe, checkpoint, training = records["recipe.yaml"], records["checkpoint.json"], records["training.json"]
    run, model, quality = records["run.json"], records["model.json"], records.get("quality.json", {})
    config, step, batch = model["config"], checkpoint["step"], recipe["training"]["batch_size"]
    context, loss = config["max_position_embeddings"], checkpoint.get("eval_loss")
    claims: list[tuple[str, Any, str, Any]] = [
        ("checkpoint.json is of", step_name(step), "its folder is", run["revision"]),
        ("training.json has parameters:", training["summary"]["parameters"], "the weights have", model["parameters"]),
    ]
    if run["final"]:
        claims.append(("checkpoint.json has step", step, "recipe.yaml has steps", recipe["training"]["steps"]))
    for key, value in recipe["model"].items():
        if key != "vocab_size" or recipe["tokenizer"]["path"] is not None:
            claims.append((f"config.json has {key}", config.get(key, value), "recipe.yaml has", value))
    if not recipe.get("conversations"):
        tokens = f"{step} steps of {batch} x {context} are"
        claims.append(("checkpoint.json has tokens seen:", checkpoint["tokens_seen"], tokens, step * batch * context))
    for key in {"threshold", "share"} & set(quality):
        claims.append((f"quality.json has {key}", quality[key], "recipe.yaml has", recipe["quality"][key]))
    for evaluation in training["evaluations"] if loss is not None else ():
        if evaluation["step"] == step and not math.isclose(evaluation["loss"], loss, rel_tol=1e-6):
            claims.append((f"training.json has, at step {step}, loss", evaluation["loss"], "checkpoint.json has", loss))
    wrong = [f"{first} {value}, {second} {other}" for first, value, second, other in claims if not _same(value, other)]
    for name, record in records.items():
        wrong += _evaluation(name, record) if name.startswith("evals/") else []
    return wrong + (list(_comparison(records)) if "comparison.json" in records else [])


def _evaluation(name: str, record: dict[str, Any]) -> Iterator[str]:
    """Of one suite: what is recited, and the held-out figures by source, against lm-eval's results."""
    scores = {score.task: score for score in results.leading_scores(record)}
    for row in record["nanophi"].get("memorisation", []):
        score = scores[f"memorisation_{row['split']}"]
        if not row["occurrences"] and not math.isclose(score.value, row["verbatim"] / row["items"], abs_tol=1e-9):
            yield f"{name} has {row['verbatim']} of {row['items']} items recited, its results have {score.value}"
    heldout, whole = record["nanophi"].get("heldout"), scores.get(HELDOUT_BITS)
    if heldout and whole is not None:
        parts = list(heldout["by_source"].values())
        bits = sum(part["bits_per_byte"] * part["bytes"] for part in parts) / sum(part["bytes"] for part in parts)
        names = {"value": "bits_per_byte", "stderr": "bits_per_byte_stderr", "items": "documents"}
        copy = {key: heldout[figure] for key, figure in names.items()}
        yield from _repeated(f"{name} has held-out bits per byte:", copy, whole)
        if not _same(copy["value"], bits):
            yield f"{name} has {copy['value']} bits per byte of the held-out text, its sources give {bits}"


def _repeated(what: str, copy: dict[str, Any], score: Score) -> Iterator[str]:
    """Where a copy of a score is not the score."""
    for key in ("value", "stderr", "items", "chance", "higher_is_better"):
        if key in copy and not _same(copy[key], getattr(score, key)):
            yield f"{what} {key} {copy[key]}, the results give {getattr(score, key)}"


def _comparison(records: ShippedRecords) -> Iterator[str]:
    """The comparison against this model's own scores, and its verdicts against the differences that they are about."""
    comparison, ours = records["comparison.json"], records["recipe.yaml"]["name"]
    for score in leading_scores(records):
        compared = comparison["tasks"].get(score.task, {"scores": {}})
        copy = compared["scores"].get(ours)
        # Of two suites with the same task, the comparison has the one with more items.
        if copy is not None and copy["items"] == score.items:
            both = {key: compared[key] for key in ("chance", "higher_is_better")} | copy
            yield from _repeated(f"comparison.json has {score.task}", both, score)
    parts = (comparison.get("heldout") or {}).get(ours, {}).get("by_source", {})
    for name, record in records.items():
        own = (record["nanophi"].get("heldout") or {}).get("by_source", {}) if name.startswith("evals/") else {}
        for source, part in parts.items() if own else ():
            here, there = part["bits_per_byte"], own.get(source, {}).get("bits_per_byte")
            if not _same(here, there):
                yield f"comparison.json has {here} bits per byte of {source}, {name} has {there}"
    yield from _underived(comparison)
    for _, task, row in _rows(comparison):
        for label, entry in row["differences"].items():
            follows = verdict(entry["value"], entry["p_corrected"], row["higher_is_better"])
            if entry["verdict"] != follows:
                yield (
                    f"comparison.json calls {label} {entry['verdict']} on {task}, its difference of "
                    f"{entry['value']} with p {entry['p_corrected']} is {follows}"
                )


def _rows(comparison: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Table (or group of subjects), task and row of every row in a comparison."""
    tables = {table: comparison.get(table) or {} for table in TABLES if table != "subjects"}
    for table, rows in {**tables, **(comparison.get("subjects") or {})}.items():
        yield from ((table, task, row) for task, row in rows.items())


def _underived(comparison: dict[str, Any]) -> Iterator[str]:
    """Figures that the comparison's scores or, in a comparison that holds items, these do not give."""
    derived = {(table, task): row for table, task, row in _rows(recompute(comparison) or {})}
    for table, task, row in _rows(comparison):
        for label, entry in row["differences"].items() if table == "tasks" else ():
            here, there = (row["scores"].get(model) for model in (label, comparison["baseline"]))
            if here and there and here["items"] == there["items"]:
                value = here["value"] - there["value"]
                if not _agrees("value", entry["value"], value, 0):
                    yield f"comparison.json has {label} {entry['value']:+.4f} on {task}, its scores give {value}"
        for part in ("scores", "differences") if derived else ():
            for label, entry in row[part].items():
                again = derived.get((table, task), {}).get(part, {}).get(label, {})
                for key in sorted(set(entry) - {"verdict"}):
                    if entry[key] is not None and not _agrees(key, entry[key], again.get(key), again.get("stderr")):
                        what = f"comparison.json has {label} on {task} with {key} {entry[key]}"
                        yield f"{what}, its items give {again.get(key)}"


def _agrees(key: str, value: Any, again: Any, stderr: float | None) -> bool:
    """Whether two figures are the same; those that a bootstrap gives, but for what other draws would change."""
    if isinstance(value, dict | list) and type(value) is type(again) and len(value) == len(again):
        places: Any = value if isinstance(value, dict) else range(len(value))
        return all(_agrees(key, value[place], again[place], stderr) for place in places)
    if key == "stderr":
        again = again or 0.0  # unknown of a single item, for which lm-eval's bootstrap has zero
    if not isinstance(value, float) or not isinstance(again, float):
        return bool(value == again)
    draws = 0 if key == "value" else 0.005 if key.startswith("p_") else 0.1 * (stderr or 0)
    return math.isclose(value, again, rel_tol=TOLERANCES.get(key, 0.1), abs_tol=max(1e-9, draws))


def scores(records: ShippedRecords) -> tuple[list[str], str]:
    """Scores that the items in a release's comparison do not give; and how many of all were computed from items."""
    ours, given = records["recipe.yaml"]["name"], {}
    for _, _, row in _rows(recompute(records.get("comparison.json", {})) or {}):
        if (score := row["scores"].get(ours)) and "part" not in row:
            given[row["task"], row["metric"], row["filter"], row["num_fewshot"], score["items"]] = score["value"]
    every = in_order(records, results.every_score)
    found = [(score, given.get((score.task, score.metric, score.filter, score.shots, score.items))) for score in every]
    wrong = [
        f"{score.task} has {score.metric} {score.value}, its items give {value}"
        for score, value in found
        if value is not None and not _agrees("value", score.value, value, 0)
    ]
    if not (again := sum(value is not None for _, value in found)):
        return wrong, f"{len(every)}, as in lm-eval's results; their items are not shipped, for their size"
    return wrong, f"{again} of {len(every)} computed again from the items in comparison.json"


def _same(value: Any, other: Any) -> bool:
    """Equal, but for the rounding of sums that other versions add up in another order."""
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-9, abs_tol=1e-12)
    return bool(value == other)
