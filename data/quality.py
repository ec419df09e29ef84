"""Quality scores: a number in [0, 1] for every document, a threshold, and the evidence for both.

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
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.data import installed_docs, quality_report
from nanophi.data.documents import SPLITS, batches, draw, find, keys, shards
from nanophi.data.gather import read_texts
from nanophi.data.parallel import run_parts
from nanophi.data.scorers import EXCERPT_BYTES, FIT_BYTES, check_scores, classify, fit, is_linear, linear
from nanophi.data.selection import choose, divide
from nanophi.files import UserError, read_json, replace_tree, write_json
from nanophi.recipe import Data, Quality, Source


def labels(quality: Quality, data: Data) -> tuple[list[str], list[str]]:
    """Names of the sources that are examples of good and of poor text."""
    high, low = list(quality.high), list(quality.low)
    if not high and not low and any(source.embedded for source in data.sources):
        high, low = list(installed_docs.HIGH), list(installed_docs.LOW)
    both = sorted(set(high) & set(low))
    if both:
        raise UserError(f"quality.high and quality.low both name '{both[0]}'")
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
        for row, (name, number) in enumerate(zip(names, draw(batch.column("id"), seed), strict=True)):
            if number < room.get(name, 0.0):
                taken.append(batch.column("text")[row].as_py().encode()[:EXCERPT_BYTES])
                good.append(name in high)
                sources.append(name)
    if not any(good) or all(good):
        raise UserError("the linear scorer found documents of one label only; see quality.high and quality.low")
    scorer, report = fit(taken, np.array(good), sources, seed)
    scorer.save(output)
    write_json(output / "scorer.json", {"scorer": "linear", "high": high, "low": low, **report})


def score(documents: Path, quality: Quality, data: Data, seed: int, output: Path) -> dict[str, Any]:
    """Score every document, training and held-out (see the module for the files).

    Args:
        documents: folder of `gather.gather`.
        quality: the recipe's section; the threshold plays no part, so that a filtered run and its control share this.
        data: the recipe's section, for the number of workers and whether the corpus is the embedded one.
        seed: of the sample that the linear scorer is fitted on.
        output: folder to create; goes on where a killed attempt left it.

    Returns:
        `{scorer, documents, mean_score, ...}` with the fit's report for a linear scorer.

    Raises:
        UserError: for a score that is missing, not a number or outside [0, 1], naming the document.
    """
    output.mkdir(parents=True, exist_ok=True)
    kind, _, name = quality.scorer.partition(":")
    if not (output / "scorer.json").exists():
        if kind == "linear":
            _fit_on(documents, quality, data, seed, output)
        else:
            write_json(output / "scorer.json", {"scorer": quality.scorer})
    paths = [(split, path) for split in SPLITS for path in shards(documents, split)]
    folder = str(output) if kind == "linear" else name
    function = "linear" if kind == "model" and is_linear(name) else kind
    parts = [(path, split, function, folder) for split, path in paths]
    work = output / ".parts"
    # A classifier fills the device, or all cores, by itself.
    workers = 1 if function == "model" else data.workers
    counts = run_parts(_score_shard, parts, work, "scoring documents", workers, data.engine)
    partial = work / "scores.parquet"
    with pq.ParquetWriter(partial, _SCHEMA, compression="zstd") as writer:
        for index in range(len(parts)):
            writer.write_table(pq.read_table(work / f"{index:05d}.parquet", schema=_SCHEMA))
    partial.replace(output / "scores.parquet")
    shutil.rmtree(work)
    total = sum(part["documents"] for part in counts)
    return {
        **read_json(output / "scorer.json"),
        "scored": total,
        "mean_score": round(sum(part["sum"] for part in counts) / total, 4),
    }


_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("split", pa.dictionary(pa.int32(), pa.string())),
        ("bytes", pa.int64()),
        ("quality_score", pa.float32()),
    ]
)


def _score_shard(shard: Path, split: str, kind: str, name: str, path: Path) -> dict[str, Any]:
    total, documents = 0.0, 0
    columns = ["id", "text", "source", *([name] if kind == "column" else [])]
    with pq.ParquetWriter(path.with_suffix(".parquet"), _SCHEMA, compression="zstd") as writer:
        for table in batches(shard, columns, None):
            texts = table["text"].cast(pa.binary()).to_pylist()
            if kind == "column":
                scores = table[name].to_numpy(zero_copy_only=False).astype(np.float32)
            elif kind == "linear":
                scores = linear(Path(name)).score(texts)
            else:
                scores = classify(name, [text.decode() for text in texts])
            check_scores(scores, table["id"].to_pylist())
            writer.write_table(
                pa.table(
                    [
                        table["id"],
                        table["source"].dictionary_encode(),
                        pa.array([split] * len(table), pa.string()).dictionary_encode(),
                        pa.array([len(text) for text in texts], pa.int64()),
                        pa.array(scores, pa.float32(), from_pandas=False),
                    ],
                    schema=_SCHEMA,
                )
            )
            total += float(scores.sum(dtype=np.float64))
            documents += len(table)
    return {"documents": documents, "sum": total}


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
        UserError: if nothing is kept, or a share cannot be chosen; for scores outside [0, 1].
    """
    output.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(scores / "scores.parquet")
    values = table["quality_score"].to_numpy()
    check_scores(values, table["id"])
    train = np.asarray(table["split"].cast(pa.string()).to_numpy(zero_copy_only=False) == "train")
    sizes = table["bytes"].to_numpy()
    selection = choose(values[train], sizes[train], keys(table["id"])[train], quality, seed)
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


