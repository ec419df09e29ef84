"""Bits per byte as a metric of the `evaluate` library; the figures of held-out documents, and of recited text."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from nanophi.eval.statistics import bits_per_byte, bits_per_byte_stderr


class BitsPerByte(evaluate.Metric):
    """-log2 P(text) / bytes(text), over all texts together: it does not depend on the tokenizer.

    `compute(predictions=log_likelihoods, references=byte_counts)` takes natural-log likelihoods and returns
    `bits_per_byte`, `bits_per_byte_stderr` (bootstrap over the texts, seed 0) and `bytes`.
    """

    def _info(self) -> evaluate.MetricInfo:
        columns = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="Bits per byte of text under a language model, with a bootstrap standard error.",
            citation="",
            inputs_description="predictions: log-likelihood of each text in nats; references: its length in bytes.",
            features=datasets.Features(columns),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, Any]:
        log_likelihoods, sizes = np.asarray(predictions, dtype=float), np.asarray(references, dtype=float)
        return {
            "bits_per_byte": bits_per_byte(log_likelihoods, sizes),
            "bits_per_byte_stderr": bits_per_byte_stderr(log_likelihoods, sizes),
            "bytes": int(sizes.sum()),
        }


def heldout_figures(samples: Sequence[Mapping[str, Any]], bz2: Mapping[str, Any]) -> dict[str, Any]:
    """Bits per byte of the held-out documents, together and by source, beside what bz2 makes of the same text."""
    figures = {
        source: bits_figures([sample["bits_per_byte"] for sample in samples if sample["source"] == source])
        for source in sorted({sample["source"] for sample in samples})
    }
    whole = bits_figures([sample["bits_per_byte"] for sample in samples])
    return {**whole, "bz2": dict(bz2), "by_source": figures}


def bits_figures(pairs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What `BitsPerByte` computes of (log-likelihood in nats, bytes) pairs, and the number of `documents`."""
    predictions, references = zip(*pairs, strict=True)
    metric = BitsPerByte(keep_in_memory=True)
    return {**metric.compute(predictions=list(predictions), references=list(references)), "documents": len(pairs)}


OCCURRENCES = {"1": (1, 1), "2 to 4": (2, 4), "5 to 16": (5, 16), "17 or more": (17, np.inf)}


def memorisation_figures(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Items continued verbatim and nearly: training text by how often it occurs in the training stream, held-out text.

    Of held-out items `seen` are in the training stream too.
    """
    trained, heldout = samples["memorisation_train"], samples["memorisation_heldout"]
    groups = {("train", ""): trained} | {
        ("train", name): [sample for sample in trained if low <= sample["occurrences"] <= high]
        for name, (low, high) in OCCURRENCES.items()
    }
    return [
        {
            "split": split,
            "occurrences": name,
            "items": len(group),
            "seen": sum(sample["occurrences"] > 0 for sample in group),
            **{key: int(sum(sample[key] for sample in group)) for key in ("verbatim", "near_verbatim")},
        }
        for (split, name), group in (groups | {("heldout", ""): heldout}).items()
        if group
    ]
