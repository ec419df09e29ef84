"""Commands side by side: whose line is whose, one that fails, and what is left when the starting process dies."""

import os
import signal
import subprocess
import sys
import time

import pytest

from nanophi.core import jobs
from nanophi.core.errors import UserError


def python(code):
    return [sys.executable, "-c", code]


def test_lines_are_labelled_and_all_have_their_own_device():
    lines, finished = [], []
    code = "import os, sys; print('b: x\\rb: done'); print(os.environ['OMP_NUM_THREADS'], file=sys.stderr)"
    jobs.side_by_side({name: python(code) for name in "abc"}, 2, lines.append, finished.append)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert sorted(lines) == sorted([f"{n}: {threads}" for n in "abc"] + ["a: b: done", "b: done", "c: b: done"])
    assert sorted(finished) == ["a", "b", "c"]


def test_the_others_finish_before_a_failure_is_told():
    finished = []
    commands = {"bad": python("import sys; sys.exit('out of luck')"), "good": python("import time; time.sleep(0.5)")}
    lines: list[str] = []
    with pytest.raises(UserError, match="bad failed, see above; run the same command to resume"):
        jobs.side_by_side(commands, 2, lines.append, finished.append)
    assert finished == ["good"]
    assert lines == ["bad: out of luck"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_commands_stop_with_the_process_that_started_them(tmp_path, number):
    child = (
        "import os, signal, sys, time; from nanophi.core.jobs import stop_with_parent; "
        "signal.signal(signal.SIGTERM, lambda *a: (open(sys.argv[1] + '.saved', 'w').close(), sys.exit(1))); "
        "stop_with_parent(); open(sys.argv[1], 'w').close(); time.sleep(60)"
    )
    # A process that is started in the background may ignore SIGINT, and then so do its children.
    parent = f"import signal; from nanophi.core import jobs; signal.signal(signal.SIGINT, signal.default_int_handler); jobs.side_by_side({{n: [{sys.executable!r}, '-c', {child!r}, {str(tmp_path)!r} + '/' + n] for n in 'ab'}}, 2)"  # noqa: E501
    process = subprocess.Popen(python(parent), stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    process.send_signal(number)
    process.wait(20)
    wait_for(lambda: {path.name for path in tmp_path.iterdir()} == {"a", "b", "a.saved", "b.saved"})


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_gpu_each_and_no_more_jobs_than_there_are_devices(monkeypatch):
    monkeypatch.setattr("nanophi.core.jobs.cores", lambda: 5)
    assert [device["OMP_NUM_THREADS"] for device in jobs.devices(2)] == ["2", "2"]
    assert len(jobs.devices(8)) == 5
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    for asked in (2, 3):
        assert jobs.devices(asked) == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "7"}]
    lines: list[str] = []
    jobs.side_by_side({"a": python("pass")}, 3, lines.append)
    assert lines == ["--jobs 3: 2 at once, one for each GPU or core here"]
