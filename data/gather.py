"""Gathers the documents of a recipe: reads the sources, cleans, removes repeats and evaluation items, holds some out.

    output/train-NNNNN.parquet    id (16 hex digits of the text's SHA-256), text, source, [columns]
    output/heldout-NNNNN.parquet  likewise
    output/documents.json         what was read, kept and dropped, by source and reason
    output/duplicates.parquet     id, source, reason (exact, near), kept (id of the document that stayed)
    output/contamination.json     evaluation items found, by benchmark (if they were looked for)

The corpus is cut into parts of about `PART_BYTES`, each of which is read and hashed by one process in small batches;
only hashes are looked at together. So memory does not grow with the corpus but for 600 bytes per document, most of
them in a memory-mapped file.
"""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.data import contamination, deduplication, installed_docs
from nanophi.data.ngrams import hash_words
from nanophi.data.parallel import run_parts
from nanophi.files import UserError, read_json, write_json
from nanophi.recipe import Data, Source

PART_BYTES = 16 << 20
BATCH_BYTES = 4 << 20
MAXIMUM_DOCUMENT_BYTES = 10_000_000
TRAIN, HELDOUT, EXACT, NEAR, CONTAMINATED, HELDOUT_NEAR = range(6)
REASONS = {
    EXACT: "exact_duplicate",
    NEAR: "near_duplicate",
    CONTAMINATED: "contaminated",
    HELDOUT_NEAR: "heldout_near_train",
}

Origin = tuple[Any, ...]
"""Where a part is read from: `("embedded", groups)`, `("parquet", path, first row group, last)`, `("jsonl", path)`,
`("text", paths)`, `("hub", first row, last)` or `("hub-stream", shard, shards)`."""


def fingerprint(data: Data) -> Any:
    """JSON-able identity of what the sources hold now: versions, or files with sizes and modification times."""
    result: list[Any] = []
    for source in data.sources:
        if source.embedded:
            result.append(installed_docs.inputs())
        elif source.files:
            result.append(_stamps(_files(source)))
        else:
            identity: dict[str, Any] = {
                "hub": source.hub,
                "config": source.config,
                "split": source.split,
                "revision": source.revision,
            }
            if Path(str(source.hub)).is_dir():
                identity["files"] = _stamps(sorted(path for path in Path(str(source.hub)).rglob("*") if path.is_file()))
            result.append(identity)
    if data.decontamination.benchmarks:
        folder = Path(data.decontamination.benchmarks)
        result.append(_stamps(sorted(path for path in folder.rglob("*") if path.is_file())))
    return result


def _stamps(paths: Sequence[Path]) -> list[list[Any]]:
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def gather(data: Data, output: Path, columns: Sequence[str] = ()) -> dict[str, Any]:
    """Write the documents of `data` to `output` (see the module) and return the counts of `documents.json`.

    Args:
        data: the recipe's section. Which documents are held out depends on their text alone, so that runs with
            different seeds are measured on the same ones.
        output: folder to create; goes on where a killed attempt left it.
        columns: numeric columns of the sources to keep, as float64.

    Raises:
        UserError: if a source cannot be read, or nothing is left.
    """
    done = output / "documents.json"
    if done.exists():
        return read_json(done)
    output.mkdir(parents=True, exist_ok=True)
    work = output / ".parts"
    parts = [
        (number, source, origin) for number, source in enumerate(data.sources) for origin in _plan(source, columns)
    ]
    benchmarks = _index_benchmarks(data, work)
    read = run_parts(
        _read_part,
        [(*part, tuple(columns), benchmarks) for part in parts],
        work / "read",
        "reading documents",
        data.workers,
        data.engine,
    )
    documents = _Documents(work, [part["documents"] for part in read])
    if len(documents.ids) == 0:
        raise UserError(f"the sources hold no usable document (dropped: {_total(read, 'dropped') or 'none read'})")
    held = [data.sources[part["origin"]].heldout for part in read]
    held_sources = np.repeat(held, [part["documents"] for part in read])
    decisions, leaders, contaminated = _decide(data, documents, held_sources)
    if not (decisions == TRAIN).any():
        raise UserError(f"no document is left to train on: {_describe(decisions)}")
    np.save(work / "decisions.npy", decisions)
    starts = np.cumsum([0] + [part["documents"] for part in read])
    written = run_parts(
        _write_part,
        [(work / "read" / f"{index:05d}.parquet", int(starts[index]), output, index) for index in range(len(parts))],
        work / "written",
        "writing documents",
        data.workers,
        data.engine,
    )
    summary = _summary(data, read, documents, decisions, leaders)
    if sum(part["train"] + part["heldout"] for part in written) != summary["train"] + summary["heldout"]:
        raise UserError(f"{output}: documents were lost between reading and writing; delete the run's .work folder")
    _write_duplicates(output / "duplicates.parquet", documents, decisions, leaders)
    if benchmarks is not None:
        index = contamination.BenchmarkIndex.load(benchmarks)
        hits = [(f"{documents.ids[row]:016x}", documents.source(row), items) for row, items in contaminated]
        report = contamination.report(index, hits)
        write_json(output / "contamination.json", report)
        summary["contamination"] = {
            name: {key: value for key, value in entry.items() if key != "examples"} for name, entry in report.items()
        }
    write_json(done, summary)
    shutil.rmtree(work)
    return summary


