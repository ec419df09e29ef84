"""The verb `compare`: which models some paths lead to, and which of their differences are more than noise.

Models are compared on the items that both answered: the same document and prompt, by their hashes. For an accuracy the
p-value is McNemar's exact test, for anything else the larger of the paired bootstrap's and Student's t test's; each
comes with the 95 % confidence interval of the difference and the minimum detectable effect. A group of tasks is tested
by the mean of their differences, each with its own variance. All tests of the main table are corrected together by
Holm's method, and so are those of each secondary table (a group's subjects, the held-out sources, the right answers'
bits per byte) among themselves. A difference is called better or worse only if its corrected p-value is below 0.05.

A comparison holds the items that it is made from; `recompute` derives its figures from them again. How it is shown is
in render.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from typer import Argument, Option

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json, write_text
from nanophi.eval import filter_parts, render, results, statistics
from nanophi.eval.catalogue import HELDOUT_BITS, LEADERBOARD, is_percent, position, references
from nanophi.eval.models import model_key
from nanophi.eval.results import ANSWER_METRIC, Score, distinct, final_results, read_result
from nanophi.eval.statistics import Estimate, bits_per_byte, bits_per_byte_stderr, holm, mcnemar

FORMAT = 3
"""Version of `comparison.json`; 3 has `items`."""
MAX_SOURCES = 12
"""Held-out sources with a row of their own; every further row makes Holm's correction harsher on all of them."""
MIN_DOCUMENTS = 20
"""Documents that a source needs for a row of its own: fewer say little about it."""


def compare(
    results: Annotated[
        list[Path], Argument(metavar="RESULT...", help="Run directories, result files, or folders of result files.")
    ],
    output: Annotated[Path, Option(help="Where comparison.json, .md and .png go.")] = Path("comparison"),
    baseline: Annotated[
        str | None, Option(help="The model that the others are compared with: a label, or one of RESULT.")
    ] = None,
) -> None:
    """Compare models item by item, with confidence intervals.

    The last one is the baseline, unless --baseline names another.

    Example: nanophi compare runs/demo runs/demo-control --baseline demo-control
    """
    files = label_results(results)
    typer.echo(render.to_text(compare_models(files, output, baseline=find_label(files, baseline))))
    typer.echo(output / "comparison.md")


