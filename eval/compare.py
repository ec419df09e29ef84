"""The verb `compare`: which models some paths lead to, and which of their differences are more than noise.

Models are compared on the items that both answered: the same document and prompt, by their hashes. A comparison holds
these items, so that `recompute` can derive its figures again. How it is shown is in render.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import typer
from typer import Argument, Option

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json, write_text
from nanophi.core.options import Json
from nanophi.eval import render, results, statistics
from nanophi.eval.catalogue import HELDOUT_BITS, LEADERBOARD, is_percent, made_from, position, references, row_title
from nanophi.eval.models import model_key
from nanophi.eval.results import ANSWER_METRIC, Score, distinct, final_results, read_result
from nanophi.eval.statistics import Estimate, bits_per_byte, bits_per_byte_stderr, holm, mcnemar
from nanophi.eval.tasks import heldout

FORMAT = 3  # of `comparison.json`; 3 has `items`
TABLES = ("tasks", "answers", "subjects", "sources", "filter")
"""Tasks; bits per byte of right answers; subjects of a group; held-out sources; held-out text that a filter keeps."""
FACTS = {name: name for name in ("task", "metric", "filter", "chance", "higher_is_better")} | {"num_fewshot": "shots"}
"""What a row has of all its scores -> its name in `Score`."""
MAX_SOURCES = 12  # held-out sources with a row of their own: each makes Holm's correction harsher on all of them
UNSUPPORTED = 3  # exit status of a comparison that does not support what `--require` demands
MIN_DOCUMENTS = 20  # that a source needs for a row of its own: fewer say little about it


def compare(
    results: Annotated[
        list[Path], Argument(metavar="RESULT...", help="Run directories, result files, or folders of result files.")
    ],
    output: Annotated[Path, Option(help="Where comparison.json, .md and .png go.")] = Path("comparison"),
    baseline: Annotated[
        str | None, Option(help="The model that the others are compared with: a label, or one of RESULT.")
    ] = None,
    require: Annotated[
        Literal["better", "not-worse"] | None,
        Option(help="End with status 3 if a model is worse at a task than the baseline, or better at none."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare models item by item, with confidence intervals.

    The last one is the baseline, unless --baseline names another.

    Example: nanophi compare runs/demo runs/demo-control --baseline demo-control
    """
    files = label_results(results)
    report = functools.partial(typer.echo, err=as_json)
    comparison = compare_models(files, output, baseline=find_label(files, baseline), report=report)
    shown = {key: value for key, value in comparison.items() if key != "items"}
    typer.echo(json.dumps(shown) if as_json else render.to_text(comparison))
    report(output / "comparison.md")
    if require and (missing := unsupported(comparison, require)):
        typer.echo(f"nanophi: --require {require}: {missing}", err=True)
        raise typer.Exit(UNSUPPORTED)


