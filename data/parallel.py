"""Runs one function over many parts of a corpus, on all cores or a cluster; resumes where a killed run stopped.

A part's function writes its files and returns its counts. The counts are written last, beside the files, and mark the
part as finished. Parts are cut by size, never by the number of workers, and results keep the parts' order, so the
outcome does not depend on the number of processes.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.core.processes import WorkerDiedError, cores, in_processes, run_task
from nanophi.core.progress import progress_bar


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
            those of a killed attempt, and returns JSON-able counts.
        parts: picklable arguments.
        folder: where the parts' files go. A part whose `NNNNN.json` is there already is not run again.
        label: what the progress bar says.
        workers: processes; None: one per core (of the cluster).
        engine: `local`; or, through datatrove, `ray` (on the cluster that RAY_ADDRESS names, else on one started
            here) or `slurm` (submits a job array and waits for it).

    Raises:
        UserError: from a part (the first one), or if a worker died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:05d}" for index in range(len(parts))]
    todo = [index for index, path in enumerate(paths) if not path.with_suffix(".json").exists()]
    progress = progress_bar(len(parts), label, initial=len(parts) - len(todo))
    tasks = [(function, parts[index], paths[index]) for index in todo]
    with progress:
        try:
            finished: Iterable[None]
            if engine != "local" and tasks:
                finished = _cluster()(tasks, engine, workers, folder / "datatrove")
            elif min(workers or cores(), len(todo)) <= 1:
                finished = itertools.starmap(run_task, tasks)
            else:
                finished = in_processes(tasks, min(workers or cores(), len(todo)))
            for _ in finished:
                if engine == "local":  # once per finished part
                    progress.update(1)
                else:  # every few seconds
                    done = len(parts) - sum(not path.with_suffix(".json").exists() for _, _, path in tasks)
                    progress.update(done - progress.n)
        except WorkerDiedError:
            raise UserError(
                f"{label}: a worker process died (out of memory?); run again with fewer data.workers, "
                "finished parts are not repeated"
            ) from None
    # Whatever the engine reports, every part must have written its counts.
    return [read_json(path.with_suffix(".json")) for path in paths]


def _cluster() -> Callable[..., Iterator[None]]:
    try:
        from nanophi.data.cluster import on_cluster
    except ImportError as error:
        raise UserError(
            f"data.engine 'ray' and 'slurm' require optional dependencies: pip install 'nanophi[cluster]' ({error})"
        ) from None
    return on_cluster


def discard_parts(folder: Path) -> None:
    """Remove what parts wrote, their marks first: a part without its files must not pass for a finished one."""
    for mark in folder.glob("*.json"):
        mark.unlink()
    shutil.rmtree(folder)
