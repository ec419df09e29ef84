"""Runs one function over many parts of a corpus, on all cores or a Ray cluster; goes on where a killed run stopped.

A part's function writes its files and returns its counts; the counts are written last, beside them, as the mark that
the part is finished. Parts are cut by size, never by the number of workers, and results keep the parts' order, so the
outcome does not depend on how many processes there are.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanophi.records import UserError, read_json, write_json


def run_parts(
    function: Callable[..., dict[str, Any]],
    parts: Sequence[tuple[Any, ...]],
    folder: Path,
    label: str,
    workers: int | None = None,
    engine: str = "local",
) -> list[dict[str, Any]]:
    """Call `function(*part, path)` for every part and return the counts in the order of the parts.

    Args:
        function: a module-level function. It writes files whose names begin with `path` (`folder/00007`), replacing
            what a killed attempt may have left, and returns JSON-able counts.
        parts: picklable arguments.
        folder: where the parts' files go. A part whose `NNNNN.json` is there already is not run again.
        label: what the progress bar says.
        workers: processes; None: one per core (of the cluster).
        engine: `local`, or `ray`: on the cluster that RAY_ADDRESS names, else on one started here. The cluster's
            machines need nanophi installed and the run directory under the same path.

    Raises:
        UserError: from a part (the first one), or if a worker died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:05d}" for index in range(len(parts))]
    todo = [index for index, path in enumerate(paths) if not path.with_suffix(".json").exists()]
    progress = tqdm(total=len(parts), initial=len(parts) - len(todo), desc=label, file=sys.stderr, leave=False, delay=2)
    tasks = [(function, parts[index], paths[index]) for index in todo]
    with progress:
        try:
            finished: Iterable[None]
            if engine == "ray":
                finished = _on_ray(tasks, workers)
            elif min(workers or cores(), len(todo)) <= 1:
                finished = itertools.starmap(_run_part, tasks)
            else:
                finished = _in_processes(tasks, min(workers or cores(), len(todo)))
            for _ in finished:
                progress.update()
        except WorkerDiedError:
            raise UserError(
                f"{label}: a worker process died (out of memory?); run again with fewer data.workers, "
                "finished parts are kept"
            ) from None
    # Every part must have left its counts, whatever the engine believes.
    return [read_json(path.with_suffix(".json")) for path in paths]


Task = tuple[Callable[..., dict[str, Any]], tuple[Any, ...], Path]


class WorkerDiedError(Exception):
    """A process ended without an answer."""


def _in_processes(tasks: Sequence[Task], workers: int) -> Iterator[None]:
    # Not `fork`: the parent holds threads (torch, pyarrow, tokenizers) whose locks a forked child inherits.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanophi.training.engine", *(sorted({task[0].__module__ for task in tasks}))])
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        futures = [pool.submit(_run_part, *task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise WorkerDiedError from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _on_ray(tasks: Sequence[Task], workers: int | None) -> Iterator[None]:
    try:
        import ray
    except ImportError:
        raise UserError("data.engine 'ray' needs Ray: pip install ray") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        ray.init(
            address=address,
            num_cpus=None if address else workers or cores(),
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    remote = ray.remote(num_cpus=1, max_retries=0)(_run_part_on_ray)
    waiting = [remote.remote(*task) for task in tasks]
    try:
        while waiting:
            ready, waiting = ray.wait(waiting)
            yield ray.get(ready[0])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError:
        raise WorkerDiedError from None
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _run_part_on_ray(function: Callable[..., dict[str, Any]], part: tuple[Any, ...], path: Path) -> None:
    _one_thread()
    _run_part(function, part, path)


def _run_part(function: Callable[..., dict[str, Any]], part: tuple[Any, ...], path: Path) -> None:
    counts = function(*part, path)
    write_json(path.with_suffix(".json"), counts)


def _one_thread() -> None:
    """One thread per worker: the parts are the parallelism."""
    import pyarrow as pa

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
