"""Runs parts on a cluster as a datatrove pipeline of one step: through Ray or through Slurm.

`nanophi.data.parallel` decides which parts there are, what they write and how they are checked; datatrove only brings
them to the machines. These need nanophi installed, and the run directory under the same path.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from nanophi.core.errors import UserError, one_line
from nanophi.core.files import read_json, write_json
from nanophi.data.parallel import Task, in_processes

POLL_SECONDS = 2.0
SLURM_WORKERS = 16
_ERRORS = {"UserError": UserError, "BrokenProcessPool": BrokenProcessPool}


class Parts(PipelineStep):
    """Runs the tasks `rank`, `rank + world_size`, ...; writes what stops them to `failures`."""

    type = "nanophi"
    name = "parts"

    def __init__(self, tasks: Sequence[Task], failures: Path) -> None:
        super().__init__()
        self.tasks, self.failures = tasks, failures

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Called by datatrove in every task of the pipeline."""
        try:
            # In a separate process: datatrove forks a pool, which would wait forever for a process that was killed.
            for _ in in_processes(self.tasks[rank::world_size], 1):
                self.stat_update("parts")
        except Exception as error:
            kind = type(error).__name__
            text = str(error) if kind in _ERRORS else traceback.format_exc()
            write_json(self.failures / f"{rank:05d}.json", {"kind": kind, "text": text})
            raise
        yield from data or ()


@contextlib.contextmanager
def _step(tasks: Sequence[Task], folder: Path) -> Iterator[Parts]:
    """The pipeline's one step, in an empty folder for its logs; raises what stopped a task (the first one)."""
    logger.disable("datatrove")
    if (folder / "job").exists():  # of a run that was killed while its job kept running
        _cancel((folder / "job").read_text())
    shutil.rmtree(folder, ignore_errors=True)
    step = Parts(tasks, folder / "failures")
    step.failures.mkdir(parents=True)
    yield step
    for _ in range(5):  # a shared file system may show what another machine wrote a moment later
        failures = sorted(step.failures.glob("*.json"))
        missing = [path for _, _, path in tasks if not path.with_suffix(".json").exists()]
        if failures or not missing:
            break
        time.sleep(POLL_SECONDS)
    for failure in map(read_json, failures):
        raise _ERRORS.get(failure["kind"], RuntimeError)(failure["text"])
    if missing:
        raise UserError(f"a task of the cluster ended before its parts were finished; the logs are in {folder}")


def ray(tasks: Sequence[Task], workers: int | None, folder: Path) -> Iterator[None]:
    """Run tasks on a Ray cluster, in `workers` tasks of the pipeline; None: one per core of the cluster."""
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
        ray.init(address=address, num_cpus=None if address else workers, **quiet)
    count = min(len(tasks), workers or int(ray.cluster_resources()["CPU"]))
    failed: list[BaseException] = []

    def run(executor: RayPipelineExecutor) -> None:
        try:
            executor.run()
        except BaseException as error:
            failed.append(error)

    with _step(tasks, folder) as step:
        once = {"max_restarts": 0}
        executor = RayPipelineExecutor([step], tasks=count, logging_dir=str(folder), ray_remote_kwargs=once)
        thread = threading.Thread(target=run, args=(executor,), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            yield
        if failed:
            raise UserError(f"Ray: {one_line(failed[0])}")


class _Slurm(SlurmPipelineExecutor):
    """One job array. Set what your site needs in sbatch's own variables (SBATCH_PARTITION, SBATCH_ACCOUNT)."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        # sbatch reads its lines as a shell does.
        given = {key: value for key, value in super().get_sbatch_args(max_array).items() if value is not None}
        return {key: f'"{value}"' if key in ("output", "error") else value for key, value in given.items()}

    def launch_merge_stats(self) -> None:
        """Submit no second job for datatrove's statistics: the parts' counts are checked here."""


def slurm(tasks: Sequence[Task], workers: int | None, folder: Path) -> Iterator[None]:
    """Run tasks as a Slurm job array of at most `workers` jobs; None: of `SLURM_WORKERS`."""
    if "SLURM_ARRAY_TASK_ID" in os.environ or not all(map(shutil.which, ("sbatch", "squeue", "scancel"))):
        raise UserError("data.engine 'slurm' submits a job array: start nanophi on a login node, where sbatch is")
    # The command that datatrove's script calls, in this very environment; its argument there has no quotes.
    module = "datatrove.tools.launch_pickled_pipeline"
    launch = shlex.join([sys.executable, "-m", module, f"{folder.absolute()}/executor.pik"])
    with _step(tasks, folder) as step:
        executor = _Slurm(
            [step],
            tasks=min(len(tasks), workers or SLURM_WORKERS),
            time=os.environ.get("SBATCH_TIMELIMIT", "24:00:00"),
            partition=os.environ.get("SBATCH_PARTITION"),  # None: Slurm's default
            qos=os.environ.get("SBATCH_QOS"),
            job_name="nanophi",
            logging_dir=str(folder),
            env_command=f"launch_pickled_pipeline() {{ {launch}; }}",
            requeue=False,
            requeue_signals=None,
            with_srun=False,
            max_array_size=-1,
        )
        try:
            executor.run()
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"sbatch refused the job ({error})") from None
        job = str(executor.job_id)
        (folder / "job").write_text(job)
        try:
            while _is_queued(job):
                yield
                time.sleep(POLL_SECONDS)
        except BaseException:
            _cancel(job)
            raise
        (folder / "job").unlink()


def _is_queued(job: str) -> bool:
    """Whether Slurm still has tasks of a job to run or running."""
    done = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True)
    # Slurm forgets a finished job after some minutes; a controller that does not answer says nothing about it.
    return bool(done.stdout.strip()) or (done.returncode != 0 and "Invalid job id" not in done.stderr)


def _cancel(job: str) -> None:
    with contextlib.suppress(OSError):
        subprocess.run(["scancel", job], capture_output=True)
        while _is_queued(job):
            time.sleep(POLL_SECONDS)