# Planning and reading


def read_texts(source: Source) -> Iterator[tuple[str, str, bytes]]:
    """`(where, source, text)` of every usable document of one source, in order; text as clean UTF-8."""
    default = source.name or source.hub or source.files or "embedded"
    for origin in _plan(source, ()):
        for number, (where, raw, name, _) in enumerate(_rows(source, origin, ())):
            if source.max_documents is not None and number >= source.max_documents:
                break
            reason, text = _clean(raw)
            if reason is None:
                yield where, default if name is None else str(name), text


def _plan(source: Source, columns: Sequence[str]) -> list[Origin]:
    """The parts of a source. A source with `max_documents` is one part, whose reading stops there."""
    if source.embedded:
        if columns:
            raise UserError(
                f"the embedded corpus has no column '{columns[0]}'; use quality.scorer 'linear' or 'model:'"
            )
        groups = installed_docs.groups()
        step = len(groups) if source.max_documents else 16
        return [("embedded", tuple(groups[start : start + step])) for start in range(0, len(groups), step)]
    if source.hub:
        return _plan_hub(source, columns)
    origins: list[Origin] = []
    texts: list[Path] = []
    for path in _files(source):
        if path.suffix == ".parquet":
            origins.extend(_plan_parquet(path, source, columns))
        elif path.suffix == ".txt":
            texts.append(path)
            if sum(text.stat().st_size for text in texts) >= PART_BYTES:
                origins.append(("text", tuple(texts)))
                texts = []
        else:
            origins.append(("jsonl", path))
    if texts:
        if columns or source.source_column:
            raise UserError(f"source {source.files}: .txt files have no column '{[*columns, source.source_column][0]}'")
        origins.append(("text", tuple(texts)))
    return [("files", tuple(origins))] if source.max_documents else origins


def _files(source: Source) -> list[Path]:
    # `Path.glob` refuses absolute patterns.
    paths = [Path(path) for path in sorted(glob.glob(str(source.files), recursive=True))]  # noqa: PTH207
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise UserError(f"source {source.files}: no such file")
    for path in paths:
        if not path.name.endswith((".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")):
            raise UserError(f"source {path}: not a .parquet, .jsonl, .jsonl.gz, .jsonl.zst or .txt file")
    return paths


def _plan_parquet(path: Path, source: Source, columns: Sequence[str]) -> list[Origin]:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a whole parquet file ({_first_line(error)})") from None
    for column in _wanted(source, columns):
        if column not in file.schema_arrow.names:
            raise UserError(f"{path} has no column '{column}'; it has {', '.join(file.schema_arrow.names)}")
    origins: list[Origin] = []
    first, size = 0, 0
    for group in range(file.num_row_groups):
        size += file.metadata.row_group(group).total_byte_size
        if size >= PART_BYTES or group == file.num_row_groups - 1:
            origins.append(("parquet", path, first, group + 1))
            first, size = group + 1, 0
    return origins