def label_results(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """A label for each model that some paths lead to -> its result files.

    Of a run directory the last checkpoint counts; result files, also all those in another folder, are grouped by the
    model that they name. Raises `UserError` if a path leads to no results, or is named twice.
    """
    runs: list[Path] = []
    files: list[Path] = []
    for path in paths:
        resolved = path.resolve()
        if resolved in (*runs, *files):
            raise UserError(f"{path} is named twice; name each run or result once")
        if (path / "checkpoints").is_dir() or (path / "record.json").is_file():
            runs.append(resolved)
        elif (path / "config.json").is_file():
            raise UserError(
                f"{path} is a model, not results of one: name its run directory, or run `nanophi eval {path}` and name "
                "the file that it writes"
            )
        elif path.is_dir():
            found = sorted(file.resolve() for file in path.glob("*.json") if not file.name.startswith("curve-"))
            if not found:
                raise UserError(f"{path} holds no results; name a run directory, or files that `nanophi eval` wrote")
            files += found
        elif len(paths) == 1 or not path.name.startswith("curve-"):  # `evals/*.json` names curves too
            files.append(resolved)
    models: dict[str, list[Path]] = {}
    identities: dict[str, dict[str, Any]] = {}
    for file in dict.fromkeys(files):
        identity = read_result(file)["nanophi"]["model"]
        models.setdefault(model_key(identity), []).append(file)
        identities[model_key(identity)] = identity
    labelled = dict(zip(distinct([str(run) for run in runs]), map(final_results, runs), strict=True))
    for mark, found in models.items():
        labelled[_label(identities[mark], [*identities.values()], labelled)] = found
    # The order in which they were named decides which is the baseline.
    order = [path.resolve() for path in paths]

    def place(label: str) -> int:
        file = labelled[label][0]
        return next(i for i, path in enumerate(order) if file == path or file.is_relative_to(path))

    return {label: labelled[label] for label in sorted(labelled, key=place)}


def find_label(labelled: Mapping[str, Sequence[Path]], name: str | None) -> str | None:
    """The label that `name` is, or whose results lie at the path `name`; any other `name` as it is."""
    if name is None or name in labelled:
        return name
    path = Path(name).resolve()
    return next((label for label, files in labelled.items() if files[0].is_relative_to(path)), name)


def _label(identity: Mapping[str, Any], others: Sequence[Mapping[str, Any]], taken: Mapping[str, Any]) -> str:
    """A model's name, with its dtype or the beginning of its hash where the name alone is not unique."""
    same = [other for other in others if other["name"] == identity["name"]]
    label = str(identity["name"])
    if len({other.get("dtype") for other in same}) > 1:
        label += f" {identity['dtype']}"
        same = [other for other in same if other.get("dtype") == identity["dtype"]]
    if len(same) > 1 or label in taken:
        label += f" ({str(identity.get('sha256') or identity.get('revision'))[:8]})"
    return label


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model's score on one task or group, with what its items contribute.

    Attributes:
        items: per leaf task, item -> value: a number, or (log-likelihood in nats, bytes). An item is known by the
            hashes of its document and prompt; once models are `_aligned`, by its position among all their items.
        sources: item -> source of a held-out document; empty for other tasks.
        answers: the bits per byte of the right answers; None where not all items have some.
    """

    score: Score
    items: dict[str, dict[Any, Any]]
    sources: dict[Any, str] = dataclasses.field(default_factory=dict)
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

    def part(self, leaf: str | None = None, keys: set[Any] | None = None) -> Measured | None:
        """The score of a group's leaf task alone, or of some of the items; None if it has none of them."""
        items = {
            name: {key: value for key, value in values.items() if keys is None or key in keys}
            for name, values in self.items.items()
            if leaf in (None, name)
        }
        counts = [len(values) for values in items.values()]
        if not sum(counts):
            return None
        means = [_mean(list(values.values())) for values in items.values() if values]
        value, stderr = means[0] if len(means) == 1 else results.mean(*zip(*means, strict=True))
        score = dataclasses.replace(
            self.score, value=value, stderr=stderr, items=sum(counts), task=leaf or self.score.task
        )
        return Measured(score, items, self.sources)


def _mean(values: Sequence[Any]) -> tuple[float, float | None]:
    """The score of some items of one task and its standard error, None for a single item."""
    array = np.array(values, dtype=float)
    if array.ndim == 1:
        return float(array.mean()), statistics.mean_stderr(array)
    nats, sizes = array.T
    return bits_per_byte(nats, sizes), bits_per_byte_stderr(nats, sizes) if len(array) > 1 else None


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
        a filter keeps and drops), `heldout` by label, `published`, `notes`, and the `items` that all this is made
        from. A task that was not measured alike everywhere has a row for each way: `winogrande:0` and `winogrande:5`.
    """
    if not results:
        raise UserError("nothing to compare: name at least one result")
    labels = list(results)
    baseline = labels[-1] if baseline is None else baseline
    if baseline not in results:
        raise UserError(f"baseline '{baseline}' is not one of {', '.join(labels)}")
    files = {label: [read_result(Path(path)) for path in paths] for label, paths in results.items()}
    notes = _identity_notes(files)
    rows = _rows({label: _measured(label, contents, notes) for label, contents in files.items()}, notes)
    rows, documents = _aligned(rows)
    parts = filter_parts.divide(results, documents)
    tables, found = _tables(rows, parts, labels, baseline, seed)
    versions = {content["lm_eval_version"] for contents in files.values() for content in contents}
    if len(versions) > 1:
        found.append(f"measured with different versions of lm-eval: {', '.join(sorted(versions))}")
    comparison: dict[str, Any] = {
        "format": FORMAT,
        "labels": labels,
        "baseline": baseline,
        "seed": seed,
        "models": {label: [content["nanophi"]["model"] for content in contents] for label, contents in files.items()},
        **tables,
        "heldout": {
            label: content["nanophi"]["heldout"]
            for label, contents in files.items()
            for content in contents
            if "heldout" in content["nanophi"]
        },
        "published": references() if set(LEADERBOARD) & set(tables["tasks"]) else None,
        "method": "McNemar's exact test for accuracies, otherwise the larger p-value of the paired bootstrap "
        f"({statistics.RESAMPLES} resamples, seed {seed}) and Student's t test, which for a group of tasks and for the "
        "average adds up the tasks' variances; Holm's correction, separately for each "
        "secondary table; minimum detectable effect at 80 % power and the correction's hardest step",
        "notes": notes + found,
        "items": {key: _stored(row, parts if key == HELDOUT_BITS else {}) for key, row in rows.items()},
    }
    _write(comparison, Path(output), report)
    return comparison


TABLES = ("tasks", "answers", "subjects", "sources", "filter")


def recompute(comparison: Mapping[str, Any]) -> dict[str, Any] | None:
    """`TABLES` of a comparison, every figure in them derived again from its `items`; None if it holds none.

    A score is derived too, unless it is one of all items together (F1, a perplexity), which has no items here. Floats
    agree but for rounding; what comes from the bootstrap only with the same version of numpy.
    """
    if not comparison.get("items"):
        return None
    rows = {
        key: _restored(row, comparison["answers"].get(key), comparison["items"].get(key, {}))
        for key, row in comparison["tasks"].items()
        if key != "average"
    }
    stored = comparison["items"].get(HELDOUT_BITS, {}).get(HELDOUT_BITS, {})
    parts = {name: set(positions) for name, positions in stored.get("filter", {}).items()}
    return _tables(rows, parts, comparison["labels"], comparison["baseline"], comparison["seed"])[0]


def _tables(
    rows: Mapping[str, dict[str, Measured]], parts: Mapping[str, set[int]], labels: Sequence[str], base: str, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """`TABLES`, and the notes on their rows. The order of the rows decides what each gets of the bootstrap's draws."""
    tester = Tester(base, np.random.default_rng(seed), [])
    held = rows.get(HELDOUT_BITS, {})
    tables: dict[str, Any] = tester.tables(rows, labels)
    tables |= {"sources": tester.parts(held, _by_source(held)), "filter": tester.parts(held, parts)}
    return tables, tester.notes


