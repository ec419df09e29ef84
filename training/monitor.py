"""What watches a training run: its clock, its energy and cost, loss spikes, and the history in training.json."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nanophi.core.recipe import Training
from nanophi.training.energy import ENERGY_SOURCE
from nanophi.training.validation import BY_SOURCE

SPIKE_WINDOW, SPIKE_LOSSES = 50, 10
LOGGED = ("loss", "learning_rate", "muon_learning_rate", "grad_norm", "tokens_seen", "tokens_per_second", "mfu")


@dataclasses.dataclass
class Clock:
    """Times the logging intervals of a run, across the processes that resume it, without evaluations and saves.

    Args:
        flops_per_token: of training.
        peak_flops: of all devices together, FLOP/s; None: unknown, no MFU.
        dollars_per_hour: of all devices together; None: no cost.
    """

    flops_per_token: float
    peak_flops: float | None
    dollars_per_hour: float | None

    def start(self, tokens: int, history: Sequence[Mapping[str, Any]]) -> None:
        """Begin after so many tokens, with the log entries of the processes before this one."""
        self.before = {key: value for entry in history for key, value in entry.items()}
        self._began = self._interval_began = time.monotonic()
        self._elapsed = float(self.before.get("elapsed_seconds", 0.0))
        self._tokens = tokens

    def pause(self, seconds: float) -> None:
        """Leave out the last `seconds`, which were not spent on training."""
        self._interval_began += seconds

    def total(self, key: str, here: float) -> float:
        """`here`, counted in this process, plus what the processes before it counted up to the resumed state."""
        return float(self.before.get(key, 0.0)) + here

    def lap(self, tokens: int) -> dict[str, Any]:
        """Speed, time, tokens and cost for the log entry after so many tokens; ends the interval.

        The first interval of a process includes warm-up and, with `compile`, compilation.
        """
        now = time.monotonic()
        seconds = max(now - self._interval_began, 1e-9)
        speed = (tokens - self._tokens) / seconds
        self._elapsed += seconds
        self._interval_began, self._tokens = now, tokens
        entry: dict[str, Any] = {
            "elapsed_seconds": round(self._elapsed, 3),
            "tokens_seen": tokens,
            "tokens_per_second": round(speed, 1),
        }
        if self.peak_flops is not None:
            entry["mfu"] = round(speed * self.flops_per_token / self.peak_flops, 4)
        if self.dollars_per_hour is not None:
            entry["cost_usd"] = self.total("cost_usd", (now - self._began) / 3600 * self.dollars_per_hour)
        return entry


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


def bad_loss(
    loss: float, steps: int, training: Training, history: Sequence[Mapping[str, Any]]
) -> tuple[str, str] | None:
    """What is wrong with the mean loss of the last `steps` steps, and a remedy; None if nothing is."""
    if not math.isfinite(loss):
        return f"the loss is {loss}", "Lower training.learning_rate or lengthen training.warmup_steps"
    if training.spike_threshold is None:
        return None
    losses = [entry["loss"] for entry in history if "loss" in entry]
    # A mean over fewer steps than a logging interval scatters more.
    limit = spike_limit(losses, training.spike_threshold * math.sqrt(max(1, training.logging_steps / steps)))
    if limit is None or loss <= limit:
        return None
    median = float(np.median(losses[-SPIKE_LOSSES:]))
    return (
        f"the loss is {loss:.3f}, a spike above {median:.3f}",
        "To train through it, set training.spike_threshold=null; to avoid it, start under another name with a lower "
        "training.learning_rate or training.max_grad_norm",
    )


def not_finite(logs: Mapping[str, Any]) -> str | None:
    """Name of a logged number that is NaN or infinite; None if there is none."""
    return next((key for key, value in logs.items() if isinstance(value, float) and not math.isfinite(value)), None)


def history(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """training.json from `Trainer`'s log: `log` (an entry per logging interval), `evaluations` and `samples`."""
    log: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    for entry in entries:
        if "tokens_per_second" in entry:
            log.append({"step": entry["step"], **{key: entry[key] for key in LOGGED if key in entry}})
            log[-1]["mfu"] = entry.get("mfu")
            log[-1]["elapsed_seconds"] = entry["elapsed_seconds"]
        elif "eval_loss" in entry:
            evaluations.append(
                {
                    "step": entry["step"],
                    "tokens_seen": entry["tokens_seen"],
                    "loss": entry["eval_loss"],
                    "bits_per_byte": entry["bits_per_byte"],
                }
            )
            prefix = f"eval_{BY_SOURCE}"
            by_source = {key.removeprefix(prefix): entry[key] for key in entry if key.startswith(prefix)}
            if by_source:
                evaluations[-1]["by_source"] = by_source
        elif "sample" in entry:
            samples.append({"step": entry["step"], "text": entry["sample"]})
    return {"log": log, "evaluations": evaluations, "samples": samples}


def energy_entry(step: int, energy_kwh: float, co2_grams: float, region: str | None) -> dict[str, Any]:
    """A log entry with the energy of all machines so far."""
    return {
        "step": step,
        "energy_kwh": energy_kwh,
        "co2_grams": co2_grams,
        "co2_source": ENERGY_SOURCE,
        "co2_region": region,
    }


def spent(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cost, energy and emissions for the card: the keys that were metered."""
    last = {key: value for entry in entries for key, value in entry.items()}
    result: dict[str, Any] = {key: round(last[key], 4) for key in ("cost_usd",) if key in last}
    if last.get("energy_kwh"):
        result |= {key: last[key] for key in ("energy_kwh", "co2_grams", "co2_source", "co2_region")}
    return result
