"""Parts run once each, on any number of processes, and say so when one fails."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_parts import die_on_three, fail_on_three, square

from nanophi.core.errors import UserError
from nanophi.data.parallel import run_parts

TESTS = Path(__file__).parent.parent

SBATCH = """
import os, pathlib, re, shutil, subprocess, sys
here = pathlib.Path(__file__).parent
job = here / str(100 + len(list(here.glob("*.sh"))))
shutil.copy(sys.argv[-1], f"{job}.sh")
last = int(re.search(r"--array=0-([0-9]+)", pathlib.Path(sys.argv[-1]).read_text()).group(1))
every = "".join(f"SLURM_ARRAY_TASK_ID={task} bash {job}.sh > {job}-{task}.out 2>&1 &\\n" for task in range(last + 1))
environment = {**os.environ, "SLURM_NODELIST": "localhost"}
job.touch()
subprocess.Popen(["bash", "-c", f"{every} wait; rm {job}"], env=environment, start_new_session=True,
                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job", job.name)
"""
SQUEUE = """
import pathlib, sys
if not (pathlib.Path(__file__).parent / sys.argv[-1]).exists():
    sys.exit("slurm_load_jobs error: Invalid job id specified")
print(sys.argv[-1], "R")
"""


@pytest.fixture(params=["ray", "slurm"])
def engine(request, tmp_path, monkeypatch):
    """Two real Ray workers on this machine; or Slurm, if it is here, else commands that run what is submitted."""
    cluster = pytest.importorskip("nanophi.data.cluster", reason="needs datatrove and Ray (make cluster)")
    # Its workers import the functions of this folder by name, as a cluster's machines import nanophi's.
    path = os.pathsep.join([str(TESTS), *sys.path])
    if request.param == "ray":
        request.getfixturevalue("ray")
    else:
        monkeypatch.setattr(cluster, "POLL_SECONDS", 0.2)
        monkeypatch.setenv("PYTHONPATH", path)
        if shutil.which("sinfo") and subprocess.run(["sinfo"], capture_output=True).returncode == 0:
            return request.param
        commands = {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": "", "scontrol": "print('localhost')"}
        (tmp_path / "slurm").mkdir()
        for name, script in commands.items():
            (tmp_path / "slurm" / name).write_text(f"#!{sys.executable}\n{script}")
            (tmp_path / "slurm" / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'slurm'}{os.pathsep}{os.environ['PATH']}")
    return request.param


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="needs Ray (make cluster)")
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield ray
    ray.shutdown()


def test_a_cluster_gives_the_same_and_fails_alike(tmp_path, engine):
    parts = [(number,) for number in range(7)]
    expected = run_parts(square, parts, tmp_path / "local", "squares", 1)
    assert run_parts(square, parts, tmp_path / "cluster", "squares", 2, engine) == expected
    for path in (tmp_path / "local").iterdir():
        assert path.read_bytes() == (tmp_path / "cluster" / path.name).read_bytes()
    assert len(list((tmp_path / "cluster" / "datatrove" / "completions").iterdir())) == 2, "one task for each worker"
    with pytest.raises(UserError, match="part three is bad"):
        run_parts(fail_on_three, parts, tmp_path / "failed", "squares", 2, engine)
    with pytest.raises(UserError, match="a worker process died"):
        run_parts(die_on_three, parts, tmp_path / "died", "squares", 2, engine)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "died").glob("*.json")}
    assert len(run_parts(square, parts, tmp_path / "died", "squares", 2, engine)) == 7
    assert finished and all(path.stat().st_mtime_ns == changed for path, changed in finished.items())


def test_without_the_cluster_extra_the_engine_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nanophi.data.cluster", None)
    with pytest.raises(UserError, match=r"pip install 'nanophi\[cluster\]'"):
        run_parts(square, [(1,)], tmp_path, "squares", 2, "ray")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_is_raised_and_what_was_finished_stays(tmp_path, workers):
    parts = [(number,) for number in range(5)]
    with pytest.raises(UserError, match="part three is bad"):
        run_parts(fail_on_three, parts, tmp_path, "squares", workers)
    assert not (tmp_path / "00003.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert finished
    assert len(run_parts(square, parts, tmp_path, "squares", workers)) == 5
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())


def test_a_worker_that_is_killed_fails_the_run(tmp_path):
    with pytest.raises(UserError, match="a worker process died"):
        run_parts(die_on_three, [(number,) for number in range(5)], tmp_path, "squares", 2)
    assert not (tmp_path / "00003.json").exists()


def _wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return done


@pytest.mark.parametrize("how", ["killed", "early", "ctrl-c"])
def test_workers_end_with_the_process_that_they_work_for(tmp_path, how):
    script = (
        "import pathlib, sys; from engine_parts import slow; from nanophi.data.parallel import run_parts\n"
        "if __name__ == '__main__':\n"
        "    try: run_parts(slow, [(n,) for n in range(9)], pathlib.Path(sys.argv[1]), 'slow', 2)\n"
        "    except KeyboardInterrupt: print('interrupted')\n"
    )
    (tmp_path / "main.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "TQDM_DISABLE": "1"}
    command = [sys.executable, str(tmp_path / "main.py"), str(tmp_path / "parts")]
    begun = lambda: len(list((tmp_path / "parts").glob("*.pid"))) == 2  # noqa: E731
    with (tmp_path / "output").open("w") as output:
        main = subprocess.Popen(command, env=environment, start_new_session=True, stdout=output, stderr=output)
    # A terminal sends Ctrl-C to every process, also while the first of them imports what it needs.
    assert _wait_for((tmp_path / "parts").exists if how == "early" else begun)
    if how == "killed":
        main.kill()
    else:
        os.killpg(main.pid, signal.SIGINT)
    main.wait(timeout=30)
    assert how == "killed" or (tmp_path / "output").read_text() == "interrupted\n"
    workers = {int(path.read_text()) for path in (tmp_path / "parts").glob("*.pid")}
    assert _wait_for(lambda: not any(map(_is_running, workers)), 20)
    assert len(workers) <= 2, "what was queued was not begun"


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
