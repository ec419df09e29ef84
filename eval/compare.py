"""Compare measured models side by side, item by item, and say which differences are more than noise.

    nanophi compare runs/demo runs/demo-control --baseline demo-control

Models are compared on the items that both answered (same document, same prompt). For an accuracy the p-value is
McNemar's exact test, for anything else the larger of the paired bootstrap's and Student's t test's; each comes with the
bootstrap's 95 % confidence interval of the difference and the minimum detectable effect. A group of tasks is tested by
the mean of their differences, each with its own variance. All tests of the main table are corrected together by Holm's
method, and so are those of each secondary table (a group's subjects, the held-out sources, the right answers' bits per
byte) among themselves. A difference is called better or worse only if its corrected p-value is below 0.05.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json, write_text
from nanophi.eval import filter_parts, render, statistics
from nanophi.eval.catalogue import LEADERBOARD, position, references
from nanophi.eval.models import fingerprint
from nanophi.eval.results import ANSWER_METRIC, FORMAT, ItemKey, item_values, mean_figures, read_result
from nanophi.eval.statistics import Estimate, bits_per_byte, bits_per_byte_stderr, holm, mcnemar

MAX_SOURCES = 12
"""Held-out sources with a row of their own; every further row makes Holm's correction harsher on all of them."""
MIN_DOCUMENTS = 20
"""Documents that a source needs for a row of its own: fewer say little about it."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model's score on one task (or group of tasks, whose unweighted mean counts).

    Attributes:
        line: the result file's `headline` entry.
        items: per leaf task, item -> value: a number, or (log-likelihood in nats, bytes).
        prompts: item -> hash of its prompt.
        sources: item -> source of a held-out document; empty for other tasks.
        answers: per leaf task, item -> bits per byte of the right answer; empty for tasks without one.
    """

    line: dict[str, Any]
    items: dict[str, dict[ItemKey, Any]]
    prompts: dict[ItemKey, str]
    sources: dict[ItemKey, str] = dataclasses.field(default_factory=dict)
    answers: dict[str, dict[ItemKey, Any]] = dataclasses.field(default_factory=dict)

    @property
    def protocol(self) -> tuple[int | None, str]:
        """What must be equal for two scores to be comparable: the number of shots, and the metric."""
        return self.line["num_fewshot"], self.line["metric"]

    @property
    def paired(self) -> bool:
        """Whether a difference of two such scores is one of their items: bits per byte, or the mean of the items.

        F1, a correlation or BLEU are made of all items together, a perplexity is the exponential of their mean.
        """
        if self.line["metric"] in ("bits_per_byte", ANSWER_METRIC):
            return True
        values = [list(items.values()) for items in self.items.values()]
        if not all(items and all(isinstance(value, int | float) for value in items) for items in values):
            return False
        mean = float(np.mean([np.mean(items) for items in values]))
        return math.isclose(mean, self.line["value"], rel_tol=1e-6, abs_tol=1e-9)


