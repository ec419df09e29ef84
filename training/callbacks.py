"""Callbacks of a training run: the progress line, and when to save, log and stop."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from nanophi.core import formatting
from nanophi.core.errors import UserError
from nanophi.core.files import write_text

IMPATIENT = 2.0
"""Seconds after which a second Ctrl-C stops at once. Sooner, it is the launcher passing on the same key press."""


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
            f"  {formatting.integer(logs['tokens_per_second'])} tokens/s"
        )
        if logs.get("mfu") is not None:
            line += f"  MFU {formatting.percent(logs['mfu'])}"
        line += f"  {formatting.duration(left)} left"
        if "cost_usd" in logs:
            line += f"  ${logs['cost_usd']:.2f} of ${logs['cost_usd'] / state.global_step * state.max_steps:.2f}"
        self.stream.write(f"\r\x1b[K{line}" if terminal else f"{line}\n")
        if terminal and finished:
            self.stream.write("\n")
        self.stream.flush()


class StopRequestedError(Exception):
    """A signal came while nothing needed to be saved."""


class SaveAndStop(TrainerCallback):
    """Saves besides every `save_steps`: at given steps, and before an orderly stop, on which all processes agree.

    On SIGTERM or SIGINT in any process, all finish the step, save it, and end. Repeated signals change nothing, because
    a launcher passes on what the process group got already; only a second Ctrl-C, some seconds later, ends at once.

    Args:
        save_steps: the steps to save besides.
    """

    def __init__(self, save_steps: Iterable[int]) -> None:
        self.save_steps = frozenset(save_steps)
        self.received: signal.Signals | None = None
        self.stopping = False
        self._when = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def agreed(self) -> bool:
        """Whether any process got a signal; every process must ask at the same point."""
        stop = self.received is not None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            flag = torch.tensor(int(stop), device=device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            stop = bool(flag.item())
        self.stopping = self.stopping or stop
        return self.stopping

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self._when = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._when > IMPATIENT:
            raise KeyboardInterrupt

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the two signals; the state of a resumed run has the intervals of its first process."""
        state.compute_steps(args, state.max_steps)
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGTERM, signal.SIGINT):
                self._previous[name] = signal.signal(name, self._handle)

    def release(self) -> None:
        """Give the signals back."""
        for name, handler in self._previous.items():
            signal.signal(name, handler)
        self._previous = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a save and a log entry at the last step, and for the stop if a signal came."""
        last = state.global_step >= state.max_steps
        stop = self.agreed()
        if stop:
            control.should_training_stop = True
            control.should_evaluate = False
        if stop or last or state.global_step in self.save_steps:
            control.should_save = True
        if last:
            control.should_log = True  # also where a run is shorter than a logging interval

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop right after a save during which a signal came."""
        if self.agreed():
            control.should_training_stop = True
            control.should_evaluate = False


class ResumedRun(TrainerCallback):
    """Starts the clock at the resumed step, and makes up for an interval or an evaluation that was cut off.

    Args:
        trainer: a `NanoPhiTrainer`; its state is loaded when training begins.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After `Trainer` has loaded the state, before the first step."""
        self.trainer.clock.start(self.trainer.tokens_seen(), state.log_history)
        self.trainer.restore_unlogged()
        self.trainer.evaluate_if_missing()


@contextlib.contextmanager
def trackers(trainer: Any) -> Iterator[None]:
    """Log in to the trackers of `training.report_to` before the body's first step; a resumed run continues its own.

    Raises:
        UserError: in one line, if a tracker cannot start.
    """
    variables = {}
    if trainer.training.report_to and trainer.is_world_process_zero():
        name = trainer.run / "training_state" / "tracker"
        if not name.exists():
            write_text(name, secrets.token_hex(8))
        variables = {
            "WANDB_RUN_ID": name.read_text(encoding="utf-8"),
            "WANDB_RESUME": "allow",
            "TENSORBOARD_LOGGING_DIR": str(trainer.run / "tensorboard"),
        }
    variables = {key: value for key, value in variables.items() if key not in os.environ}
    os.environ.update(variables)
    kinds = tuple(kind for kind in INTEGRATION_TO_CALLBACK.values() if isinstance(kind, type))
    try:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, kinds) and hasattr(callback, "setup"):
                try:
                    callback.setup(trainer.args, trainer.state, trainer.model)
                except Exception as error:  # each tracker has errors of its own
                    line = " ".join(str(error).split()) or type(error).__name__
                    raise UserError(f"training.report_to: {type(callback).__name__} cannot start: {line}") from error
        yield
    finally:
        for variable in variables:
            os.environ.pop(variable, None)
