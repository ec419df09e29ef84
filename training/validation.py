"""Validation during training: bits per byte by source on the held-out rows, without a trace in the random state."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import EvalPrediction

from nanophi.training.rows import PackedRows

BY_SOURCE = "bits_per_byte/"


class HeldoutRows(PackedRows):
    """Held-out rows that know the source of every token.

    Without `heldout-documents.parquet` in the run's `data/tokens` there is one unnamed source.
    """

    def __init__(self, tokens: Path) -> None:
        super().__init__(tokens / "heldout")
        context_length = len(self.dataset[0]["input_ids"])
        self.sources = [""]
        self.bytes_per_token = [math.nan]
        self._codes = torch.zeros(len(self), context_length, dtype=torch.int64)
        documents = tokens / "heldout-documents.parquet"
        if not documents.exists():
            return
        table = pq.read_table(documents)
        names = np.array(table["source"].to_pylist())
        lengths = table["tokens"].to_numpy()
        self.sources, codes = map(list, np.unique(names, return_inverse=True))
        # The rows are the documents end to end; an incomplete last row is dropped.
        stream = np.repeat(np.array(codes), lengths)[: len(self) * context_length]
        self._codes = torch.from_numpy(stream.reshape(len(self), context_length))
        self.bytes_per_token = [
            table["bytes"].to_numpy()[names == source].sum() / lengths[names == source].sum() for source in self.sources
        ]

    def __getitems__(self, positions: list[int]) -> list[dict[str, torch.Tensor]]:
        rows = super().__getitems__(positions)
        return [{**row, "sources": self._codes[self.index(i)]} for row, i in zip(rows, positions, strict=True)]

    def sums(self, losses: torch.Tensor, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats, and number of predicted tokens: two float32 tensors (rows, number of sources).

        Both arguments are (rows, length): position i of `losses` holds the loss of predicting token i + 1, `sources`
        the source of each token.
        """
        nats = torch.zeros(len(losses), len(self.sources), device=losses.device)
        counts = torch.zeros_like(nats)
        nats.scatter_add_(1, sources[:, 1:], losses[:, :-1])
        counts.scatter_add_(1, sources[:, 1:], torch.ones_like(losses[:, :-1]))
        return nats, counts

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """From `sums` of all rows: `mean_loss`, and `bits_per_byte/NAME` of each source that has a predicted token.

        The mean is over tokens; `Trainer`'s own is over batches, which hold some rows twice on several processes.
        """
        nats = np.asarray(prediction.predictions, np.float64).sum(axis=0)
        counts = np.asarray(prediction.label_ids, np.float64).sum(axis=0)
        by_source = {
            BY_SOURCE + name: round(nats[code] / counts[code] / math.log(2) / self.bytes_per_token[code], 5)
            for code, name in enumerate(self.sources)
            if name and counts[code]
        }
        return {"mean_loss": float(nats.sum() / counts.sum()), **by_source}


@contextlib.contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Run the body; the random generators of Python, NumPy and torch are then as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