def label_results(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """A label for each model that some paths lead to -> its result files, in the order of the paths.

    Of a run directory the last checkpoint counts; result files, also all those in another folder, are grouped by the
    model that they name. Raises `UserError` if a path leads to no results, or is named twice.
    """
    models: dict[str, list[Path]] = {}
    identities: dict[str, dict[str, Any]] = {}
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UserError(f"{path} is named twice; name each run or result once")
        if (path / "checkpoints").is_dir() or (path / "record.json").is_file():
            models[str(path)] = final_results(path)
            continue
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if path.is_dir() or len(paths) > 1:  # `evals/*.json` names curves too
            files = [file for file in files if not file.name.startswith("curve-")]
        if path.is_dir() and not files:
            raise UserError(f"{path} holds no results; name a run directory, or files that `nanophi eval` wrote")
        for file in files:
            identity = read_result(file)["nanophi"]["model"]
            found = models.setdefault(model_key(identity), [])
            found += [file] if file not in found else []
            identities[model_key(identity)] = identity
    runs = [mark for mark in models if mark not in identities]
    labels = dict(zip(runs, distinct(runs), strict=True))
    for mark, identity in identities.items():
        labels[mark] = _label(identity, [*identities.values()], labels.values())
    return {labels[mark]: files for mark, files in models.items()}


def find_label(labelled: Mapping[str, Sequence[Path]], name: str | None) -> str | None:
    """The label that `name` is, or whose results lie at the path `name`; any other `name` as it is."""
    if name is None or name in labelled:
        return name
    path = Path(name).resolve()
    return next((label for label, files in labelled.items() if files[0].is_relative_to(path)), name)


def unsupported(comparison: Mapping[str, Any], claim: str) -> str | None:
    """Why a comparison does not support that its models are `better` than the baseline, or `not-worse`; None: it does.

    What counts are the tasks, whose p values are corrected together: worse at none, and for `better` better at one.
    """
    others = [label for label in comparison["labels"] if label != comparison["baseline"]]
    rows = [row for row in comparison["tasks"].values() if made_from(row["task"]) != "tokens"]
    for label in others:
        found = {row_title(row): row["differences"][label]["verdict"] for row in rows if label in row["differences"]}
        worse = [title for title, verdict in found.items() if verdict == "worse"]
        if worse or not found or (claim == "better" and "better" not in found.values()):
            what = f"worse at {', '.join(worse)}" if worse else f"better at none of {len(found)} tasks"
            return f"{label} is {what}; the baseline is {comparison['baseline']}"
    return None if others else "there is only one model"


def _label(identity: Mapping[str, Any], others: Sequence[Mapping[str, Any]], taken: Iterable[str]) -> str:
    """A model's name, with its dtype or the beginning of its hash where the name alone is not unique."""
    same = [other for other in others if other["name"] == identity["name"]]
    label = str(identity["name"])
    if len({other.get("dtype") for other in same}) > 1:
        label += f" {identity['dtype']}"
        same = [other for other in same if other.get("dtype") == identity["dtype"]]
    if len(same) > 1 or label in taken:
        label += f" ({str(identity.get('sha256') or identity.get('revision'))[:8]})"
    return label


def compare_models(
    results: Mapping[str, Sequence[Path]],
    output: Path,
    *,
    baseline: str | None = None,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compare models, by label, and write `comparison.json`, `comparison.md` and `comparison.png`.

    Of result files with the same task the one with most items counts; the baseline is the last label by default.
    Returns what `comparison.json` holds: the `TABLES`, of rows with `scores` and `differences` from the baseline by
    label, and the `items` that they are made from. What was not measured alike has rows of its own: `winogrande:0`.
    """
    if not results:
        raise UserError("nothing to compare: name at least one result")
    labels = list(results)
    baseline = labels[-1] if baseline is None else baseline
    if baseline not in results:
        raise UserError(f"baseline '{baseline}' is not one of {', '.join(labels)}")
    files = {label: [read_result(Path(path)) for path in paths] for label, paths in results.items()}
    every = [(label, content) for label, contents in files.items() for content in contents]
    notes = _identity_notes(files)
    rows = _rows(every, notes)
    items, values, answers = {}, {}, {}
    for key, row in rows.items():
        items[key], documents = _stored(row)
        if key == HELDOUT_BITS and (parts := heldout.kept_and_dropped(results, documents)):
            items[key][key]["filter"] = parts
        values[key] = _measured({label: one.score for label, one in row.items()}, items[key], "values")
        of_answers = {label: one.answers for label, one in row.items() if one.answers}
        answers[key] = _measured(of_answers, items[key], "answers")
    tables, found = _tables(values, answers, items, labels, baseline, seed)
    versions = {content["lm_eval_version"] for _, content in every}
    if len(versions) > 1:
        found.append(f"measured with different versions of lm-eval: {', '.join(sorted(versions))}")
    comparison: dict[str, Any] = {
        "format": FORMAT,
        "labels": labels,
        "baseline": baseline,
        "seed": seed,
        "models": {label: [content["nanophi"]["model"] for content in contents] for label, contents in files.items()},
        **tables,
        "heldout": {x: content["nanophi"]["heldout"] for x, content in every if "heldout" in content["nanophi"]},
        "published": references() if set(LEADERBOARD) & set(tables["tasks"]) else None,
        "method": "McNemar's exact test for accuracies, otherwise the larger p-value of the paired bootstrap "
        f"({statistics.RESAMPLES} resamples, seed {seed}) and Student's t test, which for a group of tasks and for the "
        "average adds up the tasks' variances; Holm's correction, separately for each "
        "secondary table; minimum detectable effect at 80 % power and the correction's hardest step",
        "notes": notes + found,
        "items": items,
    }
    if (output / "comparison.json").is_file():
        earlier = read_json(output / "comparison.json")
        if any(earlier.get(key) != comparison[key] for key in ("models", "baseline")):
            names = ", ".join(earlier["labels"])
            report(f"{output} held a comparison of {names}, which this one replaces; keep both with --output")
    write_json(output / "comparison.json", comparison)
    write_text(output / "comparison.md", render.to_markdown(comparison))
    render.draw_comparison(comparison, output / "comparison.png")
    return comparison


def recompute(comparison: Mapping[str, Any]) -> dict[str, Any] | None:
    """`TABLES` of a comparison, every figure in them derived again from its `items`; None if it holds none.

    Only scores of all items together (F1, a perplexity) are as they were. Floats agree but for rounding; what comes
    from the bootstrap only with the same version of numpy.
    """
    if not (items := comparison.get("items")):
        return None

    def derived(table: str, name: str, key: str) -> dict[str, Measured]:
        row = comparison[table].get(key, {"scores": {}})
        facts = {field: row.get(name) for name, field in FACTS.items()}
        scores = {x: Score(suite="", of=0, leaves=(), **facts, **figures) for x, figures in row["scores"].items()}
        return {x: one.part() or one for x, one in _measured(scores, items.get(key, {}), name).items()}

    keys = [key for key in comparison["tasks"] if key != "average"]
    values = {key: derived("tasks", "values", key) for key in keys}
    answers = {key: derived("answers", "answers", key) for key in keys}
    return _tables(values, answers, items, comparison["labels"], comparison["baseline"], comparison["seed"])[0]


# Reading


class Chosen(NamedTuple):
    """A model's score on a task, the bits per byte of the right answers if all items have some, and the result file."""

    score: Score
    answers: Score | None
    content: dict[str, Any]


def _identity_notes(files: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """Notes on labels of one and the same model. Raises `UserError` for a label that mixes two models."""
    marks: dict[str, str] = {}
    notes = []
    for label, contents in files.items():
        models = {model_key(content["nanophi"]["model"]): content["nanophi"]["model"]["name"] for content in contents}
        if len(models) > 1:
            names = ", ".join(sorted(set(models.values())))
            raise UserError(f"'{label}' holds results of {len(models)} different models ({names})")
        for mark in models:
            if mark in marks:
                notes.append(f"{marks[mark]} and {label} are the same model")
            marks[mark] = label
    return notes


def _rows(every: Sequence[tuple[str, dict[str, Any]]], notes: list[str]) -> dict[str, dict[str, Chosen]]:
    """Key of each row -> score by label. What was measured differently gets rows of its own, and a note tells so."""
    found: dict[tuple[str, int | None, str], dict[str, Chosen]] = {}
    for label, content in every:
        answers = {score.task: score for score in results.answer_scores(content)}
        for score in results.leading_scores(content):
            row = found.setdefault((score.task, score.shots, score.metric), {})
            if label in row:
                most = max(score.items, row[label].score.items)
                notes.append(f"{score.task}: {label} has several results; the one on {most} items counts")
            if label not in row or score.items > row[label].score.items:
                row[label] = Chosen(score, answers.get(score.task), content)
    rows: dict[str, dict[str, Chosen]] = {}
    unlike = []
    for task in sorted(dict.fromkeys(task for task, *_ in found), key=position):
        ways = {(shots, metric): row for (name, shots, metric), row in found.items() if name == task}
        by_shots = len({shots for shots, _ in ways}) == len(ways)
        for (shots, metric), row in ways.items():
            rows[task if len(ways) == 1 else f"{task}:{shots}" if by_shots else f"{task}:{shots}:{metric}"] = row
        if len(ways) > 1:
            labels = dict.fromkeys(label for label, _ in every)
            shown = [f"{x}: {shots}-shot {metric}" for x in labels for (shots, metric), row in ways.items() if x in row]
            unlike.append(f"{task} was not measured alike ({', '.join(shown)})")
    if unlike and all(len(row) == 1 for row in rows.values()):
        raise UserError(f"{unlike[0]}; run `nanophi eval` again with the same --num-fewshot or suite")
    notes += [f"{line}; only results with the same number of shots are compared" for line in unlike]
    return rows


def _stored(row: Mapping[str, Chosen]) -> tuple[dict[str, Any], list[str]]:
    """The items of a row per leaf task, in one order for all models; and the hashes of the last task's documents.

    Of each leaf `values` and `answers` by label, None for what a model has not answered, and the `sources` of
    held-out documents. Scores of which no difference is one of their items have no values.
    """
    paired = [label for label, one in row.items() if _of_items(one)]
    answered = [label for label, one in row.items() if one.answers]
    # The largest first: what a bootstrap draws, in the result file and here, depends on the order of the items.
    largest_first = sorted(row, key=lambda label: -row[label].score.items)
    stored: dict[str, Any] = {}
    every: dict[Any, dict[str, Any]] = {}
    for leaf in dict.fromkeys(leaf for one in row.values() for leaf in one.score.leaves):
        samples = {label: _samples(one, leaf) for label, one in row.items()}
        every = {}
        for label in largest_first:
            for key, sample in samples[label].items():
                every.setdefault(key, sample)
        ordered = {label: [samples[label].get(key, {}) for key in every] for label in row}
        found = {
            "values": {label: [sample.get(row[label].score.metric) for sample in ordered[label]] for label in paired},
            "answers": {label: [sample.get(ANSWER_METRIC) for sample in ordered[label]] for label in answered},
            "sources": [sample["source"] for sample in every.values() if "source" in sample],
        }
        stored[leaf] = {name: items for name, items in found.items() if items}
    return stored, [document for document, *_ in every]


def _samples(one: Chosen, leaf: str) -> dict[tuple[str, str, int], dict[str, Any]]:
    """lm-eval's samples of a leaf task by the hashes of document and prompt, which may be in a benchmark twice."""
    seen: Counter[tuple[str, str]] = Counter()
    samples = {}
    for sample in one.content["samples"][leaf] if leaf in one.score.leaves else ():
        if sample["filter"] == one.score.filter and one.score.metric in sample:
            hashes = sample["doc_hash"], sample["prompt_hash"]
            samples[*hashes, seen[hashes]] = sample
            seen[hashes] += 1
    return samples


def _of_items(one: Chosen) -> bool:
    """Whether a difference of two such scores is one of their items: bits per byte, or the mean of the items.

    F1, a correlation or BLEU are made of all items together, a perplexity is the exponential of their mean.
    """
    if one.score.metric in ("bits_per_byte", ANSWER_METRIC):
        return True
    values = [[x[one.score.metric] for x in _samples(one, leaf).values()] for leaf in one.score.leaves]
    if not all(items and all(isinstance(value, int | float) for value in items) for items in values):
        return False
    mean = float(np.mean([np.mean(items) for items in values]))
    return math.isclose(mean, one.score.value, rel_tol=1e-6, abs_tol=1e-9)


# Figures


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model's score on one task or group, with what its items contribute.

    `items` has an array per leaf task: [items], or [items, 2] of log-likelihoods in nats and bytes; all models'
    items in one order, NaN where this one has no answer. It is empty for a score that is made of all items together.
    """

    score: Score
    items: dict[str, np.ndarray]

    def part(self, leaf: str | None = None, places: Sequence[int] | None = None) -> Measured | None:
        """The score derived from the items: of a group's leaf task alone, or of some items; None if it has none."""
        items = {name: values for name, values in self.items.items() if leaf in (None, name)}
        if places is not None:
            items = {name: values[places] for name, values in items.items()}
        answered = [found for values in items.values() if len(found := values[_answered(values)])]
        if not answered:
            return None
        means = [_mean(values) for values in answered]
        value, stderr = means[0] if len(means) == 1 else results.mean(*zip(*means, strict=True))
        count, task = sum(map(len, answered)), leaf or self.score.task
        return Measured(dataclasses.replace(self.score, value=value, stderr=stderr, items=count, task=task), items)


def _measured(scores: Mapping[str, Score], stored: Mapping[str, Any], name: str) -> dict[str, Measured]:
    """Scores by label with their items, `values` or `answers`, of what `_stored` made."""
    columns = [(leaf, label, column) for leaf, found in stored.items() for label, column in found.get(name, {}).items()]
    return {
        label: Measured(score, {leaf: _array(column) for leaf, other, column in columns if other == label})
        for label, score in scores.items()
    }


def _array(column: Sequence[Any]) -> np.ndarray:
    missing = [math.nan, math.nan] if any(isinstance(value, list | tuple) for value in column) else math.nan
    return np.array([missing if value is None else value for value in column], dtype=float)


def _answered(values: np.ndarray) -> np.ndarray:
    """Which items [items] a model has answered."""
    return ~np.isnan(values).any(axis=tuple(range(1, values.ndim)))


def _mean(values: np.ndarray) -> tuple[float, float | None]:
    """The score of some items of one task and its standard error, None for a single item."""
    if values.ndim == 1:
        return float(values.mean()), statistics.mean_stderr(values)
    nats, sizes = values.T
    return bits_per_byte(nats, sizes), bits_per_byte_stderr(nats, sizes) if len(values) > 1 else None


Rows = dict[str, dict[str, Measured]]
"""Key of a row -> score by label."""
Tested = tuple[dict[str, Any], dict[str, Estimate], list[str]]
"""A row of the comparison, its differences by label, and what a reader must know about it."""


def _tables(
    values: Rows, answers: Rows, items: Mapping[str, Any], labels: Sequence[str], baseline: str, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """`TABLES`, and the notes on their rows. The order of the rows decides what each gets of the bootstrap's draws."""
    rng, notes = np.random.default_rng(seed), []
    tables: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
    estimates: dict[str, dict[str, Estimate]] = {}
    for key, row in values.items():
        tables["tasks"][key], estimates[key], found = _tested(key, row, baseline, rng)
        notes += found
        leaves = dict.fromkeys(leaf for one in row.values() for leaf in one.items)
        if len(leaves) > 1 and all(one.items for one in row.values()):
            tables["subjects"][key] = {}
            for leaf in leaves:
                of = {label: part for label, one in row.items() if (part := one.part(leaf))}
                tables["subjects"][key][leaf], _, found = _tested(leaf, of, baseline, rng)
                notes += found
        if answers[key]:
            tables["answers"][key] = _tested(key, answers[key], baseline, rng)[0]
    if average := _average(values, labels, estimates, rng):
        tables["tasks"]["average"] = average
    held, stored = values.get(HELDOUT_BITS, {}), items.get(HELDOUT_BITS, {}).get(HELDOUT_BITS, {})
    for table, parts in (("sources", _by_source(stored.get("sources", []))), ("filter", stored.get("filter", {}))):
        for name, places in parts.items():
            if of := {label: part for label, one in held.items() if (part := one.part(places=places))}:
                documents = max(one.score.items for one in of.values())
                tables[table][name] = _tested(name, of, baseline, rng)[0] | {"part": name, "documents": documents}
    subjects = tables["subjects"].values()
    for rows in (*subjects, *(tables[table] for table in TABLES if table != "subjects")):
        # What a model recites is a question of its own, which makes no other claim harder to support.
        for recited in (True, False):
            _correct([row for key, row in rows.items() if recited == (made_from(key) == "tokens")])
    return tables, notes


def _by_source(sources: Sequence[str]) -> dict[str, list[int]]:
    """The held-out documents of every source that is large enough, and of the other sources together."""
    counts = Counter(sources)
    large = [source for source, count in counts.most_common(MAX_SOURCES) if count >= MIN_DOCUMENTS]
    small = [source for source in counts if source not in large]
    if len(small) == 1 and len(large) < MAX_SOURCES:
        large, small = large + small, []  # one source together with nothing has a name of its own
    groups = {source: [source] for source in large} | ({f"other ({len(small)} sources)": small} if small else {})
    return {name: [n for n, x in enumerate(sources) if x in members] for name, members in groups.items()}


def _average(
    rows: Rows, labels: Sequence[str], estimates: Mapping[str, Mapping[str, Estimate]], rng: np.random.Generator
) -> dict[str, Any] | None:
    """The mean of the leaderboard's six tasks, for the labels that have them all; None if no label has."""
    of = {x: [rows[task][x].score for task in LEADERBOARD if x in rows.get(task, {})] for x in labels}
    scores = {label: score for label, six in of.items() if (score := results.average_score(six))}
    if not scores:
        return None
    row = _row(scores)
    for label in labels:
        if all(label in estimates[task] for task in LEADERBOARD):
            six = [estimates[task][label] for task in LEADERBOARD]
            row["differences"][label] = _entry(statistics.mean_estimate(six, rng))
    return row


def _tested(key: str, measured: Mapping[str, Measured], baseline: str, rng: np.random.Generator) -> Tested:
    row = _row({label: one.score for label, one in measured.items()})
    estimates: dict[str, Estimate] = {}
    notes: list[str] = []
    others = {label: one for label, one in measured.items() if label != baseline and baseline in measured}
    if others and not all(one.items for one in measured.values()):
        return row, {}, [f"{key}: models are not compared, because {row['metric']} is not a mean over items"]
    for label, one in others.items():
        found = _paired(one, measured[baseline], rng)
        if found is None:
            notes.append(f"{key}: {label} and {baseline} have no item with the same prompt in common")
            continue
        row["differences"][label], estimates[label] = found
        common = found[0]["items"]
        if common < max(one.score.items, measured[baseline].score.items):
            notes.append(f"{key}: {label} and {baseline} are compared on the {common} items that both answered")
    return row, estimates, notes


def _row(scores: Mapping[str, Score]) -> dict[str, Any]:
    """A row with the scores of each label, and no differences yet."""
    facts = {name: getattr(next(iter(scores.values())), field) for name, field in FACTS.items()}
    figures = ("value", "stderr", "items")
    shown = {label: {name: getattr(score, name) for name in figures} for label, score in scores.items()}
    return {**facts, "scores": shown, "differences": {}}


def _paired(ours: Measured, theirs: Measured, rng: np.random.Generator) -> tuple[dict[str, Any], Estimate] | None:
    """The difference of two scores over the items that both have; None if there is none."""
    parts, pooled = [], []
    for leaf in ours.items:
        pair = [one.items[leaf] for one in (ours, theirs) if leaf in one.items]
        both = np.all([_answered(values) for values in pair], axis=0)
        if len(pair) < 2 or not both.any():
            continue
        a, b = pair[0][both], pair[1][both]
        pooled.append((a, b))
        if a.ndim == 2:
            parts.append(statistics.estimate((b[:, 0] - a[:, 0]) / math.log(2), a[:, 1], rng))
        else:
            parts.append(statistics.estimate(a - b, None, rng))
    if not parts:
        return None
    found = statistics.mean_estimate(parts, rng) if len(parts) > 1 else parts[0]
    entry = _entry(found)
    a, b = (np.concatenate([pair[side] for pair in pooled]) for side in (0, 1))
    if a.ndim == 1 and set(np.unique([a, b])) <= {0.0, 1.0}:
        entry["mcnemar"] = mcnemar(a, b)
        if len(parts) == 1:
            entry |= {"p_value": entry["mcnemar"]["p_value"], "freedom": math.inf}
        if np.count_nonzero(a != b) < statistics.FEW_CHANGED:
            entry["interval"] = statistics.interval_of_shares(found._replace(freedom=entry["freedom"]))
    if len(parts) > 1:
        # Few items may all change in one direction and leave no variance: as with a coin, that proves little.
        entry["p_value"] = max(entry["p_value"], min(1.0, 2.0 ** (1 - np.count_nonzero(a != b))))
    return entry, found


def _entry(found: Estimate) -> dict[str, Any]:
    return {
        "value": found.value,
        "stderr": float(found.draws.std()),
        "interval": statistics.interval(found),
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
        share = is_percent(row["metric"])
        effect = _detectable(difference, len(entries), share)
        # Two shares differ by one at most: so few items cannot show any difference.
        difference["minimum_detectable_effect"] = None if share and effect == 1 else effect
        if share and difference["interval"]:
            difference["interval"] = [min(max(bound, -1.0), 1.0) for bound in difference["interval"]]


def _detectable(difference: dict[str, Any], tests: int, share: bool = False) -> float | None:
    """The minimum detectable effect of a comparison like this one, of shares at most 1; None if it is unknown."""
    freedom = difference.pop("freedom")
    if freedom < 1:
        return None
    effect = statistics.minimum_detectable_effect(difference["stderr"], tests=tests, freedom=freedom)
    if "mcnemar" in difference:
        effect = max(effect, statistics.fewest_discordant(tests) / difference["items"])
        share = True
    return min(effect, 1.0 if share else math.inf) or None
