"""Runs one function over many parts of a corpus, on all cores or a cluster; resumes where a killed run stopped.

A part's function writes its files and returns its counts, which are written last and mark the part as finished. The
outcome does not depend on the number of processes.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from nanophi.core import registry
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json
from nanophi.core.jobs import cores
from nanophi.core.progress import progress_bar

Task = tuple[Callable[..., dict[str, Any]], tuple[Any, ...], Path]
CLUSTERS = {"ray": "nanophi.data.cluster:ray", "slurm": "nanophi.data.cluster:slurm"}
"""`data.engine` -> a function `(tasks, workers, folder)` that runs tasks and yields while they run."""


def run_parts(
    function: Callable[..., dict[str, Any]],
    parts: Sequence[tuple[Any, ...]],
    folder: Path,
    label: str,
    workers: int | None = None,
    engine: str = "local",
) -> list[dict[str, Any]]:
    """Call `function(*part, path)` for every part and return the counts in the order of the parts.

    `function`, of a module's own, writes files whose names begin with `path` (`folder/00007`) and returns JSON-able
    counts. A part whose `NNNNN.json` is there is not run again. `workers` are processes; None: one per core. `engine`
    is `local` or, through datatrove, `ray` (on RAY_ADDRESS, else started here) or `slurm` (a job array).
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:05d}" for index in range(len(parts))]
    marks = [path.with_suffix(".json") for path in paths]
    tasks = [(function, part, path) for part, path, mark in zip(parts, paths, marks, strict=True) if not mark.exists()]
    with progress_bar(len(parts), label, initial=len(parts) - len(tasks)) as progress:
        try:
            for finished in _run(tasks, workers, engine, folder):
                # A cluster is only seen to be at work: how far it is, the marks show.
                progress.update(finished or sum(mark.exists() for mark in marks) - progress.n)
        except BrokenProcessPool:
            problem = f"{label}: a worker process died (out of memory?); run again with fewer data.workers"
            raise UserError(problem) from None
    # Whatever the engine reports, every part must have written its counts.
    return [read_json(mark) for mark in marks]


def _run(tasks: Sequence[Task], workers: int | None, engine: str, folder: Path) -> Iterable[int | None]:
    """Run tasks; yields 1 for each that is finished, or None from time to time."""
    if engine == "local":
        workers = min(workers or cores(), len(tasks))
        return in_processes(tasks, workers) if workers > 1 else itertools.starmap(run_task, tasks)
    if not tasks:
        return ()
    try:
        cluster = registry.find(CLUSTERS, engine, "data.engine")
    except ImportError as error:
        raise UserError(f"data.engine '{engine}' needs pip install 'nanophi[cluster]' ({error})") from None
    found: Iterable[None] = cluster(tasks, workers, folder / "datatrove")
    return found


def in_processes(tasks: Sequence[Task], workers: int) -> Iterator[int]:
    """Run tasks in `workers` processes on this machine; yields 1 per finished task."""
    # Not `fork`: the parent holds threads (torch, pyarrow, tokenizers) whose locks a forked child inherits.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanophi.data.parallel", *(sorted({task[0].__module__ for task in tasks}))])
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin) as pool:
        try:
            with _without_interrupts():
                futures = [pool.submit(run_task, *task) for task in tasks]
            for future in as_completed(futures):
                yield future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, Exception):  # nobody waits for what is begun
                for worker in multiprocessing.active_children():
                    worker.terminate()
            raise


def run_task(function: Callable[..., dict[str, Any]], part: tuple[Any, ...], path: Path) -> int:
    """Call a part's function, then write the counts that mark the part as finished."""
    counts = function(*part, path)
    write_json(path.with_suffix(".json"), counts)
    return 1


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the end; the processes started here never get it, as a blocked signal stays so in them."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield  # only the main thread handles signals
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _begin() -> None:
    """One thread per worker: the parts are the parallelism. A worker ends with the process that it works for."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import pyarrow as pa

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)


def _end_with_parent() -> None:
    # Killed, the parent cannot stop its workers, which would keep writing beside those of the run that resumes.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
