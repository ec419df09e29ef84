"""The report on a threshold: counts, histogram, sweep, shares by source, examples; as JSON, Markdown and a plot."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import check_own_folder, read_json, write_json, write_text
from nanophi.core.formatting import file_size, integer, percent
from nanophi.core.recipe import Quality
from nanophi.data.selection import Selection, describe_rule

EXCERPT = 400
"""Characters of a document that the report shows."""
SWEEP_STEPS = 20
MADE_BY = b"nanophi"
"""Key of the metadata of a Parquet file that `nanophi quality score` wrote: which scorer, which scale."""


def write(
    table: pa.Table,
    train: np.ndarray,
    selection: Selection,
    quality: Quality,
    scorer: dict[str, Any],
    excerpts_of: Callable[[set[str]], dict[str, str]],
    output: Path,
) -> dict[str, Any]:
    """Write quality.json, quality.md and quality.png to a folder.

    Args:
        table: scores of the documents: id, source (dictionary), bytes, quality_score.
        train: bool `[documents]`; the report is about these.
        selection: which of these are kept.
        quality: the recipe's section, for the rule in words.
        scorer: contents of `scorer.json`.
        excerpts_of: gives the texts of some documents by id.
        output: folder, made if need be.

    Returns:
        the contents of quality.json.
    """
    output.mkdir(parents=True, exist_ok=True)
    report = describe(table, train, selection, quality)
    report["scorer"] = scorer
    report["examples"] = _examples(table, train, _middle(report), excerpts_of)
    write_json(output / "quality.json", report)
    write_text(output / "quality.md", markdown(report))
    plot(report, output / "quality.png")
    return report


def _cut(report: dict[str, Any]) -> float | None:
    """The score that divides what is kept from what is dropped; None if none does."""
    return report["cutoff"] if report["threshold"] is None else report["threshold"]


def _middle(report: dict[str, Any]) -> float:
    cut = _cut(report)
    return sum(report["scale"]) / 2 if cut is None else cut


def describe(table: pa.Table, train: np.ndarray, selection: Selection, quality: Quality) -> dict[str, Any]:
    """Counts, histogram, sweep and shares by source of the training documents' scores."""
    low, high = quality.scale or (0.0, 1.0)
    scores = table["quality_score"].to_numpy()[train]
    sizes = table["bytes"].to_numpy()[train]
    column = table["source"].combine_chunks()
    names = column.dictionary.to_pylist()
    codes = column.indices.to_numpy()[train]
    kept = selection.kept
    counts, edges = np.histogram(scores, bins=50, range=(low, high))
    sweep = []
    for number in range(SWEEP_STEPS):
        step = round(low + (high - low) * number / SWEEP_STEPS, 6)
        above = scores > step
        sweep.append({"threshold": step, "documents": int(above.sum()), "bytes": int(sizes[above].sum())})
    sources = {}
    for code, name in sorted(enumerate(names), key=lambda item: item[1]):
        mine = codes == code
        if mine.any():
            sources[name] = {
                "documents": int(mine.sum()),
                "kept_documents": int((mine & kept).sum()),
                "bytes": int(sizes[mine].sum()),
                "kept_bytes": int(sizes[mine & kept].sum()),
                "mean_score": round(float(scores[mine].mean()), 4),
            }
    return {
        "rule": describe_rule(quality),
        "threshold": quality.threshold,
        "share": quality.share,
        "select": quality.select if quality.share is not None else None,
        "cutoff": selection.cutoff,
        "scale": [low, high],
        "documents": len(scores),
        "kept_documents": int(kept.sum()),
        "bytes": int(sizes.sum()),
        "kept_bytes": int(sizes[kept].sum()),
        "kept_fraction": round(float(kept.mean()), 4),
        "kept_bytes_fraction": round(float(sizes[kept].sum() / sizes.sum()), 4),
        "mean_score": round(float(scores.mean()), 4),
        "histogram": {"edges": [round(float(edge), 4) for edge in edges], "documents": counts.tolist()},
        "sweep": sweep,
        "sources": sources,
    }