def compare(
    results: Mapping[str, Sequence[Path]],
    output: Path,
    *,
    baseline: str | None = None,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compare models and write `comparison.json`, `comparison.md` and `comparison.png`.

    Args:
        results: label of each model -> its result files, written by `nanophi eval`; see `label_results`. A task that
            several of them hold counts from the one with the most items, which a note says.
        output: folder to write in.
        baseline: the label that the others are compared with; None: the last one.
        seed: of the bootstrap.
        report: called with one line if the folder holds a comparison of other models, which is then replaced.

    Returns:
        what `comparison.json` holds: `labels`, `baseline`, `tasks` (per task `scores` by label and `differences` from
        the baseline by label), the same for `answers` (bits per byte of the right answers), `subjects` (the parts of a
        group such as MMLU), `sources` (each held-out source, the small ones together) and `filter` (held-out text that
        a filter keeps and drops), `heldout` by label, `published`, `notes`. A task that was not measured alike
        everywhere has a row for each way: `winogrande:0` and `winogrande:5`.

    Raises:
        UserError: for a file that is no result of ours, results of two models under one label, or results that have
            nothing comparable.
    """
    if not results:
        raise UserError("nothing to compare: name at least one result")
    labels = list(results)
    baseline = labels[-1] if baseline is None else baseline
    if baseline not in results:
        raise UserError(f"baseline '{baseline}' is not one of {', '.join(labels)}")
    files = {label: [read_result(Path(path)) for path in paths] for label, paths in results.items()}
    rng = np.random.default_rng(seed)
    notes = _identity_notes(files)
    rows = _rows({label: _measured(label, contents, notes) for label, contents in files.items()}, notes)
    table: dict[str, Any] = {}
    answers: dict[str, Any] = {}
    subjects: dict[str, Any] = {}
    found: dict[str, dict[str, Estimate]] = {}
    for key, scores in rows.items():
        table[key], found[key] = _row(key, scores, baseline, rng, notes)
        leaves = next(iter(scores.values())).line["tasks"]
        if len(leaves) > 1 and all(score.paired for score in scores.values()):
            parts = {}
            for leaf in leaves:
                part = {label: _leaf(score, leaf) for label, score in scores.items() if leaf in score.items}
                parts[leaf], _ = _row(leaf, part, baseline, rng, notes)
            _correct(parts.values())
            subjects[key] = parts
        right = {label: answer for label, score in scores.items() if (answer := _answers(score))}
        if right:
            answers[key], _ = _row(key, right, baseline, rng, [])
    held = rows.get("heldout_bits_per_byte", {})
    documents = {key for score in held.values() for key in score.sources}
    if all(task in table and table[task]["num_fewshot"] == shots for task, shots in LEADERBOARD.items()):
        _add_average(table, found, labels, rng)
    _correct(table.values())
    _correct(answers.values())
    versions = {content["lm_eval_version"] for contents in files.values() for content in contents}
    if len(versions) > 1:
        notes.append(f"measured with different versions of lm-eval: {', '.join(sorted(versions))}")
    comparison = {
        "format": FORMAT,
        "labels": labels,
        "baseline": baseline,
        "models": {label: [content["nanophi"]["model"] for content in contents] for label, contents in files.items()},
        "tasks": table,
        "answers": answers,
        "subjects": subjects,
        "sources": _sources(held, baseline, rng),
        "filter": _parts(held, filter_parts.divide(results, documents), baseline, rng),
        "heldout": {
            label: content["nanophi"]["heldout"]
            for label, contents in files.items()
            for content in contents
            if "heldout" in content["nanophi"]
        },
        "published": references() if set(LEADERBOARD) & set(table) else None,
        "method": "McNemar's exact test for accuracies, otherwise the larger p-value of the paired bootstrap "
        f"({statistics.RESAMPLES} resamples, seed {seed}) and Student's t test, which for a group of tasks and for the "
        "average adds up the tasks' variances; Holm's correction, separately for each "
        "secondary table; minimum detectable effect at 80 % power and the correction's hardest step",
        "notes": notes,
    }
    output = Path(output)
    if (output / "comparison.json").is_file():
        earlier = read_json(output / "comparison.json")
        if [earlier.get(key) for key in ("models", "baseline")] != [comparison["models"], baseline]:
            names = ", ".join(earlier.get("labels") or ["other models"])
            report(f"{output} held a comparison of {names}, which this one replaces; keep both with --output")
    write_json(output / "comparison.json", comparison)
    write_text(output / "comparison.md", render.to_markdown(comparison))
    render.draw_comparison(comparison, output / "comparison.png")
    return comparison


def _identity_notes(files: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """Notes on labels of one and the same model. Raises `UserError` for a label that mixes two models."""
    marks: dict[str, str] = {}
    notes = []
    for label, contents in files.items():
        found = {fingerprint(content["nanophi"]["model"]) for content in contents}
        if len(found) > 1:
            names = sorted({str(content["nanophi"]["model"]["name"]) for content in contents})
            raise UserError(f"'{label}' holds results of {len(found)} different models ({', '.join(names)})")
        for mark in found:
            if mark in marks:
                notes.append(f"{marks[mark]} and {label} are the same model")
            marks[mark] = label
    return notes


def _measured(label: str, contents: Sequence[dict[str, Any]], notes: list[str]) -> list[Measured]:
    """One model's scores, each task and way of measuring it once: the one with the most items."""
    found: dict[tuple[Any, ...], Measured] = {}
    for content in contents:
        for line in content["nanophi"]["headline"]:
            items: dict[str, dict[ItemKey, Any]] = {}
            answers: dict[str, dict[ItemKey, Any]] = {}
            prompts: dict[ItemKey, str] = {}
            sources: dict[ItemKey, str] = {}
            for leaf in line["tasks"]:
                items[leaf] = item_values(content, leaf, line["metric"], line["filter"])
                prompts |= item_values(content, leaf, "prompt_hash", line["filter"])
                sources |= item_values(content, leaf, "source", line["filter"])
                answers[leaf] = item_values(content, leaf, ANSWER_METRIC)
            answered = all(answers.values())
            score = Measured(line, items, prompts, sources, answers if answered else {})
            key = (line["task"], *score.protocol)
            if key in found:
                larger, smaller = sorted((score.line["items"], found[key].line["items"]), reverse=True)
                left_out = "the other" if larger == smaller else f"the one on {smaller}"
                notes.append(
                    f"{line['task']}: {label} has two results; the one on {larger} items counts, {left_out} does not"
                )
                if found[key].line["items"] >= line["items"]:
                    continue
            found[key] = score
    return list(found.values())


def _rows(measured: Mapping[str, Sequence[Measured]], notes: list[str]) -> dict[str, dict[str, Measured]]:
    """Key of each row -> score by label. What was measured differently gets rows of its own, and a note says so."""
    every = [(label, score) for label, scores in measured.items() for score in scores]
    tasks = sorted(dict.fromkeys(score.line["task"] for _, score in every), key=position)
    rows: dict[str, dict[str, Measured]] = {}
    unlike = []
    for task in tasks:
        of_task = [(label, score) for label, score in every if score.line["task"] == task]
        protocols = list(dict.fromkeys(score.protocol for _, score in of_task))
        by_shots = len({shots for shots, _ in protocols}) == len(protocols)
        for protocol in protocols:
            key = f"{task}:{protocol[0]}" if by_shots else f"{task}:{protocol[0]}:{protocol[1]}"
            scores = {label: score for label, score in of_task if score.protocol == protocol}
            rows[key if len(protocols) > 1 else task] = scores
        if len(protocols) > 1:
            said = ", ".join(
                f"{label}: {score.line['num_fewshot']}-shot {score.line['metric']}" for label, score in of_task
            )
            unlike.append(f"{task} was not measured alike ({said})")
    if unlike and all(len(scores) == 1 for scores in rows.values()):
        raise UserError(f"{unlike[0]}; run `nanophi eval` again with the same --num-fewshot or suite")
    notes += [f"{line}; only results with the same number of shots are compared" for line in unlike]
    return rows


def _leaf(score: Measured, leaf: str) -> Measured:
    """The part of a group's score that belongs to one of its tasks."""
    line = {**score.line, "task": leaf, "tasks": [leaf], **_figures(list(score.items[leaf].values()))}
    return Measured(line, {leaf: score.items[leaf]}, score.prompts)


def _figures(items: Sequence[Any]) -> dict[str, Any]:
    """The score that some items make: bits per byte of (nats, bytes), or the mean of numbers."""
    values = np.array(items, dtype=float)
    if values.ndim == 2:
        value, stderr = bits_per_byte(values[:, 0], values[:, 1]), bits_per_byte_stderr(values[:, 0], values[:, 1])
        return {"value": value, "stderr": stderr if len(values) > 1 else None, "items": len(values)}
    return {"value": float(values.mean()), "stderr": statistics.mean_stderr(values), "items": len(values)}


def _answers(score: Measured) -> Measured | None:
    """The bits per byte of the right answers as a score of its own; None where there are none."""
    figures = score.line.get(ANSWER_METRIC)
    if not figures or not score.answers:
        return None
    line = {**score.line, **figures, "metric": ANSWER_METRIC, "chance": None, "higher_is_better": False}
    return Measured(line, score.answers, score.prompts)


def _sources(scores: Mapping[str, Measured], baseline: str, rng: np.random.Generator) -> dict[str, Any]:
    """Bits per byte of every held-out source that is large enough, like the tasks; the other sources together."""
    every = {key: source for score in scores.values() for key, source in score.sources.items()}
    counts = Counter(every.values())
    large = [source for source, count in counts.most_common(MAX_SOURCES) if count >= MIN_DOCUMENTS]
    small = [source for source in counts if source not in large]
    if len(small) == 1 and len(large) < MAX_SOURCES:
        large, small = large + small, []  # one source together with nothing has a name of its own
    groups = {source: [source] for source in large} | ({f"other ({len(small)} sources)": small} if small else {})
    parts = {name: {key for key in every if every[key] in members} for name, members in groups.items()}
    return _parts(scores, parts, baseline, rng)


def _parts(
    scores: Mapping[str, Measured], parts: Mapping[str, set[ItemKey]], baseline: str, rng: np.random.Generator
) -> dict[str, Any]:
    """Rows for parts of the held-out documents, corrected among themselves."""
    rows = {}
    for name, keys in parts.items():
        of_part = {label: part for label, score in scores.items() if (part := _of_items(score, keys))}
        if of_part:
            rows[name], _ = _row(name, of_part, baseline, rng, [])
            rows[name] |= {"part": name, "documents": max(part.line["items"] for part in of_part.values())}
    _correct(rows.values())
    return rows


def _of_items(score: Measured, keys: set[ItemKey]) -> Measured | None:
    """The part of a held-out score that belongs to some documents; None if it has none of them."""
    items = {leaf: {key: value for key, value in values.items() if key in keys} for leaf, values in score.items.items()}
    pairs = [value for values in items.values() for value in values.values()]
    return Measured({**score.line, **_figures(pairs)}, items, score.prompts, score.sources) if pairs else None


def _row(
    key: str, scores: dict[str, Measured], baseline: str, rng: np.random.Generator, notes: list[str]
) -> tuple[dict[str, Any], dict[str, Estimate]]:
    """One row of the comparison, and its differences by label."""
    line = next(iter(scores.values())).line
    names = ("task", "metric", "filter", "num_fewshot", "chance", "higher_is_better")
    row: dict[str, Any] = {name: line[name] for name in names}
    row["scores"] = {label: {k: s.line[k] for k in ("value", "stderr", "items")} for label, s in scores.items()}
    row["differences"] = {}
    estimates: dict[str, Estimate] = {}
    others = {label: score for label, score in scores.items() if label != baseline and baseline in scores}
    if others and not all(score.paired for score in scores.values()):
        notes.append(f"{key}: models are not compared, for {line['metric']} is no mean of its items")
        return row, estimates
    for label, score in others.items():
        found = _paired(score, scores[baseline], rng)
        if found is None:
            notes.append(f"{key}: {label} and {baseline} have no item with the same prompt in common")
            continue
        row["differences"][label], estimates[label] = found
        common = found[0]["items"]
        if common < max(score.line["items"], scores[baseline].line["items"]):
            notes.append(f"{key}: {label} and {baseline} are compared on the {common} items that both answered")
    return row, estimates


def _paired(ours: Measured, theirs: Measured, rng: np.random.Generator) -> tuple[dict[str, Any], Estimate] | None:
    """The difference of two scores over the items that both have; None if a leaf task has no such item."""
    leaves = [leaf for leaf in ours.items if leaf in theirs.items]
    parts, pooled = [], []
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
            parts.append(statistics.estimate((b[:, 0] - a[:, 0]) / math.log(2), a[:, 1], rng))
        else:
            parts.append(statistics.estimate(a - b, None, rng))
    found = statistics.mean_estimate(parts, rng) if len(parts) > 1 else parts[0]
    entry = _entry(found)
    a, b = (np.concatenate([pair[side] for pair in pooled]) for side in (0, 1))
    if a.ndim == 1 and set(np.unique([a, b])) <= {0.0, 1.0}:
        entry["mcnemar"] = mcnemar(a, b)
        if len(leaves) == 1:
            entry |= {"p_value": entry["mcnemar"]["p_value"], "freedom": math.inf}
    if len(leaves) > 1:
        # Few items may all change in one direction and leave no variance: as with a coin, that proves little.
        entry["p_value"] = max(entry["p_value"], min(1.0, 2.0 ** (1 - np.count_nonzero(a != b))))
    return entry, found


def _entry(found: Estimate) -> dict[str, Any]:
    return {
        "value": found.value,
        "stderr": float(found.draws.std()),
        "interval": statistics.interval(found.draws),
        "items": found.items,
        "p_bootstrap": statistics.bootstrap_p_value(found.draws),
        "p_value": found.p_value,
        "freedom": found.freedom,
    }


def _add_average(
    table: dict[str, Any], found: dict[str, dict[str, Estimate]], labels: list[str], rng: np.random.Generator
) -> None:
    """The mean of the leaderboard's six tasks, for the labels that have them all."""
    rows = [table[task] for task in LEADERBOARD]
    average: dict[str, Any] = {"task": "average", "metric": "mean of six", "filter": "none", "num_fewshot": None}
    average |= {"chance": None, "higher_is_better": True, "scores": {}, "differences": {}}
    for label in labels:
        if all(label in row["scores"] for row in rows):
            figures = [row["scores"][label] for row in rows]
            average["scores"][label] = {**mean_figures(figures), "items": sum(figure["items"] for figure in figures)}
        if all(label in row["differences"] for row in rows):
            mean = statistics.mean_estimate([found[task][label] for task in LEADERBOARD], rng)
            average["differences"][label] = _entry(mean)
    table["average"] = average


def _correct(rows: Any) -> None:
    """Holm's correction over all differences of these rows, the verdicts, and the minimum detectable effects."""
    entries = [(row, difference) for row in rows for difference in row["differences"].values()]
    for (row, difference), p_value in zip(entries, holm([d["p_value"] for _, d in entries]), strict=True):
        difference["p_corrected"] = p_value
        difference["verdict"] = statistics.verdict(difference["value"], p_value, row["higher_is_better"])
        difference["minimum_detectable_effect"] = _detectable(difference, len(entries))


def _detectable(difference: dict[str, Any], tests: int) -> float | None:
    """The minimum detectable effect of a comparison like this one; None if nothing varied from which to tell."""
    freedom = difference.pop("freedom")
    if freedom < 1:
        return None
    effect = statistics.minimum_detectable_effect(difference["stderr"], tests=tests, freedom=freedom)
    if "mcnemar" in difference:
        effect = max(effect, statistics.fewest_discordant(tests) / difference["items"])
    return effect or None
