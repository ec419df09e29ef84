"""Gathers the documents of a recipe: reads the sources, removes repeats and evaluation items, holds some out.

    output/train-NNNNN.parquet    id (16 hex digits of the text's SHA-256), text, source, [score]
    output/heldout-NNNNN.parquet  the same columns
    output/documents.json         what was read, kept and dropped, by source and reason
    output/duplicates.parquet     id, source, reason (exact, near), kept (id of the document that stayed)
    output/contamination.json     evaluation items found, by benchmark (with data.decontamination.benchmarks)

The corpus is cut into parts of about 16 MB, each of which is read and hashed by one process in small batches; only
hashes are compared across the corpus. Memory therefore grows by 600 bytes per document only, most of them in a
memory-mapped file.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json
from nanophi.core.formatting import integer
from nanophi.core.names import local
from nanophi.core.recipe import Data, Source
from nanophi.data import contamination, deduplication, sources
from nanophi.data.ngrams import hash_words
from nanophi.data.parallel import run_parts

BATCH_BYTES = 4 << 20
TRAIN, HELDOUT, EXACT, NEAR, CONTAMINATED, HELDOUT_NEAR = range(6)
REASONS = {
    EXACT: "exact_duplicate",
    NEAR: "near_duplicate",
    CONTAMINATED: "contaminated",
    HELDOUT_NEAR: "heldout_near_train",
}

SCORE = "score"
"""The documents' column with the number that came with the data (quality.scorer `column:...`), float64."""


