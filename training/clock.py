"""The clock of a training run: time, speed, MFU and cost of each logging interval."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any


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
