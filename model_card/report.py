"""`report.html`: a run to look at. One page that needs no network: curves, evaluation, samples, filter explorer.

Unlike the card it is for the person who made the run: it shows documents, and is not part of the release.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.core import formatting
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_text
from nanophi.core.names import final_checkpoint
from nanophi.data.documents import find
from nanophi.data.trace import trace_text
from nanophi.eval import catalogue
from nanophi.model_card import pages, prediction, records
from nanophi.model_card.card import by_source, differences
from nanophi.model_card.records import ShippedRecords

DOCUMENTS_PER_BIN = 6
BINS = 20
DOCUMENT_CHARACTERS = 1500
MAX_POINTS = 600
OF_QUALITY = ("rule", "threshold", "documents", "bytes", "histogram", "sources")
OF_LOG = ("step", "loss", "learning_rate", "grad_norm", "tokens_seen", "tokens_per_second")


def build(run: Path, output: Path) -> dict[str, Any]:
    """Write the page of a run directory; returns its size in bytes, and the number of documents in its explorer."""
    shipped = records.collect(run, final_checkpoint(run))
    training, recipe = shipped["training.json"], shipped["recipe.yaml"]
    quality = read_json(run / "data" / "quality" / "quality.json")
    # What a chat model's base was chosen from is not part of its run.
    scored = "histogram" in quality and not recipe.get("conversations")
    documents = _documents(run, quality["histogram"]["edges"]) if scored else []
    data = {
        "run": recipe["name"],
        "name": recipe["card"]["title"] or recipe["name"],
        "facts": _facts(shipped),
        "log": _thinned(training["log"]),
        "evaluations": training["evaluations"],
        "scores": _scores(run, shipped),
        "baseline": _baseline(shipped),
        "differences": differences(shipped.get("comparison.json")),
        "by_source": by_source(shipped),
        "prediction": prediction.sentence(shipped),
        "ablation": _ablation(run / "ablation.json"),
        "written": training.get("samples", []),
        "samples": _samples(run / "sample.json"),
        "trace": _trace(run),
        # Not the shipped record: names of sources must be those of the documents.
        "quality": {key: quality.get(key) for key in OF_QUALITY},
        "documents": documents,
    }
    page = pages.html("report.html", data)
    write_text(output, page)
    return {"bytes": len(page.encode()), "documents": len(documents)}


def _samples(path: Path) -> dict[str, Any] | None:
    """The sample texts, of messages with the last one as their prompt."""
    sample = read_json(path) if path.exists() else None
    if sample is not None and not isinstance(sample["prompt"], str):
        question = sample["prompt"][-1]["content"] + "\n"
        texts = {name: question + text for name, text in sample["checkpoints"].items()}
        sample |= {"prompt": question, "checkpoints": texts}
    return sample


def _trace(run: Path) -> list[list[Any]] | None:
    """Spans of the card's sample that occur in the training text; None without a sample, or without the tokens."""
    if not (run / "sample.json").exists() or not (run / "data/tokens/train").is_dir():
        return None
    return [
        [span["text"], span["length"], span["documents"], span["examples"][0].get("source", "")]
        for span in trace_text(run, str(read_json(run / "sample.json")["text"]))
    ]


def _scores(run: Path, shipped: ShippedRecords) -> list[dict[str, Any]]:
    """The leading scores of every checkpoint, each with its title, the factor of its axis, and the score in words."""
    rows = []
    for revision in (entry["revision"] for entry in shipped["revisions.json"]):
        for score in records.leading_scores(records.evaluations(run, revision)):
            metric = catalogue.metric_name(score.metric)
            # Some tasks are called after their metric.
            name = score.title if metric in score.title else f"{score.title}, {metric}"
            row = {key: getattr(score, key) for key in ("task", "metric", "value", "stderr", "chance")}
            row |= {"revision": revision, "title": name + (" (%)" if score.percent else "")}
            row |= {"factor": catalogue.scale(score.metric)[0], "shown": catalogue.score(row, score.metric)}
            rows.append(row)
    return rows


