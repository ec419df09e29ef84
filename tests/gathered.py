"""Rows in files, and the section of a recipe that gathers them in this process: for the tests of the data stages."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.core.recipe import Data
from nanophi.data import gather
from nanophi.data.documents import shards


def data(*sources, **fields):
    """Sources, or files of documents; those that are alike but not equal all stay."""
    entries = [source if isinstance(source, dict) else {"files": str(source)} for source in sources]
    return Data.model_validate({"sources": entries, "deduplication": {"near": False}, "workers": 1, **fields})


def write(path, rows):
    """A file of rows or texts, by its name of JSON lines or Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row if isinstance(row, dict) else {"text": row} for row in rows]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents_of(folder, rows):
    """The folder of documents that these rows become."""
    gather.gather(data(write(folder / "in.jsonl", rows)), folder / "documents")
    return folder / "documents"


def rows_of(documents, split):
    """The documents of a split, in order."""
    return [row for path in shards(documents, split) for row in pq.read_table(path).to_pylist()]
