"""What a release's records say of each other: statements of two of them that cannot both be true, one line each.

A score is said up to four times: by lm-eval's results, by the headline that the tables show, by the figures of the
held-out text, and by the comparison. Whoever changes one of them must not get a card that passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from nanophi.core.names import step_name
from nanophi.eval import results
from nanophi.model_card.records import ShippedRecords, leading_scores


def contradictions(records: ShippedRecords) -> list[str]:
    """Statements of two records that cannot both be true, one line each."""
    recipe, checkpoint = records["recipe.yaml"], records["checkpoint.json"]
    training, run = recipe["training"], records["run.json"]
    wrong = []
    if run["final"] and checkpoint["step"] != training["steps"]:
        wrong.append(f"checkpoint.json says step {checkpoint['step']}, recipe.yaml says {training['steps']} steps")
    if step_name(checkpoint["step"]) != run["revision"]:
        wrong.append(f"checkpoint.json says step {checkpoint['step']}, its folder is {run['revision']}")
    for key, said in recipe["model"].items():
        has = records["model.json"]["config"].get(key, said)
        if has != said and not (key == "vocab_size" and recipe["tokenizer"]["path"] is None):
            wrong.append(f"config.json says {key} {has}, recipe.yaml says {said}")
    context = records["model.json"]["config"]["max_position_embeddings"]
    expected = checkpoint["step"] * training["batch_size"] * context
    if checkpoint["tokens_seen"] != expected and not recipe.get("conversations"):
        wrong.append(
            f"checkpoint.json says {checkpoint['tokens_seen']} tokens seen, "
            f"{checkpoint['step']} steps of {training['batch_size']} x {context} are {expected}"
        )
    quality = records.get("quality.json")
    for key in ("threshold", "share"):
        if quality is not None and quality[key] != recipe["quality"][key]:
            wrong.append(f"quality.json has {key} {quality[key]}, recipe.yaml says {recipe['quality'][key]}")
    for name, record in records.items():
        if name.startswith("evals/"):
            wrong += _evaluation(name, record)
    if "comparison.json" in records:
        wrong += _comparison(records)
    said, has = records["training.json"]["summary"]["parameters"], records["model.json"]["parameters"]
    if said != has:
        wrong.append(f"training.json says {said} parameters, the weights have {has}")
    for evaluation in records["training.json"]["evaluations"]:
        same = evaluation["step"] == checkpoint["step"] and checkpoint.get("eval_loss") is not None
        if same and not math.isclose(evaluation["loss"], checkpoint["eval_loss"], rel_tol=1e-6):
            wrong.append(
                f"training.json says evaluation loss {evaluation['loss']} at step {checkpoint['step']}, "
                f"checkpoint.json says {checkpoint['eval_loss']}"
            )
    return wrong


def _evaluation(name: str, record: dict[str, Any]) -> Iterator[str]:
    """Of one suite: the figures of the held-out text against its score."""
    found = {score.task: score for score in results.leading_scores(record)}
    heldout, whole = record["nanophi"].get("heldout"), found.get("heldout_bits_per_byte")
    if heldout is not None and whole is not None:
        keys = {"bits_per_byte": "value", "bits_per_byte_stderr": "stderr", "documents": "items"}
        for key, field in keys.items():
            if not _same(heldout[key], getattr(whole, field)):
                yield f"{name} says {key} {heldout[key]} of the held-out text, its results say {getattr(whole, field)}"
        parts = list(heldout["by_source"].values())
        bits = sum(part["bits_per_byte"] * part["bytes"] for part in parts) / sum(part["bytes"] for part in parts)
        if not _same(heldout["bits_per_byte"], bits):
            yield f"{name} says bits_per_byte {heldout['bits_per_byte']} of the held-out text, its sources say {bits}"


def _comparison(records: ShippedRecords) -> Iterator[str]:
    """The comparison against this model's own scores, and its verdicts against the differences that they are about."""
    from nanophi.eval.statistics import verdict

    comparison, ours = records["comparison.json"], records["recipe.yaml"]["name"]
    for row in leading_scores(records):
        compared = comparison["tasks"].get(row["task"], {"scores": {}})
        score = compared["scores"].get(ours)
        # Of two suites with the same task, the comparison has the one with more items.
        if score is None or score["items"] != row["items"]:
            continue
        for key, said in {**compared, **score}.items():
            if key in ("value", "stderr", "chance", "higher_is_better") and not _same(said, row[key]):
                yield f"comparison.json says {row['task']} {key} {said}, evals/{row['suite']}.json says {row[key]}"
    for name, record in records.items():
        own = record["nanophi"].get("heldout", {}) if name.startswith("evals/") else {}
        parts = (comparison.get("heldout") or {}).get(ours, {}).get("by_source", {})
        for source, part in parts.items() if own else ():
            said, has = part["bits_per_byte"], own["by_source"].get(source, {}).get("bits_per_byte")
            if not _same(said, has):
                yield f"comparison.json says {said} bits per byte of {source}, {name} says {has}"
    tables = [comparison.get(table) or {} for table in ("tasks", "answers", "filter", "sources")]
    for table in [*tables, *(comparison.get("subjects") or {}).values()]:
        for task, row in table.items():
            for label, entry in row["differences"].items():
                follows = verdict(entry["value"], entry["p_corrected"], row["higher_is_better"])
                if entry["verdict"] != follows:
                    yield (
                        f"comparison.json calls {label} {entry['verdict']} on {task}, its difference of "
                        f"{entry['value']} with p {entry['p_corrected']} is {follows}"
                    )


def _same(said: Any, has: Any) -> bool:
    """Equal, but for the rounding of sums that other versions add up in another order."""
    if isinstance(said, float) and isinstance(has, float):
        return math.isclose(said, has, rel_tol=1e-9, abs_tol=1e-12)
    return bool(said == has)
