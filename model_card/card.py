"""The model card: README.md, rendered from the shipped records, with its figures.

The card is a pure function of the records that are shipped with it. Whoever has them can render it again and must get
the same text: that is how `nanophi verify` checks it. Its wording is in `card.md` and `sections/`, its YAML header in
`metadata.py`.
"""

from __future__ import annotations

import functools
import statistics
from pathlib import Path
from typing import Any

from nanophi.core import formatting
from nanophi.core.errors import UserError
from nanophi.core.files import write_text
from nanophi.core.names import final_checkpoint, is_hub_id
from nanophi.eval import catalogue, results
from nanophi.eval.results import ANSWER_METRIC, Score
from nanophi.model_card import figures, metadata, pages, records
from nanophi.model_card.consistency import contradictions
from nanophi.model_card.records import ShippedRecords

SECTIONS = (
    *("summary", "use", "details", "data", "filter", "preprocessing", "training", "evaluation", "comparison"),
    *("limits", "environment", "reproduce"),
)
"""The parts of the card in their order: each is a template, `sections/NAME.md`.

It reads the records by their names (`training`, `quality`, ...; None if there is none), the settings at the top of
`card.md`, and as `view` what `View` derives from the records.
"""

RECORDS = (
    *("run", "model", "training", "checkpoint", "revisions", "documents", "quality", "tokens"),
    *("comparison", "sample", "conversations"),
)


def build(run: Path, output: Path, checkpoint: Path | None = None, repo_id: str | None = None) -> dict[str, Any]:
    """Write `README.md`, `figures/`, `records/` and, where the Hub takes them, `.eval_results/` of a run's checkpoint.

    Args:
        run: the run directory.
        output: folder to write in.
        checkpoint: None: the last one.
        repo_id: where it will be on the Hub; None: what the recipe has.

    Raises:
        UserError: if a record is missing, records contradict each other, or the Hub would refuse the metadata.
    """
    shipped = records.collect(run, checkpoint or final_checkpoint(run))
    if repo_id is not None:
        shipped["run.json"] |= {"repo_id": repo_id, "folder": None}
    if wrong := contradictions(shipped):
        raise UserError(f"{run}: the records contradict each other: {'; '.join(wrong)}")
    text = render(shipped)
    if wrong := metadata.problems(text):
        raise UserError(f"{run}: the card is not fit to publish: {'; '.join(wrong)}")
    output.mkdir(parents=True, exist_ok=True)
    records.write_records(shipped, output / "records")
    names = figures.build(shipped, output / "figures")
    write_text(output / "README.md", text)
    for name, content in metadata.eval_results_files(shipped).items():
        write_text(output / ".eval_results" / name, content)
    return {"characters": len(text), "figures": names, "evaluations": len(records.leading_scores(shipped))}


def render(shipped: ShippedRecords) -> str:
    """README.md of a release. Raises `UserError` if a section asks for something that no record holds."""
    return pages.render(
        "card.md",
        metadata=metadata.header(shipped).to_yaml(line_break="\n"),
        sections=SECTIONS,
        view=View(shipped),
        recipe=shipped["recipe.yaml"],
        **{name: shipped.get(f"{name}.json") for name in RECORDS},
    )


