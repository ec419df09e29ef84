"""Quality scores: a number for every document, a threshold, and the evidence for both.

Three kinds of scorer give the number: `linear` (trained here on examples of good and low-quality text),
`column:<name>` (it came with the data) and `model:<hub id or folder>` (a transformers text classifier, or a saved
linear scorer).

    scores/scores.parquet     id, source, split, bytes, quality_score (float32), in the order of the documents
    scores/scorer.json        what the scorer is, what it was fitted on, how well it separates what it did not see
    scores/scorer.safetensors its weights (linear)
    quality/kept.parquet      id, quality_score of the training documents that the filter keeps
    quality/heldout.parquet   id, quality_score, kept of the held-out documents: whether the filter would keep them (not
                              for a control or a random share, which treat all alike)
    quality/quality.json|.md|.png   the report: histogram, sweep over thresholds, kept share by source, examples
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import atomic_folder, check_own_file, check_own_folder, read_json, write_json
from nanophi.core.recipe import Data, Quality, Source
from nanophi.data import installed_docs, quality_report, sources
from nanophi.data.documents import SPLITS, batches, find, ids_to_uint64, shards, uniform_from_id
from nanophi.data.gather import SCORE
from nanophi.data.parallel import discard_parts, run_parts
from nanophi.data.quality_report import EXCERPT, MADE_BY
from nanophi.data.scorers import EXCERPT_BYTES, FIT_BYTES, Scorer, find_scorer, fit, forget
from nanophi.data.selection import choose, divide

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("split", pa.dictionary(pa.int32(), pa.string())),
        ("bytes", pa.int64()),
        ("quality_score", pa.float32()),
    ]
)


def labels(quality: Quality, data: Data) -> tuple[list[str], list[str]]:
    """Names of the sources that are examples of good and of low-quality text."""
    high, low = list(quality.high), list(quality.low)
    if not high and not low and any(source.embedded for source in data.sources):
        high, low = list(installed_docs.HIGH), list(installed_docs.LOW)
    return high, low


def _fit_on(documents: Path, quality: Quality, data: Data, seed: int, output: Path) -> None:
    high, low = labels(quality, data)
    known = read_json(documents / "documents.json")["sources"]
    for name in (*high, *low):
        if name not in known and (quality.high or quality.low):
            raise UserError(f"quality.high or quality.low names source '{name}'; there is {', '.join(known)}")
    taken, good, sources = [], [], []
    sizes = {name: source["bytes"] for name, source in known.items()}
    # The same share of each source's documents, chosen by hash: a cross-section that the corpus's order cannot skew.
    room = {}
    for group in (high, low):
        present = [name for name in group if name in known]
        for name in present:
            room[name] = min(1.0, FIT_BYTES / len(present) / max(1, sizes[name]))
    for batch in batches(shards(documents, "train"), ["id", "text", "source"]):
        names = batch.column("source").to_pylist()
        for row, (name, number) in enumerate(zip(names, uniform_from_id(batch.column("id"), seed), strict=True)):
            if number < room.get(name, 0.0):
                taken.append(batch.column("text")[row].as_py().encode()[:EXCERPT_BYTES])
                good.append(name in high)
                sources.append(name)
    if not any(good) or all(good):
        raise UserError("the linear scorer found documents of one label only; see quality.high and quality.low")
    scorer, report = fit(taken, np.array(good), sources, seed)
    scorer.save(output)
    write_json(output / "scorer.json", {"scorer": "linear", "high": high, "low": low, **report})


# Scoring


def score(
    documents: Path, quality: Quality, data: Data, seed: int, output: Path, revision: str | None = None
) -> dict[str, Any]:
    """Score every document, training and held-out (see the module for the files).

    Args:
        documents: folder of `gather.gather`.
        quality: the recipe's section; the threshold plays no part, so that a filtered run and its control share this.
        data: the recipe's section, for the number of workers and whether the corpus is the embedded one.
        seed: of the sample that the linear scorer is fitted on.
        output: folder to create; resumes where a killed attempt stopped.
        revision: of a classifier on the Hub.

    Returns:
        `{scorer, scored, mean_score, ...}` with the fit's report for a linear scorer.

    Raises:
        UserError: for a scorer that cannot be used, or a score outside the scale, naming the document.
    """
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "scorer.json").exists():
        if quality.scorer == "linear":
            _fit_on(documents, quality, data, seed, output)
        else:
            scale = {"scale": list(quality.scale)} if quality.scale else {}
            write_json(output / "scorer.json", {"scorer": quality.scorer, "label": quality.label, **scale})
    paths = [(split, path) for split in SPLITS for path in shards(documents, split)]
    if quality.scorer == "linear":
        scorer = Scorer("linear", str(output))
    else:
        scorer = find_scorer(quality.scorer, quality.label, quality.scale, revision)
    forget()
    work = output / ".parts"
    # A classifier uses the whole device, or all cores, in one process.
    workers = 1 if scorer.kind == "model" else data.workers
    parts = [(path, split, scorer) for split, path in paths]
    counts = run_parts(_score_shard, parts, work, "scoring documents", workers, data.engine)
    partial = work / "scores.parquet"
    with pq.ParquetWriter(partial, _SCHEMA, compression="zstd") as writer:
        for index in range(len(parts)):
            writer.write_table(pq.read_table(work / f"{index:05d}.parquet", schema=_SCHEMA))
    partial.replace(output / "scores.parquet")
    discard_parts(work)
    total = sum(part["documents"] for part in counts)
    return {
        **read_json(output / "scorer.json"),
        "scored": total,
        "mean_score": round(sum(part["sum"] for part in counts) / total, 4),
    }


def _score_shard(shard: Path, split: str, scorer: Scorer, path: Path) -> dict[str, Any]:
    total, documents = 0.0, 0
    columns = ["id", "text", "source", *([SCORE] if scorer.kind == "column" else [])]
    with pq.ParquetWriter(path.with_suffix(".parquet"), _SCHEMA, compression="zstd") as writer:
        for batch in batches(shard, columns, None):
            texts = batch["text"].cast(pa.binary()).to_pylist()
            values = batch[SCORE].to_pylist() if scorer.kind == "column" else None
            table = _scored(scorer, batch["id"], texts, batch["source"], values)
            splits = pa.array([split] * len(table), pa.string()).dictionary_encode()
            writer.write_table(table.add_column(2, "split", splits).cast(_SCHEMA))
            total += float(table["quality_score"].to_numpy().sum(dtype=np.float64))
            documents += len(table)
    return {"documents": documents, "sum": total}


def _scored(
    scorer: Scorer, ids: pa.Array, texts: Sequence[bytes], labels: pa.Array, values: Sequence[float] | None
) -> pa.Table:
    """Columns id, source, bytes and quality_score of some documents. Raises `UserError` for a score that is none."""
    scores = scorer.score(texts, values)
    scorer.check(scores, ids.to_pylist())
    sizes = pa.array([len(text) for text in texts], pa.int64())
    columns = [ids, labels.dictionary_encode(), sizes, pa.array(scores, pa.float32(), from_pandas=False)]
    return pa.table(columns, names=["id", "source", "bytes", "quality_score"])


# Selecting


def select(documents: Path, scores: Path, quality: Quality, output: Path, seed: int = 0) -> dict[str, Any]:
    """Keep training documents by threshold or share, and write the report.

    Args:
        documents: folder of `gather.gather`.
        scores: folder of `score`.
        quality: the recipe's section.
        output: folder to create (see the module for the files).
        seed: of what a share draws.

    Returns:
        `quality.json` without the examples.

    Raises:
        UserError: if nothing is kept, or a share cannot be chosen.
    """
    output.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(scores / "scores.parquet")
    values = table["quality_score"].to_numpy()
    train = np.asarray(table["split"].cast(pa.string()).to_numpy(zero_copy_only=False) == "train")
    sizes = table["bytes"].to_numpy()
    selection = choose(values[train], sizes[train], ids_to_uint64(table["id"])[train], quality, seed)
    rows = np.flatnonzero(train)[selection.kept]
    pq.write_table(table.select(["id", "quality_score"]).take(rows), output / "kept.parquet", compression="zstd")
    held = np.flatnonzero(~train)
    divided = divide(values[held], quality, selection.cutoff)
    if divided is not None:
        heldout = table.select(["id", "quality_score"]).take(held).append_column("kept", pa.array(divided))
        pq.write_table(heldout, output / "heldout.parquet", compression="zstd")
    report = quality_report.write(
        table,
        train,
        selection,
        quality,
        read_json(scores / "scorer.json"),
        lambda ids: {key: row["text"] for key, row in find(documents, ids, ["text"]).items()},
        output,
    )
    return {key: value for key, value in report.items() if key != "examples"}


# On files, without a recipe: `nanophi quality fit` and `score`


@user_errors("the scorer cannot be fitted; --debug shows where it stopped")
def fit_files(
    high: Sequence[str], low: Sequence[str], output: Path, text_column: str = "text", seed: int = 0
) -> dict[str, Any]:
    """Fit a linear scorer on files of good and of low-quality documents, for `quality.scorer: model:<output>`.

    Args:
        high, low: files, folders or globs, as a recipe's sources have them. Each one counts as one source.
        text_column: column, or path in it, of files that have columns.
        output: folder to create; one that this wrote before is replaced.
        seed: of the documents left out of the fit.

    Returns:
        what `scorer.json` says.

    Raises:
        UserError: if `output` holds anything else, or there are too few documents.
    """
    check_own_folder(output, ("scorer.json", "scorer.safetensors"), "quality fit")
    if both := sorted({*high} & {*low}):
        raise UserError(f"{both[0]} is named as high and as low quality; it can be an example of one")
    texts: list[bytes] = []
    good: list[bool] = []
    names: list[str] = []
    for patterns, label in ((high, True), (low, False)):
        for pattern in patterns:
            room = FIT_BYTES // len(patterns)
            tally = sources.Tally()
            for document in _documents_of(Source(files=pattern, text_column=text_column), None, tally):
                texts.append(document.text[:EXCERPT_BYTES])
                good.append(label)
                names.append(pattern)
                room -= len(texts[-1])
                if room <= 0:
                    break
            sources.check_usable(pattern, tally.read.total(), tally.dropped_total(), tally.refused, 1.0)
    scorer, report = fit(texts, np.array(good), names, seed)
    report = {"scorer": "linear", "high": list(high), "low": list(low), **report}
    with atomic_folder(output) as work:
        scorer.save(work)
        write_json(work / "scorer.json", report)
    return report


def _documents_of(source: Source, score: str | None, tally: sources.Tally) -> Any:
    parts, _ = sources.plan(source, score)
    for part in parts:
        yield from sources.read(source, part, score, tally)


@user_errors("the files cannot be scored; --debug shows where it stopped")
def score_files(files: str, scorer: Scorer, output: Path, text_column: str = "text") -> dict[str, Any]:
    """Score the documents of files.

    Args:
        files: file, folder or glob, as a recipe's sources have them.
        scorer: what gives the scores.
        output: parquet file to write: id, source (the file), bytes, quality_score, text (its first characters). One
            that this wrote before is replaced.
        text_column: column, or path in it, of files that have columns.

    Returns:
        `{documents, mean_score, dropped}`, the last by reason.

    Raises:
        UserError: if `output` is anything else, or no document can be used.
    """
    check_own_file(output, lambda: MADE_BY in (pq.read_schema(output).metadata or {}), "quality score")
    forget()
    column = scorer.name if scorer.kind == "column" else None
    made_by = {MADE_BY: json.dumps({"scorer": scorer.name, "scale": scorer.range})}
    schema = pa.schema([*(field for field in _SCHEMA if field.name != "split"), ("text", pa.string())], made_by)
    total, documents = 0.0, 0
    batch: list[sources.Document] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.part")
    tally = sources.Tally()

    def flush(writer: pq.ParquetWriter) -> None:
        nonlocal total, documents
        texts = [document.text for document in batch]
        ids = pa.array([hashlib.sha256(text).hexdigest()[:16] for text in texts])
        excerpts = [text[: 4 * EXCERPT].decode(errors="ignore")[:EXCERPT] for text in texts]
        values = [float(document.score or 0.0) for document in batch] if column else None
        table = _scored(scorer, ids, texts, pa.array([document.file for document in batch], pa.string()), values)
        table = table.append_column("text", pa.array(excerpts, pa.string()))
        writer.write_table(table.cast(schema))
        total += float(table["quality_score"].to_numpy().sum(dtype=np.float64))
        documents += len(batch)
        batch.clear()

    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            size = 0
            for document in _documents_of(Source(files=files, text_column=text_column), column, tally):
                batch.append(document)
                size += len(document.text)
                if size >= 4 << 20:
                    flush(writer)
                    size = 0
            if batch:
                flush(writer)
        dropped = tally.dropped_total()
        sources.check_usable(files, tally.read.total(), dropped, tally.refused, 1.0)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return {"documents": documents, "mean_score": round(total / documents, 4), "dropped": dict(dropped)}
