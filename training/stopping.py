"""When a training saves and stops: at the steps that the recipe names, and on a signal, in all processes together."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nanophi.core.recipe import Training
from nanophi.training.arguments import decay_start

IMPATIENT = 2.0
"""Seconds after which a second Ctrl-C stops at once. Before that, it is the launcher passing on the same key press."""


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""A scheduler's or a user's stop, Ctrl-C, a terminal that hangs up, Slurm's `--signal=USR1`."""


def ignore_in_worker(initialize: Any, worker: int) -> None:
    """Begin a process that loads data: it ends with the training, which needs it for as long as it saves."""
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    if initialize is not None:
        initialize(worker)


class StopRequestedError(Exception):
    """A signal came while nothing needed to be saved."""


class SaveAndStop(TrainerCallback):
    """Saves besides every `save_steps`: at kept steps, before `wsd` decays, and before an orderly stop.

    On one of `SIGNALS` in any process, all finish the step, save it, and end. Repeated signals change nothing, because
    a launcher passes on what the process group got already; only a second Ctrl-C, some seconds later, ends at once.
    """

    def __init__(self, training: Training) -> None:
        self.save_steps = {*training.keep_steps, *([decay_start(training)] if training.schedule == "wsd" else [])}
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

    def release(self) -> None:
        """Give the signals back."""
        for name, handler in self._previous.items():
            signal.signal(name, handler)
        self._previous = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take over the signals; the state of a resumed run has the intervals of its first process."""
        state.compute_steps(args, state.max_steps)
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                if name == signal.SIGHUP and signal.getsignal(name) == signal.SIG_IGN:
                    continue  # under nohup
                self._previous[name] = signal.signal(name, self._handle)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a save and a log entry at the last step, and for the stop if a signal came."""
        last = state.global_step >= state.max_steps
        if self._stop_if_agreed(control) or last or state.global_step in self.save_steps:
            control.should_save = True
        if last:
            control.should_log = True  # also where a run is shorter than a logging interval

    def on_save(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Stop right after a save during which a signal came."""
        self._stop_if_agreed(control)

    def _stop_if_agreed(self, control: TrainerControl) -> bool:
        if self.agreed():
            control.should_training_stop = True
            control.should_evaluate = False
        return self.stopping
