"""A comparison as plain text, as Markdown and as a picture; scores over training as a picture.

What is compared is decided in compare.py; nothing here computes a figure.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from nanophi.core import markup, plots
from nanophi.core.formatting import p_value, size
from nanophi.eval.catalogue import (
    HELDOUT_BITS,
    difference,
    is_percent,
    made_from,
    main_rows,
    metric,
    metric_name,
    scale,
    score,
    title,
)
from nanophi.eval.results import ANSWER_METRIC

BZ2 = "bz2 -9 on the same text"
DETECTABLE = "detectable: the minimum detectable effect, a true difference that 4 of 5 such comparisons would find"
NORMAL_95 = 1.96  # standard errors on either side of a score that make its 95 % confidence interval


def to_text(comparison: Mapping[str, Any]) -> str:
    """The comparison as a plain-text table for the terminal."""
    labels = comparison["labels"]
    rows = [["", *labels, "chance"], *(cells[:-1] for cells in _main_cells(comparison, BZ2))]
    if comparison["answers"]:
        rows.append(["" for _ in rows[0]])
        rows += [[_title(row), *_scores(row, labels), ""] for row in comparison["answers"].values()]
    parts = [markup.columns(rows)]
    for label, compared in _compared(comparison):
        parts += ["", f"{label} against {comparison['baseline']}, on the same items, with 95 % confidence intervals:"]
        cells = [
            [_title(row), difference(entry, row["metric"]), f"detectable {_detectable(row, entry)}", _verdict(entry)]
            for row, entry in compared
        ]
        parts.append(markup.columns(cells, indent="  "))
    if len(labels) > 1:
        parts += ["", DETECTABLE]
    return "\n".join([*parts, *(f"note: {note}" for note in comparison["notes"])])


def to_markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as Markdown, with the subjects of groups and the published scores."""
    labels, names = comparison["labels"], [markup.text(label) for label in comparison["labels"]]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["text"] = markup.text
    template = environment.from_string(Path(__file__).with_name("comparison.md").read_text(encoding="utf-8"))
    answers = [[_title(row), *_scores(row, labels), _items(row)] for row in comparison["answers"].values()]
    heads = ["task", "difference [95 % interval]", "detectable", "p", "p, corrected", "verdict"]
    return (
        template.render(
            main=markup.table(["task", *names, "chance", "items"], _main_cells(comparison, f"{BZ2} ↓")),
            answers=answers and markup.table(["task", *names, "items"], answers),
            differences=[
                (label, markup.table(heads, [_difference_cells(row, entry) for row, entry in compared]))
                for label, compared in _compared(comparison)
            ],
            folded=_folded(comparison, names),
            published=comparison["published"] and _published(comparison["published"]),
            detectable=DETECTABLE,
            **{key: comparison[key] for key in ("baseline", "notes", "method")},
        )
        + "\n"
    )


def draw_comparison(comparison: Mapping[str, Any], path: Path) -> None:
    """Bars with 95 % error bars, as a PNG: scores with their chance level, and bits per byte."""
    from matplotlib.patches import Patch

    labels, held = comparison["labels"], comparison["heldout"]
    panels: dict[str, list[Any]] = {}
    for row in (*comparison["tasks"].values(), *comparison["answers"].values()):
        if row["task"] != "average":
            panels.setdefault(_unit(row["metric"]), []).append(row)
    widths = [max(1.2 + 0.25 * len(labels), 1.1 * len(rows)) for rows in panels.values()]
    with plots.picture(path, 1.5 + 1.2 * sum(widths), 4.2) as figure:
        axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)
        for axis, (name, rows) in zip(axes[0], panels.items(), strict=True):
            right = 0.6
            for place, row in enumerate(rows):
                factor, width = scale(row["metric"])[0], 0.8 / len(labels)
                for number, label in enumerate(labels):
                    if entry := row["scores"].get(label):
                        middle = place + (number - (len(labels) - 1) / 2) * width
                        style: Any = {"capsize": 3, "color": _color(number)}
                        axis.bar(middle, factor * entry["value"], width * 0.9, yerr=_half(entry, factor), **style)
                line: Any = {"xmin": place - 0.45, "xmax": place + 0.45, "color": "black", "linewidth": 1}
                if row["chance"] is not None:
                    axis.hlines(factor * row["chance"], linestyle=":", **line)
                if row["task"] == HELDOUT_BITS and held:
                    figures = sorted({one["bz2"]["bits_per_byte"] for one in held.values()})
                    axis.hlines(figures, linestyle="--", **line)
                    axis.text(place + 0.48, figures[-1], "bz2 -9", va="center", fontsize=8)
                    right = 0.9  # room for that label beside the bars
            axis.set_xticks(range(len(rows)), [_title_in_picture(row) for row in rows], fontsize=8)
            axis.set_xlim(-0.6, len(rows) - 1 + right)
            axis.margins(y=0.12)
            axis.grid(axis="x", visible=False)
            axis.set_title(name, fontsize=9, wrap=True)
        _legend(figure, [Patch(color=_color(number)) for number in range(len(labels))], labels)