def _aligned(rows: Mapping[str, dict[str, Measured]]) -> tuple[dict[str, dict[str, Measured]], list[str]]:
    """The rows with items known by their position among those of all models; hashes of the held-out documents."""
    aligned: dict[str, dict[str, Measured]] = {}
    documents: list[str] = []
    for row, measured in rows.items():
        every: dict[str, dict[Any, int]] = {}
        # The largest first: what a bootstrap draws, in the result file and here, depends on the order of the items.
        for one in sorted(measured.values(), key=lambda one: -one.score.items):
            for leaf, items in one.items.items():
                places = every.setdefault(leaf, {})
                for key in items:
                    places.setdefault(key, len(places))
        if row == HELDOUT_BITS:
            documents = [document for document, *_ in every[HELDOUT_BITS]]

        def moved(one: Measured, every: Mapping[str, Mapping[Any, int]] = every) -> Measured:
            return Measured(
                one.score,
                {x: {n: items[key] for key, n in every[x].items() if key in items} for x, items in one.items.items()},
                {n: one.sources[key] for x in one.items for key, n in every[x].items() if key in one.sources},
                one.answers and moved(one.answers, every),
            )

        aligned[row] = {label: moved(one) for label, one in measured.items()}
    return aligned, documents


def _stored(row: Mapping[str, Measured], parts: Mapping[str, set[int]]) -> dict[str, Any]:
    """The items of a row, per leaf task: `values` and `answers` by label, None for what a model has not answered."""
    stored: dict[str, Any] = {}
    for leaf in _leaves(row):
        count = 1 + max(max(one.items.get(leaf, {}), default=-1) for one in row.values())
        sources = {key: source for one in row.values() for key, source in one.sources.items()}
        stored[leaf] = {
            name: {label: [one.items.get(leaf, {}).get(n) for n in range(count)] for label, one in found.items()}
            for name, found in {
                "values": {label: one for label, one in row.items() if one.paired},
                "answers": {label: one.answers for label, one in row.items() if one.answers},
            }.items()
            if found
        }
        if sources:
            stored[leaf]["sources"] = [sources.get(n) for n in range(count)]
        if parts:
            stored[leaf]["filter"] = {name: sorted(positions) for name, positions in parts.items()}
    return stored


