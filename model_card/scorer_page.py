"""The quality scorer as a repository of its own: its weights, what they were fitted on, and a card.

README.md  LICENSE  quality.png  scorer.safetensors  scorer.json  MANIFEST.json
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import CardData, ModelCardData

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json, write_text
from nanophi.core.recipe import Recipe
from nanophi.core.version import __version__
from nanophi.data import quality_report, scorers
from nanophi.data.scorers import LinearScorer
from nanophi.model_card import card, secrets
from nanophi.model_card import release as releases

EXAMPLES = (
    "A module is a file that holds definitions. Another module imports it by name, and the first import runs its code "
    "once; later imports find the finished module and return at once.",
    "HOME | LOGIN | CART (0) >>> click here!!! free free free $$$ (c) 2019 all rights reserved >>> next page >>>",
)
"""What the card shows the scores of."""


def build(run: Path, recipe: Recipe, repo_id: str, model_id: str, links: dict[str, str], output: Path) -> None:
    """Write the folder that becomes the scorer's repository.

    Args:
        run: the run directory.
        recipe: its recipe.
        repo_id: of the scorer, `ORG/NAME-quality`.
        model_id: of the model whose documents it selected.
        links: what else is published (`data`), by Hub id.
        output: folder to create.

    Raises:
        UserError: if the run has no scorer of its own.
    """
    weights = scorers.of_section(recipe.quality).weights
    if weights is None:
        raise UserError(
            f"{run}: quality.scorer is '{recipe.quality.scorer}', so there is no scorer of this run to publish; "
            "leave out --scorer"
        )
    portable = secrets.PathRemover(run)
    report = portable(read_json(run / "data" / "scores" / "scorer.json"))
    output.mkdir(parents=True)
    shutil.copyfile(run / "data" / "scores" / weights, output / weights)
    write_json(output / "scorer.json", report)
    scorer = LinearScorer.load(output)
    metadata = ModelCardData(
        language="en",
        **license_of(recipe),
        library_name="nanophi",
        pipeline_tag="text-classification",
        tags=["quality-filter", "nanophi"],
        datasets=[links["data"]] if "data" in links else None,
    )
    write_page(
        run,
        output,
        "scorer.md",
        metadata,
        recipe=recipe,
        repo_id=repo_id,
        model_id=model_id,
        links=links,
        scorer=report,
        examples=list(zip(EXAMPLES, scorer.score([text.encode() for text in EXAMPLES]).tolist(), strict=True)),
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
        source = portable(row["source"])
        if source in report["high"] or source in report["low"]:
            good = source in report["high"]
            rows.append(
                {
                    "source": source,
                    "label": "high quality" if good else "low quality",
                    "documents": row["above_count"],
                    "mean_score": row["quality_score_mean"],
                    "wrong": 1 - row["above_mean"] if good else row["above_mean"],
                }
            )
    return sorted(rows, key=lambda row: (-row["wrong"], row["source"]))


# What the scorer's page and the data's share


def license_of(recipe: Recipe) -> dict[str, Any]:
    """The card's licence, as the Hub's metadata has it."""
    section = recipe.card
    names = {"license": section.license, "license_name": section.license_name, "license_link": section.license_link}
    return {key: value for key, value in names.items() if value is not None}


def write_page(run: Path, output: Path, template: str, metadata: CardData, *, recipe: Recipe, **values: Any) -> None:
    """Write README.md from a template beside this file, the filter's figure, the licence and the manifest."""
    quality = secrets.PathRemover(run)(read_json(run / "data" / "quality" / "quality.json"))
    quality_report.plot(quality, output / "quality.png")
    page = card.compile_template((Path(__file__).parent / template).read_text(encoding="utf-8"))
    record = read_json(run / "record.json")
    try:
        text = page.render(
            metadata=metadata.to_yaml(line_break="\n"),
            name=values["repo_id"].rpartition("/")[2],
            recipe=recipe.model_dump(mode="json"),
            tag=recipe.card.version,
            quality=quality,
            **values,
        )
    except jinja2.UndefinedError as error:
        raise UserError(f"{template} needs a value that no record holds: {error.message}") from None
    write_text(output / "README.md", text)
    if recipe.card.license == "other":
        license_text = f"{recipe.card.license_name}: {recipe.card.license_link}"
    else:
        license_text = recipe.card.license
    write_text(output / "LICENSE", f"License: {license_text}\n")
    stages = {name: record["stages"][name]["key"] for name in ("documents", "scores", "quality")}
    releases.write_manifest(output, {"nanophi": __version__, "model": values["model_id"], "stages": stages})
