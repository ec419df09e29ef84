"""Quality scores: a number in [0, 1] for every document, a threshold, and receipts for both.

Three kinds of scorer give the number: `linear` (trained here on examples of good and poor text), `column:<name>` (it
came with the data) and `model:<hub id or folder>` (a transformers text classifier, or a saved linear scorer).

    scores/scores.parquet     id, source, split, bytes, quality_score (float32), in the order of the documents
    scores/scorer.json        what the scorer is, what it was fitted on, how well it separates what it did not see
    scores/scorer.safetensors its weights (linear)
    quality/kept.parquet      id, quality_score of the training documents above the threshold
    quality/quality.json|.md|.png   the report: histogram, sweep over thresholds, kept share by source, examples
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_matrix, hstack, vstack

from nanophi.data import installed_docs
from nanophi.data.documents import SPLITS, batches, draw, find, shards
from nanophi.data.gather import read_texts
from nanophi.data.ngrams import hash_words, ngrams
from nanophi.data.parallel import run_parts
from nanophi.files import UserError, read_json, replace_tree, write_json, write_text
from nanophi.recipe import Data, Quality, Source

BUCKETS = 1 << 18
EXCERPT_BYTES = 16_000
"""How much of a document the linear scorer reads."""
FIT_BYTES = 12_000_000
"""Excerpts of each label that the linear scorer is fitted on."""
TEST_SHARE = 0.2
_FIT_BATCH = 64
_CLASSES = ("lower", "upper", "digit", "newline", "space", "sentence", "quote", "markup", "other", "beyond_ascii")
EXCERPT = 400
"""Characters of a document that the report shows."""
SWEEP = tuple(round(0.05 * step, 2) for step in range(20))


# The linear scorer


def _class_table() -> np.ndarray:
    table = np.full(256, _CLASSES.index("other"), np.uint8)
    for name, characters in {
        "lower": "abcdefghijklmnopqrstuvwxyz",
        "upper": "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        "digit": "0123456789",
        "newline": "\n",
        "space": " \t",
        "sentence": ".,;?!",
        "quote": "'\"`()-",
        "markup": "<>{}[]\\|$#_*=/@^~&%+:",
    }.items():
        table[[ord(character) for character in characters]] = _CLASSES.index(name)
    table[128:] = _CLASSES.index("beyond_ascii")
    return table


_CLASS_TABLE = _class_table()


def features(texts: Sequence[bytes]) -> tuple[csr_matrix, np.ndarray]:
    """What the linear scorer sees of each document's first `EXCERPT_BYTES`.

    Returns:
        hashed words and word pairs, float32 `[documents, BUCKETS]`, counts over the square root of their sum; and
        statistics, float32 `[documents, len(_CLASSES) + 2]`: shares of character classes, mean word and line length.
    """
    excerpts = [text[:EXCERPT_BYTES] for text in texts]
    words = hash_words(excerpts)
    pairs = ngrams(words, 2)
    counts = words.counts + pairs.counts
    offsets = np.concatenate([[0], np.cumsum(counts)])
    indices = np.empty(offsets[-1], np.int32)
    # Each document's words, then its pairs.
    target = np.repeat(offsets[:-1] - words.offsets[:-1], words.counts) + np.arange(len(words.hashes))
    indices[target] = (words.hashes % np.uint64(BUCKETS)).astype(np.int32)
    target = np.repeat(offsets[:-1] + words.counts - pairs.offsets[:-1], pairs.counts) + np.arange(len(pairs.hashes))
    indices[target] = (pairs.hashes % np.uint64(BUCKETS)).astype(np.int32)
    values = np.repeat(1 / np.sqrt(np.maximum(counts, 1)), counts).astype(np.float32)
    hashed = csr_matrix((values, indices, offsets), shape=(len(texts), BUCKETS))

    classes = _CLASS_TABLE[np.frombuffer(b"".join(excerpts), np.uint8)].astype(np.int64)
    lengths = np.array([len(text) for text in excerpts])
    classes += np.repeat(np.arange(len(texts)), lengths) * len(_CLASSES)
    tallies = np.bincount(classes, minlength=len(texts) * len(_CLASSES)).reshape(len(texts), len(_CLASSES))
    shares = tallies / np.maximum(lengths, 1)[:, None]
    word_length = np.log1p((tallies[:, 0] + tallies[:, 1]) / np.maximum(words.counts, 1))
    line_length = np.log1p(lengths / (tallies[:, _CLASSES.index("newline")] + 1))
    return hashed, np.column_stack([shares, word_length, line_length]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LinearScorer:
    """Logistic regression on `features`.

    Attributes:
        weights: float32 `[BUCKETS]`; `statistic_weights`, `mean`, `scale`: float32 `[len(_CLASSES) + 2]`.
        intercept: float.
    """

    weights: np.ndarray
    statistic_weights: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    intercept: float

    def score(self, texts: Sequence[bytes]) -> np.ndarray:
        """Probability that each document (UTF-8) is good, float32 `[documents]`."""
        hashed, statistics = features(texts)
        logits = hashed @ self.weights + _clip(statistics, self.mean, self.scale) @ self.statistic_weights
        return (1 / (1 + np.exp(-np.clip(logits + self.intercept, -30, 30)))).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write `scorer.safetensors`."""
        arrays = {field: getattr(self, field) for field in ("weights", "statistic_weights", "mean", "scale")}
        save_file({**arrays, "intercept": np.array([self.intercept], np.float32)}, folder / "scorer.safetensors")

    @classmethod
    def load(cls, folder: Path) -> LinearScorer:
        """Read what `save` wrote."""
        try:
            arrays = load_file(folder / "scorer.safetensors")
            intercept = float(arrays.pop("intercept")[0])
            if arrays["weights"].shape != (BUCKETS,):
                raise KeyError("weights")
            return cls(intercept=intercept, **arrays)
        except FileNotFoundError:
            raise UserError(f"{folder} holds no scorer.safetensors") from None
        except Exception as error:
            raise UserError(f"{folder}/scorer.safetensors is not a linear scorer ({type(error).__name__})") from None