def _restored(
    row: Mapping[str, Any], answers: Mapping[str, Any] | None, stored: Mapping[str, Any]
) -> dict[str, Measured]:
    """The models of a row, from what `_stored` made of them."""

    def measured(facts: Mapping[str, Any], name: str, label: str) -> Measured:
        columns = {leaf: found.get(name, {}).get(label) for leaf, found in stored.items()}
        items = {
            leaf: {n: value for n, value in enumerate(column) if value is not None}
            for leaf, column in columns.items()
            if column is not None
        }
        items = {leaf: values for leaf, values in items.items() if values}
        names = ("task", "metric", "filter", "chance", "higher_is_better")
        score = Score(
            suite="", of=0, shots=facts["num_fewshot"], leaves=tuple(items), **facts["scores"][label],
            **{key: facts[key] for key in names},
        )  # fmt: skip
        sources = {n: x for found in stored.values() for n, x in enumerate(found.get("sources", [])) if x is not None}
        return Measured(score, items, sources).part() or Measured(score, items)

    restored = {label: measured(row, "values", label) for label in row["scores"]}
    if answers is not None:
        for label in answers["scores"]:
            restored[label] = dataclasses.replace(restored[label], answers=measured(answers, "answers", label))
    return restored


def _leaves(row: Mapping[str, Measured]) -> list[str]:
    return list(dict.fromkeys(leaf for one in row.values() for leaf in one.items))


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
        answers = {score.task: _with_items(content, score) for score in results.answer_scores(content)}
        for score in results.leading_scores(content):
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
    items: dict[str, dict[Any, Any]] = {}
    sources: dict[Any, str] = {}
    for leaf in score.leaves:
        seen: Counter[tuple[str, str]] = Counter()
        items[leaf] = {}
        for sample in content["samples"][leaf]:
            if sample["filter"] == score.filter and score.metric in sample:
                hashes = sample["doc_hash"], sample["prompt_hash"]
                key = *hashes, seen[hashes]  # the same question may be in a benchmark twice
                seen[hashes] += 1
                items[leaf][key] = sample[score.metric]
                if "source" in sample:
                    sources[key] = sample["source"]
    return Measured(score, items, sources)


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


def _by_source(held: Mapping[str, Measured]) -> dict[str, set[Any]]:
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
            leaves = _leaves(measured)
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

    def parts(self, held: Mapping[str, Measured], parts: Mapping[str, set[Any]]) -> dict[str, Any]:
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
        scores = {label: score for label, six in of.items() if (score := results.average_score(six))}
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
    """The difference of two scores over the items that both have; None if there is none."""
    parts, pooled = [], []
    for leaf in ours.items:
        common = [key for key in ours.items[leaf] if key in theirs.items.get(leaf, {})]
        if not common:
            continue
        a, b = (np.array([one.items[leaf][key] for key in common], dtype=float) for one in (ours, theirs))
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
