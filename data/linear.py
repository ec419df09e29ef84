"""The linear scorer's arithmetic: features of a text, the fit on labelled documents, the file of weights.

How a recipe names the scorer is defined in `scorers.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_matrix, hstack, vstack

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import permit, read_json, write_json
from nanophi.core.recipe import Data, Quality
from nanophi.data import installed_docs
from nanophi.data.documents import batches, shards, uniform_from_id
from nanophi.data.ngrams import hash_words, ngrams

BUCKETS = 1 << 18
EXCERPT_BYTES = 16_000
"""How much of a document the linear scorer reads."""
FIT_BYTES = 12_000_000
"""Excerpts of each label that the linear scorer is fitted on."""
TEST_SHARE = 0.2
# Chosen on sources left out of the fit; benchmarks/data_speed.py prints the area under the curve they give.
_REGULARISATION = 10.0
_STATISTIC_SCALE = 0.3
_FIT_BATCH = 64
_CLASSES = {
    "lower": "abcdefghijklmnopqrstuvwxyz",
    "upper": "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "digit": "0123456789",
    "newline": "\n",
    "space": " \t",
    "sentence": ".,;?!",
    "quote": "'\"`()-",
    "markup": "<>{}[]\\|$#_*=/@^~&%+:",
    "other": "",
    "beyond_ascii": "".join(map(chr, range(128, 256))),
}
"""Classes of bytes; `other` has those that are in no class."""
_NEWLINE = list(_CLASSES).index("newline")
_CLASS_TABLE = np.full(256, list(_CLASSES).index("other"), np.uint8)
for _number, _members in enumerate(_CLASSES.values()):
    _CLASS_TABLE[[ord(_member) for _member in _members]] = _number


def features(texts: Sequence[bytes]) -> tuple[csr_matrix, np.ndarray]:
    """What the linear scorer sees of each document's first `EXCERPT_BYTES`: hashed words and word pairs, float32
    `[documents, BUCKETS]`, counts over the square root of their sum; and statistics, float32
    `[documents, len(_CLASSES) + 2]`: shares of character classes, mean word and line length.
    """
    excerpts = [text[:EXCERPT_BYTES] for text in texts]
    words = hash_words(excerpts)
    pairs = ngrams(words, 2)
    counts = words.counts + pairs.counts
    offsets = np.concatenate([[0], np.cumsum(counts)])
    indices = np.empty(offsets[-1], np.int32)
    # Each document's words, then its pairs.
    for part, first in ((words, offsets[:-1]), (pairs, offsets[:-1] + words.counts)):
        target = np.repeat(first - part.offsets[:-1], part.counts) + np.arange(len(part.hashes))
        indices[target] = (part.hashes % np.uint64(BUCKETS)).astype(np.int32)
    values = np.repeat(1 / np.sqrt(np.maximum(counts, 1)), counts).astype(np.float32)
    hashed = csr_matrix((values, indices, offsets), shape=(len(texts), BUCKETS))

    classes = _CLASS_TABLE[np.frombuffer(b"".join(excerpts), np.uint8)].astype(np.int64)
    lengths = np.array([len(text) for text in excerpts])
    classes += np.repeat(np.arange(len(texts)), lengths) * len(_CLASSES)
    tallies = np.bincount(classes, minlength=len(texts) * len(_CLASSES)).reshape(len(texts), len(_CLASSES))
    shares = tallies / np.maximum(lengths, 1)[:, None]
    word_length = np.log1p((tallies[:, 0] + tallies[:, 1]) / np.maximum(words.counts, 1))
    line_length = np.log1p(lengths / (tallies[:, _NEWLINE] + 1))
    return hashed, np.column_stack([shares, word_length, line_length]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LinearModel:
    """Logistic regression on `features`: float32 `[BUCKETS]` weights, `[len(_CLASSES) + 2]` for the statistics."""

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
        arrays = {**vars(self), "intercept": np.array([self.intercept], np.float32)}
        save_file(arrays, folder / "scorer.safetensors")
        permit(folder / "scorer.safetensors")

    @classmethod
    def load(cls, folder: Path) -> LinearModel:
        """Read what `save` wrote."""
        with user_errors(f"{folder}/scorer.safetensors is not a linear scorer"):
            arrays = load_file(folder / "scorer.safetensors")
            return cls(intercept=float(arrays.pop("intercept")[0]), **arrays)


def _clip(statistics: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    # A document far outside what was seen must not be decided by one statistic.
    return np.clip((statistics - mean) / scale, -4, 4)


def fit(
    texts: Sequence[bytes], good: np.ndarray, sources: Sequence[str], seed: int
) -> tuple[LinearModel, dict[str, Any]]:
    """Fit a linear scorer; returns it, and `{documents, test_documents, roc_auc, brier, calibration}`.

    Labels weigh the same, and so do the sources within a label. The report is made on `TEST_SHARE` of the documents.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import brier_score_loss, roc_auc_score

    weight = np.zeros(len(texts))
    names = np.array(sources)
    for label in (False, True):
        mine = np.unique(names[good == label])
        for name in mine:
            chosen = (names == name) & (good == label)
            weight[chosen] = len(texts) / (2 * len(mine) * chosen.sum())
    test = np.random.default_rng(seed).random(len(texts)) < TEST_SHARE
    if not all((part & label).any() for part in (test, ~test) for label in (good, ~good)):
        raise UserError("the linear scorer needs at least ten documents of each label (quality.high, quality.low)")
    # In small batches: on the way to its features a text takes some thirty times its size.
    batches = [features(texts[start : start + _FIT_BATCH]) for start in range(0, len(texts), _FIT_BATCH)]
    for hashed, _ in batches:
        hashed.sum_duplicates()
    statistics = np.concatenate([batch for _, batch in batches])
    mean, scale = statistics[~test].mean(axis=0), statistics[~test].std(axis=0) + 1e-4
    inputs = vstack([batch for batch, _ in batches], "csr")
    del batches
    inputs = hstack([inputs, csr_matrix(_clip(statistics, mean, scale) * _STATISTIC_SCALE)], format="csr")
    inputs, left_out = inputs[~test], inputs[test]
    model = LogisticRegression(C=_REGULARISATION, max_iter=300, tol=1e-3)
    model.fit(inputs, good[~test], sample_weight=weight[~test])
    weights = model.coef_[0].astype(np.float32)
    hashed_weights, statistic_weights = weights[:BUCKETS], weights[BUCKETS:] * np.float32(_STATISTIC_SCALE)
    mean, scale = mean.astype(np.float32), scale.astype(np.float32)
    scorer = LinearModel(hashed_weights, statistic_weights, mean, scale, float(model.intercept_[0]))
    scores = model.predict_proba(left_out)[:, 1]
    return scorer, {
        "documents": int((~test).sum()),
        "test_documents": int(test.sum()),
        "roc_auc": round(float(roc_auc_score(good[test], scores, sample_weight=weight[test])), 4),
        "brier": round(float(brier_score_loss(good[test], scores, sample_weight=weight[test])), 4),
        "calibration": _calibration(scores, good[test], weight[test]),
    }


