"""Compare measured models side by side, item by item, and decide which differences are more than noise.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json, write_text
from nanophi.eval import filter_parts, render, statistics
from nanophi.eval.catalogue import HELDOUT_BITS, LEADERBOARD, position, references
from nanophi.eval.models import model_key
from nanophi.eval.results import (
    ANSWER_METRIC,
    ItemKey,
    Score,
    answer_scores,
    average_score,
    item_values,
    leading_scores,
    read_result,
)
from nanophi.eval.statistics import Estimate, bits_per_byte, bits_per_byte_stderr, holm, mcnemar

FORMAT = 2
"""Version of `comparison.json`."""
MAX_SOURCES = 12
"""Held-out sources with a row of their own; every further row makes Holm's correction harsher on all of them."""
MIN_DOCUMENTS = 20
"""Documents that a source needs for a row of its own: fewer say little about it."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model's score on one task or group, with what its items contribute.

    Attributes:
        items: per leaf task, item -> value: a number, or (log-likelihood in nats, bytes).
        prompts: item -> hash of its prompt.
        sources: item -> source of a held-out document; empty for other tasks.
        answers: the bits per byte of the right answers; None where not all items have some.
    """

    score: Score
    items: dict[str, dict[ItemKey, Any]]
    prompts: dict[ItemKey, str]
    sources: dict[ItemKey, str] = dataclasses.field(default_factory=dict)
    answers: Measured | None = None

    @property
    def protocol(self) -> tuple[int | None, str]:
        """What must be equal for two scores to be comparable: the number of shots, and the metric."""
        return self.score.shots, self.score.metric

    @property
    def paired(self) -> bool:
        """Whether a difference of two such scores is one of their items: bits per byte, or the mean of the items.

        F1, a correlation or BLEU are made of all items together, a perplexity is the exponential of their mean.
        """
        if self.score.metric in ("bits_per_byte", ANSWER_METRIC):
            return True
        values = [list(items.values()) for items in self.items.values()]
        if not all(items and all(isinstance(value, int | float) for value in items) for items in values):
            return False
        mean = float(np.mean([np.mean(items) for items in values]))
        return math.isclose(mean, self.score.value, rel_tol=1e-6, abs_tol=1e-9)

    def part(self, leaf: str | None = None, keys: set[ItemKey] | None = None) -> Measured | None:
        """The score of a group's leaf task alone, or of some of the items; None if it has none of them."""
        items = {
            name: {key: value for key, value in values.items() if keys is None or key in keys}
            for name, values in self.items.items()
            if leaf in (None, name)
        }
        values = np.array([value for of_leaf in items.values() for value in of_leaf.values()], dtype=float)
        if not len(values):
            return None
        stderr: float | None
        if values.ndim == 2:
            value, stderr = bits_per_byte(values[:, 0], values[:, 1]), bits_per_byte_stderr(values[:, 0], values[:, 1])
        else:
            value, stderr = float(values.mean()), statistics.mean_stderr(values)
        score = dataclasses.replace(
            self.score,
            value=value,
            stderr=stderr if len(values) > 1 else None,
            items=len(values),
            task=leaf or self.score.task,
        )
        return Measured(score, items, self.prompts, self.sources)


