"""What a training measures, shows and keeps while it runs: clock and energy, progress line, history, trackers.

codecarbon (https://mlco2.github.io/codecarbon/) meters energy by NVML and RAPL, else by rated power. Nothing is sent.
"""

import contextlib
import dataclasses
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from accelerate.utils import patch_environment
from transformers import TrainerCallback, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from nanophi.core import formatting
from nanophi.core.errors import UserError, one_line
from nanophi.core.files import write_text
from nanophi.core.recipe import Training
from nanophi.training.rows import BY_SOURCE

INTERVAL = 15.0
"""Seconds between progress lines where they cannot be rewritten in place."""
Entries = Sequence[Mapping[str, Any]]
"""`TrainerState.log_history`."""
ENERGY_SOURCE = "codecarbon, mean grid intensity of the country"


@dataclasses.dataclass
class Clock:
    """Times the logging intervals of a run, across the processes that resume it, without evaluations and saves."""

    flops_per_token: float
    peak_flops: float | None  # of all devices together, FLOP/s; None: unknown, no MFU
    dollars_per_hour: float | None  # of all devices together; None: no cost

    def start(self, tokens: int, history: Entries) -> None:
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
        """Speed, time, tokens and cost for the log entry after so many tokens; ends the interval."""
        now = time.monotonic()
        seconds = max(now - self._interval_began, 1e-9)
        speed = (tokens - self._tokens) / seconds
        self._elapsed += seconds
        self._interval_began, self._tokens = now, tokens
        entry: dict[str, Any] = {"elapsed_seconds": round(self._elapsed, 3), "tokens_seen": tokens}
        entry["tokens_per_second"] = round(speed, 1)
        if self.peak_flops is not None:
            entry["mfu"] = round(speed * self.flops_per_token / self.peak_flops, 4)
        if self.dollars_per_hour is not None:
            entry["cost_usd"] = self.total("cost_usd", (now - self._began) / 3600 * self.dollars_per_hour)
        return entry


@contextlib.contextmanager
def energy(training: Training, report: Callable[[str], None]) -> Iterator[Callable[[], tuple[float, float]]]:
    """Meter this machine within the body; gives a function: energy (kWh) and emissions (grams of CO2e) so far.

    They are 0 where the recipe does not ask, another process meters, or codecarbon is missing. Raises `UserError` for
    a country that codecarbon does not know.
    """
    country = training.country_iso_code
    totals: list[Any] = []
    if not training.track_energy or int(os.environ.get("LOCAL_RANK", "0")):
        yield lambda: (0.0, 0.0)
        return
    try:
        import codecarbon
        from codecarbon.input import DataSource
        from codecarbon.output_methods.base_output import BaseOutput
    except ImportError:
        report("energy is not metered, because codecarbon is not installed: pip install 'nanophi[energy]'")
        yield lambda: (0.0, 0.0)
        return
    if country not in DataSource().get_global_energy_mix_data():
        why = f"codecarbon does not know the country '{country}'"
        raise UserError(f"training.country_iso_code: {why}; give the three letters of ISO 3166, such as FRA or USA")

    class Keep(BaseOutput):
        def out(self, total: Any, delta: Any) -> None:
            totals[:] = [total]

    options: Any = {"output_methods": [], "output_handlers": [Keep()], "allow_multiple_runs": True}
    options["log_level"] = "error"
    tracker = codecarbon.OfflineEmissionsTracker(country_iso_code=country, **options)

    def read() -> tuple[float, float]:
        tracker.flush()
        return (totals[0].energy_consumed, 1000 * totals[0].emissions) if totals else (0.0, 0.0)

    tracker.start()
    try:
        yield read
    finally:
        tracker.stop()