class View:
    """What the sections show that no record has as such."""

    def __init__(self, shipped: ShippedRecords) -> None:
        self._records = shipped
        self._results = records.results(shipped)
        self.datasets = metadata.public_datasets(shipped)
        self.sources = records.training_sources(shipped["recipe.yaml"])
        self.published = is_hub_id(shipped["run.json"]["repo_id"])
        self.hardware = records.hardware(shipped)
        self.harness = ", ".join(sorted({result["lm_eval_version"] for result in self._results}))
        self.figures = figures.names(shipped)
        self.differences = differences(shipped.get("comparison.json"))
        self.by_source = by_source(shipped)

    @functools.cached_property
    def scores(self) -> list[Score]:
        """The leading scores."""
        return records.leading_scores(self._records)

    @property
    def answers(self) -> list[Score]:
        """Bits per byte of the right answers."""
        return records.in_order(self._records, results.answer_scores)

    @property
    def every(self) -> list[Score]:
        """Every metric of every leaf task; MMLU's subjects are among them."""
        return records.in_order(self._records, results.every_score)

    @property
    def heldout(self) -> dict[str, Any] | None:
        """Bits per byte of the held-out text, by source and with bz2's beside them."""
        return next((found["nanophi"]["heldout"] for found in self._results if found["nanophi"].get("heldout")), None)

    @property
    def leaderboard(self) -> dict[str, Any] | None:
        """The six tasks of Open LLM Leaderboard v1, `[(title there, value)]`, and their mean; None unless complete."""
        for result in self._results:
            scores = {score.task: score for score in results.leading_scores(result)}
            average = results.average_score(list(scores.values()))
            if average is not None and all(scores[task].items == scores[task].of for task in catalogue.LEADERBOARD):
                boards = {task: entry.leaderboard for task, entry in catalogue.TASKS.items() if entry.leaderboard}
                titles = [(board.title, scores[task].value) for task, board in boards.items()]
                return {"average": average.value, "stderr": average.stderr, "scores": titles}
        return None

    @property
    def noise(self) -> dict[str, list[str]]:
        """Tasks by where their score is: `above`, `within` or `below` two standard errors of chance."""
        tasks: dict[str, list[str]] = {"above": [], "within": [], "below": []}
        for score in self.scores:
            if (place := score.against_chance) is not None:
                tasks[place].append(score.title)
        return tasks

    @property
    def mfu(self) -> float | None:
        """Median utilisation of the device's arithmetic."""
        known = [entry["mfu"] for entry in self._records["training.json"]["log"] if entry["mfu"] is not None]
        return statistics.median(known) if known else None


def differences(comparison: dict[str, Any] | None) -> dict[str, list[dict[str, Any]]] | None:
    """Label -> one row per task: its difference from the baseline, and whether that is more than noise."""
    if comparison is None:
        return None
    rows: dict[str, list[dict[str, Any]]] = {}
    answers = [{"task": task, **row} for task, row in comparison.get("answers", {}).items()]
    for row in (*catalogue.main_rows(comparison), *answers):
        answer = f" ({catalogue.metric_name(ANSWER_METRIC)})" if row["metric"] == ANSWER_METRIC else ""
        for label, entry in row["differences"].items():
            rows.setdefault(label, []).append(
                {
                    "title": catalogue.row_title(row) + answer,
                    "difference": catalogue.difference(entry, row["metric"]),
                    "detectable": catalogue.metric(entry.get("minimum_detectable_effect"), row["metric"]),
                    "p": formatting.p_value(entry["p_corrected"]),
                    "verdict": entry["verdict"],
                }
            )
    return rows


def by_source(shipped: ShippedRecords) -> dict[str, Any] | None:
    """Held-out bits per byte of the compared models by source; None unless two or more were measured.

    Returns:
        `{"labels": names of the models, "rows": [{"source", "documents", "kept": share of the source's bytes that the
        filter kept, None if it is not trained on, "scores": cells in the order of the labels}]}`.
    """
    comparison = shipped.get("comparison.json") or {}
    heldout = comparison.get("heldout") or {}
    labels = [label for label in comparison.get("labels", []) if label in heldout]
    if len(labels) < 2:
        return None
    filtered, rows = shipped.get("quality.json", {}).get("sources", {}), []
    for source in sorted({source for label in labels for source in heldout[label]["by_source"]}):
        parts = [heldout[label]["by_source"].get(source) for label in labels]
        trained = filtered.get(source)
        rows.append(
            {
                "source": source,
                "documents": max(part["documents"] for part in parts if part is not None),
                "kept": trained["kept_bytes"] / trained["bytes"] if trained and trained["bytes"] else None,
                "scores": [pages.bits_per_byte(part) for part in parts],
            }
        )
    return {"labels": labels, "rows": rows}
