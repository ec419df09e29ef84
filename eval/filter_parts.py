"""The held-out documents in two parts: those that a run's filter would keep, and those that it would drop.

A filtered model has seen less text of the kinds that its filter drops, so it may be worse on all held-out text together
and better on the text that it was made for. The selection itself defines the two parts, so neither decides whether a
filter helps; `nanophi ablate` measures that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from nanophi.data import documents
from nanophi.eval.results import ItemKey


def divide(results: Mapping[str, Sequence[Path]], items: Collection[ItemKey]) -> dict[str, set[ItemKey]]:
    """The held-out `items` of each part, by the filter of the first run that any result file belongs to; else empty."""
    for label, files in results.items():
        for run in {Path(file).resolve().parent.parent for file in files}:
            scores = run / "data" / "quality" / "heldout.parquet"
            if scores.exists() and (run / "data" / "documents").is_dir():
                kept = {row["id"] for row in pq.read_table(scores).to_pylist() if row["kept"]}
                ids = [row["id"] for row in documents.heldout(run / "data" / "documents", ["id"])]
                keep = {item for item in items if item[0] < len(ids) and ids[item[0]] in kept}
                return {
                    f"held-out text, kept by {label}": keep,
                    f"held-out text, dropped by {label}": set(items) - keep,
                }
    return {}