def _plan_hub(source: Source, columns: Sequence[str]) -> list[Origin]:
    dataset = _load_hub(source)
    names = dataset.column_names or list(next(iter(dataset), {}))
    for column in _wanted(source, columns):
        if column not in names:
            raise UserError(f"dataset {source.hub} has no column '{column}'; it has {', '.join(names)}")
    if source.streaming:
        count = 1 if source.max_documents else dataset.num_shards
        return [("hub-stream", shard, count) for shard in range(count)]
    rows = len(dataset)
    if source.max_documents:
        return [("hub", 0, min(rows, source.max_documents))]
    step = max(1, min(rows, int(rows * PART_BYTES / max(1, dataset.dataset_size or dataset.data.nbytes))))
    return [("hub", start, min(rows, start + step)) for start in range(0, rows, step)]


def _load_hub(source: Source) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            source.hub, source.config, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"dataset {source.hub} cannot be loaded: {_first_line(error)}") from None


def _wanted(source: Source, columns: Sequence[str]) -> list[str]:
    return [source.text_column, *([source.source_column] if source.source_column else []), *columns]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


TOO_LARGE = object()
"""Stands for a text file that is not read because of its size."""

Row = tuple[str, Any, Any, tuple[Any, ...]]
"""`(where, text, source, columns)`; the text is bytes, str, or whatever else the source holds in its place."""


def _rows(source: Source, origin: Origin, columns: Sequence[str]) -> Iterator[Row]:
    kind = origin[0]
    if kind == "files":
        for part in origin[1]:
            yield from _rows(source, part, columns)
    elif kind == "embedded":
        for group in origin[1]:
            for number, (name, text) in enumerate(installed_docs.documents(group)):
                yield f"{group}:{number}", text, name, ()
    elif kind == "parquet":
        yield from _parquet_rows(source, origin[1], range(origin[2], origin[3]), columns)
    elif kind == "jsonl":
        yield from _json_rows(source, origin[1], columns)
    elif kind == "text":
        for path in origin[1]:
            yield str(path), path.read_bytes() if path.stat().st_size <= MAXIMUM_DOCUMENT_BYTES else TOO_LARGE, None, ()
    else:
        dataset = _load_hub(source)
        if kind == "hub":
            dataset = dataset.select(range(origin[1], origin[2]))
        elif origin[2] > 1:
            dataset = dataset.shard(origin[2], origin[1])
        number = 0
        for batch in dataset.select_columns(_wanted(source, columns)).iter(256):
            for row, text in enumerate(batch[source.text_column]):
                label = batch[source.source_column][row] if source.source_column else None
                yield f"{source.hub}:{origin[1]}:{number}", text, label, tuple(batch[key][row] for key in columns)
                number += 1


def _parquet_rows(source: Source, path: Path, groups: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
    names = list(dict.fromkeys(_wanted(source, columns)))
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256, row_groups=list(groups), columns=names):
                texts = batch.column(source.text_column)
                if pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type):
                    # As bytes: arrow does not check UTF-8 when it reads, and one bad document must not fail the batch.
                    texts = texts.cast(pa.large_binary())
                sources = batch.column(source.source_column).to_pylist() if source.source_column else None
                extras = list(zip(*(batch.column(column).to_pylist() for column in columns), strict=True))
                for row, text in enumerate(texts.to_pylist()):
                    where = f"{path}:{groups[0]}:{number}"
                    yield where, text, sources[row] if sources else None, extras[row] if extras else ()
                    number += 1
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a whole parquet file ({_first_line(error)})") from None