def draw_curve(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Scores with their 95 % intervals over tokens seen, as a PNG: one panel per task, one line per run."""
    from matplotlib.ticker import MaxNLocator

    tasks = list(points[0]["scores"])
    runs = list(dict.fromkeys(point["run"] for point in points))
    columns = min(len(tasks), 4)
    rows = -(-len(tasks) // columns)
    tokens_seen = [point["tokens_seen"] for point in points]
    with plots.picture(path, 1 + 3.2 * columns, 0.6 + 2.8 * rows) as figure:
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis, task in zip(axes.flat, tasks, strict=False):
            first = points[0]["scores"][task]
            factor, _ = scale(first["metric"])
            for number, run in enumerate(runs):
                # Side by side, so that one run's error bars do not hide another's.
                shift = 0.012 * (max(tokens_seen) - min(tokens_seen)) * (number - (len(runs) - 1) / 2)
                line = [point for point in points if point["run"] == run]
                entries = [point["scores"][task] for point in line]
                axis.errorbar(
                    [point["tokens_seen"] + shift for point in line],
                    [factor * entry["value"] for entry in entries],
                    yerr=[_half(entry, factor) for entry in entries],
                    **{"marker": "o", "markersize": 4, "capsize": 3, "color": _color(number), "label": run},
                )
            if first["chance"] is not None:
                axis.axhline(factor * first["chance"], color="black", linestyle=":", linewidth=1)
            axis.set_title(f"{title(task)}\n{_unit(first['metric'])}", fontsize=9)
            axis.set_xlabel("tokens seen", fontsize=8)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.xaxis.set_major_formatter(lambda tokens, _: size(tokens))
            axis.tick_params(labelsize=8)
        for axis in axes.flat[len(tasks) :]:
            axis.set_visible(False)
        if len(runs) > 1:
            _legend(figure, *axes[0][0].get_legend_handles_labels())


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Outside the axes, so that it covers nothing."""
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=8)


def _half(entry: Mapping[str, Any], factor: float) -> float:
    """Half of a score's 95 % confidence interval."""
    return NORMAL_95 * factor * (entry["stderr"] or 0)


def _color(number: int) -> str:
    return (*plots.SERIES, *(f"C{spare}" for spare in range(4, 10)))[number % 10]


def _unit(name: str) -> str:
    """What a metric's numbers are, over a picture."""
    if is_percent(name):
        return "score in percent (dotted: chance)"
    words = "right answers, bits per byte" if name == ANSWER_METRIC else metric_name(name)
    return f"{words} (lower is better)" if name in ("bits_per_byte", ANSWER_METRIC) else words


def _title(row: Mapping[str, Any]) -> str:
    """What a row measures: `Winogrande (acc, 5-shot)`, `HellaSwag (right answer, bits per byte, 0-shot) ↓`."""
    name = metric_name(row["metric"]) if row["metric"] == ANSWER_METRIC else row["metric"]
    details = [name] if name not in ("mean of six", "bits_per_byte") else []
    if row["num_fewshot"] is not None and not made_from(row["task"]):
        details.append(f"{row['num_fewshot']}-shot")
    more = f" ({', '.join(details)})" if details else ""
    return row.get("part", title(row["task"])) + more + ("" if row["higher_is_better"] else " ↓")


