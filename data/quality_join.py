"""Joins texts with scores that somebody published without them (`nanophi quality join`)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import atomic_folder, check_own_folder, write_text
from nanophi.core.names import split_revision
from nanophi.core.recipe import Source
from nanophi.data import sources

COLUMNS = ("id", "source", "split", "quality_score", "kept")
ROWS = 1024
FILE = "data/{split}-00000-of-00001.parquet"
"""So that `datasets` finds the splits by the files' names."""
MADE_BY = "Written by `nanophi quality join`."


@user_errors("the scores cannot be joined; --debug shows where it stopped")
def join_files(files: str, scores: str, output: Path, text_column: str = "text") -> dict[str, int]:
    """Write a data set of the documents that are both in `files` and in `scores`, in the order of the scores.

    The texts that are in both go through a temporary file beside `output`.

    Args:
        files: file, folder or glob, as a recipe's sources have them.
        scores: data set that `nanophi push --data` published: `ORG/NAME`, `ORG/NAME@REVISION` or a folder.
        output: folder to create; one that this wrote before is replaced.
        text_column: column, or path in it, of files that have columns.

    Returns:
        `{joined, scored, unknown}`: documents in both, in the scores, and texts that the scores do not have.

    Raises:
        UserError: if the scores are anything else, no text is in both, or `output` holds anything else.
    """
    check_own_folder(output, ("README.md", "data"), "quality join")
    if (output / "README.md").exists() and MADE_BY not in (output / "README.md").read_text(encoding="utf-8"):
        raise UserError(f"{output} holds a data set that `nanophi quality join` did not write: choose another folder")
    tables = {split: _read(scores, split) for split in ("train", "heldout")}
    ids = [key for table in tables.values() for key in table["id"].to_pylist()]
    first: dict[str, int] = {}
    rows = np.array([first.setdefault(key, row) for row, key in enumerate(ids)], np.int64)
    begin, size = np.zeros(len(ids), np.int64), np.full(len(ids), -1, np.int64)
    unknown = 0
    tally = sources.Tally()
    source = Source(files=files, text_column=text_column)
    parts = sources.plan(source, None)[0]
    with atomic_folder(output) as work:
        spill = work.with_name("texts")
        with spill.open("wb") as file:
            for document in (document for part in parts for document in sources.read(source, part, None, tally)):
                row = first.get(hashlib.sha256(document.text).hexdigest())
                if row is None:
                    unknown += 1
                elif size[row] < 0:
                    begin[row], size[row] = file.tell(), len(document.text)
                    file.write(document.text)
        sources.check_usable(files, tally.read.total(), tally.dropped_total(), tally.refused, 1.0)
        if (size < 0).all():
            raise UserError(f"none of the {unknown} texts of {files} is among the {len(first)} documents of {scores}")
        texts = np.memmap(spill, np.uint8, "r")
        (work / "data").mkdir()
        joined = start = 0
        for split, table in tables.items():
            mine = rows[start : start + len(table)]
            start += len(table)
            found = np.flatnonzero(size[mine] >= 0)
            joined += len(found)
            if not len(found):
                continue
            schema = table.schema.append(pa.field("text", pa.string()))
            with pq.ParquetWriter(work / FILE.format(split=split), schema, compression="zstd") as writer:
                for first_row in range(0, len(found), ROWS):
                    chosen = found[first_row : first_row + ROWS]
                    column = [texts[begin[row] : begin[row] + size[row]].tobytes() for row in mine[chosen]]
                    text = pa.array(column, pa.binary()).cast(pa.string())
                    writer.write_table(table.take(chosen).append_column("text", text).cast(schema))
        write_text(work / "README.md", f"{MADE_BY}\n\nTexts of {joined} documents with the scores of {scores}.\n")
    return {"joined": joined, "scored": len(ids), "unknown": unknown}


def _read(scores: str, split: str) -> pa.Table:
    """The scores of a split, in order."""
    name, revision = split_revision(scores)
    located = sources.locate(Source(hub=name, revision=revision, split=split))
    parts: list[Any] = []
    for file in located.files:
        with user_errors(f"{file} cannot be read as parquet"):
            schema = pq.read_schema(file)
            missing = [column for column in COLUMNS if column not in schema.names]
            if missing:
                raise UserError(f"{scores} is not a data set of scores: it has no column '{missing[0]}'")
            parts.append(pq.read_table(file, columns=list(COLUMNS)))
    return pa.concat_tables(parts)