def _examples(
    table: pa.Table, train: np.ndarray, cut: float, excerpts_of: Callable[[set[str]], dict[str, str]]
) -> dict[str, Any]:
    """Best, worst, and the nearest on both sides of the cut, with the text's start."""
    rows = np.flatnonzero(train)
    scores = table["quality_score"].to_numpy()[rows]
    order = rows[np.argsort(scores, kind="stable")]
    above = int(np.searchsorted(np.sort(scores), cut, side="right"))
    chosen = {
        "best": order[::-1][:5],
        "worst": order[:5],
        "nearest_above": order[above : above + 5],
        "nearest_below": order[max(0, above - 5) : above][::-1],
    }
    excerpts = excerpts_of({table["id"][int(row)].as_py() for rows in chosen.values() for row in rows})
    return {
        kind: [
            {
                "id": table["id"][int(row)].as_py(),
                "source": table["source"][int(row)].as_py(),
                "quality_score": round(float(table["quality_score"][int(row)].as_py()), 4),
                "text": excerpts.get(table["id"][int(row)].as_py(), "")[:EXCERPT],
            }
            for row in rows
        ]
        for kind, rows in chosen.items()
    }


def markdown(report: dict[str, Any], bytes_per_token: float | None = None) -> str:
    """The report as Markdown, with tokens beside bytes if it is known how many bytes a token has."""
    scorer = report["scorer"]
    lines = [
        "# Quality filter",
        "",
        f"Scorer `{_plain(scorer['scorer'])}`, {report['rule']}: {integer(report['kept_documents'])} of "
        f"{integer(report['documents'])} documents kept, {file_size(report['kept_bytes'])} of "
        f"{file_size(report['bytes'])} ({percent(report['kept_bytes_fraction'])}).",
        "",
    ]
    if "roc_auc" in scorer:
        lines += [
            f"Fitted on {integer(scorer['documents'])} labelled documents (good: {_plain(', '.join(scorer['high']))}; "
            f"low-quality: {_plain(', '.join(scorer['low']))}). On {integer(scorer['test_documents'])} others with the "
            f"same labels the area under the ROC curve is {scorer['roc_auc']:.3f} and the Brier score "
            f"{scorer['brier']:.3f}.",
            "",
        ]
    lines += ["![Scores, share kept and, for a linear scorer, calibration](quality.png)", "", "## By source", ""]
    lines += ["| source | documents | kept | MB | MB kept | mean score |", "|---|---:|---:|---:|---:|---:|"]
    for name, entry in report["sources"].items():
        share = entry["kept_documents"] / entry["documents"]
        lines.append(
            f"| {_plain(name)} | {integer(entry['documents'])} | {percent(share)} | {entry['bytes'] / 1e6:.2f} "
            f"| {entry['kept_bytes'] / 1e6:.2f} | {entry['mean_score']:.3f} |"
        )
    heads = ["score >", "documents", "MB", "share of bytes", *(["tokens, about"] if bytes_per_token else [])]
    lines += ["", "## Other thresholds", "", f"| {' | '.join(heads)} |", "|" + "---:|" * len(heads)]
    for step in report["sweep"]:
        cells = [f"{step['threshold']:.2f}", integer(step["documents"]), f"{step['bytes'] / 1e6:.2f}"]
        cells.append(percent(step["bytes"] / report["bytes"]))
        if bytes_per_token:
            cells.append(f"{step['bytes'] / bytes_per_token / 1e6:.2f} M")
        lines.append(f"| {' | '.join(cells)} |")
    titles = {
        "best": "The best",
        "worst": "The worst",
        "nearest_above": "Just above the cut",
        "nearest_below": "Just below the cut",
    }
    for kind, title in titles.items():
        if kind not in report["examples"]:
            continue
        lines += ["", f"## {title}", ""]
        for example in report["examples"][kind]:
            text = " ".join(example["text"].split()).replace("`", "'")
            lines += [f"- {example['quality_score']:.3f}, {_plain(example['source'])}, {example['id']}: `{text[:300]}`"]
    return "\n".join(lines) + "\n"