def _title_in_picture(row: Mapping[str, Any]) -> str:
    shots = f"\n{row['num_fewshot']}-shot" if row["num_fewshot"] else ""
    return textwrap.fill(title(row["task"]), 13, break_on_hyphens=False) + shots


def _main_cells(comparison: Mapping[str, Any], bz2: str) -> list[list[str]]:
    """The main table: title, scores, chance and items of each row; below all held-out text, a compressor's figure."""
    labels, held = comparison["labels"], comparison["heldout"]
    cells = []
    for row in main_rows(comparison):
        chance = "" if row["chance"] is None else metric(row["chance"], row["metric"])
        cells.append([_title(row), *_scores(row, labels), chance, _items(row)])
        if row["task"] == HELDOUT_BITS and "part" not in row and held:
            figures = (held[label]["bz2"]["bits_per_byte"] if label in held else None for label in labels)
            cells.append([bz2, *("" if value is None else metric(value, "bits_per_byte") for value in figures), "", ""])
    return cells


def _compared(comparison: Mapping[str, Any]) -> list[tuple[str, list[tuple[Any, Any]]]]:
    """Labels that were compared with the baseline, each with its rows and their differences."""
    every = [*main_rows(comparison), *comparison["answers"].values()]
    labels = comparison["labels"]
    found = [(x, [(row, row["differences"][x]) for row in every if x in row["differences"]]) for x in labels]
    return [(label, rows) for label, rows in found if rows]


def _scores(row: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    return [score(row["scores"].get(label), row["metric"]) for label in labels]


def _items(row: Mapping[str, Any]) -> str:
    counts = sorted({entry["items"] for entry in row["scores"].values()})
    return " to ".join(f"{count:,}" for count in (counts if len(counts) < 2 else (counts[0], counts[-1])))


def _detectable(row: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    effect = entry["minimum_detectable_effect"]
    return "-" if effect is None else f"±{metric(effect, row['metric'])}"


def _verdict(entry: Mapping[str, Any]) -> str:
    value = p_value(entry["p_corrected"])
    return f"{entry['verdict']} (p {value if value.startswith('<') else '= ' + value})"


def _difference_cells(row: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    p_values = [p_value(entry["p_value"]), p_value(entry["p_corrected"])]
    return [_title(row), difference(entry, row["metric"]), _detectable(row, entry), *p_values, entry["verdict"]]


def _folded(comparison: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str]]:
    """Summary and table of what is folded: bits per byte by source, and the parts of each group."""
    labels, baseline = comparison["labels"], markup.text(comparison["baseline"])
    folded = []
    if sources := comparison["sources"]:
        others = [label for label in labels if any(label in row["differences"] for row in sources.values())]
        against = [(f"{markup.text(label)} against {baseline} [95 % interval]", "verdict") for label in others]
        rows = []
        for name, row in sources.items():
            rows.append([markup.text(name), f"{row['documents']:,}", *_scores(row, labels)])
            for entry in map(row["differences"].get, others):
                rows[-1] += [difference(entry, row["metric"]), _verdict(entry)] if entry else ["", ""]
        head = ["source", "documents", *names, *(cell for pair in against for cell in pair)]
        folded.append(("Held-out bits per byte by source", markup.table(head, rows)))
    for group, parts in comparison["subjects"].items():
        others = [label for label in labels if label != comparison["baseline"]]
        head = ["subject", *names, *(f"{markup.text(label)} against {baseline}" for label in others)]
        rows = []
        for name, row in parts.items():
            verdicts = [_verdict(entry) if entry else "" for entry in map(row["differences"].get, others)]
            rows.append([name.removeprefix(f"{group}_"), *_scores(row, labels), *verdicts])
        folded.append((f"{title(group)} by subject", markup.table(head, rows)))
    return folded


def _published(published: Mapping[str, Any]) -> str:
    tasks = list(published["metrics"])
    rows = [
        [model["name"], *(f"{model['scores'][task]:.2f}" for task in tasks), f"{model['average']:.2f}", model["source"]]
        for model in published["models"]
    ]
    return markup.table(["model", *map(title, tasks), "average", "source"], rows)
