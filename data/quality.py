"""The filter on files, without a run: the verbs of `nanophi quality`. A run scores in `scoring.py`."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import atomic_folder, check_own_file, check_own_folder, read_json, whole_file
from nanophi.core.options import TextColumn

if TYPE_CHECKING:
    import pyarrow as pa

    from nanophi.data.sources import Document, Tally

MADE_BY = b"nanophi"
"""Key of the metadata of a Parquet file that `nanophi quality score` wrote: which scorer, which scale."""


@user_errors("the scorer cannot be fitted; --debug shows where it stopped")
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
    from nanophi.data import linear
    from nanophi.data.sources import Tally

    check_own_folder(output, ("scorer.json", "scorer.safetensors"), "quality fit")
    if both := sorted({*high} & {*low}):
        raise UserError(f"{both[0]} is named as high and as low quality; it can be an example of one")

    def examples() -> Iterator[tuple[bytes, bool, str]]:
        for patterns, is_good in ((high, True), (low, False)):
            for pattern in patterns:
                for text in _spread(_read(pattern, text_column, None, Tally()), linear.FIT_BYTES // len(patterns)):
                    yield text, is_good, pattern

    with atomic_folder(output) as work:
        report = linear.fit_and_save(examples(), high, low, seed, work)
    typer.echo(f"{output}: area under the ROC curve {report['roc_auc']} on {report['test_documents']} test documents")


@user_errors("the files cannot be scored; --debug shows where it stopped")
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
    import pyarrow as pa
    import pyarrow.parquet as pq

    from nanophi.data import quality_report, scorers, scoring, sources

    chosen = scorers.find_scorer(scorer, label, scale)
    check_own_file(output, lambda: MADE_BY in (pq.read_schema(output).metadata or {}), "quality score")
    made_by = {MADE_BY: json.dumps({"scorer": chosen.name, "scale": chosen.range})}
    schema = scoring.SCHEMA.remove(scoring.SCHEMA.get_field_index("split"))
    schema = schema.append(pa.field("text", pa.string())).with_metadata(made_by)
    tally = sources.Tally()
    with whole_file(output) as partial:
        batches = _batches(_read(files, text_column, chosen.column, tally))
        summary = scoring.write_scores(batches, chosen, "", partial, schema, quality_report.EXCERPT)
    dropped = ", ".join(f"{reason} {count}" for reason, count in sources.dropped(tally.total()).items())
    typer.echo(f"{output}: {summary['documents']} documents" + (f"; dropped: {dropped}" if dropped else ""))


def _read(files: str, text_column: str, column: str | None, tally: Tally) -> Iterator[Document]:
    """The usable documents of files, counted in `tally`. Raises `UserError` at the end if there were none."""
    from nanophi.core.recipe import Source
    from nanophi.data import sources

    source = Source(files=files, text_column=text_column)
    for part in sources.plan(source, column):
        yield from sources.read(source, part, column, tally)
    sources.check_usable(files, tally.total(), tally.refused, 1.0)


def _spread(documents: Iterator[Document], room: int) -> list[bytes]:
    """Excerpts of at most about `room` bytes: of all documents if they fit, else of those with the lowest ids."""
    from nanophi.data.documents import id_of
    from nanophi.data.linear import EXCERPT_BYTES

    chosen: list[tuple[int, int, bytes]] = []
    size = 0
    for number, document in enumerate(documents):
        excerpt = document.text[:EXCERPT_BYTES]
        heapq.heappush(chosen, (-int(id_of(document.text), 16), number, excerpt))
        size += len(excerpt)
        while size > room and len(chosen) > 1:
            size -= len(heapq.heappop(chosen)[2])
    return [text for _, _, text in sorted(chosen, key=lambda entry: entry[1])]


def _batches(documents: Iterator[Document]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    from nanophi.data.documents import id_of
    from nanophi.data.gather import SCORE, in_batches

    for rows in in_batches(documents):
        columns = {
            "id": [id_of(document.text) for document in rows],
            "text": pa.array([document.text for document in rows], pa.binary()),
            "source": pa.array([document.file for document in rows], pa.string()),
            SCORE: pa.array([document.score for document in rows], pa.float64()),
        }
        yield pa.RecordBatch.from_pydict(columns)


@user_errors("the report cannot be written; --debug shows where it stopped")
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
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from nanophi.core.recipe import Quality
    from nanophi.data import quality_report

    if scores.is_dir():
        if threshold is not None or output is not None:
            raise UserError("--threshold and --output are for a file of scores; a run has its own report")
        selected, tokens = scores / "data/quality/quality.json", scores / "data/tokens/tokens.json"
        if not selected.is_file():
            raise UserError(f"{scores} is not a run whose documents were selected; run `nanophi prepare` on its recipe")
        bytes_per_token = read_json(tokens)["train"]["bytes_per_token"] if tokens.exists() else None
        report = read_json(selected)
        if "rule" in report:
            typer.echo(quality_report.markdown(report, bytes_per_token))
        else:  # of a run before 0.1
            typer.echo(selected.with_suffix(".md").read_text(encoding="utf-8"))
        return
    output = output or Path("quality")
    check_own_folder(output, ("quality.json", "quality.md", "quality.png"), "quality report")
    with user_errors(f"{scores} cannot be read as parquet"):
        table = pq.read_table(scores)
    made_by = json.loads((table.schema.metadata or {}).get(MADE_BY, b"null"))
    if made_by is None:
        raise UserError(f"{scores} was not written by `nanophi quality score`")
    low, high = made_by["scale"]
    threshold = (low + high) / 2 if threshold is None else threshold
    if not low <= threshold <= high:
        raise UserError(f"--threshold {threshold:g} lies outside the scale of the scores, {low:g} to {high:g}")
    texts = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    table = table.set_column(1, "source", table["source"].combine_chunks().dictionary_encode())
    table = table.append_column("kept", pc.greater(table["quality_score"], threshold))
    quality = Quality(scorer="column:quality_score", scale=(low, high), threshold=threshold)
    quality_report.write(table, quality, made_by, lambda ids: {key: texts[key] for key in ids}, output)
    typer.echo(output / "quality.md")
