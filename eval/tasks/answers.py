"""Held-out answers of a run with conversations: the data behind the `answers_*.yaml` tasks.

The prompt is the conversation in the run's chat template, as text, so that the base is asked the same way.
"""

from pathlib import Path
from typing import Any

import datasets

from nanophi.eval.generation import NOT_ENDED


def conversations(heldout: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The rows of `heldout.parquet`: prompt, answer, id, source."""
    rows = datasets.Dataset.from_parquet(str(Path(heldout) / "heldout.parquet"), keep_in_memory=True)
    return {"test": rows.remove_columns("messages")}


def bits(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """Log-likelihood of the answer in nats, and its bytes."""
    return {"bits_per_byte": (results[0][0], len(doc["answer"].encode()))}


def ended(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """Whether the model ended its answer itself."""
    return {"ended": float(not results[0].endswith(NOT_ENDED))}
