"""When a loss is a reason to stop: it is not finite, or a spike. What happens then is decided in `run_trainer.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nanophi.core.recipe import Training

SPIKE_WINDOW, SPIKE_LOSSES = 50, 10


def spike_limit(losses: Sequence[float], threshold: float) -> float | None:
    """The loss above which a run counts as spiking, from the losses logged before.

    The median of the last `SPIKE_LOSSES` losses, plus the larger of `threshold` robust standard deviations and a fifth
    of that median (a smooth curve's deviation is too small to go by). The deviation comes from the differences of
    neighbours among the last `SPIKE_WINDOW` losses, so that a falling curve does not count as noise: 1.4826 times
    their median absolute value, over the square root of 2. None until `SPIKE_LOSSES` losses were logged.
    """
    if len(losses) < SPIKE_LOSSES:
        return None
    differences = np.diff(losses[-SPIKE_WINDOW:])
    deviation = 1.4826 * np.median(np.abs(differences)) / math.sqrt(2)
    median = np.median(losses[-SPIKE_LOSSES:])
    return float(median + max(threshold * deviation, 0.2 * median))


def loss_anomaly(
    loss: float, steps: int, training: Training, log: Sequence[Mapping[str, Any]]
) -> tuple[str, str] | None:
    """What is wrong with the mean loss of the last `steps` steps, and a remedy; None if nothing is."""
    if not math.isfinite(loss):
        return f"the loss is {loss}", "Lower training.learning_rate or lengthen training.warmup_steps"
    if training.spike_threshold is None:
        return None
    losses = [entry["loss"] for entry in log if "loss" in entry]
    # A mean over fewer steps than a logging interval scatters more.
    limit = spike_limit(losses, training.spike_threshold * math.sqrt(max(1, training.logging_steps / steps)))
    if limit is None or loss <= limit:
        return None
    return (
        f"the loss is {loss:.3f}, a spike above {float(np.median(losses[-SPIKE_LOSSES:])):.3f}",
        "To train through it, set training.spike_threshold=null; to avoid it, start under another name with a lower "
        "training.learning_rate or training.max_grad_norm",
    )


def not_finite(logs: Mapping[str, Any]) -> str | None:
    """Name of a logged number that is NaN or infinite; None if there is none."""
    return next((key for key, value in logs.items() if isinstance(value, float) and not math.isfinite(value)), None)
