"""Runs several commands side by side, each on its own share of the cores or on its own GPU.

On a processor several trainings with one thread each are faster than one after the other with all threads: a small
model's matrix products are too small to divide well.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from subprocess import PIPE, STDOUT, Popen

from nanophi.core.errors import UserError

_QUIET = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def side_by_side(
    commands: Mapping[str, Sequence[str]],
    jobs: int,
    report: Callable[[str], None] = print,
    finished: Callable[[str], None] = lambda name: None,
) -> None:
    """Run every command, at most `jobs` at once, each on its own GPU or its share of the cores (`devices`).

    A command's standard input is a pipe that ends when this process stops or dies: the command should then stop too
    (`stop_with_parent`). Its lines are reported with its name in front; `finished` gets the name of each that ended
    well. Raises `UserError` naming those that failed, after the others have ended.
    """
    free = devices(jobs)
    if len(free) < jobs:
        report(f"--jobs {jobs}: {len(free)} at once, one for each GPU or core here")
    waiting, failed = list(commands), []
    running: dict[str, tuple[Popen[bytes], dict[str, str]]] = {}
    lines: SimpleQueue[tuple[str, bytes | None]] = SimpleQueue()

    def next_to_end() -> str:
        """Report what the commands print until one has printed its last (None), and return its name."""
        while True:
            name, line = lines.get()
            if line is None:
                return name
            if text := line.decode(errors="replace").rstrip().rpartition("\r")[2]:
                report(text if text.startswith(f"{name}: ") else f"{name}: {text}")

    try:
        while waiting or running:
            while waiting and free:
                name, device = waiting.pop(0), free.pop(0)
                # A signal from the terminal reaches this process alone, which then stops the others in order.
                environment = {**os.environ, **device, **_QUIET}
                process = Popen(
                    commands[name], env=environment, stdin=PIPE, stdout=PIPE, stderr=STDOUT, start_new_session=True
                )
                running[name] = process, device
                threading.Thread(target=_read, args=(name, process, lines), daemon=True).start()
            name = next_to_end()
            process, device = running.pop(name)
            free.append(device)
            if process.wait() == 0:
                finished(name)
            else:
                failed.append(name)
    finally:
        for process, _ in running.values():
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        while running:
            running.pop(next_to_end())[0].wait()
    if failed:
        raise UserError(f"{', '.join(failed)} failed, see above; run the same command to resume")


def _read(name: str, process: Popen[bytes], lines: SimpleQueue[tuple[str, bytes | None]]) -> None:
    for line in process.stdout or ():
        lines.put((name, line))
    lines.put((name, None))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices(jobs: int) -> list[dict[str, str]]:
    """Environment variables of each of so many jobs, or of as many as there are GPUs or cores."""
    import torch

    if count := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else map(str, range(count))
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names][:jobs]
    jobs = min(jobs, cores())
    threads = str(cores() // jobs)
    return [{"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}] * jobs


def end_like_ctrl_c(*signals: int) -> None:
    """Let signals that nothing handles yet interrupt this process as Ctrl-C does, so that it can end in order."""
    for number in signals:
        if signal.getsignal(number) == signal.SIG_DFL:
            with contextlib.suppress(ValueError):  # outside the main thread
                signal.signal(number, signal.default_int_handler)


def stop_with_parent() -> None:
    """Send this process SIGTERM when its standard input ends; a training then saves a checkpoint first."""

    def watch() -> None:
        # Not by `sys.stdin`, whose lock a thread that waits in it would hold when the interpreter ends.
        while os.read(0, 1 << 16):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
