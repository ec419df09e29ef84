"""Joins texts with scores that somebody published without them (`nanophi quality join`)."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.data import sources
from nanophi.files import UserError, check_own_folder, replace_tree, user_errors, write_text
from nanophi.inputs import split_revision
from nanophi.recipe import Source

COLUMNS = ("id", "source", "split", "quality_score", "kept")
FILE = "data/{split}-00000-of-00001.parquet"
"""So that `datasets` finds the splits by the files' names."""
MADE_BY = "Written by `nanophi quality join`."


@user_errors("the scores cannot be joined; --debug shows where it stopped")
def join_files(files: str, scores: str, output: Path, text_column: str = "text") -> dict[str, int]:
    """Write a data set of the documents that are both in `files` and in `scores`, in the order of the scores.

    The texts that are in both are held in memory.

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
    wanted = {key for table in tables.values() for key in table["id"].to_pylist()}
    texts: dict[str, str] = {}
    unknown = 0
    tally = sources.Tally()
    source = Source(files=files, text_column=text_column)
    for part in sources.plan(source, None)[0]:
        for document in sources.read(source, part, None, tally):
            key = hashlib.sha256(document.text).hexdigest()
            if key in wanted:
                texts.setdefault(key, document.text.decode())
            else:
                unknown += 1
    sources.check_usable(files, tally.read.total(), tally.dropped_total(), tally.refused, 1.0)
    if not texts:
        raise UserError(f"none of the {unknown} texts of {files} is among the {len(wanted)} documents of {scores}")
    joined = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.{os.getpid()}.", dir=output.parent) as scratch:
        work = Path(scratch) / "joined"
        (work / "data").mkdir(parents=True)
        for split, table in tables.items():
            table = table.append_column("text", pa.array([texts.get(key) for key in table["id"].to_pylist()]))
            table = table.filter(table["text"].is_valid())
            joined += len(table)
            if len(table):
                pq.write_table(table, work / FILE.format(split=split), compression="zstd", row_group_size=1024)
        write_text(work / "README.md", f"{MADE_BY}\n\nTexts of {joined} documents with the scores of {scores}.\n")
        replace_tree(work, output)
    return {"joined": joined, "scored": sum(map(len, tables.values())), "unknown": unknown}


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
