"""Weights in a run directory: which steps are there, and the one refusal to replace them.

Whether a recipe may replace or continue them is decided by those who know what they were trained on.
"""

from __future__ import annotations

from pathlib import Path

from nanophi.core.errors import UserError
from nanophi.core.names import step_folders


def weights_of(run: Path) -> str:
    """The steps whose weights a run holds: `step-000010, step-000020`; empty if it holds none."""
    names = ", ".join(path.name for path in step_folders(run / "checkpoints"))
    return names or ("in training_state only" if step_folders(run / "training_state") else "")


def weights_kept(run: Path, why: str, remedy: str = "") -> UserError:
    """The error of whoever would have to replace a run's weights.

    Args:
        why: goes on from `the weights (step-000010)`: what they are, or what is missing.
        remedy: what else helps, beside another name and `--restart`.
    """
    return UserError(
        f"{run}: the weights ({weights_of(run)}) {why}. They are kept: {f'{remedy}, ' if remedy else ''}"
        "use another name, or start over with --restart, which removes them"
    )
