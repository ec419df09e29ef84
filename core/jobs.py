"""Runs several commands side by side, each on its own share of the cores or on its own GPU.

On a processor several trainings with one thread each are faster than one after the other with all threads: a small
model's matrix products are too small to divide well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from nanophi.core.errors import UserError

_QUIET = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def side_by_side(
    commands: Mapping[str, Sequence[str]],
    jobs: int,
    report: Callable[[str], None] = print,
    finished: Callable[[str], None] = lambda name: None,
) -> None:
    """Run every command, at most `jobs` at once.

    Each gets its own GPU (`CUDA_VISIBLE_DEVICES`) where there are some, else its share of the cores
    (`OMP_NUM_THREADS`). A command's standard input is a pipe that nothing is written to: it ends when this process
    stops or dies, and the command should then stop too (`stop_with_parent`).

    Args:
        commands: by name. What a command prints is reported line by line, beginning with its name.
        jobs: how many run at once.
        report: gets those lines.
        finished: called with the name of each command that ended with status 0.

    Raises:
        UserError: if some commands failed, naming them, after the others have ended.
    """
    slots = devices(jobs)
    if len(slots) < jobs:
        report(f"--jobs {jobs}: {len(slots)} at once, one for each GPU or core here")
    free = list(range(len(slots)))
    waiting = list(commands)
    running: dict[Future[int], tuple[str, int]] = {}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    lock = threading.Lock()

    def say(line: str) -> None:
        with lock:
            report(line)

    with ThreadPoolExecutor(len(slots)) as threads:
        try:
            while waiting or running:
                while waiting and free:
                    name, slot = waiting.pop(0), free.pop(0)
                    process = subprocess.Popen(
                        commands[name],
                        env={**os.environ, **slots[slot], **_QUIET},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        # A signal from the terminal reaches this process alone, which then stops the others in order.
                        start_new_session=True,
                    )
                    processes[name] = process
                    running[threads.submit(_follow, name, process, say)] = (name, slot)
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    name, slot = running.pop(future)
                    free.append(slot)
                    if future.result() == 0:
                        finished(name)
                    else:
                        failed.append(name)
        finally:
            for process in processes.values():
                assert process.stdin is not None
                with contextlib.suppress(OSError):
                    process.stdin.close()
    if failed:
        raise UserError(f"{', '.join(failed)} failed, see above; run the same command to resume")


def _follow(name: str, process: subprocess.Popen[bytes], say: Callable[[str], None]) -> int:
    """Report what a process prints until it ends, and return its exit status."""
    assert process.stdout is not None
    for line in process.stdout:
        text = line.decode(errors="replace").rstrip().rpartition("\r")[2]
        if text:
            say(text if text.startswith(f"{name}: ") else f"{name}: {text}")
    return process.wait()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices(jobs: int) -> list[dict[str, str]]:
    """Environment variables of each of so many jobs, or of as many as there are GPUs or cores."""
    import torch

    count = torch.cuda.device_count()
    if count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(index) for index in range(count)]
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names[:jobs]]
    jobs = min(jobs, cores())
    threads = str(cores() // jobs)
    return [{"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}] * jobs


def stop_with_parent() -> None:
    """Send this process SIGTERM when its standard input ends; a training then saves a checkpoint first."""

    def watch() -> None:
        # Not by `sys.stdin`, whose lock a thread that waits in it would hold when the interpreter ends.
        while os.read(0, 1 << 16):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
