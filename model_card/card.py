"""The model card: README.md, rendered from the shipped records, with its figures.

The card is a pure function of the records that are shipped with it: that is how `nanophi verify` checks it. Its wording
is in `card.md` and `sections/`, its YAML header in `metadata.py`.
"""

import statistics
from pathlib import Path
from typing import Any

from nanophi.core import formatting
from nanophi.core.errors import UserError
from nanophi.core.files import write_text
from nanophi.core.names import final_checkpoint, is_hub_id
from nanophi.eval import catalogue, results
from nanophi.eval.results import ANSWER_METRIC
from nanophi.eval.statistics import share_interval
from nanophi.model_card import figures, metadata, pages, prediction, records
from nanophi.model_card.consistency import contradictions
from nanophi.model_card.records import ShippedRecords

SECTIONS = (
    *("summary", "use", "details", "data", "filter", "preprocessing", "training", "evaluation", "comparison"),
    *("memorisation", "prediction", "limits", "environment", "reproduce"),
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
    """Write the card of a run's checkpoint (None: the last one), figures and records; `repo_id` None: the recipe's."""
    shipped = records.collect(run, checkpoint or final_checkpoint(run))
    if repo_id is not None:
        shipped["run.json"] |= {"repo_id": repo_id, "folder": None}
    if wrong := contradictions(shipped):
        raise UserError(f"{run}: the records contradict each other: {'; '.join(wrong)}")
    text = render(shipped)
    if wrong := metadata.problems(text):
        raise UserError(f"{run}: the card is not fit to publish: {'; '.join(wrong)}")
    records.write_records(shipped, output / "records")
    names = figures.build(shipped, output / "figures")
    write(shipped, output)
    return {"characters": len(text), "figures": names, "evaluations": len(records.leading_scores(shipped))}


def write(shipped: ShippedRecords, folder: Path) -> None:
    """Write README.md and `.eval_results/`, which follow from the records beside them."""
    write_text(folder / "README.md", render(shipped))
    for name, content in metadata.eval_results_files(shipped).items():
        write_text(folder / ".eval_results" / name, content)


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
        self._results = suites = records.results(shipped)
        self.datasets = metadata.public_datasets(shipped)
        self.sources = records.training_sources(shipped["recipe.yaml"])
        self.published = is_hub_id(shipped["run.json"]["repo_id"])
        self.hardware = records.hardware(shipped)
        self.harness = ", ".join(sorted({result["lm_eval_version"] for result in suites}))
        self.figures = figures.names(shipped)
        self.differences = differences(shipped.get("comparison.json"))
        self.by_source = by_source(shipped)
        self.scores = [
            score for score in records.leading_scores(shipped) if catalogue.made_from(score.task) != "tokens"
        ]
        self.answers = records.in_order(shipped, results.answer_scores)  # bits per byte of the right answers
        self.every = records.in_order(shipped, results.every_score)  # MMLU's subjects are among them
        self.heldout = next((found["nanophi"]["heldout"] for found in suites if found["nanophi"].get("heldout")), None)
        self.memorisation = [
            {**row, "interval": [100 * bound for bound in share_interval(row["verbatim"], row["items"])]}
            for found in suites
            for row in found["nanophi"].get("memorisation", [])
        ]
        known = [entry["mfu"] for entry in shipped["training.json"]["log"] if entry["mfu"] is not None]
        self.mfu = statistics.median(known) if known else None
        self.prediction = prediction.sentence(shipped)

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


def differences(comparison: dict[str, Any] | None) -> dict[str, list[dict[str, Any]]] | None:
    """Label -> one row per task: its difference from the baseline, and whether that is more than noise."""
    if comparison is None:
        return None
    rows: dict[str, list[dict[str, Any]]] = {}
    answers = [{"task": task, **row} for task, row in comparison.get("answers", {}).items()]
    for row in (*catalogue.main_rows(comparison), *answers):
        answer = f" ({catalogue.metric_name(ANSWER_METRIC)})" if row["metric"] == ANSWER_METRIC else ""
        for label, entry in row["differences"].items():
            shown = {
                "title": catalogue.row_title(row) + answer,
                "difference": catalogue.difference(entry, row["metric"]),
                "detectable": catalogue.metric(entry.get("minimum_detectable_effect"), row["metric"]),
                "p": formatting.p_value(entry["p_corrected"]),
                "verdict": entry["verdict"],
            }
            rows.setdefault(label, []).append(shown)
    return rows


def by_source(shipped: ShippedRecords) -> dict[str, Any] | None:
    """Held-out bits per byte of the compared models by source, and the share of it that the filter kept."""
    comparison = shipped.get("comparison.json") or {}
    heldout = comparison.get("heldout") or {}
    labels = [label for label in comparison.get("labels", []) if label in heldout]
    if len(labels) < 2:
        return None
    filtered, rows = shipped.get("quality.json", {}).get("sources", {}), []
    for source in sorted({source for label in labels for source in heldout[label]["by_source"]}):
        parts, trained = [heldout[label]["by_source"].get(source) for label in labels], filtered.get(source)
        documents = max(part["documents"] for part in parts if part is not None)
        kept = trained["kept_bytes"] / trained["bytes"] if trained and trained["bytes"] else None
        scores = [pages.bits_per_byte(part) for part in parts]
        rows.append({"source": source, "documents": documents, "kept": kept, "scores": scores})
    return {"labels": labels, "rows": rows}
