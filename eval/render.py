"""A comparison as plain text, as Markdown and as a picture; scores over training as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanophi.core.formatting import difference, metric, metric_name, p_value, scale, score, size
from nanophi.eval.catalogue import main_rows, title
from nanophi.eval.results import ANSWER_METRIC

BZ2 = "bz2 -9 on the same text"
DETECTABLE = "detectable: the minimum detectable effect, a true difference that 4 of 5 such comparisons would find"
NORMAL_95 = 1.96
"""Standard errors on either side of a score that make its 95 % confidence interval."""


def to_text(comparison: Mapping[str, Any]) -> str:
    """The comparison as a plain-text table for the terminal."""
    labels, baseline = comparison["labels"], comparison["baseline"]
    rows = [["", *labels, "chance"]]
    for row in main_rows(comparison):
        rows.append([_title(row), *(_scores(row, labels)), _chance(row)])
        if _is_heldout_bits(row) and comparison["heldout"]:
            rows.append([BZ2, *_bz2(comparison), ""])
    if comparison["answers"]:
        rows.append(["", *("" for _ in labels), ""])
        rows += [[_title(row), *_scores(row, labels), ""] for row in comparison["answers"].values()]
    lines = _columns(rows)
    for label in labels:
        every = [*main_rows(comparison), *comparison["answers"].values()]
        compared = [row for row in every if label in row["differences"]]
        if compared:
            lines += ["", f"{label} against {baseline}, on the same items, with 95 % confidence intervals:"]
            lines += _columns([_text_difference(row, row["differences"][label]) for row in compared])
    if len(labels) > 1:
        lines += ["", DETECTABLE]
    lines += [f"note: {note}" for note in comparison["notes"]]
    return "\n".join(lines)


def to_markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as Markdown, with the subjects of groups and the published scores."""
    labels, baseline = comparison["labels"], comparison["baseline"]
    names = [_plain(label) for label in labels]
    lines = ["# Comparison", "", "Score ± standard error. ↓: lower is better.", ""]
    lines += _markdown_row(["task", *names, "chance", "items"]) + _markdown_rule(len(labels) + 3)
    for row in main_rows(comparison):
        lines += _markdown_row([_title(row), *_scores(row, labels), _chance(row), _items(row)])
        if _is_heldout_bits(row) and comparison["heldout"]:
            lines += _markdown_row([f"{BZ2} ↓", *_bz2(comparison), "", ""])
    if comparison["answers"]:
        lines += ["", "## Right answers, bits per byte", ""]
        lines += ["How many bits per byte of text the right answers cost, averaged over the items."]
        lines += ["It moves while the accuracy of a small model is still at chance.", ""]
        lines += _markdown_row(["task", *names, "items"]) + _markdown_rule(len(labels) + 2)
        for row in comparison["answers"].values():
            lines += _markdown_row([_title(row), *_scores(row, labels), _items(row)])
    for label in labels:
        every = [*main_rows(comparison), *comparison["answers"].values()]
        compared = [row for row in every if label in row["differences"]]
        if compared:
            lines += ["", f"## {_plain(label)} against {_plain(baseline)}", "", f"{DETECTABLE.capitalize()}.", ""]
            header = ["task", "difference [95 % interval]", "detectable", "p", "p, corrected", "verdict"]
            lines += _markdown_row(header) + _markdown_rule(len(header))
            for row in compared:
                lines += _markdown_difference(row, row["differences"][label])
    if comparison["sources"]:
        lines += _markdown_sources(comparison)
    for group, parts in comparison["subjects"].items():
        lines += _markdown_subjects(group, parts, labels, baseline)
    if comparison["published"]:
        lines += _markdown_published(comparison["published"])
    lines += ["", *(f"Note: {_plain(note)}.\n" for note in comparison["notes"]), f"Method: {comparison['method']}."]
    return "\n".join(lines) + "\n"