class ProgressLine(TrainerCallback):
    """Step, loss, speed, time left and cost on one line; rewritten in place on a terminal, elsewhere now and then."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._last = 0.0

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if not state.is_world_process_zero or "tokens_per_second" not in logs:
            return
        terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        finished = state.global_step >= state.max_steps
        if not terminal and not finished and time.monotonic() - self._last < INTERVAL:
            return
        self._last = time.monotonic()
        left = logs["elapsed_seconds"] / state.global_step * (state.max_steps - state.global_step)
        parts = [
            f"{self.label}: train step {state.global_step}/{state.max_steps}",
            f"loss {logs['loss']:.3f}",
            f"{formatting.integer(logs['tokens_per_second'])} tokens/s",
            *([f"MFU {formatting.percent(logs['mfu'])}"] if "mfu" in logs else []),
            f"{formatting.duration(left)} left",
        ]
        if "cost_usd" in logs:
            total = logs["cost_usd"] / state.global_step * state.max_steps
            parts.append(f"${logs['cost_usd']:.2f} of ${total:.2f}")
        width = shutil.get_terminal_size().columns - 1 if terminal else sys.maxsize
        while len(parts) > 1 and len("  ".join(parts)) > width:
            parts.pop()
        line = "  ".join(parts)[:width]
        sys.stderr.write(f"\r\x1b[K{line}" + "\n" * finished if terminal else f"{line}\n")
        sys.stderr.flush()


def history(entries: Entries) -> dict[str, Any]:
    """`log` (an entry per logging interval), `evaluations` and `samples`."""
    log, evaluations, prefix = [], [], f"eval_{BY_SOURCE}"
    for entry in entries:
        rates = sorted(key for key in entry if key.endswith("learning_rate"))
        if "tokens_per_second" in entry:
            keys = ("step", "loss", *rates, "grad_norm", "tokens_seen", "tokens_per_second")
            times = {"mfu": entry.get("mfu"), "elapsed_seconds": entry["elapsed_seconds"]}
            log.append({key: entry[key] for key in keys if key in entry} | times)
        if "eval_loss" in entry:
            known = {key: entry[key] for key in ("step", "tokens_seen")} | {"loss": entry["eval_loss"]}
            by_source = {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)}
            known |= {"bits_per_byte": entry["bits_per_byte"]} | ({"by_source": by_source} if by_source else {})
            evaluations.append(known)
    samples = [{"step": entry["step"], "text": entry["sample"]} for entry in entries if "sample" in entry]
    return {"log": log, "evaluations": evaluations, "samples": samples}


def cost_and_energy(entries: Entries) -> dict[str, Any]:
    """Cost, energy and emissions for the card: the keys that were metered."""
    last = {key: value for entry in entries for key, value in entry.items()}
    result: dict[str, Any] = {"cost_usd": round(last["cost_usd"], 4)} if "cost_usd" in last else {}
    if last.get("energy_kwh"):
        result |= {key: last[key] for key in ("energy_kwh", "co2_grams", "co2_source", "co2_region")}
    return result


@contextlib.contextmanager
def trackers(trainer: Any) -> Iterator[None]:
    """Log in to the trackers of `training.report_to` before the body's first step; a resumed run continues its own."""
    variables = {}
    if trainer.training.report_to and trainer.is_world_process_zero():
        name = trainer.run / "training_state" / "tracker"
        if not name.exists():
            write_text(name, secrets.token_hex(8))
        variables = {"WANDB_RUN_ID": name.read_text(encoding="utf-8"), "WANDB_RESUME": "allow"}
        variables["TENSORBOARD_LOGGING_DIR"] = str(trainer.run / "tensorboard")
    kinds = tuple(kind for kind in INTEGRATION_TO_CALLBACK.values() if isinstance(kind, type))
    with patch_environment(**{key: value for key, value in variables.items() if key not in os.environ}):
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, kinds) and hasattr(callback, "setup"):
                try:
                    callback.setup(trainer.args, trainer.state, trainer.model)
                except Exception as error:  # each tracker has errors of its own
                    line = " ".join(str(error).split()) or one_line(error)
                    raise UserError(f"training.report_to: {type(callback).__name__} cannot start: {line}") from error
        yield
