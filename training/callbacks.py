"""What watches a training run: the progress line, and saving before an orderly stop."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressLine(TrainerCallback):
    """One line with step, loss, speed, time left and, where a price is known, cost.

    It is rewritten in place on a terminal; elsewhere one is written now and then.

    Args:
        label: what the line begins with.
        stream: where it goes.
        interval: seconds between lines where they cannot be rewritten.
    """

    def __init__(self, label: str, stream: TextIO | None = None, interval: float = 15.0) -> None:
        self.label = label
        self.stream = stream or sys.stderr
        self.interval = interval
        self._last = 0.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest training log entry."""
        if not state.is_world_process_zero or not logs or "tokens_per_second" not in logs:
            return
        terminal, finished = self.stream.isatty(), state.global_step >= state.max_steps
        if not terminal and not finished and time.monotonic() - self._last < self.interval:
            return
        self._last = time.monotonic()
        left = logs["elapsed_seconds"] / state.global_step * (state.max_steps - state.global_step)
        line = (
            f"{self.label}: train step {state.global_step}/{state.max_steps}  loss {logs['loss']:.3f}"
            f"  {logs['tokens_per_second']:,.0f} tokens/s"
        )
        if logs.get("mfu") is not None:
            line += f"  MFU {logs['mfu']:.1%}"
        line += f"  {duration(left)} left"
        if "cost_usd" in logs:
            line += f"  ${logs['cost_usd']:.2f} of ${logs['cost_usd'] / state.global_step * state.max_steps:.2f}"
        self.stream.write(f"\r\x1b[K{line}" if terminal else f"{line}\n")
        if terminal and finished:
            self.stream.write("\n")
        self.stream.flush()


class SaveTimes(TrainerCallback):
    """When to save besides every `save_steps`: at the steps to keep, and before an orderly stop.

    On SIGTERM or SIGINT the step is finished, a checkpoint saved, and training ends; a second signal ends it at once.

    Args:
        keep_steps: the steps whose checkpoints are kept.
    """

    def __init__(self, keep_steps: Iterable[int]) -> None:
        self.keep_steps = frozenset(keep_steps)
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the two signals."""
        for name in (signal.SIGTERM, signal.SIGINT):
            self._previous[name] = signal.signal(name, self._handle)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give them back."""
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for the save, and for the stop if a signal came."""
        if self.received is not None:
            control.should_training_stop = True
        if self.received is not None or state.global_step in self.keep_steps:
            control.should_save = True


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
