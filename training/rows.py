"""Packed rows in the order in which training sees them, and as batches."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from nanophi.core.errors import UserError
from nanophi.core.files import read_json


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """The rows that training sees, in order: all epochs as one sequence, each epoch shuffled by its own seed.

    Row `i` of the sequence depends only on `i` and the seed, so a run that resumes, or divides its batches among
    other devices, sees the same rows. Without a length (`rows`) each row comes once, in file order.

    `tokens` is a folder of `datasets.Dataset.save_to_disk` with a column `input_ids` of equally long rows.
    """

    def __init__(self, tokens: Path, rows: int | None = None, seed: int = 0) -> None:
        try:
            dataset = datasets.load_from_disk(str(tokens))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{tokens} cannot be read ({reason}); delete {tokens.parent} and run `nanophi prepare` on the recipe; "
                "it packs the same rows again and leaves the checkpoints alone"
            ) from None
        if len(dataset) == 0:
            raise UserError(
                f"{tokens} holds no complete row, because the text is shorter than one context; add documents"
            )
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


def check_tokens(tokens: Path, **splits: PackedRows) -> None:
    """Check that the rows of each split are those that `tokens.json` records. Raises `UserError`."""
    recorded = read_json(tokens / "tokens.json")
    for split, rows in splits.items():
        counts, rest = recorded[split], tokens / f"{split}-rest.bin"
        if counts.get("tail_tokens") and not rest.exists():  # packed by 0.1, which kept no rest
            packed = read_json(tokens / split / "state.json")["_fingerprint"]
            same = (len(rows.dataset), packed) == (counts["rows"], counts["sha256"][:16])
        else:
            same = rows.sha256(rest.read_bytes() if rest.exists() else b"") == counts["sha256"]
        if not same:
            raise UserError(
                f"{tokens / split} holds other tokens than {tokens / 'tokens.json'} records; delete {tokens} and run "
                "`nanophi prepare` on the recipe; it packs the same rows again and leaves the checkpoints alone"
            )


@dataclasses.dataclass(frozen=True)
class PackedCollator:
    """Rows to a batch: `input_ids`, `labels`, `position_ids` if documents are isolated, and `sources` if the rows have
    them; all (rows, length) int64.

    A document begins at an end-of-text token, which also ends the document before. Positions restart there.
    Attention reads restarting positions as boundaries, so every prediction, including that of the end-of-text token,
    depends on one document only.
    """

    eos_token_id: int
    isolate_documents: bool

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        input_ids = torch.stack([row["input_ids"] for row in rows]).long()
        batch = {"input_ids": input_ids, "labels": input_ids}
        if "sources" in rows[0]:
            batch["sources"] = torch.stack([row["sources"] for row in rows])
        if self.isolate_documents:
            batch["position_ids"] = restarting_positions(input_ids, self.eos_token_id)
        return batch


def restarting_positions(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Positions that count from 0 at the row's start and at every end-of-text token; (rows, length) int64."""
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    starts = torch.where(input_ids == eos_token_id, positions, 0).cummax(dim=1).values
    return positions - starts
