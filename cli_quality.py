"""The verbs of `nanophi quality`: the filter on files, without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from nanophi.core.errors import UserError

quality_app = typer.Typer(help="Apply the quality filter to text files of your own.", no_args_is_help=True)

TextColumn = Annotated[str, Option(help="Column or JSON key that holds the text.")]


@quality_app.command()
def fit(
    output: Annotated[Path, Argument(help="Folder for the scorer.")],
    high: Annotated[list[str], Option(metavar="GLOB", help="Files of high-quality text; repeatable.")],
    low: Annotated[list[str], Option(metavar="GLOB", help="Files of low-quality text; repeatable.")],
    text_column: TextColumn = "text",
    seed: Annotated[int, Option(min=0, help="Seed of the split into train and test documents.")] = 0,
) -> None:
    """Fit a linear scorer. A recipe uses it as `quality.scorer: model:FOLDER`.

    Example: nanophi quality fit scorer --high "books/*.txt" --low "chat/*.jsonl.gz"
    """
    from nanophi.data import quality

    fitted = quality.fit_files(high, low, output, text_column, seed)
    typer.echo(f"{output}: area under the ROC curve {fitted['roc_auc']} on {fitted['test_documents']} test documents")


@quality_app.command()
def score(
    files: Annotated[str, Argument(metavar="GLOB", help="Files, or a folder, as in a recipe's sources.")],
    scorer: Annotated[str, Option(help="column:NAME, model:FOLDER, or model:ORG/NAME.")],
    output: Annotated[Path, Option(help="Parquet file with a score for every document.")] = Path("scores.parquet"),
    text_column: TextColumn = "text",
    label: Annotated[str | None, Option(help="Label of a classifier that means high-quality text.")] = None,
    scale: Annotated[
        tuple[float, float] | None, Option(metavar="LOW HIGH", help="Range of the scores (default: 0 1).")
    ] = None,
) -> None:
    """Score every document.

    Example: nanophi quality score "chat/*.jsonl.gz" --scorer model:scorer
    """
    from nanophi.data import quality, scorers

    summary = quality.score_files(files, scorers.find_scorer(scorer, label, scale), output, text_column)
    dropped = ", ".join(f"{reason} {count}" for reason, count in summary["dropped"].items())
    typer.echo(f"{output}: {summary['documents']} documents" + (f"; dropped: {dropped}" if dropped else ""))


@quality_app.command()
def join(
    files: Annotated[str, Argument(metavar="GLOB", help="Files, or a folder, as in a recipe's sources.")],
    scores: Annotated[str, Option(help="Data set of scores: ORG/NAME, ORG/NAME@REVISION or a folder.")],
    output: Annotated[Path, Option(help="Folder for the joined data set.")] = Path("joined"),
    text_column: TextColumn = "text",
) -> None:
    """Join your own texts with published scores.

    They are matched by the SHA-256 of the text.

    The folder has the documents that are in both, in the order of the scores. A recipe names it as
    `data.sources[].hub` with `quality.scorer: column:quality_score`.

    Example: nanophi quality join "web/*.parquet" --scores ORG/NAME-data
    """
    from nanophi.data import quality_join

    summary = quality_join.join_files(files, scores, output, text_column)
    typer.echo(
        f"{output}: {summary['joined']} of {summary['scored']} scored documents have their text here; "
        f"{summary['unknown']} of the texts have no score"
    )


@quality_app.command()
def report(
    scores: Annotated[Path, Argument(help="A file written by `nanophi quality score`, or a run directory.")],
    threshold: Annotated[
        float | None, Option(help="Documents that score above it are kept (default: the middle of the scale).")
    ] = None,
    output: Annotated[
        Path | None, Option(help="Where quality.json, .md and .png go. [default: quality]", show_default=False)
    ] = None,
) -> None:
    """Show what a threshold keeps and drops, with examples.

    For a run directory, its own report is shown.

    Example: nanophi quality report scores.parquet --threshold 0.3
    """
    from nanophi.data import quality_report as reports

    if scores.is_dir():
        if threshold is not None or output is not None:
            raise UserError("--threshold and --output are for a file of scores; a run has its own report")
        typer.echo(reports.report_run(scores))
    else:
        output = output or Path("quality")
        reports.report_files(scores, threshold, output)
        typer.echo(output / "quality.md")
