"""What becomes of each document: trained on, held out, or dropped as a repeat or for an evaluation item; and how many.

Decides by hashes alone, over the whole corpus at once. A document that is recorded as kept in place of others is kept.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanophi.core.errors import UserError
from nanophi.core.recipe import Data
from nanophi.data.deduplication import exact_duplicates, near_duplicates
from nanophi.data.documents import uniform_from_id
from nanophi.data.sources import reasons

TRAIN, HELDOUT, EXACT, NEAR, CONTAMINATED, HELDOUT_NEAR = range(6)
OUTCOMES = ("train", "heldout", "exact_duplicate", "near_duplicate", "contaminated", "heldout_near_train")


class Counts:
    """Documents read (and their bytes), trained on, held out and dropped, by number of the source, name and reason."""

    def __init__(self, read: Sequence[dict[str, Any]]) -> None:
        self.counts: Counter[tuple[int, str, str]] = Counter()
        for part in read:
            for what in ("read", "bytes"):
                self.counts.update({(part["origin"], name, what): count for name, count in part[what].items()})
            for name, lost in part["dropped"].items():
                self.counts.update({(part["origin"], name, why): count for why, count in lost.items()})

    def add(self, origins: np.ndarray, codes: np.ndarray, names: Sequence[str], decisions: np.ndarray) -> None:
        """Count decisions; per document: number of its source, index of its name in `names`, what becomes of it."""
        cells = Counter(zip(origins.tolist(), codes.tolist(), decisions.tolist(), strict=True))
        for (origin, code, outcome), count in cells.items():
            self.counts[origin, names[code], OUTCOMES[outcome]] += count

    def grouped(self, position: int) -> dict[Any, Counter[str]]:
        """Counts of each source, by its number in the recipe (position 0), or of each name that documents have (1)."""
        grouped: dict[Any, Counter[str]] = defaultdict(Counter)
        for key, count in self.counts.items():
            grouped[key[position]][key[2]] += count
        return dict(sorted(grouped.items()))

    def origins(self) -> dict[str, list[int]]:
        """Every name with the numbers of the sources that give it."""
        found: dict[str, list[int]] = defaultdict(list)
        for number, name, what in self.counts:
            if what == "read":
                found[name].append(number)
        return found


def dropped(counts: Counter[str]) -> Counter[str]:
    return Counter({what: count for what, count in counts.items() if what not in ("read", "bytes", *OUTCOMES[:2])})


def decide(
    data: Data, ids: np.ndarray, signatures: np.ndarray, contaminated: np.ndarray, held_sources: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of each document (uint8), and the index of the one that stays in its place (its own if it stays).

    Per document: `ids` uint64; `signatures` uint32 `[documents, PERMUTATIONS]`; whether it holds an evaluation item and
    whether its source is held out as a whole.
    """
    settings, own = data.deduplication, np.arange(len(ids))
    first = exact_duplicates(ids)
    # Also without near-duplicate removal: held-out documents must not have near-duplicates among those trained on.
    similar = near_duplicates(signatures, first == own, settings.similarity)[first]
    clusters = similar if settings.near else first if settings.exact else own
    # Of a cluster the first document without an evaluation item stays; of one that has none, the first stands for it.
    clean = np.flatnonzero(~contaminated)
    labels, positions = np.unique(clusters[clean], return_index=True)
    keepers = own.copy()
    keepers[labels] = clean[positions]
    leaders = keepers[clusters]
    if not settings.exact:
        leaders = np.where(first == first[leaders], own, leaders)
    decisions = np.where(leaders == own, TRAIN, np.where(settings.exact & (first != own), EXACT, NEAR)).astype(np.uint8)
    decisions[contaminated] = CONTAMINATED
    candidates = np.flatnonzero(decisions == TRAIN)
    if len(candidates) < 2:
        left = f"{len(candidates)} of {len(ids)} documents are left, too few to hold one out"
        raise UserError(f"{left} (dropped: {_described(decisions)})")
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
    if not (settings.near and settings.exact):
        trained = np.zeros(len(ids), bool)
        trained[similar[decisions == TRAIN]] = True
        decisions[heldout[trained[similar[heldout]]]] = HELDOUT_NEAR
        # The copies of such a document are dropped for the same reason: it does not stay in their place.
        decisions[(decisions == EXACT) & (decisions[leaders] == HELDOUT_NEAR)] = HELDOUT_NEAR
        if not (decisions == HELDOUT).any():
            raise UserError("every held-out document is near one to train on; set deduplication.near: true")
    if not (decisions == TRAIN).any():
        raise UserError(f"no document is left to train on: {_described(decisions)}")
    return decisions, leaders


def _described(decisions: np.ndarray) -> str:
    return reasons(dropped(Counter(OUTCOMES[code] for code in decisions.tolist())))