def _calibration(scores: np.ndarray, good: np.ndarray, weight: np.ndarray) -> list[dict[str, Any]]:
    """The share of good documents among those with about the same score, in ten steps."""
    rows = []
    for low in np.arange(0, 1, 0.1):
        inside = (scores >= low) & (scores < low + 0.1 + (low > 0.85))
        if inside.any():
            mean, share = (np.average(values[inside], weights=weight[inside]) for values in (scores, good))
            row = {"mean_score": round(float(mean), 4), "share_good": round(float(share), 4)}
            rows.append({**row, "documents": int(inside.sum())})
    return rows


def fit_and_save(
    examples: Iterable[tuple[bytes, bool, str]], high: Sequence[str], low: Sequence[str], seed: int, output: Path
) -> dict[str, Any]:
    """Fit on text, label and source of some documents; write weights and `scorer.json`, whose contents are returned."""
    texts, good, names = zip(*((text[:EXCERPT_BYTES], *rest) for text, *rest in examples), strict=True)
    model, report = fit(texts, np.array(good, bool), names, seed)
    report = {"scorer": "linear", "high": list(high), "low": list(low), **report}
    model.save(output)
    write_json(output / "scorer.json", report)
    return report


def fit_on_documents(documents: Path, quality: Quality, data: Data, seed: int, output: Path) -> None:
    """Fit on the sources of a run's documents that the recipe names, or on the embedded corpus's own examples."""
    known = read_json(documents / "documents.json")["sources"]
    high, low = list(quality.high), list(quality.low)
    if not high and not low and any(source.embedded for source in data.sources):
        high, low = list(installed_docs.HIGH), list(installed_docs.LOW)
    elif missing := [name for name in (*high, *low) if name not in known]:
        raise UserError(f"quality.high or quality.low names source '{missing[0]}'; there is {', '.join(known)}")
    # The same share of each source's documents, chosen by hash: a cross-section that the corpus's order cannot skew.
    share = {
        name: min(1.0, FIT_BYTES / sum(other in known for other in group) / max(1, known[name]["bytes"]))
        for group in (high, low)
        for name in group
        if name in known
    }

    def examples() -> Iterable[tuple[bytes, bool, str]]:
        for batch in batches(shards(documents, "train"), ["id", "text", "source"]):
            names = batch["source"].to_pylist()
            for row, (name, number) in enumerate(zip(names, uniform_from_id(batch["id"], seed), strict=True)):
                if number < share.get(name, 0.0):
                    yield batch["text"][row].as_py().encode(), name in high, name

    fit_and_save(examples(), high, low, seed, output)
