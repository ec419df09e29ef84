"""Gathers the documents of a recipe: reads the sources, removes repeats and evaluation items, holds some out.

Writes train- and heldout-NNNNN.parquet, documents.json (counts by source and reason), duplicates.parquet and
contamination.json. Only hashes are compared across the corpus: 600 bytes per document, most in a memory-mapped file.
"""

import contextlib
import functools
import hashlib
import pickle
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, remove, sha256_of, whole_file, write_json, write_text
from nanophi.core.formatting import integer
from nanophi.core.names import local
from nanophi.core.recipe import Data, Source
from nanophi.data import contamination, deduplication, sources
from nanophi.data.deduplication import exact_duplicates, near_duplicates
from nanophi.data.documents import uniform_from_id
from nanophi.data.ngrams import hash_words
from nanophi.data.parallel import run_parts
from nanophi.data.sources import dropped

TRAIN, HELDOUT, EXACT, NEAR, CONTAMINATED, HELDOUT_NEAR = range(6)
OUTCOMES = ("train", "heldout", "exact_duplicate", "near_duplicate", "contaminated", "heldout_near_train")
BATCH_BYTES = 4 << 20
SCORE = "score"
"""The documents' column with the number that came with the data (quality.scorer `column:...`), float64."""


def gather(
    data: Data, output: Path, score: str | None = None, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Write the documents of `data` to `output` (see the module) and return the counts of `documents.json`.

    Which are held out depends on their text alone. It resumes where a killed attempt stopped. `score` is the sources'
    column with a quality score, kept as `SCORE`; `report` gets a line for each source.
    """
    done, work = output / "documents.json", output / ".parts"
    if done.exists():
        return read_json(done)
    work.mkdir(parents=True, exist_ok=True)
    parts = _plan(data, score, work)
    _benchmark_index.cache_clear()  # this folder may have held another one
    benchmarks = _index_benchmarks(data, work)
    run = functools.partial(run_parts, workers=data.workers, engine=data.engine)
    read = run(_read_part, [(*part, score, benchmarks) for part in parts], work / "read", "reading documents")
    refused = [(part["origin"], entry) for part in read for entry in part["refused"]]
    counts: Counts = defaultdict(Counter)
    for part in read:
        for name, counted in part["counts"].items():
            counts[part["origin"], name].update(counted)
    sources.by_name(data.sources, _origins(counts))
    by_source = _grouped(counts, 0)
    for number, source in enumerate(data.sources):  # before hours of work
        bad = [entry for origin, entry in refused if origin == number]
        sources.check_usable(sources.name_of(source), by_source[number], bad, data.max_dropped)
    documents = _Documents(work, read)
    decisions, leaders = decide(
        data,
        documents.ids,
        documents.signatures,
        documents.contaminated,
        np.array([source.heldout for source in data.sources])[documents.origins],
    )
    cells = Counter(zip(*(each.tolist() for each in (documents.origins, documents.codes, decisions)), strict=True))
    for (number, code, outcome), count in cells.items():
        counts[number, documents.names[code]][OUTCOMES[outcome]] += count
    for number, mine in sorted(_grouped(counts, 0).items()):
        name, lost, kept = sources.name_of(data.sources[number]), dropped(mine), mine["train"] + mine["heldout"]
        line = f"{name}: {integer(mine['read'])} documents read, {integer(kept)} kept"
        report(line + (f", {integer(lost.total())} dropped ({sources.reasons(lost)})" if lost.total() else ""))
        if kept == 0:
            raise UserError(f"source {name} keeps nothing: {sources.reasons(lost)}; leave it out")
    np.save(work / "decisions.npy", decisions)
    files = [work / "read" / f"{index:05d}.parquet" for index in range(len(parts))]
    to_write = [(*part, output, index) for index, part in enumerate(zip(files, documents.starts, strict=False))]
    written = run(_write_part, to_write, work / "written", "writing documents")
    summary = _summary(counts, leaders, [entry for _, entry in refused[:100]])
    kept = summary["train"] + summary["heldout"]
    done_parts = sum(part["train"] + part["heldout"] for part in written)
    if not done_parts == kept == summary["read"] - sum(summary["dropped"].values()):
        raise UserError(f"{output}: documents were lost between reading and writing; delete the run's .work folder")
    _write_duplicates(output / "duplicates.parquet", documents, decisions, leaders)
    if benchmarks is not None:
        hits = [
            (f"{documents.ids[row]:016x}", documents.names[documents.codes[row]], items)
            for row, items in documents.hits
            if decisions[row] == CONTAMINATED
        ]
        found = contamination.report(_benchmark_index(benchmarks), hits)
        write_json(output / "contamination.json", found)
        numbers = ("items", "too_short", "items_found", "documents")
        summary["contamination"] = {name: {key: entry[key] for key in numbers} for name, entry in found.items()}
    write_json(done, summary)
    shutil.rmtree(work)
    return summary


def _plan(data: Data, score: str | None, work: Path) -> list[tuple[int, Source, sources.Part]]:
    """The parts to read, with their source and its number; what an attempt that was cut otherwise left is removed."""
    parts = [
        (number, source, part) for number, source in enumerate(data.sources) for part in sources.plan(source, score)
    ]
    plan = work / "plan"  # `plan.txt` was that of parts that were counted in another way
    cut = sha256_of([[number, part] for number, _, part in parts])
    if not plan.exists() or plan.read_text() != cut:
        for left in (work / "read", work / "written"):
            remove(left)
        write_text(plan, cut)
    return parts


def _read_part(
    number_of_source: int, source: Source, part: sources.Part, score: str | None, benchmarks: Path | None, path: Path
) -> dict[str, Any]:
    """Clean and hash one part. Writes `.parquet` (documents), `.ids` (uint64) and `.signatures` (uint32)."""
    schema = pa.schema([(name, pa.string()) for name in ("id", "text", "source")])
    schema = schema.append(pa.field(SCORE, pa.float64())) if score else schema
    tally = sources.Tally()
    hits: list[list[Any]] = []
    documents = 0
    with (
        pq.ParquetWriter(path.with_suffix(".parquet"), schema, compression="zstd") as writer,
        path.with_suffix(".ids").open("wb") as ids,
        path.with_suffix(".signatures").open("wb") as signatures,
    ):
        for batch in in_batches(sources.read(source, part, score, tally)):
            texts = [document.text for document in batch]
            digests = [hashlib.sha256(text).digest()[:8] for text in texts]
            columns = [
                pa.array([digest.hex() for digest in digests], pa.string()),
                pa.array(texts, pa.binary()).cast(pa.string()),
                pa.array([document.label for document in batch], pa.string()),
            ]
            if score:
                columns.append(pa.array([document.score for document in batch], pa.float64()))
            writer.write_table(pa.table(columns, schema=schema))
            ids.write(b"".join(digests))
            words = hash_words(texts)
            signatures.write(deduplication.signatures(words).tobytes())
            if benchmarks is not None:
                found = contamination.find(_benchmark_index(benchmarks), words)
                hits.extend([documents + row, items] for row, items in enumerate(found) if items)
            documents += len(batch)
    return {"origin": number_of_source, "documents": documents, **vars(tally), "contaminated": hits}


def in_batches(documents: Iterable[sources.Document]) -> Iterator[list[sources.Document]]:
    """Documents, about `BATCH_BYTES` of text at a time."""
    batch: list[sources.Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _index_benchmarks(data: Data, work: Path) -> Path | None:
    if data.decontamination.benchmarks is None:
        return None
    path = work / "benchmarks.pickle"
    if not path.exists():
        index = contamination.load_benchmarks(local(data.decontamination.benchmarks), data.decontamination.ngram)
        with whole_file(path) as partial:
            partial.write_bytes(pickle.dumps(index))
    return path


@functools.lru_cache(maxsize=1)
def _benchmark_index(path: Path) -> contamination.BenchmarkIndex:
    index: contamination.BenchmarkIndex = pickle.loads(path.read_bytes())
    return index


class _Documents:
    """Hashes, signatures and sources of all parts' documents, in order; part `i` has rows `starts[i]:starts[i + 1]`.

    `origins` are numbers of sources in the recipe, `codes` indices in `names`, `hits` rows that hold evaluation items.
    """

    def __init__(self, work: Path, read: Sequence[dict[str, Any]]) -> None:
        paths = [work / "read" / f"{index:05d}" for index in range(len(read))]
        counts = [part["documents"] for part in read]
        self.starts = np.cumsum([0, *counts]).tolist()
        self.ids = np.concatenate([np.fromfile(path.with_suffix(".ids"), ">u8") for path in paths]).astype(np.uint64)
        joined = work / "signatures.bin"
        with joined.open("wb") as file:
            for path in paths:
                with path.with_suffix(".signatures").open("rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
        shape = (len(self.ids), deduplication.PERMUTATIONS)
        empty = np.zeros(shape, np.uint32)  # a file of no bytes cannot be mapped
        self.signatures = np.memmap(joined, np.uint32, "r", shape=shape) if len(self.ids) else empty
        tables = [pq.read_table(path.with_suffix(".parquet"), columns=["source"]) for path in paths]
        sources = pa.concat_tables(tables)["source"].combine_chunks().dictionary_encode()
        self.codes, self.names = sources.indices.to_numpy(), sources.dictionary.to_pylist()
        self.origins = np.repeat(np.array([part["origin"] for part in read], np.int64), counts)
        self.hits = [
            (start + row, items)
            for start, part in zip(self.starts, read, strict=False)
            for row, items in part["contaminated"]
        ]
        self.contaminated = np.zeros(len(self.ids), bool)
        self.contaminated[[row for row, _ in self.hits]] = True


Counts = defaultdict[tuple[int, str], Counter[str]]
"""Number of a source and name -> documents read (and their bytes), trained on, held out and, by reason, dropped."""


def _grouped(counts: Counts, position: int) -> defaultdict[Any, Counter[str]]:
    """Counts of each source, by its number in the recipe (position 0), or of each name that documents have (1)."""
    grouped: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    for key, mine in counts.items():
        grouped[key[position]].update(mine)
    return grouped


def _origins(counts: Counts) -> dict[str, list[int]]:
    """Every name with the numbers of the sources that give it."""
    origins: defaultdict[str, list[int]] = defaultdict(list)
    for number, name in counts:
        origins[name].append(number)
    return origins


def _entry(mine: Counter[str]) -> dict[str, Any]:
    totals = {what: mine[what] for what in ("read", "bytes", "train", "heldout")}
    return totals | {"dropped": dict(sorted(dropped(mine).items()))}


def _summary(counts: Counts, leaders: np.ndarray, refused: list[dict[str, str]]) -> dict[str, Any]:
    origins, by_name = _origins(counts), sorted(_grouped(counts, 1).items())
    by_source = {name: {"origin": origins[name][0], "origins": origins[name]} | _entry(mine) for name, mine in by_name}
    clusters = {"duplicates": deduplication.cluster_counts(leaders), "sources": by_source, "refused": refused}
    return _entry(sum(counts.values(), Counter())) | clusters


def _write_part(part: Path, start: int, output: Path, index: int, path: Path) -> dict[str, Any]:
    counts = {"train": 0, "heldout": 0}
    decisions = np.load(output / ".parts" / "decisions.npy", mmap_mode="r")
    with contextlib.ExitStack() as stack:
        file, writers = stack.enter_context(pq.ParquetFile(part)), {}
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            codes = np.asarray(decisions[start : start + len(table)])
            start += len(table)
            for split, code in (("train", TRAIN), ("heldout", HELDOUT)):
                kept = table.filter(pa.array(codes == code))
                if len(kept) and split not in writers:
                    shard = output / f"{split}-{index:05d}.parquet"
                    writers[split] = stack.enter_context(pq.ParquetWriter(shard, kept.schema, compression="zstd"))
                if len(kept):
                    writers[split].write_table(kept)
                    counts[split] += len(kept)
    return counts


def _write_duplicates(path: Path, documents: _Documents, decisions: np.ndarray, leaders: np.ndarray) -> None:
    rows = np.flatnonzero((decisions == EXACT) | (decisions == NEAR))
    rows = rows[np.lexsort((rows, leaders[rows]))]
    ids, kept = ([f"{value:016x}" for value in documents.ids[chosen].tolist()] for chosen in (rows, leaders[rows]))
    names = [documents.names[code] for code in documents.codes[rows]]
    reasons = np.where(decisions[rows] == EXACT, "exact", "near").tolist()
    columns = {"id": ids, "source": names, "reason": reasons, "kept": kept}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    pq.write_table(table, path, compression="zstd")


def decide(
    data: Data, ids: np.ndarray, signatures: np.ndarray, contaminated: np.ndarray, held_sources: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of each document (uint8), and the index of the one that stays in its place (its own if it stays).

    Per document: `ids` uint64; `signatures` uint32 `[documents, PERMUTATIONS]`; whether it holds an evaluation item and
    whether its source is held out as a whole.
    """
    settings, own = data.deduplication, np.arange(len(ids))
    first = exact_duplicates(ids)
    # Also without near-duplicate removal: held-out documents must not have near-duplicates among those trained on.
    similar = near_duplicates(signatures, first == own, settings.similarity)[first]
    clusters = similar if settings.near else first if settings.exact else own
    # Of a cluster the first document without an evaluation item stays; of one that has none, the first stands for it.
    clean = np.flatnonzero(~contaminated)
    labels, positions = np.unique(clusters[clean], return_index=True)
    keepers = own.copy()
    keepers[labels] = clean[positions]
    leaders = keepers[clusters]
    if not settings.exact:
        leaders = np.where(first == first[leaders], own, leaders)
    decisions = np.where(leaders == own, TRAIN, np.where(settings.exact & (first != own), EXACT, NEAR)).astype(np.uint8)
    decisions[contaminated] = CONTAMINATED
    candidates = np.flatnonzero(decisions == TRAIN)
    if len(candidates) < 2:
        left = f"{len(candidates)} of {len(ids)} documents are left, too few to hold one out"
        raise UserError(f"{left} (dropped: {_described(decisions)})")
    if held_sources.any():
        heldout = candidates[held_sources[candidates]]
        if len(heldout) in (0, len(candidates)):
            where = "repeat the other sources" if len(heldout) == 0 else "are all that is left"
            raise UserError(f"the documents of the held-out sources {where}: {_described(decisions)}")
    else:
        # By hash: the same document is held out in every run, whatever else the corpus holds.
        order = candidates[np.argsort(ids[candidates], kind="stable")]
        chosen = int((uniform_from_id(ids[order]) < data.heldout_fraction).sum())
        heldout = order[: max(1, min(chosen, data.heldout_max_documents))]
    decisions[heldout] = HELDOUT
    if not (settings.near and settings.exact):
        trained = np.zeros(len(ids), bool)
        trained[similar[decisions == TRAIN]] = True
        decisions[heldout[trained[similar[heldout]]]] = HELDOUT_NEAR
        # The copies of such a document are dropped for the same reason: it does not stay in their place.
        decisions[(decisions == EXACT) & (decisions[leaders] == HELDOUT_NEAR)] = HELDOUT_NEAR
        if not (decisions == HELDOUT).any():
            raise UserError("every held-out document is near one to train on; set deduplication.near: true")
    if not (decisions == TRAIN).any():
        raise UserError(f"no document is left to train on: {_described(decisions)}")
    return decisions, leaders


def _described(decisions: np.ndarray) -> str:
    return sources.reasons(dropped(Counter(OUTCOMES[code] for code in decisions.tolist())))