def _json_rows(source: Source, path: Path, columns: Sequence[str]) -> Iterator[Row]:
    seen = False
    number = 0
    try:
        with _open_lines(path) as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except UnicodeDecodeError:
                    yield where, b"\xff", None, (None,) * len(columns)
                    continue
                except (json.JSONDecodeError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    yield where, None, None, (None,) * len(columns)
                    continue
                for column in columns:
                    if column not in row:
                        raise UserError(f"{where} has no column '{column}'; it has {', '.join(row)}")
                seen = seen or source.text_column in row
                label = row.get(source.source_column) if source.source_column else None
                yield where, row.get(source.text_column), label, tuple(row[column] for column in columns)
    except (EOFError, OSError, gzip.BadGzipFile, pa.ArrowException) as error:
        raise UserError(f"{path} ends early or is damaged after line {number} ({_first_line(error)})") from None
    if number and not seen:
        raise UserError(f"{path} has no line with a column '{source.text_column}'")


def _open_lines(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _clean(text: Any) -> tuple[str | None, bytes]:
    """`(reason to drop it or None, UTF-8 text)`."""
    if text is TOO_LARGE:
        return "oversize", b""
    if isinstance(text, bytes):
        if len(text) > MAXIMUM_DOCUMENT_BYTES:
            return "oversize", b""
        try:
            text = text.decode()
        except UnicodeDecodeError:
            return "invalid_utf8", b""
    if not isinstance(text, str):
        return "not_text", b""
    try:
        encoded = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").strip().encode()
    except UnicodeEncodeError:  # lone surrogates, which JSON can spell
        return "invalid_utf8", b""
    if not encoded:
        return "empty", b""
    return ("oversize", b"") if len(encoded) > MAXIMUM_DOCUMENT_BYTES else (None, encoded)


def _read_part(
    number_of_source: int, source: Source, origin: Origin, columns: tuple[str, ...], benchmarks: Path | None, path: Path
) -> dict[str, Any]:
    """Clean and hash one part. Writes `.parquet` (documents), `.ids` (uint64) and `.signatures` (uint32)."""
    schema = pa.schema(
        [("id", pa.string()), ("text", pa.string()), ("source", pa.string())]
        + [(column, pa.float64()) for column in columns]
    )
    default = source.name or source.hub or source.files or "embedded"
    read: Counter[str] = Counter()
    size: Counter[str] = Counter()
    dropped: dict[str, Counter[str]] = {}
    refused: list[dict[str, str]] = []
    hits: list[list[Any]] = []
    documents = 0
    batch: list[tuple[bytes, str, tuple[Any, ...]]] = []
    with (
        pq.ParquetWriter(path.with_suffix(".parquet"), schema, compression="zstd") as writer,
        path.with_suffix(".ids").open("wb") as ids,
        path.with_suffix(".signatures").open("wb") as signatures,
    ):

        def flush() -> None:
            nonlocal documents
            texts = [text for text, _, _ in batch]
            digests = [hashlib.sha256(text).digest()[:8] for text in texts]
            words = hash_words(texts)
            writer.write_table(
                pa.table(
                    [
                        pa.array([digest.hex() for digest in digests], pa.string()),
                        pa.array(texts, pa.binary()).cast(pa.string()),
                        pa.array([name for _, name, _ in batch], pa.string()),
                        *(
                            pa.array([_number(extra[index]) for _, _, extra in batch], pa.float64())
                            for index in range(len(columns))
                        ),
                    ],
                    schema=schema,
                )
            )
            ids.write(b"".join(digests))
            signatures.write(deduplication.signatures(words).tobytes())
            if benchmarks is not None:
                found = contamination.find(_benchmark_index(benchmarks), words)
                hits.extend([documents + row, items] for row, items in enumerate(found) if items)
            documents += len(batch)
            batch.clear()

        pending = 0
        for number, (where, raw, name, extra) in enumerate(_rows(source, origin, columns)):
            if source.max_documents is not None and number >= source.max_documents:
                break
            label = default if name is None else str(name)
            read[label] += 1
            reason, text = _clean(raw)
            if reason is not None:
                dropped.setdefault(label, Counter())[reason] += 1
                if reason != "empty" and len(refused) < 20:
                    refused.append({"document": where, "reason": reason})
                continue
            size[label] += len(text)
            batch.append((text, label, extra))
            pending += len(text)
            if pending >= BATCH_BYTES:
                flush()
                pending = 0
        if batch:
            flush()
    return {
        "origin": number_of_source,
        "documents": documents,
        "read": dict(read),
        "bytes": dict(size),
        "dropped": {name: dict(reasons) for name, reasons in dropped.items()},
        "refused": refused,
        "contaminated": hits,
    }


def _number(value: Any) -> float | None:
    return None if value is None or isinstance(value, str | bytes | list | dict) else float(value)


def _index_benchmarks(data: Data, work: Path) -> Path | None:
    if data.decontamination.benchmarks is None:
        return None
    path = work / "benchmarks.npz"
    if not path.exists():
        index = contamination.load_benchmarks(Path(data.decontamination.benchmarks), data.decontamination.ngram)
        work.mkdir(parents=True, exist_ok=True)
        partial = work / "benchmarks.part.npz"
        index.save(partial)
        partial.replace(path)
    return path


@functools.lru_cache(maxsize=1)
def _benchmark_index(path: Path) -> contamination.BenchmarkIndex:
    return contamination.BenchmarkIndex.load(path)


# Decisions over the whole corpus


class _Documents:
    """Hashes, signatures and sources of all parts' documents, in order."""

    def __init__(self, work: Path, counts: Sequence[int]) -> None:
        folder = work / "read"
        paths = [folder / f"{index:05d}" for index in range(len(counts))]
        self.ids = np.concatenate([np.fromfile(path.with_suffix(".ids"), ">u8") for path in paths]).astype(np.uint64)
        if len(self.ids) != sum(counts):
            raise UserError(f"{folder} is incomplete; delete it and run again")
        joined = work / "signatures.bin"
        with joined.open("wb") as file:
            for path in paths:
                with path.with_suffix(".signatures").open("rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
        shape = (len(self.ids), deduplication.PERMUTATIONS)
        self.signatures = (
            np.memmap(joined, np.uint32, "r", shape=shape) if len(self.ids) else np.zeros(shape, np.uint32)
        )
        self.sources: list[str] = []
        codes = []
        self.bytes = np.zeros(len(self.ids), np.int64)
        self.hits: list[tuple[int, list[int]]] = []
        start = 0
        known: dict[str, int] = {}
        for path, count in zip(paths, counts, strict=True):
            with pq.ParquetFile(path.with_suffix(".parquet"), read_dictionary=["source"]) as file:
                for batch in file.iter_batches(columns=["source"]):
                    column = batch.column("source")
                    names = column.dictionary.to_pylist()
                    mapping = np.array([known.setdefault(name, len(known)) for name in names], np.int32)
                    codes.append(mapping[column.indices.to_numpy(zero_copy_only=False)])
            self.hits.extend(
                (start + row, items) for row, items in read_json(path.with_suffix(".json"))["contaminated"]
            )
            start += count
        self.sources = list(known)
        self.codes = np.concatenate(codes) if codes else np.zeros(0, np.int32)

    def source(self, row: int) -> str:
        return self.sources[int(self.codes[row])]


def _decide(
    data: Data, documents: _Documents, held_sources: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, list[int]]]]:
    """For each document what becomes of it, uint8; the index of the one it repeats (or its own); contaminated ones.

    `held_sources`, bool `[documents]`, says which documents are of sources that are held out as a whole.
    """
    count = len(documents.ids)
    decisions = np.full(count, TRAIN, np.uint8)
    leaders = np.arange(count)
    first = deduplication.exact_duplicates(documents.ids)
    unique = first == leaders
    if data.deduplication.exact:
        decisions[~unique] = EXACT
        leaders = first
    # Also without near-duplicate removal: held-out documents must not have near-duplicates among those trained on.
    near = deduplication.near_duplicates(documents.signatures, unique, data.deduplication.similarity)
    if data.deduplication.near:
        repeated = unique & (near != np.arange(count))
        decisions[repeated] = NEAR
        leaders = np.where(repeated, near, leaders)
    contaminated = [(row, items) for row, items in documents.hits if decisions[row] == TRAIN]
    decisions[[row for row, _ in contaminated]] = CONTAMINATED
    candidates = np.flatnonzero(decisions == TRAIN)
    if len(candidates) < 2:
        raise UserError(f"{len(candidates)} documents are left, too few to hold one out: {_describe(decisions)}")
    if held_sources.any():
        heldout = candidates[held_sources[candidates]]
        if len(heldout) in (0, len(candidates)):
            where = "repeat the other sources" if len(heldout) == 0 else "are all that is left"
            raise UserError(f"the documents of the held-out sources {where}: {_describe(decisions)}")
    else:
        # By hash: the same document is held out in every run, whatever else the corpus holds.
        order = candidates[np.argsort(documents.ids[candidates], kind="stable")]
        chosen = int((documents.ids[order] < np.uint64(data.heldout_fraction * 2**64)).sum())
        heldout = order[: max(1, min(chosen, data.heldout_max_documents))]
    decisions[heldout] = HELDOUT
    if not (data.deduplication.near and data.deduplication.exact):
        cluster = near[first]
        trained = np.zeros(count, bool)
        trained[cluster[decisions == TRAIN]] = True
        decisions[heldout[trained[cluster[heldout]]]] = HELDOUT_NEAR
        if not (decisions == HELDOUT).any():
            raise UserError(
                "every held-out document has a near-duplicate among the others; set deduplication.near: true"
            )
    return decisions, leaders, contaminated


def _describe(decisions: np.ndarray) -> str:
    return ", ".join(f"{reason} {int((decisions == code).sum())}" for code, reason in REASONS.items())


# Writing


def _write_part(part: Path, start: int, output: Path, index: int, path: Path) -> dict[str, Any]:
    """Write the documents that stay of one part to its train and held-out shards."""
    counts = {"train": 0, "heldout": 0}
    decisions = np.load(output / ".parts" / "decisions.npy", mmap_mode="r")
    writers: dict[str, pq.ParquetWriter] = {}
    try:
        with pq.ParquetFile(part) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                codes = np.asarray(decisions[start : start + len(table)])
                start += len(table)
                for split, code in (("train", TRAIN), ("heldout", HELDOUT)):
                    kept = table.filter(pa.array(codes == code))
                    if len(kept):
                        if split not in writers:
                            shard = output / f"{split}-{index:05d}.parquet"
                            writers[split] = pq.ParquetWriter(shard, kept.schema, compression="zstd")
                        writers[split].write_table(kept)
                        counts[split] += len(kept)
    finally:
        for writer in writers.values():
            writer.close()
    return counts


def _write_duplicates(path: Path, documents: _Documents, decisions: np.ndarray, leaders: np.ndarray) -> None:
    rows = np.flatnonzero((decisions == EXACT) | (decisions == NEAR))
    rows = rows[np.lexsort((rows, leaders[rows]))]
    table = pa.table(
        {
            "id": pa.array([f"{value:016x}" for value in documents.ids[rows].tolist()], pa.string()),
            "source": pa.array([documents.source(row) for row in rows.tolist()], pa.string()),
            "reason": pa.array(["exact" if decisions[row] == EXACT else "near" for row in rows], pa.string()),
            "kept": pa.array([f"{value:016x}" for value in documents.ids[leaders[rows]].tolist()], pa.string()),
        }
    )
    pq.write_table(table, path, compression="zstd")


def _total(parts: Sequence[dict[str, Any]], key: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        for reasons in part[key].values():
            total.update(reasons)
    return dict(sorted(total.items()))


def _summary(
    data: Data, read: Sequence[dict[str, Any]], documents: _Documents, decisions: np.ndarray, leaders: np.ndarray
) -> dict[str, Any]:
    names = sorted({name for part in read for name in part["read"]})
    codes = {name: code for code, name in enumerate(documents.sources)}
    origins: dict[str, int] = {}
    for part in read:
        for name in part["read"]:
            origin = origins.setdefault(name, part["origin"])
            if data.sources[origin].weight != data.sources[part["origin"]].weight:
                raise UserError(f"two sources of different weight give the same name '{name}'; set their 'name'")
    sources: dict[str, Any] = {}
    for name in names:
        mine = decisions[documents.codes == codes[name]] if name in codes else decisions[:0]
        dropped = Counter({reason: int((mine == code).sum()) for code, reason in REASONS.items()})
        for part in read:
            dropped.update(part["dropped"].get(name, {}))
        sources[name] = {
            "origin": origins[name],
            "read": sum(part["read"].get(name, 0) for part in read),
            "bytes": sum(part["bytes"].get(name, 0) for part in read),
            "train": int((mine == TRAIN).sum()),
            "heldout": int((mine == HELDOUT).sum()),
            "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
        }
    total: Counter[str] = Counter()
    for source in sources.values():
        total.update(source["dropped"])
    return {
        "read": sum(source["read"] for source in sources.values()),
        "bytes": sum(source["bytes"] for source in sources.values()),
        "train": int((decisions == TRAIN).sum()),
        "heldout": int((decisions == HELDOUT).sum()),
        "dropped": dict(sorted(total.items())),
        "duplicates": deduplication.cluster_counts(leaders),
        "sources": sources,
        "refused": [entry for part in read for entry in part["refused"]][:100],
    }