def fit_files(
    high: Sequence[str], low: Sequence[str], output: Path, text_column: str = "text", seed: int = 0
) -> dict[str, Any]:
    """Fit a linear scorer on files of good and of poor documents and save it, for `quality.scorer: model:<output>`.

    Args:
        high, low: globs of .parquet, .jsonl(.gz, .zst) or .txt files. Each glob counts as one source.
        output: folder to create or replace.

    Returns:
        what `scorer.json` says.
    """
    texts: list[bytes] = []
    good: list[bool] = []
    sources: list[str] = []
    for patterns, label in ((high, True), (low, False)):
        for pattern in patterns:
            room = FIT_BYTES // len(patterns)
            for _, _, text in read_texts(Source(files=pattern, text_column=text_column)):
                texts.append(text[:EXCERPT_BYTES])
                good.append(label)
                sources.append(pattern)
                room -= len(texts[-1])
                if room <= 0:
                    break
    scorer, report = fit(texts, np.array(good), sources, seed)
    report = {"scorer": "linear", "high": list(high), "low": list(low), **report}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as name:
        partial = Path(name) / output.name
        partial.mkdir()
        scorer.save(partial)
        write_json(partial / "scorer.json", report)
        replace_tree(partial, output)
    return report


def score_files(files: str, scorer: str, output: Path, text_column: str = "text") -> dict[str, Any]:
    """Score the documents of files.

    Args:
        files: glob of .parquet, .jsonl(.gz, .zst) or .txt files.
        scorer: folder of a linear scorer, or Hub id or folder of a text classifier.
        output: parquet file to write: id, source (the file), bytes, quality_score, text (its first characters).

    Returns:
        `{documents, mean_score}`.
    """
    schema = pa.schema([*(field for field in _SCHEMA if field.name != "split"), ("text", pa.string())])
    total, documents = 0.0, 0
    batch: list[tuple[str, bytes]] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.part")

    def flush(writer: pq.ParquetWriter) -> None:
        nonlocal total, documents
        texts = [text for _, text in batch]
        scores = (
            linear(Path(scorer)).score(texts)
            if is_linear(scorer)
            else classify(scorer, [text.decode() for text in texts])
        )
        columns = [
            pa.array([hashlib.sha256(text).hexdigest()[:16] for text in texts]),
            pa.array([source for source, _ in batch], pa.string()).dictionary_encode(),
            pa.array([len(text) for text in texts], pa.int64()),
            pa.array(scores, pa.float32()),
            pa.array(
                [
                    text[: 4 * quality_report.EXCERPT].decode(errors="ignore")[: quality_report.EXCERPT]
                    for text in texts
                ],
                pa.string(),
            ),
        ]
        writer.write_table(pa.table(columns, schema=schema))
        total, documents = total + float(scores.sum(dtype=np.float64)), documents + len(batch)
        batch.clear()

    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            size = 0
            for where, _, text in read_texts(Source(files=files, text_column=text_column)):
                batch.append((where.split(":")[0], text))
                size += len(text)
                if size >= 4 << 20:
                    flush(writer)
                    size = 0
            if batch:
                flush(writer)
        if not documents:
            raise UserError(f"{files} holds no usable document")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return {"documents": documents, "mean_score": round(total / documents, 4)}
