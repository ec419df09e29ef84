"""The report on a filter: counts, histogram, sweep, shares by source, examples; as JSON, Markdown and a figure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nanophi.core import formatting, markup, plots
from nanophi.core.files import write_json, write_text
from nanophi.core.recipe import Quality

EXCERPT = 400
"""Characters of a document that the report shows."""
SWEEP_STEPS = 20
TITLES = {
    "best": "The best",
    "worst": "The worst",
    "nearest_above": "Just above the cut",
    "nearest_below": "Just below the cut",
}


def write(
    table: pa.Table,
    quality: Quality,
    scorer: dict[str, Any],
    excerpts_of: Callable[[set[str]], dict[str, str]],
    output: Path,
    cutoff: float | None = None,
) -> dict[str, Any]:
    """Write quality.json, quality.md and quality.png to a folder; returns the contents of the first.

    `table` has id, source (dictionary), bytes, quality_score and kept of the training documents, `scorer` the contents
    of `scorer.json`; `excerpts_of` gives the texts of some documents by id; `cutoff` is that of `scoring.choose`.
    """
    output.mkdir(parents=True, exist_ok=True)
    report = describe(table, quality, cutoff) | {"scorer": scorer}
    if quality.scorer == "none":
        for section in (report, *report["sources"].values()):
            for part in ("scale", "mean_score", "histogram", "sweep"):
                section.pop(part, None)
    else:
        cut = _cut(report)
        report["examples"] = _examples(table, sum(report["scale"]) / 2 if cut is None else cut, excerpts_of)
        plot(report, output / "quality.png")
    write_json(output / "quality.json", report)
    write_text(output / "quality.md", markdown(report))
    return report


def _cut(report: dict[str, Any]) -> float | None:
    """The score that divides what is kept from what is dropped; None if none does."""
    return report["cutoff"] if report["threshold"] is None else report["threshold"]


def describe(table: pa.Table, quality: Quality, cutoff: float | None) -> dict[str, Any]:
    """Counts, histogram, sweep and shares by source of the training documents' scores."""
    low, high = quality.scale or (0.0, 1.0)
    scores, sizes, kept = (table[column].to_numpy() for column in ("quality_score", "bytes", "kept"))
    column = table["source"].combine_chunks()
    names, codes = column.dictionary.to_pylist(), column.indices.to_numpy()

    def counts(chosen: np.ndarray) -> dict[str, int]:
        parts = {"": chosen, "kept_": chosen & kept}
        documents = {f"{part}documents": int(rows.sum()) for part, rows in parts.items()}
        return documents | {f"{part}bytes": int(sizes[rows].sum()) for part, rows in parts.items()}

    everything = counts(np.ones(len(scores), bool))
    histogram, edges = np.histogram(scores, bins=50, range=(low, high))
    sweep = []
    for number in range(SWEEP_STEPS):
        step = round(low + (high - low) * number / SWEEP_STEPS, 6)
        above = scores > step
        sweep.append({"threshold": step, "documents": int(above.sum()), "bytes": int(sizes[above].sum())})
    sources = {}
    for name, code in sorted(zip(names, range(len(names)), strict=True)):
        mine = codes == code
        if mine.any():
            sources[name] = {**counts(mine), "mean_score": round(float(scores[mine].mean()), 4)}
    return {
        "rule": describe_rule(quality),
        "threshold": quality.threshold,
        "share": quality.share,
        "select": quality.select if quality.share is not None else None,
        "cutoff": cutoff,
        **({} if quality.phase == "all" else {"phase": quality.phase}),
        "scale": [low, high],
        **everything,
        "kept_fraction": round(float(kept.mean()), 4),
        "kept_bytes_fraction": round(everything["kept_bytes"] / everything["bytes"], 4),
        "mean_score": round(float(scores.mean()), 4),
        "histogram": {"edges": [round(float(edge), 4) for edge in edges], "documents": histogram.tolist()},
        "sweep": sweep,
        "sources": sources,
    }


def _examples(
    table: pa.Table, cut: float, excerpts_of: Callable[[set[str]], dict[str, str]]
) -> dict[str, list[dict[str, Any]]]:
    """Best, worst, and the nearest on both sides of the cut, with the text's start."""
    scores = table["quality_score"].to_numpy()
    order = np.argsort(scores, kind="stable")
    above = int(np.searchsorted(scores[order], cut, side="right"))
    chosen = {
        "best": order[::-1][:5],
        "worst": order[:5],
        "nearest_above": order[above : above + 5],
        "nearest_below": order[max(0, above - 5) : above][::-1],
    }
    columns = table.select(["id", "source", "quality_score"])
    examples = {kind: columns.take(rows).to_pylist() for kind, rows in chosen.items()}
    excerpts = excerpts_of({row["id"] for rows in examples.values() for row in rows})
    for row in (row for rows in examples.values() for row in rows):
        row |= {"quality_score": round(row["quality_score"], 4), "text": excerpts.get(row["id"], "")[:EXCERPT]}
    return examples


