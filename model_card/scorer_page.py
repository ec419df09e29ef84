"""The quality scorer as a repository of its own: its weights, what they were fitted on, and a card."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import ModelCardData

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json
from nanophi.data import scorers
from nanophi.data.scorers import LinearScorer
from nanophi.model_card import secrets
from nanophi.model_card.companions import Source, license_of, write_filter_page

# What the card shows the scores of.
EXAMPLES = (
    "A module is a file that holds definitions. Another module imports it by name, and the first import runs its code "
    "once; later imports find the finished module and return at once.",
    "HOME | LOGIN | CART (0) >>> click here!!! free free free $$$ (c) 2019 all rights reserved >>> next page >>>",
)


def build(source: Source, repo_id: str, folder: Path) -> None:
    """Write the folder that becomes `ORG/NAME-quality`. Raises `UserError` if the run has no scorer of its own."""
    run, recipe = source.run, source.recipe
    weights = scorers.of_section(recipe.quality).weights
    if weights is None:
        raise UserError(f"{run}: quality.scorer '{recipe.quality.scorer}' has nothing to publish; leave out --scorer")
    portable = secrets.PathRemover(run)
    report = portable(read_json(run / "data" / "scores" / "scorer.json"))
    folder.mkdir(parents=True)
    shutil.copyfile(run / "data" / "scores" / weights, folder / weights)
    write_json(folder / "scorer.json", report)
    scores = LinearScorer.load(folder).score([text.encode() for text in EXAMPLES]).tolist()
    metadata = ModelCardData(
        language="en",
        **license_of(recipe),
        library_name="nanophi",
        pipeline_tag="text-classification",
        tags=["quality-filter", "nanophi"],
        datasets=[source.links["data"]] if "data" in source.links else None,
    )
    write_filter_page(
        source,
        repo_id,
        folder,
        "scorer.md",
        metadata,
        scorer=report,
        examples=list(zip(EXAMPLES, scores, strict=True)),
        labelled=_labelled(run, report, portable),
    )


def _labelled(run: Path, report: dict[str, Any], portable: secrets.PathRemover) -> list[dict[str, Any]]:
    """By labelled source: documents, mean score, and the share on the wrong side of 0.5; the worst first."""
    table = pq.read_table(run / "data" / "scores" / "scores.parquet", columns=["source", "quality_score"])
    table = table.set_column(0, "source", table["source"].cast(pa.string()))
    table = table.append_column("above", pc.greater(table["quality_score"], 0.5))
    means = table.group_by("source").aggregate([("quality_score", "mean"), ("above", "mean"), ("above", "count")])
    rows = []
    for row in means.to_pylist():
        source, above, mean = portable(row["source"]), row["above_mean"], row["quality_score_mean"]
        found = {"source": source, "documents": row["above_count"], "mean_score": mean}
        for label, wrong in (("high", 1 - above), ("low", above)):
            rows += [{**found, "label": f"{label} quality", "wrong": wrong}] if source in report[label] else []
    return sorted(rows, key=lambda row: (-row["wrong"], row["source"]))
