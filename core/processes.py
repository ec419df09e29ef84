"""Runs tasks in processes on this machine: the layer below `nanophi.data.parallel` and the clusters."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from nanophi.core.files import write_json

Task = tuple[Callable[..., dict[str, Any]], tuple[Any, ...], Path]


class WorkerDiedError(Exception):
    """A worker process died before it finished its task."""


def in_processes(tasks: Sequence[Task], workers: int) -> Iterator[None]:
    """Run tasks in `workers` processes on this machine; yields once per finished task. Raises `WorkerDiedError`."""
    # Not `fork`: the parent holds threads (torch, pyarrow, tokenizers) whose locks a forked child inherits.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # Windows
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["nanophi.core.processes", *(sorted({task[0].__module__ for task in tasks}))])
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin) as pool:
        futures = [pool.submit(run_task, *task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise WorkerDiedError from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_task(function: Callable[..., dict[str, Any]], part: tuple[Any, ...], path: Path) -> None:
    """Call a part's function, then write the counts that mark the part as finished."""
    counts = function(*part, path)
    write_json(path.with_suffix(".json"), counts)


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


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