def markdown(report: dict[str, Any], bytes_per_token: float | None = None) -> str:
    """The report as Markdown, with tokens beside bytes if it is known how many bytes a token has."""
    import jinja2

    integer, percent = formatting.integer, formatting.percent
    by_source, by_threshold = [], []
    for name, entry in report["sources"].items():
        kept = percent(entry["kept_documents"] / entry["documents"])
        megabytes = [f"{entry[size] / 1e6:.2f}" for size in ("bytes", "kept_bytes")]
        mean = [f"{entry['mean_score']:.3f}"] if "mean_score" in entry else []
        by_source.append([markup.text(name), integer(entry["documents"]), kept, *megabytes, *mean])
    for step in report.get("sweep", []):
        size, share = f"{step['bytes'] / 1e6:.2f}", percent(step["bytes"] / report["bytes"])
        tokens = [f"{step['bytes'] / bytes_per_token / 1e6:.2f} M"] if bytes_per_token else []
        by_threshold.append([f"{step['threshold']:.2f}", integer(step["documents"]), size, share, *tokens])
    scored = ["mean score"] if "mean_score" in report else []
    heads = ["score >", "documents", "MB", "share of bytes", *(["tokens, about"] if bytes_per_token else [])]
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    for module, names in ((markup, ("text", "code")), (formatting, ("integer", "percent", "decimal", "file_size"))):
        environment.filters |= {name: getattr(module, name) for name in names}
    template = environment.from_string(Path(__file__).with_name("quality.md").read_text(encoding="utf-8"))
    return template.render(
        report,
        by_source=markup.table(["source", "documents", "kept", "MB", "MB kept", *scored], by_source),
        by_threshold=markup.table(heads, by_threshold, left=0),
        titles=TITLES,
    )


def plot(report: dict[str, Any], path: Path) -> None:
    """Histogram with the threshold, bytes kept against the threshold, and the calibration of a linear scorer."""
    calibration = report["scorer"].get("calibration")
    scale, edges = tuple(report["scale"]), report["histogram"]["edges"]
    with plots.picture(path, 12 if calibration else 8, 3.6) as figure:
        scores, kept, *rest = figure.subplots(1, 3 if calibration else 2)
        width = edges[1] - edges[0]
        scores.bar(edges[:-1], report["histogram"]["documents"], width=width, align="edge", color=plots.BLUE)
        scores.set(xlabel="quality score", ylabel="training documents", title="Scores", xlim=scale)
        thresholds = [step["threshold"] for step in report["sweep"]]
        kept.plot(thresholds, [100 * step["bytes"] / report["bytes"] for step in report["sweep"]], color=plots.BLUE)
        kept.set(xlabel="threshold", ylabel="% of bytes kept", title="Kept", xlim=scale, ylim=(0, 101))
        cut = _cut(report)
        for axis in (scores, kept) if cut is not None else ():
            axis.axvline(cut, color=plots.ORANGE, linestyle="--")
        for axis in rest:
            axis.plot([0, 1], [0, 1], color=plots.GREY, linestyle="--")
            x, y = ([entry[name] for entry in calibration] for name in ("mean_score", "share_good"))
            axis.plot(x, y, "o-", color=plots.BLUE)
            title = f"Calibration, left-out documents (Brier {report['scorer']['brier']:.3f})"
            axis.set(xlabel="mean score", ylabel="share labelled good", title=title, xlim=(0, 1), ylim=(0, 1))


def describe_rule(quality: Quality) -> str:
    """The filter in words: `score > 0.5`, `the best 42.0 % of the bytes`, `all`."""
    when = " while the learning rate decays" if quality.phase == "decay" else ""
    if quality.share is not None:
        article = "a random" if quality.select == "random" else f"the {quality.select}"
        return f"{article} {formatting.percent(quality.share)} of the bytes{when}"
    if quality.threshold is None:
        return "all"
    scale = "" if quality.scale is None else f" on a scale from {quality.scale[0]:g} to {quality.scale[1]:g}"
    return f"score > {quality.threshold:g}{scale}{when}"
