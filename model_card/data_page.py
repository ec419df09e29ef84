"""A run's documents as a data set on the Hub: their scores, or their text as well, with a card.

A row has `id` (SHA-256 of the text as the run has it, UTF-8), `source`, `split`, `quality_score`, `kept`, and `text` if
it was asked for. The rows are in the order of the run's documents, so that a recipe over them gives the same tokens.
"""

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData

from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.core.recipe import Recipe
from nanophi.data import documents, quality_report, sources
from nanophi.model_card import secrets
from nanophi.model_card.companions import Source, license_of, write_filter_page

FILE_BYTES = 256 << 20  # text of a file, uncompressed
_COLUMNS = {"id": pa.string(), "source": pa.string(), "split": pa.string(), "quality_score": pa.float32()}
SCHEMA = pa.schema({**_COLUMNS, "kept": pa.bool_()})
# The Hub's names of sizes, and the number of rows below which each one holds.
SIZES = (("n<1K", 1e3), ("1K<n<10K", 1e4), ("10K<n<100K", 1e5), ("100K<n<1M", 1e6), ("1M<n<10M", 1e7))


def build(source: Source, repo_id: str, folder: Path) -> None:
    """Write the folder that becomes `ORG/NAME-data`."""
    run, recipe, text = source.run, source.recipe, source.asked["data"] == "text"
    missing = [sources.name_of(source) for source in recipe.data.sources if source.license is None]
    if text and missing:
        advice = "state data.sources[].license in the recipe and run `nanophi release`, or publish --data scores"
        raise UserError(f"--data text: no licence is stated for {', '.join(missing)}; {advice}")
    portable = secrets.PathRemover(run)
    schema = SCHEMA.append(pa.field("text", pa.string())) if text else SCHEMA
    (folder / "data").mkdir(parents=True)
    counts = {split: _write_split(run, split, schema, portable, folder / "data") for split in documents.SPLITS}
    summary = read_json(run / "data" / "documents" / "documents.json")
    trained = [source for source in recipe.data.sources if not source.heldout]
    read = [f"{source.weight}, phase {source.phase}" if source.given("phase") else source.weight for source in trained]
    rows = [
        {"source": portable(name), "license": recipe.data.sources[entry["origin"]].license, **entry}
        for name, entry in summary["sources"].items()
    ]
    write_filter_page(
        source,
        repo_id,
        folder,
        "data.md",
        _metadata(recipe, schema, counts, text, folder),
        text=text,
        documents=summary,
        sources=rows,
        weights=sorted({*read}, key=str),
        report=_report(run, portable),
    )


def _write_split(
    run: Path, split: str, schema: pa.Schema, portable: secrets.PathRemover, folder: Path
) -> dict[str, int]:
    """Write the files of a split, a few MB at a time; returns its `num_examples` and `num_bytes`."""
    scores = _scores(run, split)
    examples = total = number = room = 0
    with contextlib.ExitStack() as stack:
        paths = documents.shards(run / "data" / "documents", split)
        for batch in documents.batches(paths, ["id", "text", "source"], None):
            rows = scores.slice(examples, len(batch))
            if rows["id"].to_pylist() != batch["id"].to_pylist():
                raise UserError(f"{run}: its scores are not those of its documents; run `nanophi release` again")
            texts = batch["text"].cast(pa.binary()).to_pylist()
            columns: dict[str, Any] = {
                "id": [hashlib.sha256(value).hexdigest() for value in texts],
                "source": [portable(name) for name in batch["source"].to_pylist()],
                "split": [split] * len(batch),
                "quality_score": rows["quality_score"],
                "kept": rows["kept"],
                "text": batch["text"],
            }
            table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
            if room <= 0:
                stack.close()  # the file before
                file = folder / f"{split}-{number:05d}.parquet"
                writer = stack.enter_context(pq.ParquetWriter(file, schema, compression="zstd"))
                number, room = number + 1, FILE_BYTES
            writer.write_table(table)
            room -= batch.nbytes
            examples, total = examples + len(table), total + table.nbytes
    return {"num_examples": examples, "num_bytes": total}


def _scores(run: Path, split: str) -> pa.Table:
    """id, quality_score and kept of a split's documents in their order; kept is null where the filter does not say."""
    table = pq.read_table(run / "data" / "scores" / "scores.parquet", columns=["id", "split", "quality_score"])
    table = table.filter(pc.equal(table["split"].cast(pa.string()), split)).drop_columns("split")
    path = run / "data" / "quality" / f"{'kept' if split == 'train' else 'heldout'}.parquet"
    if not path.exists():
        return table.append_column("kept", pa.nulls(len(table), pa.bool_())).combine_chunks()
    chosen = pq.read_table(path)
    if "kept" in chosen.column_names:
        chosen = chosen.filter(chosen["kept"])
    kept = np.isin(documents.ids_to_uint64(table["id"]), documents.ids_to_uint64(chosen["id"]))
    return table.append_column("kept", pa.array(kept)).combine_chunks()


def _metadata(
    recipe: Recipe, schema: pa.Schema, counts: dict[str, dict[str, int]], text: bool, output: Path
) -> DatasetCardData:
    """The header of the data set's card: what the Hub shows, and what `datasets` reads."""
    number = sum(count["num_examples"] for count in counts.values())
    licenses = sorted({source.license for source in recipe.data.sources if source.license}) if text else []
    metadata = DatasetCardData(
        language=["en"],
        multilinguality="monolingual",
        size_categories=[next((name for name, limit in SIZES if number < limit), "10M<n<100M")],
        task_categories=["text-generation"],
        tags=["quality-filter", "nanophi"],
        pretty_name=f"{recipe.card.title or recipe.name}: {'scored documents' if text else 'quality scores'}",
        **({"license": licenses if len(licenses) > 1 else licenses[0]} if licenses else license_of(recipe)),
    )
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in counts]
    MetadataConfigs({"default": {"data_files": files}}).to_dataset_card_data(metadata)
    info = datasets.DatasetInfo(
        features=datasets.Features.from_arrow_schema(schema),
        splits=datasets.SplitDict.from_split_dict([{"name": split, **count} for split, count in counts.items()]),
        download_size=sum(path.stat().st_size for path in (output / "data").iterdir()),
        dataset_size=sum(count["num_bytes"] for count in counts.values()),
        config_name="default",
    )
    datasets.info.DatasetInfosDict({"default": info}).to_dataset_card_data(metadata)
    return metadata


def _report(run: Path, portable: secrets.PathRemover) -> str:
    """The run's report on its filter, without title and examples."""
    quality = portable(read_json(run / "data" / "quality" / "quality.json"))
    tokens = run / "data" / "tokens" / "tokens.json"
    bytes_per_token = read_json(tokens)["train"]["bytes_per_token"] if tokens.exists() else None
    return quality_report.markdown({**quality, "examples": {}}, bytes_per_token).partition("\n\n")[2]