def _ablation(path: Path) -> dict[str, Any] | None:
    """The answer of `nanophi ablate` on this recipe's filter, if there is one: a paragraph, the primary contrasts."""
    if not path.exists():
        return None
    result = read_json(path)
    target = next(entry for entry in result["targets"].values() if entry["primary"])
    rows = []
    for name, found in {**target["contrasts"], "check": target["check"]}.items():
        for rate, one in found["learning_rates"].items():
            if one["value"] is not None:
                bare = f"{one['value']:+.4f}"
                difference = catalogue.difference(one, "bits_per_byte") if one["interval"] else bare
                rows.append([f"{name}: {' - '.join(found['arms'])}", f"{float(rate):g}", difference, found["verdict"]])
    return {"paragraph": result.get("paragraph", ""), "rows": rows}


def _baseline(shipped: ShippedRecords) -> dict[str, Any] | None:
    """The scores of the run's baseline, if it was compared with another run."""
    comparison = shipped.get("comparison.json")
    if comparison is None or comparison["baseline"] == shipped["recipe.yaml"]["name"]:
        return None
    label, scores = comparison["baseline"], {}
    for task, row in comparison["tasks"].items():
        if (entry := row["scores"].get(label)) is not None:
            shown = catalogue.score(entry, row["metric"])
            scores[task] = {"value": entry["value"], "stderr": entry["stderr"], "shown": shown}
    return {"label": label, "scores": scores}


def _facts(shipped: ShippedRecords) -> list[list[str]]:
    summary, recipe = shipped["training.json"]["summary"], shipped["recipe.yaml"]
    metered = (("energy", "energy_kwh", "kWh"), ("CO2e", "co2_grams", "g"), ("cost", "cost_usd", "US dollars"))
    known = [(name, summary[key], unit) for name, key, unit in metered if summary.get(key) is not None]
    return [
        ["parameters", formatting.integer(shipped["model.json"]["parameters"])],
        ["steps", formatting.integer(recipe["training"]["steps"])],
        ["tokens seen", formatting.integer(summary["tokens_seen"])],
        ["epochs", " + ".join(f"{summary[key]:.2f}" for key in ("epochs", "decay_epochs") if key in summary)],
        ["training time", formatting.duration(summary["seconds"])],
        ["speed", f"{formatting.integer(summary['tokens_per_second'])} tokens/s"],
        ["hardware", records.hardware(shipped)],
        ["seed", str(recipe["seed"])],
        *([name, f"{formatting.figure(value)} {unit}"] for name, value, unit in known),
    ]


def _thinned(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MAX_POINTS` entries, the last one among them."""
    step = -(-len(log) // MAX_POINTS)
    return [{key: entry[key] for key in OF_LOG} for entry in log[::-1][::step][::-1]]


def _documents(run: Path, edges: list[float]) -> list[dict[str, Any]]:
    """A few training documents, always the same, from each twentieth of the scale that the histogram's `edges` span."""
    path = run / "data" / "scores" / "scores.parquet"
    if not path.exists():
        raise UserError(f"{path} is missing; run `nanophi prepare` on its recipe")
    table = pq.read_table(path, columns=["id", "split", "quality_score"])
    train = np.asarray(table["split"].cast(pa.string()).to_numpy(zero_copy_only=False) == "train")
    ids, scores = table["id"].to_numpy(zero_copy_only=False), table["quality_score"].to_numpy()
    bins = np.minimum((BINS * (scores - edges[0]) / (edges[-1] - edges[0])).astype(int), BINS - 1)
    chosen = {
        str(ids[row]): round(float(scores[row]), 4)
        for number in range(BINS)
        for row in sorted(np.flatnonzero(train & (bins == number)), key=lambda row: ids[row])[:DOCUMENTS_PER_BIN]
    }
    found = find(run / "data" / "documents", chosen, ["source", "text"])
    shown = []
    for key, score in sorted(chosen.items(), key=lambda item: item[1]):
        if key in found:
            source, text = found[key]["source"], found[key]["text"]
            start = text[:DOCUMENT_CHARACTERS]
            shown.append({"source": source, "score": score, "text": start, "characters": len(text)})
    return shown
