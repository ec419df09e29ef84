"""Two stages of a run: a quality score for every document, and which documents the filter keeps.

scores/scores.parquet     in the order of the documents; scorer.json, scorer.safetensors: what gave them
quality/kept.parquet      of the training documents; heldout.parquet: whether the filter would keep each of these
quality/quality.json|.md|.png   the report
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.core.recipe import Data, Quality
from nanophi.data import quality_report, scorers
from nanophi.data.documents import SPLITS, batches, find, ids_to_uint64, shards
from nanophi.data.gather import SCORE
from nanophi.data.parallel import run_parts
from nanophi.data.scorers import Scorer

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("split", pa.dictionary(pa.int32(), pa.string())),
        ("bytes", pa.int64()),
        ("quality_score", pa.float32()),
    ]
)


def score(
    documents: Path, quality: Quality, data: Data, seed: int, output: Path, revision: str | None = None
) -> dict[str, Any]:
    """Score every document, training and held-out; returns `{scorer, scored, mean_score, ...}` with the fit's report.

    The threshold plays no part. It resumes after a kill. The seed chooses what a linear scorer is fitted on;
    `revision` is that of a classifier on the Hub.
    """
    output.mkdir(parents=True, exist_ok=True)
    scorer = scorers.of_section(quality, revision).prepare(documents, quality, data, seed, output)
    work, done = output / ".parts", output / "scores.parquet"
    if not done.exists():
        parts = [(path, split, scorer) for split in SPLITS for path in shards(documents, split)]
        workers = data.workers if scorer.parallel else 1
        run_parts(_score_shard, parts, work, "scoring documents", workers, data.engine)
        with pq.ParquetWriter(work / "scores.parquet", SCHEMA, compression="zstd") as writer:
            for index in range(len(parts)):
                writer.write_table(pq.read_table(work / f"{index:05d}.parquet", schema=SCHEMA))
        (work / "scores.parquet").replace(done)
    shutil.rmtree(work, ignore_errors=True)
    scores = pq.read_table(done, columns=["quality_score"])["quality_score"]
    mean = round(pc.mean(scores).as_py(), 4)
    return {**read_json(output / "scorer.json"), "scored": len(scores), "mean_score": mean}


def _score_shard(shard: Path, split: str, scorer: Scorer, path: Path) -> dict[str, Any]:
    columns = ["id", "text", "source", *([SCORE] if scorer.column else [])]
    return write_scores(batches(shard, columns, None), scorer, split, path.with_suffix(".parquet"), SCHEMA)


def write_scores(
    documents: Iterable[pa.RecordBatch], scorer: Scorer, split: str, path: Path, schema: pa.Schema, excerpt: int = 0
) -> dict[str, Any]:
    """Score batches of documents (id, text, source and, for a column's scores, `SCORE`) and write what `schema` names.

    A column `text` holds the first `excerpt` characters. Returns the number of `documents`.
    """
    number = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in documents:
            texts = batch["text"].cast(pa.binary()).to_pylist()
            scores = scorer.score(texts, batch[SCORE].to_pylist() if scorer.column else None)
            scorer.check_scores(scores, batch["id"].to_pylist())
            columns = {
                "id": batch["id"],
                "source": batch["source"].dictionary_encode(),
                "split": pa.array([split] * len(batch), pa.string()).dictionary_encode(),
                "bytes": pa.array([len(text) for text in texts], pa.int64()),
                "quality_score": pa.array(scores, pa.float32(), from_pandas=False),
            }
            if "text" in schema.names:
                starts = [text[: 4 * excerpt].decode(errors="ignore")[:excerpt] for text in texts]
                columns["text"] = pa.array(starts, pa.string())
            writer.write_table(pa.table({name: columns[name] for name in schema.names}).cast(schema))
            number += len(batch)
    return {"documents": number}


def select(documents: Path, scores: Path, quality: Quality, output: Path, seed: int = 0) -> dict[str, Any]:
    """Keep training documents by threshold or share, and write the report; returns it without the examples."""
    output.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(scores / "scores.parquet")
    in_training = pc.equal(table["split"].cast(pa.string()), "train")
    train, heldout = table.filter(in_training), table.filter(pc.invert(in_training))
    values, sizes = train["quality_score"].to_numpy(), train["bytes"].to_numpy()
    kept, cutoff = choose(values, sizes, ids_to_uint64(train["id"]), quality, seed)
    scored = ["id", "quality_score"]
    pq.write_table(train.filter(kept).select(scored), output / "kept.parquet", compression="zstd")
    divided = divide(heldout["quality_score"].to_numpy(), quality, cutoff)
    if divided is not None:
        heldout = heldout.select(scored).append_column("kept", pa.array(divided))
        pq.write_table(heldout, output / "heldout.parquet", compression="zstd")
    report = quality_report.write(
        train.append_column("kept", pa.array(kept)),
        quality,
        read_json(scores / "scorer.json"),
        lambda ids: {key: row["text"] for key, row in find(documents, ids, ["text"]).items()},
        output,
        cutoff,
    )
    return {key: value for key, value in report.items() if key != "examples"}


def choose(
    scores: np.ndarray, sizes: np.ndarray, ids: np.ndarray, quality: Quality, seed: int
) -> tuple[np.ndarray, float | None]:
    """Which training documents are kept, bool `[documents]`, by their scores, sizes in bytes and distinct ids; and the
    score of the last one that a share took, by which `divide` treats held-out documents alike.

    A share is taken from the best, the worst or a random end of the documents until their bytes come nearest to it,
    those with equal scores in random order. What is chosen depends on the documents and the seed, not on their order.
    """
    if quality.share is None:
        kept = np.ones(len(scores), bool) if quality.threshold is None else scores > quality.threshold
        if not kept.any():
            highest = f"; the highest score is {scores.max():.4f}" if len(scores) else ""
            raise UserError(f"quality.threshold {quality.threshold} keeps no document{highest}")
        return kept, None
    by_score = quality.select != "random"
    if by_score and quality.share < 1 and len(scores) and scores.min() == scores.max():
        raise UserError(f"quality.select '{quality.select}': every document has the score {scores[0]:.4f}")
    shuffled = np.argsort(ids, kind="stable")
    np.random.default_rng([seed, 1]).shuffle(shuffled)
    key = {"best": -scores, "worst": scores, "random": np.zeros(len(scores))}[quality.select]
    order = shuffled[np.argsort(key[shuffled], kind="stable")]
    reached = np.concatenate([[0], np.cumsum(sizes[order], dtype=np.int64)])
    count = int(np.argmin(np.abs(reached - quality.share * reached[-1])))
    if count == 0:
        raise UserError(f"quality.share {quality.share:g} of {reached[-1]:,} bytes keeps no document")
    kept = np.zeros(len(scores), bool)
    kept[order[:count]] = True
    return kept, float(scores[order[count - 1]]) if by_score else None


def divide(scores: np.ndarray, quality: Quality, cutoff: float | None) -> np.ndarray | None:
    """Which documents the filter would keep of those that it did not choose from; None if it treats all alike."""
    if cutoff is not None:
        return scores >= cutoff if quality.select == "best" else scores <= cutoff
    return None if quality.threshold is None else scores > quality.threshold
