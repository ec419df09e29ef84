"""`report.html`: a run to look at. One page that needs no network: curves, filter explorer, evaluation, samples.

Unlike the card it is for who made the run: it shows documents, of every score, and is not part of the release.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanophi.files import UserError, read_json, write_text
from nanophi.model_card import card

TEMPLATE = Path(__file__).parent / "report.html"
PLACE_OF_DATA = "/*DATA*/"

DOCUMENTS_PER_BIN = 6
BINS = 20
DOCUMENT_CHARACTERS = 1500
MAX_POINTS = 600


def build(run: Path, output: Path) -> dict[str, Any]:
    """Write the page.

    Args:
        run: the run directory.
        output: the HTML file.

    Returns:
        `{"bytes": size, "documents": number of documents in the filter explorer}`.

    Raises:
        UserError: if a record is missing.
    """
    checkpoint = card.last_checkpoint(run)
    records = card.collect(run, checkpoint)
    training = records["training.json"]
    documents = _documents(run)
    data = {
        "run": records["recipe.yaml"]["name"],
        "name": records["recipe.yaml"]["card"]["title"] or records["recipe.yaml"]["name"],
        "facts": _facts(records),
        "log": _thinned(training["log"]),
        "evaluations": training["evaluations"],
        "quality": {
            key: records["quality.json"][key]
            for key in ("rule", "threshold", "documents", "bytes", "histogram", "sources")
        },
        "documents": documents,
        "scores": [
            {key: row[key] for key in ("task", "metric", "value", "stderr", "chance", "percent")}
            | {"revision": name, "title": _title(row)}
            for name in (entry["revision"] for entry in records["revisions.json"])
            for row in card.headline(
                {f"evals/{suite}.json": result for suite, result in card.evaluations(run, name).items()}
            )
        ],
        "comparison": records.get("comparison.json"),
        "titles": {
            task: card.task_name({"task": task, "shots": row["num_fewshot"]})
            for task, row in records.get("comparison.json", {"tasks": {}})["tasks"].items()
        },
        "by_source": card.by_source(records),
        "written": training.get("samples", []),
        "samples": read_json(run / "sample.json") if (run / "sample.json").exists() else None,
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    # In a script element "</" would end it, whatever the documents say.
    page = text.replace(PLACE_OF_DATA, json.dumps(data, ensure_ascii=False, allow_nan=False).replace("</", "<\\/"))
    write_text(output, page)
    return {"bytes": len(page.encode()), "documents": len(documents)}


def _title(row: dict[str, Any]) -> str:
    """A task with its metric, which some tasks are called after."""
    metric = card.METRIC_NAMES.get(row["metric"], row["metric"])
    name = card.task_name(row)
    return (name if metric in name else f"{name}, {metric}") + (" (%)" if row["percent"] else "")


def _facts(records: card.Records) -> list[list[str]]:
    summary, recipe = records["training.json"]["summary"], records["recipe.yaml"]
    metered = {"energy": ("energy_kwh", "kWh"), "CO2e": ("co2_grams", "g"), "cost": ("cost_usd", "US dollars")}
    return [
        ["parameters", f"{records['model.json']['parameters']:,}"],
        ["steps", f"{recipe['training']['steps']:,}"],
        ["tokens seen", f"{summary['tokens_seen']:,}"],
        ["epochs", f"{summary['epochs']:.2f}"],
        ["training time", f"{summary['seconds']:,.0f} s"],
        ["speed", f"{summary['tokens_per_second']:,.0f} tokens/s"],
        ["hardware", card.hardware(records)],
        ["seed", str(recipe["seed"])],
        *(
            [name, f"{card.figure(summary[key])} {unit}"]
            for name, (key, unit) in metered.items()
            if summary.get(key) is not None
        ),
    ]


def _thinned(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MAX_POINTS` entries, the last one among them."""
    step = -(-len(log) // MAX_POINTS)
    keys = ("step", "loss", "learning_rate", "grad_norm", "tokens_seen", "tokens_per_second")
    return [{key: entry[key] for key in keys} for entry in log[::-1][::step][::-1]]


def _documents(run: Path) -> list[dict[str, Any]]:
    """A few training documents from each twentieth of the scores: id, source, score, the text's beginning.

    Taken in the order of their ids, which are hashes, so the choice is arbitrary and always the same.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from nanophi.data.documents import find

    path = run / "data" / "scores" / "scores.parquet"
    if not path.exists():
        raise UserError(f"{path} is missing; run `nanophi prepare` on its recipe")
    table = pq.read_table(path, columns=["id", "source", "split", "quality_score"])
    train = np.asarray(table["split"].cast(pa.string()).to_numpy(zero_copy_only=False) == "train")
    ids, scores = table["id"].to_numpy(zero_copy_only=False), table["quality_score"].to_numpy()
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    chosen = {}
    for number in range(BINS):
        rows = np.flatnonzero(train & (bins == number))
        for row in sorted(rows, key=lambda row: ids[row])[:DOCUMENTS_PER_BIN]:
            chosen[str(ids[row])] = round(float(scores[row]), 4)
    found = find(run / "data" / "documents", chosen, ["source", "text"])
    return [
        {
            "source": found[key]["source"],
            "score": score,
            "text": found[key]["text"][:DOCUMENT_CHARACTERS],
            "characters": len(found[key]["text"]),
        }
        for key, score in sorted(chosen.items(), key=lambda item: item[1])
        if key in found
    ]
