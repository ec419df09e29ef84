"""The report on a threshold: counts, histogram, sweep, shares by source, examples; as JSON, Markdown and a plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.data.scorers import check_scores
from nanophi.data.selection import Selection, describe_rule
from nanophi.files import UserError, read_json, write_json, write_text
from nanophi.recipe import Quality

EXCERPT = 400
"""Characters of a document that the report shows."""
SWEEP = tuple(round(0.05 * step, 2) for step in range(20))


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
    report["examples"] = _examples(table, train, _cut(report), excerpts_of)
    write_json(output / "quality.json", report)
    write_text(output / "quality.md", markdown(report))
    plot(report, output / "quality.png")
    return report


def _cut(report: dict[str, Any]) -> float | None:
    """The score that divides what is kept from what is dropped; None if none does."""
    return report["cutoff"] if report["threshold"] is None else report["threshold"]


def describe(table: pa.Table, train: np.ndarray, selection: Selection, quality: Quality) -> dict[str, Any]:
    """Counts, histogram, sweep and shares by source of the training documents' scores."""
    scores = table["quality_score"].to_numpy()[train]
    sizes = table["bytes"].to_numpy()[train]
    column = table["source"].combine_chunks()
    names = column.dictionary.to_pylist()
    codes = column.indices.to_numpy()[train]
    kept = selection.kept
    counts, edges = np.histogram(scores, bins=50, range=(0, 1))
    sweep = []
    for step in SWEEP:
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
    table: pa.Table, train: np.ndarray, cut: float | None, excerpts_of: Callable[[set[str]], dict[str, str]]
) -> dict[str, Any]:
    """Best, worst, and the nearest on both sides of the cut (where there is none: of 0.5), with the text's start."""
    rows = np.flatnonzero(train)
    scores = table["quality_score"].to_numpy()[rows]
    order = rows[np.argsort(scores, kind="stable")]
    cut = 0.5 if cut is None else cut
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
        f"Scorer `{scorer['scorer']}`, {report['rule']}: {report['kept_documents']:,} of {report['documents']:,} "
        f"training documents kept, {report['kept_bytes'] / 1e6:.1f} of {report['bytes'] / 1e6:.1f} MB "
        f"({100 * report['kept_bytes_fraction']:.1f} %).",
        "",
    ]
    if "roc_auc" in scorer:
        lines += [
            f"Fitted on {scorer['documents']:,} labelled documents (good: {', '.join(scorer['high'])}; "
            f"poor: {', '.join(scorer['low'])}). On {scorer['test_documents']:,} others with the same labels the area "
            f"under the ROC curve is {scorer['roc_auc']:.3f} and the Brier score {scorer['brier']:.3f}.",
            "",
        ]
    lines += ["![Scores, share kept and, for a linear scorer, calibration](quality.png)", "", "## By source", ""]
    lines += ["| source | documents | kept | MB | MB kept | mean score |", "|---|---:|---:|---:|---:|---:|"]
    for name, entry in report["sources"].items():
        share = entry["kept_documents"] / entry["documents"]
        lines.append(
            f"| {name} | {entry['documents']:,} | {100 * share:.1f} % | {entry['bytes'] / 1e6:.2f} "
            f"| {entry['kept_bytes'] / 1e6:.2f} | {entry['mean_score']:.3f} |"
        )
    heads = ["score >", "documents", "MB", "share of bytes", *(["tokens, about"] if bytes_per_token else [])]
    lines += ["", "## Other thresholds", "", f"| {' | '.join(heads)} |", "|" + "---:|" * len(heads)]
    for step in report["sweep"]:
        cells = [f"{step['threshold']:.2f}", f"{step['documents']:,}", f"{step['bytes'] / 1e6:.2f}"]
        cells.append(f"{100 * step['bytes'] / report['bytes']:.1f} %")
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
        lines += ["", f"## {title}", ""]
        for example in report["examples"][kind]:
            text = " ".join(example["text"].split()).replace("`", "'")
            lines += [f"- {example['quality_score']:.3f}, {example['source']}, {example['id']}: `{text[:300]}`"]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Histogram with the threshold, bytes kept against the threshold, and the calibration of a linear scorer."""
    from matplotlib.figure import Figure

    calibration = report["scorer"].get("calibration")
    figure = Figure(figsize=(12 if calibration else 8, 3.6), layout="constrained")
    axes = figure.subplots(1, 3 if calibration else 2)
    edges = report["histogram"]["edges"]
    axes[0].bar(edges[:-1], report["histogram"]["documents"], width=edges[1] - edges[0], align="edge", color="#4c72b0")
    axes[0].set(xlabel="quality score", ylabel="training documents", title="Scores", xlim=(0, 1))
    axes[1].plot(
        [step["threshold"] for step in report["sweep"]],
        [100 * step["bytes"] / report["bytes"] for step in report["sweep"]],
        color="#4c72b0",
    )
    axes[1].set(xlabel="threshold", ylabel="% of bytes kept", title="Kept", xlim=(0, 1), ylim=(0, 101))
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


def report_files(scores: Path, threshold: float | None, output: Path) -> dict[str, Any]:
    """Write quality.json, quality.md and quality.png on what `score_files` wrote, and return the report."""
    try:
        table = pq.read_table(scores)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{scores} cannot be read as parquet ({str(error).splitlines()[0]})") from None
    if not {"id", "source", "bytes", "quality_score", "text"} <= set(table.column_names):
        raise UserError(f"{scores} was not written by `nanophi quality score`")
    check_scores(table["quality_score"].to_numpy(), table["id"])
    everything = np.ones(len(table), bool)
    table = table.set_column(1, "source", table["source"].combine_chunks().dictionary_encode())
    texts = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    scorer = {"scorer": str(scores)}
    quality = Quality(threshold=threshold)
    kept = everything if threshold is None else table["quality_score"].to_numpy() > threshold
    return write(
        table, everything, Selection(kept), quality, scorer, lambda ids: {key: texts[key] for key in ids}, output
    )


def report_run(run: Path) -> str:
    """The quality report of a run as Markdown, with tokens if the run got so far. Raises `UserError` without one."""
    report = read_json(run / "data" / "quality" / "quality.json")
    tokens = run / "data" / "tokens" / "tokens.json"
    return markdown(report, read_json(tokens)["train"]["bytes_per_token"] if tokens.exists() else None)