def _clip(statistics: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    # A document far outside what was seen must not be decided by one statistic.
    return np.clip((statistics - mean) / scale, -4, 4)


def fit(
    texts: Sequence[bytes], good: np.ndarray, sources: Sequence[str], seed: int
) -> tuple[LinearScorer, dict[str, Any]]:
    """Fit a linear scorer.

    Labels weigh the same, and so do the sources within a label, so that a large source does not become the definition
    of its label.

    Args:
        texts: documents, UTF-8.
        good: bool `[documents]`.
        sources: of each document.
        seed: of the split into documents to fit on and, `TEST_SHARE`, to test on.

    Returns:
        the scorer, and `{documents, test_documents, roc_auc, brier, calibration}` on the documents left out of the fit.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import brier_score_loss, roc_auc_score

    weight = np.zeros(len(texts))
    names = np.array(sources)
    for label in (False, True):
        mine = sorted({name for name, is_good in zip(sources, good, strict=True) if is_good == label})
        for name in mine:
            chosen = (names == name) & (good == label)
            weight[chosen] = len(texts) / (2 * len(mine) * chosen.sum())
    test = np.random.default_rng(seed).random(len(texts)) < TEST_SHARE
    for label in (False, True):
        for part in (test, ~test):
            if not (part & (good == label)).any():
                raise UserError(
                    "the linear scorer needs at least ten documents of each label (quality.high, quality.low)"
                )
    # In small batches: on the way to its features a text takes some thirty times its size.
    batches = [features(texts[start : start + _FIT_BATCH]) for start in range(0, len(texts), _FIT_BATCH)]
    statistics = np.concatenate([batch for _, batch in batches])
    mean, scale = statistics[~test].mean(axis=0), statistics[~test].std(axis=0) + 1e-4
    fitted, left_out = [], []
    for start in range(0, len(texts), _FIT_BATCH):
        hashed, batch = batches.pop(0)
        hashed.sum_duplicates()
        rows = hstack([hashed, csr_matrix(_clip(batch, mean, scale) * _STATISTIC_SCALE)], format="csr")
        unseen = test[start : start + _FIT_BATCH]
        fitted.append(rows[~unseen])
        left_out.append(rows[unseen])
    inputs, test_inputs = vstack(fitted, format="csr"), vstack(left_out, format="csr")
    del fitted, left_out
    model = LogisticRegression(C=_REGULARISATION, max_iter=300, tol=1e-3)
    model.fit(inputs, good[~test], sample_weight=weight[~test])
    weights = model.coef_[0].astype(np.float32)
    scorer = LinearScorer(
        weights[:BUCKETS],
        weights[BUCKETS:] * np.float32(_STATISTIC_SCALE),
        mean.astype(np.float32),
        scale.astype(np.float32),
        float(model.intercept_[0]),
    )
    scores = model.predict_proba(test_inputs)[:, 1]
    calibration = []
    for low in np.arange(0, 1, 0.1):
        inside = (scores >= low) & (scores < low + 0.1 + (low > 0.85))
        if inside.any():
            share = np.average(good[test][inside], weights=weight[test][inside])
            calibration.append(
                {
                    "mean_score": round(float(np.average(scores[inside], weights=weight[test][inside])), 4),
                    "share_good": round(float(share), 4),
                    "documents": int(inside.sum()),
                }
            )
    return scorer, {
        "documents": int((~test).sum()),
        "test_documents": int(test.sum()),
        "roc_auc": round(float(roc_auc_score(good[test], scores, sample_weight=weight[test])), 4),
        "brier": round(float(brier_score_loss(good[test], scores, sample_weight=weight[test])), 4),
        "calibration": calibration,
    }


# Chosen on sources left out of the fit; benchmarks/data_speed.py prints the area under the curve they give.
_REGULARISATION = 10.0
_STATISTIC_SCALE = 0.3


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


# Scoring


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
    function = "linear" if kind == "model" and _is_linear(name) else kind
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
                scores = _linear(Path(name)).score(texts)
            else:
                scores = _classify(name, [text.decode() for text in texts])
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


def check_scores(scores: np.ndarray, ids: Sequence[str]) -> None:
    """Raise `UserError` naming the first document whose score is not a number in [0, 1]."""
    bad = np.flatnonzero(~((scores >= 0) & (scores <= 1)))
    if len(bad):
        raise UserError(
            f"document {ids[bad[0]]} has quality score {scores[bad[0]]} ({len(bad)} such documents); "
            "scores must be numbers from 0 to 1"
        )


def _is_linear(name: str) -> bool:
    return (Path(name) / "scorer.safetensors").exists()


@functools.lru_cache(maxsize=1)
def _linear(folder: Path) -> LinearScorer:
    return LinearScorer.load(folder)


@functools.lru_cache(maxsize=1)
def _classifier(name: str) -> tuple[Any, Any, str]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises anything from KeyError to huggingface_hub's errors here
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"quality.scorer: {name} cannot be loaded as a text classifier ({message})") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), tokenizer, device


def _classify(name: str, texts: list[str]) -> np.ndarray:
    """Probability of the last label (`LABEL_1` of two); of a model with one output, its sigmoid."""
    import torch

    model, tokenizer, device = _classifier(name)
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512), 512)
    scores = np.empty(len(texts), np.float32)
    # By length, so that a batch is not padded to one long document.
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        batch = [texts[row][: 20 * limit] for row in rows]
        inputs = tokenizer(batch, truncation=True, max_length=limit, padding=True, return_tensors="pt").to(device)
        with torch.inference_mode():
            logits = model(**inputs).logits.float()
        values = logits.sigmoid()[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, -1]
        scores[rows] = values.cpu().numpy()
    return scores


# Selecting and reporting


def select(documents: Path, scores: Path, quality: Quality, output: Path) -> dict[str, Any]:
    """Apply the threshold: keep training documents that score above it (all if it is None), and write the report.

    Returns:
        `quality.json` without the examples.

    Raises:
        UserError: if nothing is kept, naming the highest score; for scores outside [0, 1].
    """
    output.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(scores / "scores.parquet")
    values = table["quality_score"].to_numpy()
    check_scores(values, table["id"])
    train = np.asarray(table["split"].cast(pa.string()).to_numpy(zero_copy_only=False) == "train")
    threshold = quality.threshold
    kept = train.copy() if threshold is None else train & (values > threshold)
    if not kept.any():
        raise UserError(
            f"quality.threshold {threshold} keeps no document; the highest score is {values[train].max():.4f}"
        )
    kept_table = table.filter(pa.array(kept)).select(["id", "quality_score"])
    pq.write_table(kept_table, output / "kept.parquet", compression="zstd")
    report = describe(table, train, threshold)
    report["scorer"] = read_json(scores / "scorer.json")
    report["examples"] = _examples(table, train, threshold, lambda ids: _excerpts(documents, ids))
    write_json(output / "quality.json", report)
    write_text(output / "quality.md", markdown(report))
    plot(report, output / "quality.png")
    return {key: value for key, value in report.items() if key != "examples"}


def describe(table: pa.Table, train: np.ndarray, threshold: float | None) -> dict[str, Any]:
    """Counts, histogram, sweep and shares by source of the training documents' scores."""
    scores = table["quality_score"].to_numpy()[train]
    sizes = table["bytes"].to_numpy()[train]
    column = table["source"].combine_chunks()
    names = column.dictionary.to_pylist()
    codes = column.indices.to_numpy()[train]
    kept = np.ones(len(scores), bool) if threshold is None else scores > threshold
    counts, edges = np.histogram(scores, bins=50, range=(0, 1))
    sweep = []
    for step in SWEEP:
        above = scores > step
        sweep.append({"threshold": step, "documents": int(above.sum()), "bytes": int(sizes[above].sum())})
    sources = {}
    for code, name in sorted(enumerate(names), key=lambda item: item[1]):
        mine = codes == code
        if mine.any():
            sources[name] = {
                "documents": int(mine.sum()),
                "kept_documents": int((mine & kept).sum()),
                "bytes": int(sizes[mine].sum()),
                "kept_bytes": int(sizes[mine & kept].sum()),
                "mean_score": round(float(scores[mine].mean()), 4),
            }
    return {
        "threshold": threshold,
        "documents": len(scores),
        "kept_documents": int(kept.sum()),
        "bytes": int(sizes.sum()),
        "kept_bytes": int(sizes[kept].sum()),
        "kept_fraction": round(float(kept.mean()), 4),
        "kept_bytes_fraction": round(float(sizes[kept].sum() / sizes.sum()), 4),
        "mean_score": round(float(scores.mean()), 4),
        "histogram": {"edges": [round(float(edge), 4) for edge in edges], "documents": counts.tolist()},
        "sweep": sweep,
        "sources": sources,
    }


def _examples(
    table: pa.Table, train: np.ndarray, threshold: float | None, excerpts_of: Callable[[set[str]], dict[str, str]]
) -> dict[str, Any]:
    """Best, worst, and the nearest on both sides of the threshold (for a control: of 0.5), with the text's start."""
    rows = np.flatnonzero(train)
    scores = table["quality_score"].to_numpy()[rows]
    order = rows[np.argsort(scores, kind="stable")]
    cut = 0.5 if threshold is None else threshold
    above = int(np.searchsorted(np.sort(scores), cut, side="right"))
    chosen = {
        "best": order[::-1][:5],
        "worst": order[:5],
        "nearest_above": order[above : above + 5],
        "nearest_below": order[max(0, above - 5) : above][::-1],
    }
    excerpts = excerpts_of({table["id"][int(row)].as_py() for rows in chosen.values() for row in rows})
    return {
        kind: [
            {
                "id": table["id"][int(row)].as_py(),
                "source": table["source"][int(row)].as_py(),
                "quality_score": round(float(table["quality_score"][int(row)].as_py()), 4),
                "text": excerpts.get(table["id"][int(row)].as_py(), ""),
            }
            for row in rows
        ]
        for kind, rows in chosen.items()
    }


def _excerpts(documents: Path, wanted: set[str]) -> dict[str, str]:
    """The first characters of some training documents, by id."""
    return {key: row["text"][:EXCERPT] for key, row in find(documents, wanted, ["text"]).items()}


def markdown(report: dict[str, Any], bytes_per_token: float | None = None) -> str:
    """The report as Markdown, with tokens beside bytes if it is known how many bytes a token has."""
    threshold = report["threshold"]
    rule = "no threshold (all kept)" if threshold is None else f"score > {threshold}"
    scorer = report["scorer"]
    lines = [
        "# Quality filter",
        "",
        f"Scorer `{scorer['scorer']}`, {rule}: {report['kept_documents']:,} of {report['documents']:,} training "
        f"documents kept, {report['kept_bytes'] / 1e6:.1f} of {report['bytes'] / 1e6:.1f} MB "
        f"({100 * report['kept_bytes_fraction']:.1f} %).",
        "",
    ]
    if "roc_auc" in scorer:
        lines += [
            f"Fitted on {scorer['documents']:,} labelled documents (good: {', '.join(scorer['high'])}; "
            f"poor: {', '.join(scorer['low'])}). On {scorer['test_documents']:,} others with the same labels the area "
            f"under the ROC curve is {scorer['roc_auc']:.3f} and the Brier score {scorer['brier']:.3f}.",
            "",
        ]
    lines += ["![Scores, share kept and, for a linear scorer, calibration](quality.png)", "", "## By source", ""]
    lines += ["| source | documents | kept | MB | MB kept | mean score |", "|---|---:|---:|---:|---:|---:|"]
    for name, entry in report["sources"].items():
        share = entry["kept_documents"] / entry["documents"]
        lines.append(
            f"| {name} | {entry['documents']:,} | {100 * share:.1f} % | {entry['bytes'] / 1e6:.2f} "
            f"| {entry['kept_bytes'] / 1e6:.2f} | {entry['mean_score']:.3f} |"
        )
    heads = ["score >", "documents", "MB", "share of bytes", *(["tokens, about"] if bytes_per_token else [])]
    lines += ["", "## Other thresholds", "", f"| {' | '.join(heads)} |", "|" + "---:|" * len(heads)]
    for step in report["sweep"]:
        cells = [f"{step['threshold']:.2f}", f"{step['documents']:,}", f"{step['bytes'] / 1e6:.2f}"]
        cells.append(f"{100 * step['bytes'] / report['bytes']:.1f} %")
        if bytes_per_token:
            cells.append(f"{step['bytes'] / bytes_per_token / 1e6:.2f} M")
        lines.append(f"| {' | '.join(cells)} |")
    titles = {
        "best": "The best",
        "worst": "The worst",
        "nearest_above": "Just above the threshold",
        "nearest_below": "Just below the threshold",
    }
    for kind, title in titles.items():
        lines += ["", f"## {title}", ""]
        for example in report["examples"][kind]:
            text = " ".join(example["text"].split()).replace("`", "'")
            lines += [f"- {example['quality_score']:.3f}, {example['source']}, {example['id']}: `{text[:300]}`"]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Histogram with the threshold, bytes kept against the threshold, and the calibration of a linear scorer."""
    from matplotlib.figure import Figure

    calibration = report["scorer"].get("calibration")
    figure = Figure(figsize=(12 if calibration else 8, 3.6), layout="constrained")
    axes = figure.subplots(1, 3 if calibration else 2)
    edges = report["histogram"]["edges"]
    axes[0].bar(edges[:-1], report["histogram"]["documents"], width=edges[1] - edges[0], align="edge", color="#4c72b0")
    axes[0].set(xlabel="quality score", ylabel="training documents", title="Scores", xlim=(0, 1))
    axes[1].plot(
        [step["threshold"] for step in report["sweep"]],
        [100 * step["bytes"] / report["bytes"] for step in report["sweep"]],
        color="#4c72b0",
    )
    axes[1].set(xlabel="threshold", ylabel="% of bytes kept", title="Kept", xlim=(0, 1), ylim=(0, 101))
    if report["threshold"] is not None:
        for axis in axes[:2]:
            axis.axvline(report["threshold"], color="#c44e52", linestyle="--")
    if calibration:
        axes[2].plot([0, 1], [0, 1], color="0.7", linestyle="--")
        axes[2].plot(
            [entry["mean_score"] for entry in calibration], [entry["share_good"] for entry in calibration], "o-"
        )
        title = f"Calibration, left-out documents (Brier {report['scorer']['brier']:.3f})"
        axes[2].set(xlabel="mean score", ylabel="share labelled good", title=title, xlim=(0, 1), ylim=(0, 1))
    figure.savefig(path, dpi=120, metadata={"Software": None})


# On files, without a recipe: `nanophi quality fit | score | report`


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
            _linear(Path(scorer)).score(texts)
            if _is_linear(scorer)
            else _classify(scorer, [text.decode() for text in texts])
        )
        columns = [
            pa.array([hashlib.sha256(text).hexdigest()[:16] for text in texts]),
            pa.array([source for source, _ in batch], pa.string()).dictionary_encode(),
            pa.array([len(text) for text in texts], pa.int64()),
            pa.array(scores, pa.float32()),
            pa.array([text[: 4 * EXCERPT].decode(errors="ignore")[:EXCERPT] for text in texts], pa.string()),
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


def report_files(scores: Path, threshold: float | None, output: Path) -> dict[str, Any]:
    """Write quality.json, quality.md and quality.png on what `score_files` wrote, and return the report."""
    try:
        table = pq.read_table(scores)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{scores} cannot be read as parquet ({str(error).splitlines()[0]})") from None
    if not {"id", "source", "bytes", "quality_score", "text"} <= set(table.column_names):
        raise UserError(f"{scores} was not written by `nanophi quality score`")
    check_scores(table["quality_score"].to_numpy(), table["id"])
    everything = np.ones(len(table), bool)
    table = table.set_column(1, "source", table["source"].combine_chunks().dictionary_encode())
    report = describe(table, everything, threshold)
    texts = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    report["scorer"] = {"scorer": str(scores)}
    report["examples"] = _examples(table, everything, threshold, lambda ids: {key: texts[key] for key in ids})
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "quality.json", report)
    write_text(output / "quality.md", markdown(report))
    plot(report, output / "quality.png")
    return report


def report_run(run: Path) -> str:
    """The quality report of a run as Markdown, with tokens if the run got so far. Raises `UserError` without one."""
    report = read_json(run / "data" / "quality" / "quality.json")
    tokens = run / "data" / "tokens" / "tokens.json"
    return markdown(report, read_json(tokens)["train"]["bytes_per_token"] if tokens.exists() else None)
