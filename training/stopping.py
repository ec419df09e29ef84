"""When a training saves and stops: at steps that the recipe names, on a signal, and on a loss that went wrong."""

import atexit
import math
import multiprocessing
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nanophi.core.recipe import Training
from nanophi.training.arguments import decay_steps

IMPATIENT = 2.0
"""Seconds after which a second Ctrl-C stops at once. Before that, it is the launcher passing on the same key press."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""A scheduler's or a user's stop, Ctrl-C, a terminal that hangs up, Slurm's `--signal=USR1`."""
SPIKE_WINDOW, SPIKE_LOSSES = 50, 10


class StopRequestedError(Exception):
    """A signal came while nothing needed to be saved."""


class SaveAndStop(TrainerCallback):
    """Saves besides every `save_steps`: at kept steps, before `wsd` decays, and before an orderly stop.

    On one of `SIGNALS` in any process, all finish the step, save it, and end. A launcher passes on what the process
    group got already, so only a second Ctrl-C, some seconds later, ends at once.
    """

    def __init__(self, training: Training) -> None:
        self.save_steps = {*training.keep_steps, *decay_steps(training)}
        self.received: signal.Signals | None = None
        self.stopping = False
        self._when = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def agreed(self) -> bool:
        """Whether any process got a signal; every process must ask at the same point."""
        stop = self.received is not None
        if PartialState().num_processes > 1:
            stop = bool(reduce(torch.tensor(int(stop), device=PartialState().device), "sum"))
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
        stops = self._stop_if_agreed(control)
        control.should_save |= stops or last or state.global_step in self.save_steps
        control.should_log |= last  # also where a run is shorter than a logging interval

    def on_save(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._stop_if_agreed(control)

    def _stop_if_agreed(self, control: TrainerControl) -> bool:
        if self.agreed():
            control.should_training_stop = True
            control.should_evaluate = False
        return self.stopping


@atexit.register
def kill_workers() -> None:
    """End processes that load data: at its end Python sends them SIGTERM, which they ignore, and waits for them."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def ignore_in_worker(initialize: Any, worker: int) -> None:
    """Begin a process that loads data: it ends with the training, which needs it for as long as it saves."""
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    if initialize is not None:
        initialize(worker)


def spike_limit(losses: Sequence[float], threshold: float) -> float | None:
    """The loss above which a run counts as spiking; None until `SPIKE_LOSSES` losses were logged.

    The median of the last `SPIKE_LOSSES`, plus the larger of `threshold` robust standard deviations and a fifth of it.
    The deviation is of neighbours' differences among the last `SPIKE_WINDOW`, so that a falling curve is no noise:
    1.4826 times their median absolute value, over the square root of 2.
    """
    if len(losses) < SPIKE_LOSSES:
        return None
    deviation = 1.4826 * np.median(np.abs(np.diff(losses[-SPIKE_WINDOW:]))) / math.sqrt(2)
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
