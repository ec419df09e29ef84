"""What becomes of each document: trained on, held out, or dropped as a repeat or for an evaluation item; and how many.

Decides by hashes alone, over the whole corpus at once: it reads no text and writes no file.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanophi.core.errors import UserError
from nanophi.core.recipe import Data
from nanophi.data import deduplication
from nanophi.data.documents import uniform_from_id
from nanophi.data.sources import reasons

TRAIN, HELDOUT, EXACT, NEAR, CONTAMINATED, HELDOUT_NEAR = range(6)
OUTCOMES = ("train", "heldout", "exact_duplicate", "near_duplicate", "contaminated", "heldout_near_train")
_NOT_DROPPED = ("read", "bytes", "train", "heldout")


class Counts:
    """How many documents were read (and their bytes), trained on, held out and dropped, by source, name and reason.

    Args:
        read: what the parts read, as `gather` stores it; `add` counts what became of their usable documents.
    """

    def __init__(self, read: Sequence[dict[str, Any]]) -> None:
        self.counts: Counter[tuple[int, str, str]] = Counter()
        """By number of the source in the recipe, name that its documents have, and `read`, `bytes` or outcome."""
        for part in read:
            for what in ("read", "bytes"):
                self.counts.update({(part["origin"], name, what): count for name, count in part[what].items()})
            for name, dropped in part["dropped"].items():
                self.counts.update({(part["origin"], name, reason): count for reason, count in dropped.items()})

    def add(self, origins: np.ndarray, codes: np.ndarray, names: Sequence[str], decisions: np.ndarray) -> None:
        """Count decisions; per document: number of its source, index of its name in `names`, what becomes of it."""
        shape = (len(OUTCOMES), int(origins.max(initial=0)) + 1, len(names) or 1)
        cells = np.ravel_multi_index((decisions, origins, codes), shape)
        numbers = np.bincount(cells, minlength=int(np.prod(shape))).reshape(shape)
        for outcome, origin, code in np.argwhere(numbers).tolist():
            self.counts[origin, names[code], OUTCOMES[outcome]] += int(numbers[outcome, origin, code])

    def by_source(self) -> dict[int, Counter[str]]:
        """Counts of each source of the recipe."""
        return self._grouped(0)

    def by_name(self) -> dict[str, Counter[str]]:
        """Counts of each name, sorted."""
        return dict(sorted(self._grouped(1).items()))

    def origins(self) -> dict[str, list[int]]:
        """Every name with the numbers of the sources that give it."""
        found: dict[str, list[int]] = defaultdict(list)
        for number, name, what in self.counts:
            if what == "read":
                found[name].append(number)
        return found

    def _grouped(self, position: int) -> dict[Any, Counter[str]]:
        grouped: dict[Any, Counter[str]] = defaultdict(Counter)
        for key, count in self.counts.items():
            grouped[key[position]][key[2]] += count
        return grouped


def dropped(counts: Counter[str]) -> Counter[str]:
    """Why documents were dropped, of one group's counts."""
    return Counter({reason: count for reason, count in counts.items() if reason not in _NOT_DROPPED})


def decide(
    data: Data, ids: np.ndarray, signatures: np.ndarray, contaminated: np.ndarray, held_sources: np.ndarray, remedy: str
) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of each document (uint8), and the index of the one that stays in its place (its own if it stays).

    Args:
        data: the recipe's section.
        ids: uint64 `[documents]`.
        signatures: uint32 `[documents, deduplication.PERMUTATIONS]`.
        contaminated: bool `[documents]`: which hold an evaluation item.
        held_sources: bool `[documents]`: which are of sources that are held out as a whole.
        remedy: what to do if there are too few documents, for the message.
    """
    own = np.arange(len(ids))
    decisions, leaders = np.full(len(ids), TRAIN, np.uint8), own
    first = deduplication.exact_duplicates(ids)
    unique = first == own
    if data.deduplication.exact:
        decisions[~unique] = EXACT
        leaders = first
    # Also without near-duplicate removal: held-out documents must not have near-duplicates among those trained on.
    near = deduplication.near_duplicates(signatures, unique, data.deduplication.similarity)
    if data.deduplication.near:
        repeated = unique & (near != own)
        decisions[repeated] = NEAR
        leaders = np.where(repeated, near, leaders)
    decisions[contaminated & (decisions == TRAIN)] = CONTAMINATED
    candidates = np.flatnonzero(decisions == TRAIN)
    if len(candidates) < 2:
        left = f"{len(candidates)} of {len(ids)} documents are left, too few to hold one out"
        raise UserError(left + (f" (dropped: {found})" if (found := _described(decisions)) else "") + remedy)
    if held_sources.any():
        heldout = candidates[held_sources[candidates]]
        if len(heldout) in (0, len(candidates)):
            where = "repeat the other sources" if len(heldout) == 0 else "are all that is left"
            raise UserError(f"the documents of the held-out sources {where}: {_described(decisions)}")
    else:
        # By hash: the same document is held out in every run, whatever else the corpus holds.
        order = candidates[np.argsort(ids[candidates], kind="stable")]
        chosen = int((uniform_from_id(ids[order]) < data.heldout_fraction).sum())
        heldout = order[: max(1, min(chosen, data.heldout_max_documents))]
    decisions[heldout] = HELDOUT
    if not (data.deduplication.near and data.deduplication.exact):
        cluster = near[first]
        trained = np.zeros(len(ids), bool)
        trained[cluster[decisions == TRAIN]] = True
        decisions[heldout[trained[cluster[heldout]]]] = HELDOUT_NEAR
        if not (decisions == HELDOUT).any():
            raise UserError(
                "every held-out document has a near-duplicate among the others; set deduplication.near: true"
            )
    if not (decisions == TRAIN).any():
        raise UserError(f"no document is left to train on: {_described(decisions)}")
    return decisions, leaders


def _described(decisions: np.ndarray) -> str:
    return reasons(dropped(Counter(OUTCOMES[code] for code in decisions.tolist())))
