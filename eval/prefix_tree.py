"""A prefix tree of token sequences, how it is laid out in rows for the model, and the keys and values of a prefix.

A range of sequences runs as one row, in which every token attends to its own ancestors only, at its own position.
Running the model, and which range becomes a row, is up to scorer.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

ROW_TOKENS = 1024  # about how many tokens a row has, and a forward pass on a CPU: enough to keep its cores busy
PACK_TOKENS = 512  # of a row after a cached prefix: in longer rows too much attention is computed only to be masked

Range = tuple[int, int]
"""Sequences [low, high) of a tree."""


class RowPlan(NamedTuple):
    """Ranges of a tree that run as one sequence, and the number of their tokens."""

    tokens: int
    ranges: list[Range]


class PrefixTree:
    """Token sequences (int [tokens], all different) in lexicographic order: that of a walk through their prefix tree.

    For each sequence `scored` has the number of its last positions whose next token is scored, `requests` what is asked
    at its end, and `shared` how many tokens it has in common with the previous one.
    """

    def __init__(self, sequences: Sequence[np.ndarray], scored: Sequence[int], requests: Sequence[Any] = ()) -> None:
        self.sequences, self.scored, self.requests = sequences, scored, requests
        self.shared = [0] * len(sequences)
        for i in range(1, len(sequences)):
            common = min(len(sequences[i - 1]), len(sequences[i]))
            differs = np.flatnonzero(sequences[i - 1][:common] != sequences[i][:common])
            self.shared[i] = int(differs[0]) if len(differs) else common

    def prefix(self, low: int, high: int) -> int:
        """Number of leading tokens that sequences [low, high) share and of which none is scored."""
        tokens = min(self.shared[low + 1 : high], default=len(self.sequences[low]))
        return min(tokens, *(len(self.sequences[i]) - self.scored[i] for i in range(low, high)))

    def new(self, i: int, low: int, base: int) -> int:
        """Number of tokens that sequence i adds to a row that starts with sequence `low`, after `base` tokens."""
        return len(self.sequences[i]) - (base if i == low else max(self.shared[i], base))

    def split(self, low: int, high: int, base: int) -> list[Range]:
        """Consecutive ranges of [low, high), each a row of about `ROW_TOKENS` tokens after the first `base`."""
        rows = []
        start = low
        total = 0
        for i in range(low, high):
            length, new = len(self.sequences[i]) - base, self.new(i, start, base)
            # A sequence that shares most of its tokens with the previous one stays with it, even in a long row.
            if total and total + new > ROW_TOKENS and (2 * new > length or total + new > 2 * ROW_TOKENS):
                rows.append((start, i))
                start, total, new = i, 0, length
            total += new
        return [*rows, (start, high)]

    def children(self, low: int, high: int) -> list[Range]:
        """[low, high), divided where neighbours share the fewest tokens."""
        least = min(self.shared[low + 1 : high])
        cuts = [i for i in range(low + 1, high) if self.shared[i] == least]
        return list(zip([low, *cuts], [*cuts, high], strict=True))

    def tokens(self, low: int, high: int, base: int) -> int:
        """Number of tokens of [low, high) as one row, after the first `base`."""
        return sum(self.new(i, low, base) for i in range(low, high))

    def rows(self, ranges: Sequence[Range], base: int) -> list[RowPlan]:
        """Ranges as rows, longest first; after a cached prefix, which is copied for each, packed to `PACK_TOKENS`."""
        rows = [RowPlan(self.tokens(low, high, base), [(low, high)]) for low, high in ranges]
        packed: list[RowPlan] = []
        for row in rows:
            if base and packed and packed[-1].tokens + row.tokens <= PACK_TOKENS:
                packed[-1] = RowPlan(packed[-1].tokens + row.tokens, packed[-1].ranges + row.ranges)
            else:
                packed.append(row)
        return sorted(packed, key=lambda row: -row.tokens)


class PackedRow:
    """Ranges of a tree as one sequence, without the first `base` tokens of each.

    `tokens` and `positions` are int64 [tokens of the row]; `paths` has for each sequence the indices in the row of its
    tokens; in a `chain` every token is the ancestor of the next, so that plain causal attention is correct.
    """

    def __init__(self, tree: PrefixTree, ranges: Sequence[Range], base: int) -> None:
        self.base = base
        self.paths: dict[int, np.ndarray] = {}
        tokens, positions = [], []
        self.blocks: list[tuple[int, np.ndarray]] = []
        length = 0
        for low, high in ranges:
            path = np.empty(0, dtype=np.int64)
            for i in range(low, high):
                start, end = base if i == low else max(tree.shared[i], base), len(tree.sequences[i])
                path = np.concatenate([path[: start - base], np.arange(length, length + end - start)])
                self.paths[i] = path
                self.blocks.append((end - start, path))
                tokens.append(tree.sequences[i][start:])
                positions.append(np.arange(start, end))
                length += end - start
        self.tokens, self.positions = np.concatenate(tokens), np.concatenate(positions)
        self.chain = all(len(path) == path[-1] + 1 for _, path in self.blocks if len(path))

    def allow(self, mask: Tensor) -> None:
        """Set an additive mask [tokens, base + tokens] to zero where a token may attend."""
        mask[: len(self.tokens), : self.base] = 0
        allowed = np.zeros((len(self.tokens), len(self.tokens)), dtype=bool)
        for count, path in self.blocks:
            if count:
                rows = path[-count:]
                allowed[rows[0] : rows[-1] + 1, path[:-count]] = True
                allowed[rows[0] : rows[-1] + 1, rows[0] : rows[-1] + 1] = np.tri(count, dtype=bool)
        where = torch.from_numpy(allowed).to(mask.device)
        mask[: len(self.tokens), self.base : self.base + len(self.tokens)].masked_fill_(where, 0)


Past = list[tuple[Tensor, Tensor]]
"""Keys and values of a prefix, per layer, each [1, key-value heads, tokens, head size]."""


class StopForward(Exception):  # noqa: N818
    """Ends a forward pass once everything that is needed has been computed."""


class PrefixCache(DynamicCache):
    """Collects the keys and values of a prefix, and ends the pass there: the rest of the last layer is not needed."""

    def __init__(self, past: Past | None, last_layer: int) -> None:
        super().__init__(past)
        self.last_layer = last_layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self.last_layer:
            raise StopForward
        return result