def compare_models(
    results: Mapping[str, Sequence[Path]],
    output: Path,
    *,
    baseline: str | None = None,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compare models and write `comparison.json`, `comparison.md` and `comparison.png`.

    Args:
        results: label of each model -> its result files. A task that several of them hold counts from the one with the
            most items, which a note tells.
        baseline: the label that the others are compared with; None: the last one.
        report: called with one line if the folder holds a comparison of other models, which is then replaced.

    Returns:
        what `comparison.json` holds: `labels`, `baseline`, `tasks` (per task `scores` by label and `differences` from
        the baseline by label), the same for `answers` (bits per byte of the right answers), `subjects` (the parts of a
        group such as MMLU), `sources` (each held-out source, the small ones together) and `filter` (held-out text that
        a filter keeps and drops), `heldout` by label, `published`, `notes`. A task that was not measured alike
        everywhere has a row for each way: `winogrande:0` and `winogrande:5`.

    Raises:
        UserError: for a file that is not a result of `nanophi eval`, results of two models under one label, or results
            that have nothing comparable.
    """
    if not results:
        raise UserError("nothing to compare: name at least one result")
    labels = list(results)
    baseline = labels[-1] if baseline is None else baseline
    if baseline not in results:
        raise UserError(f"baseline '{baseline}' is not one of {', '.join(labels)}")
    files = {label: [read_result(Path(path)) for path in paths] for label, paths in results.items()}
    tester = Tester(baseline, np.random.default_rng(seed), _identity_notes(files))
    rows = _rows({label: _measured(label, contents, tester.notes) for label, contents in files.items()}, tester.notes)
    comparison: dict[str, Any] = {
        "format": FORMAT,
        "labels": labels,
        "baseline": baseline,
        "models": {label: [content["nanophi"]["model"] for content in contents] for label, contents in files.items()},
        **tester.tables(rows, labels),
    }
    held = rows.get(HELDOUT_BITS, {})
    documents = {key for measured in held.values() for key in measured.sources}
    versions = {content["lm_eval_version"] for contents in files.values() for content in contents}
    if len(versions) > 1:
        tester.notes.append(f"measured with different versions of lm-eval: {', '.join(sorted(versions))}")
    comparison |= {
        "sources": tester.parts(held, _by_source(held)),
        "filter": tester.parts(held, filter_parts.divide(results, documents)),
        "heldout": {
            label: content["nanophi"]["heldout"]
            for label, contents in files.items()
            for content in contents
            if "heldout" in content["nanophi"]
        },
        "published": references() if set(LEADERBOARD) & set(comparison["tasks"]) else None,
        "method": "McNemar's exact test for accuracies, otherwise the larger p-value of the paired bootstrap "
        f"({statistics.RESAMPLES} resamples, seed {seed}) and Student's t test, which for a group of tasks and for the "
        "average adds up the tasks' variances; Holm's correction, separately for each "
        "secondary table; minimum detectable effect at 80 % power and the correction's hardest step",
        "notes": tester.notes,
    }
    _write(comparison, Path(output), report)
    return comparison


def _write(comparison: dict[str, Any], output: Path, report: Callable[[str], None]) -> None:
    if (output / "comparison.json").is_file():
        earlier = read_json(output / "comparison.json")
        if any(earlier.get(key) != comparison[key] for key in ("models", "baseline")):
            names = ", ".join(earlier.get("labels") or ["other models"])
            report(f"{output} held a comparison of {names}, which this one replaces; keep both with --output")
    write_json(output / "comparison.json", comparison)
    write_text(output / "comparison.md", render.to_markdown(comparison))
    render.draw_comparison(comparison, output / "comparison.png")


def _identity_notes(files: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """Notes on labels of one and the same model. Raises `UserError` for a label that mixes two models."""
    marks: dict[str, str] = {}
    notes = []
    for label, contents in files.items():
        found = {model_key(content["nanophi"]["model"]) for content in contents}
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
        answers = {score.task: _with_items(content, score) for score in answer_scores(content)}
        for score in leading_scores(content):
            measured = dataclasses.replace(_with_items(content, score), answers=answers.get(score.task))
            key = (score.task, *measured.protocol)
            if key in found:
                larger, smaller = sorted((score.items, found[key].score.items), reverse=True)
                left_out = "the other" if larger == smaller else f"the one on {smaller}"
                notes.append(
                    f"{score.task}: {label} has two results; the one on {larger} items counts, {left_out} does not"
                )
                if found[key].score.items >= score.items:
                    continue
            found[key] = measured
    return list(found.values())


def _with_items(content: dict[str, Any], score: Score) -> Measured:
    items = {leaf: item_values(content, leaf, score.metric, score.filter) for leaf in score.leaves}
    prompts: dict[ItemKey, str] = {}
    sources: dict[ItemKey, str] = {}
    for leaf in score.leaves:
        prompts |= item_values(content, leaf, "prompt_hash", score.filter)
        sources |= item_values(content, leaf, "source", score.filter)
    return Measured(score, items, prompts, sources)


def _rows(measured: Mapping[str, Sequence[Measured]], notes: list[str]) -> dict[str, dict[str, Measured]]:
    """Key of each row -> score by label. What was measured differently gets rows of its own, and a note tells so."""
    every = [(label, one) for label, found in measured.items() for one in found]
    rows: dict[str, dict[str, Measured]] = {}
    unlike = []
    for task in sorted(dict.fromkeys(one.score.task for _, one in every), key=position):
        of_task = [(label, one) for label, one in every if one.score.task == task]
        protocols = list(dict.fromkeys(one.protocol for _, one in of_task))
        by_shots = len({shots for shots, _ in protocols}) == len(protocols)
        for protocol in protocols:
            key = f"{task}:{protocol[0]}" if by_shots else f"{task}:{protocol[0]}:{protocol[1]}"
            rows[key if len(protocols) > 1 else task] = {x: one for x, one in of_task if one.protocol == protocol}
        if len(protocols) > 1:
            ways = ", ".join(f"{label}: {one.score.shots}-shot {one.score.metric}" for label, one in of_task)
            unlike.append(f"{task} was not measured alike ({ways})")
    if unlike and all(len(found) == 1 for found in rows.values()):
        raise UserError(f"{unlike[0]}; run `nanophi eval` again with the same --num-fewshot or suite")
    notes += [f"{line}; only results with the same number of shots are compared" for line in unlike]
    return rows


def _by_source(held: Mapping[str, Measured]) -> dict[str, set[ItemKey]]:
    """The held-out documents of every source that is large enough, and of the other sources together."""
    every = {key: source for measured in held.values() for key, source in measured.sources.items()}
    counts = Counter(every.values())
    large = [source for source, count in counts.most_common(MAX_SOURCES) if count >= MIN_DOCUMENTS]
    small = [source for source in counts if source not in large]
    if len(small) == 1 and len(large) < MAX_SOURCES:
        large, small = large + small, []  # one source together with nothing has a name of its own
    groups = {source: [source] for source in large} | ({f"other ({len(small)} sources)": small} if small else {})
    return {name: {key for key in every if every[key] in members} for name, members in groups.items()}


@dataclasses.dataclass(frozen=True)
class Tester:
    """Tests models against the baseline, and makes the tables of a comparison.

    Attributes:
        rng: of the bootstrap; the order of the rows decides what each gets of it.
        notes: what a reader must know about the rows; added to.
    """

    baseline: str
    rng: np.random.Generator
    notes: list[str]

    def tables(self, rows: Mapping[str, dict[str, Measured]], labels: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The main table, the right answers' bits per byte, and the parts of each group."""
        tasks: dict[str, Any] = {}
        answers: dict[str, Any] = {}
        subjects: dict[str, Any] = {}
        found: dict[str, dict[str, Estimate]] = {}
        for key, measured in rows.items():
            tasks[key], found[key] = self.row(key, measured, self.notes)
            leaves = next(iter(measured.values())).score.leaves
            if len(leaves) > 1 and all(one.paired for one in measured.values()):
                parts = {leaf: {x: part for x, one in measured.items() if (part := one.part(leaf))} for leaf in leaves}
                subjects[key] = {leaf: self.row(leaf, part, self.notes)[0] for leaf, part in parts.items()}
                _correct(subjects[key].values())
            if right := {label: one.answers for label, one in measured.items() if one.answers}:
                answers[key], _ = self.row(key, right, [])
        if average := self._average(rows, labels, found):
            tasks["average"] = average
        _correct(tasks.values())
        _correct(answers.values())
        return {"tasks": tasks, "answers": answers, "subjects": subjects}

    def parts(self, held: Mapping[str, Measured], parts: Mapping[str, set[ItemKey]]) -> dict[str, Any]:
        """Rows for parts of the held-out documents, corrected among themselves."""
        rows = {}
        for name, keys in parts.items():
            if of_part := {label: part for label, one in held.items() if (part := one.part(keys=keys))}:
                documents = max(part.score.items for part in of_part.values())
                rows[name] = self.row(name, of_part, [])[0] | {"part": name, "documents": documents}
        _correct(rows.values())
        return rows

    def row(
        self, key: str, measured: Mapping[str, Measured], notes: list[str]
    ) -> tuple[dict[str, Any], dict[str, Estimate]]:
        """One row of the comparison, and its differences by label."""
        row = _row({label: one.score for label, one in measured.items()})
        estimates: dict[str, Estimate] = {}
        others = {x: one for x, one in measured.items() if x != self.baseline and self.baseline in measured}
        if others and not all(one.paired for one in measured.values()):
            notes.append(f"{key}: models are not compared, because {row['metric']} is not a mean over items")
            return row, estimates
        for label, one in others.items():
            found = _paired(one, measured[self.baseline], self.rng)
            if found is None:
                notes.append(f"{key}: {label} and {self.baseline} have no item with the same prompt in common")
                continue
            row["differences"][label], estimates[label] = found
            common = found[0]["items"]
            if common < max(one.score.items, measured[self.baseline].score.items):
                notes.append(
                    f"{key}: {label} and {self.baseline} are compared on the {common} items that both answered"
                )
        return row, estimates

    def _average(
        self, rows: Mapping[str, Mapping[str, Measured]], labels: Sequence[str], found: dict[str, dict[str, Estimate]]
    ) -> dict[str, Any] | None:
        """The mean of the leaderboard's six tasks, for the labels that have them all; None if no label has."""
        of = {
            label: [rows[task][label].score for task in LEADERBOARD if label in rows.get(task, {})] for label in labels
        }
        scores = {label: score for label, six in of.items() if (score := average_score(six))}
        if not scores:
            return None
        row = _row(scores)
        for label in labels:
            if all(label in found[task] for task in LEADERBOARD):
                mean = statistics.mean_estimate([found[task][label] for task in LEADERBOARD], self.rng)
                row["differences"][label] = _entry(mean)
        return row


def _row(scores: Mapping[str, Score]) -> dict[str, Any]:
    """A row with the scores of each label, and no differences yet."""
    one = next(iter(scores.values()))
    return {
        "task": one.task,
        "metric": one.metric,
        "filter": one.filter,
        "num_fewshot": one.shots,
        "chance": one.chance,
        "higher_is_better": one.higher_is_better,
        "scores": {
            label: {"value": score.value, "stderr": score.stderr, "items": score.items}
            for label, score in scores.items()
        },
        "differences": {},
    }


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


def _correct(rows: Iterable[dict[str, Any]]) -> None:
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
