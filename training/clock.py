"""What a training takes: time, speed, MFU and cost of each logging interval, and the energy of the whole.

codecarbon (https://mlco2.github.io/codecarbon/) meters energy by NVML and RAPL, else by rated power. Nothing is sent.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanophi.core.errors import UserError
from nanophi.core.recipe import Training

ENERGY_SOURCE = "codecarbon, mean grid intensity of the country"


@dataclasses.dataclass
class Clock:
    """Times the logging intervals of a run, across the processes that resume it, without evaluations and saves."""

    flops_per_token: float
    peak_flops: float | None  # of all devices together, FLOP/s; None: unknown, no MFU
    dollars_per_hour: float | None  # of all devices together; None: no cost

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
        entry: dict[str, Any] = {"elapsed_seconds": round(self._elapsed, 3), "tokens_seen": tokens}
        entry["tokens_per_second"] = round(speed, 1)
        if self.peak_flops is not None:
            entry["mfu"] = round(speed * self.flops_per_token / self.peak_flops, 4)
        if self.dollars_per_hour is not None:
            entry["cost_usd"] = self.total("cost_usd", (now - self._began) / 3600 * self.dollars_per_hour)
        return entry


class EnergyMeter:
    """This machine's energy within a `with` block; nothing, where the recipe does not ask or another process meters.

    Raises `UserError` for a country that codecarbon does not know. Without codecarbon there is one line to `report`.
    """

    def __init__(self, training: Training, report: Callable[[str], None]) -> None:
        self._tracker: Any = None
        self._total: Any = None
        self.source: dict[str, Any] = {"co2_source": ENERGY_SOURCE, "co2_region": training.country_iso_code}
        if not training.track_energy or int(os.environ.get("LOCAL_RANK", "0")):
            return
        try:
            import codecarbon
            from codecarbon.input import DataSource
            from codecarbon.output_methods.base_output import BaseOutput
        except ImportError:
            report("energy is not metered, because codecarbon is not installed: pip install 'nanophi[energy]'")
            return
        if training.country_iso_code not in DataSource().get_global_energy_mix_data():
            raise UserError(
                f"training.country_iso_code: codecarbon does not know the country '{training.country_iso_code}'; give "
                "the three letters of ISO 3166, such as FRA or USA"
            )

        class Keep(BaseOutput):
            def out(_, total: Any, delta: Any) -> None:  # noqa: N805
                self._total = total

        self._tracker = codecarbon.OfflineEmissionsTracker(
            country_iso_code=training.country_iso_code,
            output_methods=[],
            output_handlers=[Keep()],
            allow_multiple_runs=True,
            log_level="error",
        )

    def __enter__(self) -> EnergyMeter:
        if self._tracker is not None:
            self._tracker.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._tracker is not None:
            self._tracker.stop()

    def read(self) -> tuple[float, float]:
        """Energy (kWh) and emissions (grams of CO2 equivalent) so far."""
        if self._tracker is not None:
            self._tracker.flush()
        return (self._total.energy_consumed, 1000 * self._total.emissions) if self._total is not None else (0.0, 0.0)