def draw_comparison(comparison: Mapping[str, Any], path: Path) -> None:
    """Bars with 95 % error bars, as a PNG: scores with their chance level, and bits per byte."""
    plt = _pyplot()
    labels = comparison["labels"]
    panels: dict[str, list[Any]] = {}
    for row in comparison["tasks"].values():
        if row["task"] != "average":
            panels.setdefault(_unit(row["metric"]), []).append(row)
    if comparison["answers"]:
        panels[_unit(ANSWER_METRIC)] = list(comparison["answers"].values())
    widths = [max(1.2 + 0.25 * len(labels), 1.1 * len(rows)) for rows in panels.values()]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.5 + 1.2 * sum(widths), 4.2), width_ratios=widths, squeeze=False, layout="constrained"
    )
    for axis, (name, rows) in zip(axes[0], panels.items(), strict=True):
        width, right = 0.8 / len(labels), 0.6
        for place, row in enumerate(rows):
            factor, _ = scale(row["metric"])
            for number, label in enumerate(labels):
                if entry := row["scores"].get(label):
                    axis.bar(
                        place + (number - (len(labels) - 1) / 2) * width,
                        factor * entry["value"],
                        width * 0.9,
                        yerr=NORMAL_95 * factor * (entry["stderr"] or 0),
                        capsize=3,
                        color=f"C{number % 10}",
                    )
            if row["chance"] is not None:
                axis.hlines(
                    factor * row["chance"], place - 0.45, place + 0.45, color="black", linestyle=":", linewidth=1
                )
            if _is_heldout_bits(row) and comparison["heldout"]:
                figures = sorted({held["bz2"]["bits_per_byte"] for held in comparison["heldout"].values()})
                axis.hlines(figures, place - 0.45, place + 0.45, color="black", linestyle="--", linewidth=1)
                axis.text(place + 0.48, figures[-1], "bz2 -9", va="center", fontsize=8)
                right = 0.9  # room for that label beside the bars
        axis.set_xticks(range(len(rows)), [_title_in_picture(row) for row in rows], fontsize=8)
        axis.set_xlim(-0.6, max(len(rows), 1) - 1 + right)
        axis.margins(y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(name, fontsize=9, wrap=True)
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{number % 10}") for number in range(len(labels))]
    # Outside the axes, so that it covers nothing.
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=8, frameon=False)
    _save(plt, figure, path)


