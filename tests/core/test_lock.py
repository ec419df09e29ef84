"""One writer at a time, with file locks and without."""

import errno
import fcntl
import os
import time

import pytest

from nanophi.core import lock
from nanophi.core.errors import UserError


@pytest.fixture
def no_flock(monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.5)
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.3)


def test_the_second_is_refused_with_the_first_ones_pid(tmp_path):
    with lock.hold(tmp_path), pytest.raises(UserError, match=f"pid {os.getpid()}"), lock.hold(tmp_path):
        pass
    with lock.hold(tmp_path):
        pass


def test_without_file_locks_a_lease_that_is_renewed_is_respected(tmp_path, no_flock):
    with lock.hold(tmp_path):
        time.sleep(2)
        with pytest.raises(UserError, match=f"pid {os.getpid()}"), lock.hold(tmp_path):
            pass
    assert not (tmp_path / ".lease").exists()


def test_the_lease_of_a_process_that_is_gone_is_free(tmp_path, no_flock):
    (tmp_path / ".lease").write_text("12 on elsewhere")
    (tmp_path / ".lock").touch()  # from where there are file locks
    with lock.hold(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lease").read_text()
