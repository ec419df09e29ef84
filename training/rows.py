"""Packed rows: in the order in which training sees them, as batches, and held out, measured by source."""

import dataclasses
import hashlib
import math
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from torch.utils.data import ConcatDataset, Dataset
from transformers import EvalPrediction

from nanophi.core.errors import UserError, one_line
from nanophi.core.files import read_json
from nanophi.data.stages import read_tokens

BY_SOURCE = "bits_per_byte/"
REMEDY = "run `nanophi prepare` on the recipe; it packs the same rows again and leaves the checkpoints alone"


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """The rows that training sees, in order: all epochs as one sequence, each epoch shuffled by its own seed.

    Row `i` depends only on `i` and the seed, however a run resumes or divides its batches. Without a length (`rows`)
    each row comes once, in file order. `tokens` is a folder of `datasets.Dataset.save_to_disk`.
    """

    def __init__(self, tokens: Path, rows: int | None = None, seed: int = 0) -> None:
        try:
            dataset = datasets.load_from_disk(str(tokens))
        except (OSError, ValueError) as error:
            reason = one_line(error)
            raise UserError(f"{tokens} cannot be read ({reason}); delete {tokens.parent} and {REMEDY}") from None
        if len(dataset) == 0:
            raise UserError(f"{tokens} holds no row: the text is shorter than one context; add documents")
        self.dataset = dataset.with_format("torch", columns=["input_ids"])
        self.rows = rows
        self.seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def sha256(self, rest: bytes = b"") -> str:
        """Of the packed stream, as `packing.py` defines it; `rest`: its end, which filled no row."""
        digest = hashlib.sha256()
        for chunk in self.dataset.data.column("input_ids").chunks:
            digest.update(chunk.flatten().to_numpy().astype("<i4").tobytes())
        digest.update(rest)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.dataset) if self.rows is None else self.rows

    def index(self, position: int) -> int:
        """Row of the dataset at a position of the sequence."""
        if self.rows is None:
            return position
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            self._epoch = epoch
        return int(self._order[offset])

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict[str, torch.Tensor]]:
        batch = self.dataset[[self.index(position) for position in positions]]["input_ids"]
        return [{"input_ids": row} for row in batch]


class PhasedRows(ConcatDataset[dict[str, torch.Tensor]]):
    """The rows of one phase after those of another, each with epochs of its own text."""

    def __getitems__(self, positions: list[int]) -> list[dict[str, torch.Tensor]]:
        """At ascending positions."""
        rows, first = [], 0
        for phase, stop in zip(self.datasets, self.cumulative_sizes, strict=True):
            if mine := [position - first for position in positions if first <= position < stop]:
                rows += phase.__getitems__(mine)  # type: ignore[attr-defined]
            first = stop
        return rows


class HeldoutRows(PackedRows):
    """Held-out rows that know the source of every token; one unnamed source without `heldout-documents.parquet`."""

    def __init__(self, tokens: Path) -> None:
        super().__init__(tokens / "heldout")
        shape = (len(self), len(self.dataset[0]["input_ids"]))
        self.sources, self.bytes_per_token = [""], [math.nan]
        self._codes = torch.zeros(shape, dtype=torch.int64)
        documents = tokens / "heldout-documents.parquet"
        if not documents.exists():
            return
        table = pq.read_table(documents)
        lengths, sizes = (table[name].to_numpy() for name in ("tokens", "bytes"))
        self.sources, codes = map(list, np.unique(table["source"].to_pylist(), return_inverse=True))
        # The rows are the documents end to end; an incomplete last row is dropped.
        self._codes = torch.from_numpy(np.repeat(codes, lengths)[: math.prod(shape)].reshape(shape))
        self.bytes_per_token = (np.bincount(codes, sizes) / np.bincount(codes, lengths)).tolist()

    def __getitems__(self, positions: list[int]) -> list[dict[str, torch.Tensor]]:
        rows = super().__getitems__(positions)
        return [{**row, "sources": self._codes[self.index(i)]} for row, i in zip(rows, positions, strict=True)]

    def sums(self, losses: torch.Tensor, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats, and number of predicted tokens: two float32 tensors (rows, number of sources).

        Both arguments are (rows, length): position i of `losses` holds the loss of predicting token i + 1.
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
        parts = (prediction.predictions, prediction.label_ids)
        nats, counts = (np.asarray(part, np.float64).sum(axis=0) for part in parts)
        by_source = {
            BY_SOURCE + name: round(nats[code] / counts[code] / math.log(2) / self.bytes_per_token[code], 5)
            for code, name in enumerate(self.sources)
            if name and counts[code]
        }
        return {"mean_loss": float(nats.sum() / counts.sum()), **by_source}


def check_tokens(tokens: Path, **splits: PackedRows) -> None:
    """Check that tokenizer and rows of each split are those that `tokens.json` records. Raises `UserError`."""
    recorded = read_tokens(tokens)
    for split, rows in splits.items():
        counts, rest = recorded[split], tokens / f"{split}-rest.bin"
        if counts.get("tail_tokens") and not rest.exists():  # packed by 0.1, which kept no rest
            packed = read_json(tokens / split / "state.json")["_fingerprint"]
            same = (len(rows.dataset), packed) == (counts["rows"], counts["sha256"][:16])
        else:
            same = rows.sha256(rest.read_bytes() if rest.exists() else b"") == counts["sha256"]
        if not same:
            raise UserError(
                f"{tokens / split} holds other tokens than tokens.json records; delete {tokens} and {REMEDY}"
            )


@dataclasses.dataclass(frozen=True)
class PackedCollator:
    """Rows to a batch of `labels`, `position_ids` if documents are isolated, and what rows have; (rows, length) int64.

    Positions restart at an end-of-text token, which attention reads as the boundary of a document.
    """

    eos_token_id: int
    isolate_documents: bool

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.stack([row[name] for row in rows]).long() for name in rows[0]}
        batch["labels"] = batch["input_ids"]
        if self.isolate_documents:
            batch["position_ids"] = restarting_positions(batch["input_ids"], self.eos_token_id)
        return batch


def restarting_positions(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Positions that count from 0 at the row's start and at every end-of-text token; (rows, length) int64."""
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    starts = torch.where(input_ids == eos_token_id, positions, 0).cummax(dim=1).values
    return positions - starts
