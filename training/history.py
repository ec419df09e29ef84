"""`training.json`: what `Trainer`'s log holds, in the form that the card, the report and `nanophi` read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from nanophi.core.files import write_json
from nanophi.training.validation import BY_SOURCE

Entries = Sequence[Mapping[str, Any]]
"""`TrainerState.log_history`."""


class HistoryFile(TrainerCallback):
    """Writes `training.json` after every log entry."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """The history so far; the summary is added at the end of training."""
        if state.is_world_process_zero:
            write_json(self.run / "training.json", from_log(state.log_history))


def from_log(entries: Entries) -> dict[str, Any]:
    """`log` (an entry per logging interval), `evaluations` and `samples`."""
    return {
        "log": [_interval(entry) for entry in entries if "tokens_per_second" in entry],
        "evaluations": [_evaluation(entry) for entry in entries if "eval_loss" in entry],
        "samples": [{"step": entry["step"], "text": entry["sample"]} for entry in entries if "sample" in entry],
    }


def _interval(entry: Mapping[str, Any]) -> dict[str, Any]:
    rates = sorted(key for key in entry if key.endswith("learning_rate"))
    keys = ("step", "loss", *rates, "grad_norm", "tokens_seen", "tokens_per_second")
    known = {key: entry[key] for key in keys if key in entry}
    return {**known, "mfu": entry.get("mfu"), "elapsed_seconds": entry["elapsed_seconds"]}


def _evaluation(entry: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"eval_{BY_SOURCE}"
    by_source = {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)}
    return {
        "step": entry["step"],
        "tokens_seen": entry["tokens_seen"],
        "loss": entry["eval_loss"],
        "bits_per_byte": entry["bits_per_byte"],
        **({"by_source": by_source} if by_source else {}),
    }


def cost_and_energy(entries: Entries) -> dict[str, Any]:
    """Cost, energy and emissions for the card: the keys that were metered."""
    last = {key: value for entry in entries for key, value in entry.items()}
    result: dict[str, Any] = {key: round(last[key], 4) for key in ("cost_usd",) if key in last}
    if last.get("energy_kwh"):
        result |= {key: last[key] for key in ("energy_kwh", "co2_grams", "co2_source", "co2_region")}
    return result
