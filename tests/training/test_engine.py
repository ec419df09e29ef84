"""Parts run once each, on any number of processes, and say so when one fails."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from nanophi.records import UserError
from nanophi.training.engine import run_parts


def square(number: int, path: Path) -> dict[str, Any]:
    path.with_suffix(".txt").write_text(str(number))
    return {"square": number**2}


def fail_on_three(number: int, path: Path) -> dict[str, Any]:
    if number == 3:
        raise UserError("part three is bad")
    return square(number, path)


def die_on_three(number: int, path: Path) -> dict[str, Any]:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(number, path)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_keep_the_order_of_the_parts(tmp_path: Path, workers: int) -> None:
    results = run_parts(square, [(number,) for number in range(7)], tmp_path, "squares", workers)
    assert results == [{"square": number**2} for number in range(7)]
    assert (tmp_path / "00006.txt").read_text() == "6"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_is_raised_and_what_was_finished_stays(tmp_path: Path, workers: int) -> None:
    parts = [(number,) for number in range(5)]
    with pytest.raises(UserError, match="part three is bad"):
        run_parts(fail_on_three, parts, tmp_path, "squares", workers)
    assert not (tmp_path / "00003.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert finished
    assert len(run_parts(square, parts, tmp_path, "squares", workers)) == 5
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())


def test_a_worker_that_is_killed_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a worker process died"):
        run_parts(die_on_three, [(number,) for number in range(5)], tmp_path, "squares", 2)
    assert not (tmp_path / "00003.json").exists()


def test_no_parts(tmp_path: Path) -> None:
    assert run_parts(square, [], tmp_path, "nothing", 2) == []
