"""Functions that test_parallel.py runs in other processes, which must be able to import them by name."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from nanophi.core.errors import UserError


def square(number: int, path: Path) -> dict[str, Any]:
    path.with_suffix(".txt").write_text(str(number))
    return {"square": number**2}


def fail_on_three(number: int, path: Path) -> dict[str, Any]:
    if number == 3:
        raise UserError("part three is bad")
    return square(number, path)


def slow(number: int, path: Path) -> dict[str, Any]:
    path.with_suffix(".pid").write_text(str(os.getpid()))
    time.sleep(1)
    return square(number, path)


def die_on_three(number: int, path: Path) -> dict[str, Any]:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(number, path)