def draw_curve(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Scores with their 95 % intervals over tokens seen, as a PNG: one panel per task, one line per run."""
    plt = _pyplot()
    from matplotlib.ticker import MaxNLocator

    tasks = list(points[0]["scores"])
    runs = list(dict.fromkeys(point["run"] for point in points))
    columns = min(len(tasks), 4)
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1 + 3.2 * columns, 0.6 + 2.8 * rows), squeeze=False, layout="constrained"
    )
    for axis, task in zip(axes.flat, tasks, strict=False):
        first = points[0]["scores"][task]
        factor, _ = scale(first["metric"])
        span = max(point["tokens_seen"] for point in points) - min(point["tokens_seen"] for point in points)
        for number, run in enumerate(runs):
            # Side by side, so that one run's error bars do not hide another's.
            shift = 0.012 * span * (number - (len(runs) - 1) / 2)
            line = [(point["tokens_seen"], point["scores"][task]) for point in points if point["run"] == run]
            axis.errorbar(
                [tokens + shift for tokens, _ in line],
                [factor * entry["value"] for _, entry in line],
                yerr=[NORMAL_95 * factor * (entry["stderr"] or 0) for _, entry in line],
                marker="o",
                markersize=4,
                capsize=3,
                label=run,
            )
        if first["chance"] is not None:
            axis.axhline(factor * first["chance"], color="black", linestyle=":", linewidth=1)
        axis.set_title(f"{title(task)}\n{_unit(first['metric'])}", fontsize=9)
        axis.set_xlabel("tokens seen", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(lambda tokens, _: size(tokens))
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    if len(runs) > 1:
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(runs), 4), fontsize=8, frameon=False)
    _save(plt, figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    figure.savefig(partial, format="png", dpi=150)
    plt.close(figure)
    partial.replace(path)


def _unit(name: str) -> str:
    """What a metric's numbers are, over a picture."""
    if scale(name)[0] == 100:
        return "score in percent (dotted: chance)"
    said = {"bits_per_byte": "bits per byte", ANSWER_METRIC: "right answers, bits per byte"}.get(name, name)
    return f"{said} (lower is better)" if name in ("bits_per_byte", ANSWER_METRIC) else said


def _is_heldout_bits(row: Mapping[str, Any]) -> bool:
    return row["task"] == "heldout_bits_per_byte" and "part" not in row


def _title(row: Mapping[str, Any]) -> str:
    """What a row measures: `Winogrande (acc, 5-shot)`, `HellaSwag (right answer, bits per byte, 0-shot) ↓`."""
    name = metric_name(row["metric"]) if row["metric"] == ANSWER_METRIC else row["metric"]
    details = [name] if name not in ("mean of six", "bits_per_byte") else []
    if row["num_fewshot"] is not None and not row["task"].startswith(("answers_", "heldout_")):
        details.append(f"{row['num_fewshot']}-shot")
    said = f" ({', '.join(details)})" if details else ""
    return row.get("part", title(row["task"])) + said + ("" if row["higher_is_better"] else " ↓")


def _title_in_picture(row: Mapping[str, Any]) -> str:
    shots = f"\n{row['num_fewshot']}-shot" if row["num_fewshot"] else ""
    return textwrap.fill(title(row["task"]), 13, break_on_hyphens=False) + shots


def _scores(row: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    return [score(row["scores"].get(label), row["metric"]) for label in labels]


def _chance(row: Mapping[str, Any]) -> str:
    return "" if row["chance"] is None else metric(row["chance"], row["metric"])


def _items(row: Mapping[str, Any]) -> str:
    counts = sorted({entry["items"] for entry in row["scores"].values()})
    return " to ".join(f"{count:,}" for count in (counts if len(counts) < 2 else (counts[0], counts[-1])))


def _bz2(comparison: Mapping[str, Any]) -> list[str]:
    held = comparison["heldout"]
    return [
        metric(held[label]["bz2"]["bits_per_byte"], "bits_per_byte") if label in held else ""
        for label in comparison["labels"]
    ]


def _detectable(row: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    effect = entry["minimum_detectable_effect"]
    return "-" if effect is None else f"±{metric(effect, row['metric'])}"


def _text_difference(row: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    detectable = f"detectable {_detectable(row, entry)}"
    return [f"  {_title(row)}", difference(entry, row["metric"]), detectable, _verdict(entry)]


def _verdict(entry: Mapping[str, Any]) -> str:
    value = p_value(entry["p_corrected"])
    return f"{entry['verdict']} (p {value if value.startswith('<') else '= ' + value})"


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _plain(text: str) -> str:
    """Text in which Markdown and HTML find no markup."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def _markdown_row(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def _markdown_rule(columns: int) -> list[str]:
    return ["|---" + "|---:" * (columns - 1) + "|"]


def _markdown_difference(row: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    p_values = [p_value(entry["p_value"]), p_value(entry["p_corrected"])]
    cells = [difference(entry, row["metric"]), _detectable(row, entry), *p_values, entry["verdict"]]
    return _markdown_row([_title(row), *cells])


def _markdown_sources(comparison: Mapping[str, Any]) -> list[str]:
    """Bits per byte by source, folded: each model's, and its difference from the baseline."""
    labels, baseline = comparison["labels"], comparison["baseline"]
    others = [label for label in labels if any(label in row["differences"] for row in comparison["sources"].values())]
    lines = ["", "<details>", "<summary>Held-out bits per byte by source</summary>", ""]
    header = [
        part for label in others for part in (f"{_plain(label)} against {_plain(baseline)} [95 % interval]", "verdict")
    ]
    lines += _markdown_row(["source", "documents", *map(_plain, labels), *header]) + _markdown_rule(
        2 + len(labels) + len(header)
    )
    for name, row in comparison["sources"].items():
        cells = _scores(row, labels)
        for label in others:
            entry = row["differences"].get(label)
            cells += [difference(entry, row["metric"]), _verdict(entry)] if entry else ["", ""]
        lines += _markdown_row([_plain(name), f"{row['documents']:,}", *cells])
    return [*lines, "", "</details>"]


def _markdown_subjects(group: str, parts: Mapping[str, Any], labels: Sequence[str], baseline: str) -> list[str]:
    """The parts of a group of tasks, folded."""
    others = [label for label in labels if label != baseline]
    lines = ["", "<details>", f"<summary>{title(group)} by subject</summary>", ""]
    against = (f"{_plain(label)} against {_plain(baseline)}" for label in others)
    lines += _markdown_row(["subject", *map(_plain, labels), *against])
    lines += _markdown_rule(1 + len(labels) + len(others))
    for name, row in parts.items():
        verdicts = [_verdict(row["differences"][label]) if label in row["differences"] else "" for label in others]
        lines += _markdown_row([name.removeprefix(f"{group}_"), *_scores(row, labels), *verdicts])
    return [*lines, "", "</details>"]


def _markdown_published(published: Mapping[str, Any]) -> list[str]:
    tasks = list(published["metrics"])
    lines = ["", "## Published scores, measured elsewhere", ""]
    lines += _markdown_row(["model", *(title(task) for task in tasks), "average", "source"])
    lines += _markdown_rule(len(tasks) + 3)
    for model in published["models"]:
        scores = [f"{model['scores'][task]:.2f}" for task in tasks]
        lines += _markdown_row([model["name"], *scores, f"{model['average']:.2f}", model["source"]])
    return lines
