"""The one reader of a run's documents (`data/documents/`), for every stage after `gather`.

train-NNNNN.parquet, heldout-NNNNN.parquet   id (16 hex digits of the text's SHA-256), text, source, [columns]
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanophi.core.errors import UserError, one_line

SPLITS = ("train", "heldout")


def shards(documents: Path, split: str) -> list[Path]:
    """The files of a split (`train` or `heldout`), in order. Raises `UserError` if there are none."""
    found = sorted(documents.glob(f"{split}-*.parquet"))
    if not found:
        raise UserError(f"{documents} holds no {split}-*.parquet; run `nanophi prepare` again")
    return found


def batches(paths: Path | Sequence[Path], columns: Sequence[str], rows: int | None = 256) -> Iterator[pa.RecordBatch]:
    """The documents of some shards, in order, with some columns in the file's order. Raises `UserError` for a bad file.

    `rows` are documents per batch; None: as they were written, about 4 MB of text at a time.
    """
    for path in [paths] if isinstance(paths, Path) else paths:
        try:
            with pq.ParquetFile(path) as file:
                absent = [column for column in columns if column not in file.schema_arrow.names]
                if absent:
                    raise UserError(f"{path} has no column '{absent[0]}'; it has {', '.join(file.schema_arrow.names)}")
                if rows is not None:
                    yield from file.iter_batches(batch_size=rows, columns=list(columns))
                for group in range(file.num_row_groups if rows is None else 0):
                    yield from file.read_row_group(group, columns=list(columns)).combine_chunks().to_batches()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}); run `nanophi prepare` again") from None


def text_bytes(paths: Iterable[Path]) -> int:
    """About how many bytes some shards hold uncompressed, from their metadata alone."""
    metadata = (pq.read_metadata(path) for path in paths)
    return sum(file.row_group(index).total_byte_size for file in metadata for index in range(file.num_row_groups))


def id_of(text: str | bytes) -> str:
    """A document's id: the first 16 hex digits of its text's SHA-256."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def ids_to_uint64(ids: pa.Array | pa.ChunkedArray | Iterable[str]) -> np.ndarray:
    """Ids as numbers, uint64 `[documents]`."""
    values = ids.to_pylist() if isinstance(ids, pa.Array | pa.ChunkedArray) else ids
    return np.array([int(value, 16) for value in values], np.uint64)


def uniform_from_id(ids: np.ndarray | pa.Array | Iterable[str], seed: int | None = None) -> np.ndarray:
    """The draw by hash: a number in [0, 1) for each id that depends on it and the seed alone, float64 `[documents]`.

    Without a seed the numbers are in the order of the ids.
    """
    numbers = ids if isinstance(ids, np.ndarray) else ids_to_uint64(ids)
    if seed is not None:
        numbers = numbers * np.uint64((2 * seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    return np.asarray(numbers / 2.0**64)


def find(documents: Path, wanted: Collection[str], columns: Sequence[str], split: str = "train") -> dict[str, Any]:
    """Some documents by id: `{id: {column: value}}`; ids that are not there are left out."""
    names, values = list(dict.fromkeys(["id", *columns])), pa.array(sorted(wanted), pa.string())
    found = (
        batch.filter(pc.is_in(batch["id"], values)).select(names).to_pylist()
        for batch in batches(shards(documents, split), names, None)
    )
    return {row["id"]: row for rows in found for row in rows}


def heldout(documents: Path, columns: Sequence[str] = ("id", "source", "text")) -> list[dict[str, Any]]:
    """The held-out documents in the order in which the evaluation numbers them: by the SHA-256 of their ids."""
    paths = shards(documents, "heldout")
    names = list(dict.fromkeys(["id", *columns]))
    rows = [row for batch in batches(paths, names, None) for row in batch.select(names).to_pylist()]
    return sorted(rows, key=lambda row: id_of(row["id"]))