def gather(
    data: Data, output: Path, score: str | None = None, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Write the documents of `data` to `output` (see the module) and return the counts of `documents.json`.

    Args:
        data: the recipe's section. Which documents are held out depends on their text alone, so that runs with
            different seeds are measured on the same ones.
        output: folder to create; resumes where a killed attempt stopped.
        score: column of the sources with a quality score, kept as `SCORE`.
        report: called with a line for each source: documents read, kept, and dropped by reason.

    Raises:
        UserError: if a source cannot be read, keeps nothing, or has more than `data.max_dropped` unusable documents.
    """
    done = output / "documents.json"
    if done.exists():
        return read_json(done)
    output.mkdir(parents=True, exist_ok=True)
    work = output / ".parts"
    parts: list[tuple[int, Source, sources.Part]] = []
    for number, source in enumerate(data.sources):
        planned, others = sources.plan(source, score)
        parts += [(number, source, part) for part in planned]
        if others:
            names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            report(f"{sources.name_of(source)}: {len(others)} other files are not read: {names}")
    _benchmark_index.cache_clear()  # this folder may have held another one
    benchmarks = _index_benchmarks(data, work)
    read = run_parts(
        _read_part,
        [(*part, score, benchmarks) for part in parts],
        work / "read",
        "reading documents",
        data.workers,
        data.engine,
    )
    _check_read(data, read)
    documents = _Documents(work, [part["documents"] for part in read])
    held = [data.sources[part["origin"]].heldout for part in read]
    held_sources = np.repeat(held, [part["documents"] for part in read])
    whole = {sources.name_of(source) for _, source, part in parts if sources.is_undivided(source, part)}
    remedy = f"; set the separator of {', '.join(sorted(whole))} to split a text file into documents" if whole else ""
    decisions, leaders, contaminated = _decide(data, documents, held_sources, remedy)
    _report_sources(data, read, decisions, report)
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
    summary = _summary(read, documents, decisions, leaders)
    kept = summary["train"] + summary["heldout"]
    if sum(part["train"] + part["heldout"] for part in written) != kept or summary["read"] != kept + sum(
        summary["dropped"].values()
    ):
        raise UserError(f"{output}: documents were lost between reading and writing; delete the run's .work folder")
    _write_duplicates(output / "duplicates.parquet", documents, decisions, leaders)
    if benchmarks is not None:
        index = contamination.BenchmarkIndex.load(benchmarks)
        hits = [(f"{documents.ids[row]:016x}", documents.source(row), items) for row, items in contaminated]
        found = contamination.report(index, hits)
        write_json(output / "contamination.json", found)
        summary["contamination"] = {
            name: {key: value for key, value in entry.items() if key != "examples"} for name, entry in found.items()
        }
    write_json(done, summary)
    shutil.rmtree(work)
    return summary


def _read_part(
    number_of_source: int, source: Source, part: sources.Part, score: str | None, benchmarks: Path | None, path: Path
) -> dict[str, Any]:
    """Clean and hash one part. Writes `.parquet` (documents), `.ids` (uint64) and `.signatures` (uint32)."""
    schema = pa.schema(
        [("id", pa.string()), ("text", pa.string()), ("source", pa.string())]
        + ([(SCORE, pa.float64())] if score else [])
    )
    tally = sources.Tally()
    hits: list[list[Any]] = []
    documents = 0
    batch: list[sources.Document] = []
    with (
        pq.ParquetWriter(path.with_suffix(".parquet"), schema, compression="zstd") as writer,
        path.with_suffix(".ids").open("wb") as ids,
        path.with_suffix(".signatures").open("wb") as signatures,
    ):

        def flush() -> None:
            nonlocal documents
            texts = [document.text for document in batch]
            digests = [hashlib.sha256(text).digest()[:8] for text in texts]
            words = hash_words(texts)
            columns = [
                pa.array([digest.hex() for digest in digests], pa.string()),
                pa.array(texts, pa.binary()).cast(pa.string()),
                pa.array([document.label for document in batch], pa.string()),
            ]
            if score:
                columns.append(pa.array([document.score for document in batch], pa.float64()))
            writer.write_table(pa.table(columns, schema=schema))
            ids.write(b"".join(digests))
            signatures.write(deduplication.signatures(words).tobytes())
            if benchmarks is not None:
                found = contamination.find(_benchmark_index(benchmarks), words)
                hits.extend([documents + row, items] for row, items in enumerate(found) if items)
            documents += len(batch)
            batch.clear()

        pending = 0
        for document in sources.read(source, part, score, tally):
            batch.append(document)
            pending += len(document.text)
            if pending >= BATCH_BYTES:
                flush()
                pending = 0
        if batch:
            flush()
    return {"origin": number_of_source, "documents": documents, **tally.summary(), "contaminated": hits}


def _index_benchmarks(data: Data, work: Path) -> Path | None:
    if data.decontamination.benchmarks is None:
        return None
    path = work / "benchmarks.npz"
    if not path.exists():
        index = contamination.load_benchmarks(local(data.decontamination.benchmarks), data.decontamination.ngram)
        work.mkdir(parents=True, exist_ok=True)
        partial = work / "benchmarks.part.npz"
        index.save(partial)
        partial.replace(path)
    return path


@functools.lru_cache(maxsize=1)
def _benchmark_index(path: Path) -> contamination.BenchmarkIndex:
    return contamination.BenchmarkIndex.load(path)


# What each source gave


def _dropped_of(read: Sequence[dict[str, Any]], number: int) -> Counter[str]:
    """Unusable documents of the recipe's source `number`, by reason."""
    total: Counter[str] = Counter()
    for part in read:
        if part["origin"] == number:
            for reasons in part["dropped"].values():
                total.update(reasons)
    return total


def _origins(read: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Every name with the numbers of the sources that give it."""
    origins: dict[str, list[int]] = {}
    for part in read:
        for name in part["read"]:
            if part["origin"] not in origins.setdefault(name, []):
                origins[name].append(part["origin"])
    return origins


def _check_read(data: Data, read: Sequence[dict[str, Any]]) -> None:
    """What stops the run before hours of work: names that stand for two sources, and sources that lose too much."""
    sources.weights(data.sources, _origins(read))
    for number, source in enumerate(data.sources):
        mine = [part for part in read if part["origin"] == number]
        total = sum(sum(part["read"].values()) for part in mine)
        refused = [entry for part in mine for entry in part["refused"]]
        sources.check_usable(sources.name_of(source), total, _dropped_of(read, number), refused, data.max_dropped)


def _report_sources(
    data: Data, read: Sequence[dict[str, Any]], decisions: np.ndarray, report: Callable[[str], None]
) -> None:
    """A line for each source. Raises `UserError` for one that keeps nothing."""
    origins = np.repeat([part["origin"] for part in read], [part["documents"] for part in read])
    for number, source in enumerate(data.sources):
        mine = decisions[origins == number]
        dropped = _dropped_of(read, number)
        dropped.update({reason: int((mine == code).sum()) for code, reason in REASONS.items()})
        kept = int(((mine == TRAIN) | (mine == HELDOUT)).sum())
        total = kept + dropped.total()
        line = f"{sources.name_of(source)}: {integer(total)} documents read, {integer(kept)} kept"
        report(line + (f", {integer(dropped.total())} dropped ({sources.reasons(dropped)})" if dropped.total() else ""))
        if kept == 0:
            raise UserError(f"source {sources.name_of(source)} keeps nothing: {sources.reasons(dropped)}; leave it out")


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
    data: Data, documents: _Documents, held_sources: np.ndarray, remedy: str
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, list[int]]]]:
    """For each document what becomes of it, uint8; the index of the one it repeats (or its own); contaminated ones.

    `held_sources`, bool `[documents]`, says which documents are of sources that are held out as a whole; `remedy` is
    what to do if there are too few.
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
        dropped = sources.reasons(Counter({reason: int((decisions == code).sum()) for code, reason in REASONS.items()}))
        raise UserError(
            f"{len(candidates)} of {count} documents are left, too few to hold one out"
            + (f" (dropped: {dropped})" if dropped else "")
            + remedy
        )
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


def _summary(
    read: Sequence[dict[str, Any]], documents: _Documents, decisions: np.ndarray, leaders: np.ndarray
) -> dict[str, Any]:
    names = sorted({name for part in read for name in part["read"]})
    codes = {name: code for code, name in enumerate(documents.sources)}
    origins = _origins(read)
    entries: dict[str, Any] = {}
    for name in names:
        mine = decisions[documents.codes == codes[name]] if name in codes else decisions[:0]
        dropped = Counter({reason: int((mine == code).sum()) for code, reason in REASONS.items()})
        for part in read:
            dropped.update(part["dropped"].get(name, {}))
        entries[name] = {
            "origin": origins[name][0],
            "origins": origins[name],
            "read": sum(part["read"].get(name, 0) for part in read),
            "bytes": sum(part["bytes"].get(name, 0) for part in read),
            "train": int((mine == TRAIN).sum()),
            "heldout": int((mine == HELDOUT).sum()),
            "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
        }
    total: Counter[str] = Counter()
    for source in entries.values():
        total.update(source["dropped"])
    return {
        "read": sum(source["read"] for source in entries.values()),
        "bytes": sum(source["bytes"] for source in entries.values()),
        "train": int((decisions == TRAIN).sum()),
        "heldout": int((decisions == HELDOUT).sum()),
        "dropped": dict(sorted(total.items())),
        "duplicates": deduplication.cluster_counts(leaders),
        "sources": entries,
        "refused": [entry for part in read for entry in part["refused"]][:100],
    }