def _plain(name: str) -> str:
    """A name from the data, which is never markup."""
    return html.escape(name, quote=False).replace("|", "\\|").replace("`", "'")


def plot(report: dict[str, Any], path: Path) -> None:
    """Histogram with the threshold, bytes kept against the threshold, and the calibration of a linear scorer."""
    from matplotlib.figure import Figure

    calibration = report["scorer"].get("calibration")
    figure = Figure(figsize=(12 if calibration else 8, 3.6), layout="constrained")
    axes = figure.subplots(1, 3 if calibration else 2)
    scale, edges = tuple(report["scale"]), report["histogram"]["edges"]
    axes[0].bar(edges[:-1], report["histogram"]["documents"], width=edges[1] - edges[0], align="edge", color="#4c72b0")
    axes[0].set(xlabel="quality score", ylabel="training documents", title="Scores", xlim=scale)
    axes[1].plot(
        [step["threshold"] for step in report["sweep"]],
        [100 * step["bytes"] / report["bytes"] for step in report["sweep"]],
        color="#4c72b0",
    )
    axes[1].set(xlabel="threshold", ylabel="% of bytes kept", title="Kept", xlim=scale, ylim=(0, 101))
    if _cut(report) is not None:
        for axis in axes[:2]:
            axis.axvline(_cut(report), color="#c44e52", linestyle="--")
    if calibration:
        axes[2].plot([0, 1], [0, 1], color="0.7", linestyle="--")
        axes[2].plot(
            [entry["mean_score"] for entry in calibration], [entry["share_good"] for entry in calibration], "o-"
        )
        title = f"Calibration, left-out documents (Brier {report['scorer']['brier']:.3f})"
        axes[2].set(xlabel="mean score", ylabel="share labelled good", title=title, xlim=(0, 1), ylim=(0, 1))
    figure.savefig(path, dpi=120, metadata={"Software": None})


@user_errors("the report cannot be written; --debug shows where it stopped")
def report_files(scores: Path, threshold: float | None, output: Path) -> dict[str, Any]:
    """Write quality.json, quality.md and quality.png on what `nanophi quality score` wrote; returns the first.

    Args:
        scores: the Parquet file.
        threshold: documents above it are kept; None: the middle of the scale.
        output: folder to create; one that this wrote before is replaced.

    Raises:
        UserError: if `scores` is anything else, `output` holds anything else, or the threshold is outside the scale.
    """
    check_own_folder(output, ("quality.json", "quality.md", "quality.png"), "quality report")
    with user_errors(f"{scores} cannot be read as parquet"):
        table = pq.read_table(scores)
    made_by = json.loads((table.schema.metadata or {}).get(MADE_BY, b"null"))
    if made_by is None:
        raise UserError(f"{scores} was not written by `nanophi quality score`")
    low, high = made_by["scale"]
    if threshold is None:
        threshold = (low + high) / 2
    if not low <= threshold <= high:
        raise UserError(f"--threshold {threshold:g} lies outside the scale of the scores, {low:g} to {high:g}")
    texts = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    table = table.set_column(1, "source", table["source"].combine_chunks().dictionary_encode())
    everything = np.ones(len(table), bool)
    selection = Selection(table["quality_score"].to_numpy() > threshold)
    quality = Quality(scorer="column:quality_score", scale=(low, high), threshold=threshold)
    return write(table, everything, selection, quality, made_by, lambda ids: {key: texts[key] for key in ids}, output)


def report_run(run: Path) -> str:
    """The quality report of a run as Markdown, with tokens if the run got so far. Raises `UserError` without one."""
    selected = run / "data/quality/quality.json"
    if not selected.is_file():
        raise UserError(f"{run} is not a run whose documents were selected; run `nanophi prepare` on its recipe")
    report = read_json(selected)
    tokens = run / "data" / "tokens" / "tokens.json"
    return markdown(report, read_json(tokens)["train"]["bytes_per_token"] if tokens.exists() else None)
