"""What people add to nanophi: one file each, and one line here.

A line names a class or function as `module:name`, which is imported when a recipe asks for it: `core` knows no room
above it. Suites are in `eval/tasks.yaml`, card sections in `model_card/sections/`, formats in `data/formats.py`.
"""

import importlib
from typing import Any

from nanophi.core.errors import suggest

SCORERS = {
    "linear": "nanophi.data.scorers:LinearScorer",
    "column": "nanophi.data.scorers:ColumnScorer",
    "model": "nanophi.data.scorers:ModelScorer",
    "none": "nanophi.data.scorers:NoScorer",
}
"""Kind of `quality.scorer` (before the colon) -> a `Scorer`."""

OPTIMIZERS = {"adamw": "nanophi.training.optimizer:adamw", "muon": "nanophi.training.optimizer:MuonAdamW"}
"""`training.optimizer` -> a function that makes a `torch.optim.Optimizer`."""


def choose(table: dict[str, str], value: str) -> tuple[Any, str]:
    """The class of `KIND` or `KIND:ARGUMENT`, as its `form` spells it, and the argument ("" without one)."""
    kind, colon, argument = value.partition(":")
    classes = {name: find(table, name, "kind") for name in table}
    found = classes.get(kind)
    if found is None or not bool(argument) == bool(colon) == (":" in found.form):
        *most, last = [f"'{known.form}'" for known in classes.values()]
        raise ValueError(f"'{value}' must be {', '.join(most)} or {last}")
    return found, argument


def find(table: dict[str, str], name: str, what: str) -> Any:
    """The class or function registered under a name. Raises ValueError, with the nearest known name."""
    if name not in table:
        raise ValueError(f"{what} '{name}' is unknown; {suggest(name, table)}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
