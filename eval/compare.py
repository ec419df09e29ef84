"""Compare measured models side by side, item by item, and say which differences are more than noise.

    nanophi compare runs/demo runs/demo-control --baseline demo-control

Models are compared on the items that both answered (same document, same prompt). For an accuracy the p-value is
McNemar's exact test (McNemar 1947, Psychometrika 12), for anything else the paired bootstrap's, and for bits per byte
not below that of Student's t; all come with the bootstrap's 95 % interval of the difference. All tests of one
comparison are corrected together by Holm's method (1979, Scand. J. Statist. 6), and so are those of a secondary table
(a group's subjects, the held-out sources) among themselves. A difference is called better or worse only if its
corrected p-value is below 0.05.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nanophi.eval import statistics
from nanophi.eval.results import FORMAT, read_result
from nanophi.eval.statistics import SIGNIFICANCE, bits_per_byte, bits_per_byte_stderr, holm, mcnemar
from nanophi.files import UserError, write_json, write_text

LEADERBOARD = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k")
MAX_SOURCES = 12
"""Held-out sources with a row of their own; every row more makes Holm's correction harsher on all of them."""
MIN_DOCUMENTS = 20
"""Documents that a source needs for a row of its own: fewer say little about it."""
REFERENCES = Path(__file__).parent / "references.yaml"
TITLES = {
    "heldout_bits_per_byte": "held-out bits per byte",
    "heldout_continuation": "held-out continuation",
    "heldout_order": "held-out sentence order",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
    "truthfulqa_mc2": "TruthfulQA mc2",
    "winogrande": "Winogrande",
    "gsm8k": "GSM8K",
    "average": "average",
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model's score on one task (or group of tasks, whose unweighted mean counts).

    Attributes:
        line: the result file's `headline` entry.
        items: per leaf task, item key -> value: a number, or (log-likelihood in nats, bytes).
        prompts: item key -> hash of its prompt.
        sources: item key -> source of a held-out document; empty for other tasks.
    """

    line: dict[str, Any]
    items: dict[str, dict[tuple[int, str], Any]]
    prompts: dict[tuple[int, str], str]
    sources: dict[tuple[int, str], str] = dataclasses.field(default_factory=dict)


def compare(
    results: Mapping[str, Sequence[Path]], output: Path, *, baseline: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compare models and write `comparison.json`, `comparison.md` and `comparison.png`.

    Args:
        results: label of each model -> its result files, written by `nanophi eval`. A task that several of them hold
            counts from the one with the most items.
        output: folder to write in.
        baseline: the label that the others are compared with; None: the last one.
        seed: of the bootstrap.

    Returns:
        what `comparison.json` holds: `labels`, `baseline`, `tasks` (per task `scores` by label and `differences` from
        the baseline by label), `subjects` (the same for the parts of a group such as MMLU), `sources` (the same for
        bits per byte of each held-out source, the small ones together), `heldout` by label, `published`, `notes`.

    Raises:
        UserError: for a file that is no result of ours, or results that cannot be compared.
    """
    if not results:
        raise UserError("nothing to compare: name at least one result")
    labels = list(results)
    baseline = labels[-1] if baseline is None else baseline
    if baseline not in results:
        raise UserError(f"baseline '{baseline}' is not one of {', '.join(labels)}")
    files = {label: [read_result(Path(path)) for path in paths] for label, paths in results.items()}
    measured = {label: _measured(contents) for label, contents in files.items()}
    tasks = list(dict.fromkeys(t for scores in measured.values() for t in scores))
    tasks.sort(key=lambda task: list(TITLES).index(task) if task in TITLES else len(TITLES))
    rng = np.random.default_rng(seed)
    notes: list[str] = []
    table: dict[str, Any] = {}
    subjects: dict[str, Any] = {}
    draws: dict[str, dict[str, np.ndarray]] = {}
    for task in tasks:
        scores = {label: measured[label][task] for label in labels if task in measured[label]}
        table[task], draws[task] = _row(task, scores, baseline, rng, notes)
        leaves = next(iter(scores.values())).line["tasks"]
        if len(leaves) > 1:
            parts = {}
            for leaf in leaves:
                part = {label: _leaf(score, leaf) for label, score in scores.items() if leaf in score.items}
                parts[leaf], _ = _row(leaf, part, baseline, rng, notes)
            _correct(parts.values())
            subjects[task] = parts
    held = {label: scores.get("heldout_bits_per_byte") for label, scores in measured.items()}
    sources = _sources(held, baseline, rng)
    if set(LEADERBOARD) <= set(table):
        _add_average(table, draws, labels, baseline)
    _correct(table.values())
    versions = {content["lm_eval_version"] for contents in files.values() for content in contents}
    if len(versions) > 1:
        notes.append(f"measured with different versions of lm-eval: {', '.join(sorted(versions))}")
    comparison = {
        "format": FORMAT,
        "labels": labels,
        "baseline": baseline,
        "models": {label: [content["nanophi"]["model"] for content in contents] for label, contents in files.items()},
        "tasks": table,
        "subjects": subjects,
        "sources": sources,
        "heldout": {
            label: content["nanophi"]["heldout"]
            for label, contents in files.items()
            for content in contents
            if "heldout" in content["nanophi"]
        },
        "published": references() if set(LEADERBOARD) & set(table) else None,
        "method": f"McNemar's exact test, or paired bootstrap ({statistics.RESAMPLES} resamples, seed {seed}) and, for "
        "bits per byte, Student's t; Holm's correction, separately for each secondary table",
        "notes": notes,
    }
    output = Path(output)
    write_json(output / "comparison.json", comparison)
    write_text(output / "comparison.md", to_markdown(comparison))
    draw(comparison, output / "comparison.png")
    return comparison


def references() -> dict[str, Any]:
    """The published scores in `references.yaml`."""
    return yaml.safe_load(REFERENCES.read_text(encoding="utf-8"))


def render(comparison: Mapping[str, Any]) -> str:
    """The comparison as a plain-text table for the terminal."""
    labels, baseline = comparison["labels"], comparison["baseline"]
    header = ["", *labels, "chance"]
    rows = [
        [_title(task, row), *(_score(row["scores"].get(label), row) for label in labels), _chance(row)]
        for task, row in comparison["tasks"].items()
    ]
    if comparison["heldout"]:
        rows.append(["bz2 -9, same text", *_bz2(comparison), ""])
    lines = _columns([header, *rows])
    for label in labels:
        differences = [
            [f"  {_title(task, row)}", _difference(row["differences"][label], row), _verdict(row["differences"][label])]
            for task, row in comparison["tasks"].items()
            if label in row["differences"]
        ]
        if differences:
            lines += ["", f"{label} against {baseline}, on the same items (95 % interval; p after Holm's correction):"]
            lines += _columns(differences)
    lines += [f"note: {note}" for note in comparison["notes"]]
    return "\n".join(lines)


def to_markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as Markdown, with the subjects of groups and the published scores."""
    labels, baseline = comparison["labels"], comparison["baseline"]
    lines = ["# Comparison", "", "Score ± standard error. ↓: lower is better.", ""]
    lines += _markdown_row(["", *labels, "chance", "items"])
    lines += _markdown_rule(len(labels) + 3)
    for task, row in comparison["tasks"].items():
        items = max((score["items"] for score in row["scores"].values()), default=0)
        cells = [_score(row["scores"].get(label), row) for label in labels]
        lines += _markdown_row([_title(task, row), *cells, _chance(row), str(items) if items else ""])
    if comparison["heldout"]:
        lines += _markdown_row(["bz2 -9 on the same text ↓", *_bz2(comparison), "", ""])
    for label in labels:
        rows = [(task, row) for task, row in comparison["tasks"].items() if label in row["differences"]]
        if rows:
            lines += ["", f"## {label} against {baseline}", ""]
            lines += _markdown_row(["", "difference [95 % interval]", "p", "p, corrected", "verdict"])
            lines += _markdown_rule(5)
            for task, row in rows:
                lines += _markdown_difference(_title(task, row), row["differences"][label], row)
    if comparison["sources"]:
        lines += _markdown_sources(comparison)
    for group, parts in comparison["subjects"].items():
        lines += ["", f"## {TITLES.get(group, group)} by subject", ""]
        lines += _markdown_row(["subject", *labels, *(f"{x} against {baseline}" for x in labels if x != baseline)])
        lines += _markdown_rule(2 * len(labels))
        for name, row in parts.items():
            cells = [_score(row["scores"].get(label), row) for label in labels]
            verdicts = [
                _verdict(row["differences"][label]) if label in row["differences"] else ""
                for label in labels
                if label != baseline
            ]
            lines += _markdown_row([name.removeprefix(f"{group}_"), *cells, *verdicts])
    if comparison["published"]:
        published = comparison["published"]
        tasks = list(published["metrics"])
        lines += ["", "## Published scores, measured elsewhere", ""]
        lines += _markdown_row(["model", *(TITLES[task] for task in tasks), "average", "source"])
        lines += _markdown_rule(len(tasks) + 3)
        for model in published["models"]:
            scores = [f"{model['scores'][task]:.2f}" for task in tasks]
            lines += _markdown_row([model["name"], *scores, f"{model['average']:.2f}", model["source"]])
    lines += ["", *(f"Note: {note}." for note in comparison["notes"]), f"Method: {comparison['method']}."]
    return "\n".join(lines) + "\n"


def draw(comparison: Mapping[str, Any], path: Path) -> None:
    """Bars with 95 % error bars: scores with their chance level, and bits per byte, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = comparison["labels"]
    choices = {t: row for t, row in comparison["tasks"].items() if row["higher_is_better"] and t != "average"}
    bits = {t: row for t, row in comparison["tasks"].items() if not row["higher_is_better"]}
    panels = [panel for panel in (choices, bits) if panel] or [{}]
    widths = [max(len(panel), 1) for panel in panels]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.5 + 1.1 * sum(widths), 4), width_ratios=widths, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        width = 0.8 / len(labels)
        for number, label in enumerate(labels):
            for place, row in enumerate(panel.values()):
                score = row["scores"].get(label)
                if score:
                    axis.bar(
                        place + (number - (len(labels) - 1) / 2) * width,
                        score["value"],
                        width * 0.9,
                        yerr=1.96 * (score["stderr"] or 0),
                        capsize=3,
                        color=f"C{number}",
                        label=label if place == 0 else None,
                    )
        for place, row in enumerate(panel.values()):
            if row["chance"] is not None:
                axis.hlines(row["chance"], place - 0.45, place + 0.45, color="black", linestyle=":", linewidth=1)
        axis.set_xticks(range(len(panel)), [TITLES.get(t, t).replace(" ", "\n") for t in panel], fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title("score (dotted: chance)" if panel is choices else "lower is better", fontsize=9)
        if panel is choices:
            axis.set_ylim(0, min(1, axis.get_ylim()[1]))
        if panel is bits and comparison["heldout"]:
            for held in comparison["heldout"].values():
                axis.axhline(held["bz2"]["bits_per_byte"], color="grey", linestyle="--", linewidth=1)
                axis.annotate("bz2 -9", (0.5, held["bz2"]["bits_per_byte"]), fontsize=7, va="bottom", ha="right")
            axis.set_title("bits per byte", fontsize=9)
    axes[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    figure.savefig(partial, format="png", dpi=150)
    plt.close(figure)
    partial.replace(path)


def _measured(contents: Sequence[dict[str, Any]]) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    for content in contents:
        for line in content["nanophi"]["headline"]:
            if line["task"] in found and found[line["task"]].line["items"] >= line["items"]:
                continue
            items: dict[str, dict[tuple[int, str], Any]] = {}
            prompts: dict[tuple[int, str], str] = {}
            sources: dict[tuple[int, str], str] = {}
            for leaf in line["tasks"]:
                samples = [s for s in content["samples"][leaf] if s["filter"] == line["filter"]]
                items[leaf] = {(s["doc_id"], s["doc_hash"]): s[line["metric"]] for s in samples}
                prompts |= {(s["doc_id"], s["doc_hash"]): s["prompt_hash"] for s in samples}
                sources |= {(s["doc_id"], s["doc_hash"]): s["source"] for s in samples if "source" in s}
            found[line["task"]] = Measured(line, items, prompts, sources)
    return found


def _leaf(score: Measured, leaf: str) -> Measured:
    """The part of a group's score that belongs to one of its tasks."""
    values = np.array(list(score.items[leaf].values()), dtype=float)
    stderr = statistics.mean_stderr(values)
    line = {**score.line, "task": leaf, "tasks": [leaf], "value": float(values.mean()), "stderr": stderr}
    return Measured({**line, "items": len(values)}, {leaf: score.items[leaf]}, score.prompts)


def _sources(scores: Mapping[str, Measured | None], baseline: str, rng: np.random.Generator) -> dict[str, Any]:
    """Bits per byte of every held-out source that is large enough, like the tasks; the other sources together."""
    measured = {label: score for label, score in scores.items() if score is not None}
    counts: Counter[str] = Counter()
    for source in {key: source for score in measured.values() for key, source in score.sources.items()}.values():
        counts[source] += 1
    large = [source for source, count in counts.most_common(MAX_SOURCES) if count >= MIN_DOCUMENTS]
    small = [source for source in counts if source not in large]
    if len(small) == 1 and len(large) < MAX_SOURCES:
        large, small = large + small, []  # one source together with nothing has a name of its own
    groups = {source: [source] for source in large} | ({f"other ({len(small)} sources)": small} if small else {})
    rows = {}
    for name, members in groups.items():
        parts = {label: part for label, score in measured.items() if (part := _of_sources(score, set(members)))}
        rows[name], _ = _row(name, parts, baseline, rng, [])
        rows[name]["documents"] = max(part.line["items"] for part in parts.values())
    _correct(rows.values())
    return rows


def _of_sources(score: Measured, sources: set[str]) -> Measured | None:
    """The part of a held-out score that belongs to some sources; None if it has no document of them."""
    items = {
        leaf: {key: value for key, value in values.items() if score.sources.get(key) in sources}
        for leaf, values in score.items.items()
    }
    pairs = np.array([value for values in items.values() for value in values.values()], dtype=float)
    if not len(pairs):
        return None
    value, stderr = bits_per_byte(pairs[:, 0], pairs[:, 1]), bits_per_byte_stderr(pairs[:, 0], pairs[:, 1])
    line = {**score.line, "value": value, "stderr": stderr if len(pairs) > 1 else None, "items": len(pairs)}
    return Measured(line, items, score.prompts, score.sources)


def _row(
    task: str, scores: dict[str, Measured], baseline: str, rng: np.random.Generator, notes: list[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One task's entry in the comparison, and the bootstrap's differences by label."""
    shots = {label: score.line["num_fewshot"] for label, score in scores.items()}
    if len({(score.line["num_fewshot"], score.line["metric"]) for score in scores.values()}) > 1:
        said = ", ".join(f"{label}: {count}-shot {scores[label].line['metric']}" for label, count in shots.items())
        raise UserError(f"{task} was not measured alike ({said}); run `nanophi eval` again with one suite")
    line = next(iter(scores.values())).line
    row: dict[str, Any] = {key: line[key] for key in ("metric", "filter", "num_fewshot", "chance", "higher_is_better")}
    row["scores"] = {label: {k: s.line[k] for k in ("value", "stderr", "items")} for label, s in scores.items()}
    row["differences"] = {}
    draws = {}
    for label, score in scores.items():
        if label != baseline and baseline in scores:
            found = _paired(score, scores[baseline], rng)
            if found is None:
                notes.append(f"{task}: {label} and {baseline} have no item with the same prompt in common")
                continue
            row["differences"][label], draws[label] = found
            if row["differences"][label]["items"] < min(score.line["items"], scores[baseline].line["items"]):
                notes.append(f"{task}: {row['differences'][label]['items']} items are common to {label} and {baseline}")
    return row, draws


def _paired(ours: Measured, theirs: Measured, rng: np.random.Generator) -> tuple[dict[str, Any], np.ndarray] | None:
    leaves = [leaf for leaf in ours.items if leaf in theirs.items]
    differences, drawn, pooled = [], [], []
    for leaf in leaves:
        common = [
            key for key in ours.items[leaf] if key in theirs.items[leaf] and ours.prompts[key] == theirs.prompts[key]
        ]
        if not common:
            return None
        a = np.array([ours.items[leaf][key] for key in common], dtype=float)
        b = np.array([theirs.items[leaf][key] for key in common], dtype=float)
        pooled.append((a, b))
        if a.ndim == 2:
            bits = (b[:, 0] - a[:, 0]) / math.log(2)
            differences.append(float(bits.sum() / a[:, 1].sum()))
            drawn.append(statistics.bootstrap_ratio(bits, a[:, 1], rng))
        else:
            differences.append(float((a - b).mean()))
            drawn.append(statistics.bootstrap_mean(a - b, rng))
    draws = np.mean(drawn, axis=0)
    a, b = (np.concatenate([pair[side] for pair in pooled]) for side in (0, 1))
    entry = _entry(float(np.mean(differences)), draws, len(a))
    if a.ndim == 2:
        entry["p_value"] = max(entry["p_bootstrap"], statistics.student(b[:, 0] - a[:, 0], a[:, 1]))
    elif set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}:
        entry["mcnemar"] = mcnemar(a, b)
        if len(leaves) == 1:
            entry["p_value"] = entry["mcnemar"]["p_value"]
    return entry, draws


def _entry(difference: float, draws: np.ndarray, items: int) -> dict[str, Any]:
    p_value = statistics.bootstrap_p_value(draws)
    return {
        "value": difference,
        "stderr": float(draws.std()),
        "interval": statistics.interval(draws),
        "items": items,
        "p_bootstrap": p_value,
        "p_value": p_value,
    }


def _add_average(
    table: dict[str, Any], draws: dict[str, dict[str, np.ndarray]], labels: list[str], baseline: str
) -> None:
    """The mean of the leaderboard's six tasks, for the labels that have them all."""
    rows = [table[task] for task in LEADERBOARD]
    average: dict[str, Any] = {"metric": "mean of six", "filter": "none", "num_fewshot": None, "chance": None}
    average |= {"higher_is_better": True, "scores": {}, "differences": {}}
    for label in labels:
        if all(label in row["scores"] for row in rows):
            errors = [row["scores"][label]["stderr"] or 0.0 for row in rows]
            average["scores"][label] = {
                "value": float(np.mean([row["scores"][label]["value"] for row in rows])),
                "stderr": float(np.sqrt(np.sum(np.square(errors))) / len(errors)),
                "items": sum(row["scores"][label]["items"] for row in rows),
            }
        if all(label in row["differences"] for row in rows):
            value = float(np.mean([row["differences"][label]["value"] for row in rows]))
            mean = np.mean([draws[task][label] for task in LEADERBOARD], axis=0)
            average["differences"][label] = _entry(value, mean, sum(row["differences"][label]["items"] for row in rows))
    table["average"] = average


def _correct(rows: Any) -> None:
    """Holm's correction over all differences of these rows, and the verdicts."""
    entries = [(row, difference) for row in rows for difference in row["differences"].values()]
    for (row, difference), p_value in zip(entries, holm([d["p_value"] for _, d in entries]), strict=True):
        difference["p_corrected"] = p_value
        improved = (difference["value"] > 0) == row["higher_is_better"]
        difference["verdict"] = "within noise" if p_value >= SIGNIFICANCE else "better" if improved else "worse"


def _title(task: str, row: Mapping[str, Any]) -> str:
    shots = f", {row['num_fewshot']}-shot" if row["num_fewshot"] else ""
    metric = f" ({row['metric']}{shots})" if not task.startswith("heldout_") else ""
    return TITLES.get(task, task) + metric + ("" if row["higher_is_better"] else " ↓")


def _scale(row: Mapping[str, Any]) -> tuple[float, int]:
    """Accuracies in percent with two digits, bits per byte as they are with four."""
    return (100.0, 2) if row["higher_is_better"] else (1.0, 4)


def _score(score: Mapping[str, Any] | None, row: Mapping[str, Any]) -> str:
    if score is None:
        return ""
    factor, digits = _scale(row)
    error = f" ± {factor * score['stderr']:.{digits}f}" if score["stderr"] is not None else ""
    return f"{factor * score['value']:.{digits}f}{error}"


def _bz2(comparison: Mapping[str, Any]) -> list[str]:
    held = comparison["heldout"]
    return [f"{held[label]['bz2']['bits_per_byte']:.4f}" if label in held else "" for label in comparison["labels"]]


def _chance(row: Mapping[str, Any]) -> str:
    return "" if row["chance"] is None else f"{100 * row['chance']:.1f}"


def _difference(difference: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    factor, digits = _scale(row)
    low, high = (f"{factor * bound:+.{digits}f}" for bound in difference["interval"])
    return f"{factor * difference['value']:+.{digits}f} [{low}, {high}]"


def _verdict(difference: Mapping[str, Any]) -> str:
    p_value = _p(difference["p_corrected"])
    return f"{difference['verdict']} (p {p_value if p_value.startswith('<') else '= ' + p_value})"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _markdown_row(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"]


def _markdown_rule(columns: int) -> list[str]:
    return ["|---" + "|---:" * (columns - 1) + "|"]


def _markdown_sources(comparison: Mapping[str, Any]) -> list[str]:
    """Bits per byte by source, folded: each model's, and its difference from the baseline."""
    labels, baseline = comparison["labels"], comparison["baseline"]
    others = [label for label in labels if any(label in row["differences"] for row in comparison["sources"].values())]
    lines = ["", "<details>", "<summary>Held-out bits per byte by source</summary>", ""]
    header = [part for label in others for part in (f"{label} against {baseline} [95 % interval]", "verdict")]
    lines += _markdown_row(["source", "documents", *labels, *header])
    lines += _markdown_rule(2 + len(labels) + len(header))
    for name, row in comparison["sources"].items():
        cells = [_score(row["scores"].get(label), row) for label in labels]
        for label in others:
            difference = row["differences"].get(label)
            cells += [_difference(difference, row), _verdict(difference)] if difference else ["", ""]
        lines += _markdown_row([name, str(row["documents"]), *cells])
    return [*lines, "", "</details>"]


def _markdown_difference(title: str, difference: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    p_values = [_p(difference["p_value"]), _p(difference["p_corrected"])]
    return _markdown_row([title, _difference(difference, row), *p_values, difference["verdict"]])
