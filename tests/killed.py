"""A stage that is killed while it works, for the tests of starting it again."""

import signal
import subprocess
import sys

PREAMBLE = """
import os, signal, sys
from pathlib import Path
from nanophi.data import parallel

write_json, marked = parallel.write_json, []

def mark_or_die(path, value):
    if len(marked) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    marked.append(path)
    write_json(path, value)

parallel.write_json = mark_or_die
arguments = sys.argv[2:]
"""


def run_killed(code: str, *arguments: object, survive: int) -> None:
    """Run `code`, which finds `arguments` as a list of strings, in a process of its own.

    The process kills itself (SIGKILL) when `survive` parts of the stage are marked as finished and one more would be.
    """
    command = [sys.executable, "-c", PREAMBLE + code, str(survive), *map(str, arguments)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
