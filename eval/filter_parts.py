"""The held-out documents in two parts: those that a run's filter would keep, and those that it would drop.

A filtered model has seen less text of the kinds that its filter drops, so it may be worse on all held-out text together
and better on the text that it was made for. The selection itself defines the two parts, so neither decides whether a
filter helps; `nanophi ablate` measures that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from nanophi.eval.tasks import heldout


def divide(results: Mapping[str, Sequence[Path]], documents: Sequence[str]) -> dict[str, list[int]]:
    """Positions of the held-out `documents` (lm-eval's hashes) that a filter keeps, and drops.

    It is the filter of the first run with one that any result file belongs to; empty without one. Documents that are
    not that run's are in neither part.
    """
    for label, files in results.items():
        for run in {Path(file).resolve().parent.parent for file in files}:
            scores = run / "data" / "quality" / "heldout.parquet"
            if scores.exists() and (run / "data" / "documents").is_dir():
                kept = {row["id"]: bool(row["kept"]) for row in pq.read_table(scores).to_pylist()}
                of = {heldout.doc_hash(row): kept[row["id"]] for row in heldout.texts(str(run / "data" / "documents"))}
                parts = {f"held-out text, kept by {label}": True, f"held-out text, dropped by {label}": False}
                return {
                    name: [n for n, document in enumerate(documents) if of.get(document) is keep]
                    for name, keep in parts.items()
                }
    return {}
