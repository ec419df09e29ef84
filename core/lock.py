"""One writer at a time in a folder: by `flock`, which the system frees when a process ends, however it ends.

On a file system without (some Lustre and NFS mounts) a lease in the folder is renewed by its holder, and is free once
it has not been renewed for a while.
"""

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import write_text

LEASE_SECONDS, RENEW_SECONDS = 20.0, 5.0


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder for writing. Raises `UserError` if another process holds it or it cannot be written."""
    holder = folder / ".lock.pid"
    with contextlib.ExitStack() as held:
        with user_errors(f"{folder} cannot be written; choose another --runs"):
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((folder / ".lock").open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise _held(folder, holder.read_text() if holder.exists() else "unknown") from None
                held.enter_context(_lease(folder / ".lease"))
            write_text(holder, str(os.getpid()))
        yield


def _held(folder: Path, holder: str) -> UserError:
    return UserError(f"{folder} is being written by another process (pid {holder}); wait for it or use another name")


@contextlib.contextmanager
def _lease(path: Path) -> Iterator[None]:
    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(f"{os.getpid()} on {socket.gethostname()}")
            break
        except FileExistsError:
            _wait_for(path)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(path)

    threading.Thread(target=renew, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            path.unlink()


def _wait_for(path: Path) -> None:
    """Remove a lease whose holder is gone. Raises `UserError` if it is renewed meanwhile."""
    began = time.monotonic()  # clocks of machines differ; that a lease is renewed can be seen on any
    with contextlib.suppress(FileNotFoundError):
        renewed = path.stat().st_mtime_ns
        while time.monotonic() - began < LEASE_SECONDS:
            time.sleep(0.5)
            if path.stat().st_mtime_ns != renewed:
                raise _held(path.parent, path.read_text(encoding="utf-8"))
        path.unlink()
