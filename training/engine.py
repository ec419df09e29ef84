"""Runs one function over many parts of a corpus, on all cores, so that a killed run goes on where it stopped.

A part's function writes its files and returns its counts; the counts are written last, beside them, as the mark that
the part is finished. Parts are cut by size, never by the number of workers, and results keep the parts' order, so the
outcome does not depend on how many processes there are.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
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
) -> list[dict[str, Any]]:
    """Call `function(*part, path)` for every part and return the counts in the order of the parts.

    Args:
        function: a module-level function. It writes files whose names begin with `path` (`folder/00007`), replacing
            what a killed attempt may have left, and returns JSON-able counts.
        parts: picklable arguments.
        folder: where the parts' files go. A part whose `NNNNN.json` is there already is not run again.
        label: what the progress bar says.
        workers: processes; None: one per core.

    Raises:
        UserError: from a part (the first one), or if a worker died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:05d}" for index in range(len(parts))]
    todo = [index for index, path in enumerate(paths) if not path.with_suffix(".json").exists()]
    workers = min(workers or cores(), len(todo))
    progress = tqdm(total=len(parts), initial=len(parts) - len(todo), desc=label, file=sys.stderr, leave=False, delay=2)
    with progress:
        if workers <= 1:
            for index in todo:
                _run_part(function, parts[index], paths[index])
                progress.update()
        else:
            # Not `fork`: the parent holds threads (torch, pyarrow, tokenizers) whose locks a forked child inherits.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["nanophi.training.engine", function.__module__])
            with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
                futures = [pool.submit(_run_part, function, parts[index], paths[index]) for index in todo]
                try:
                    for future in as_completed(futures):
                        future.result()
                        progress.update()
                except BrokenProcessPool:
                    raise UserError(
                        f"{label}: a worker process died (out of memory?); run again with fewer data.workers, "
                        "finished parts are kept"
                    ) from None
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return [read_json(path.with_suffix(".json")) for path in paths]


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
