"""One writer at a time in a folder, also where the file system has no file locks.

Where there are locks (`flock`), the system frees them when a process ends, however it ends. Elsewhere (some Lustre and
NFS mounts) a lease in the folder is renewed by its holder, and is free once it has not been renewed for a while.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from nanophi.core.files import write_text

LEASE_SECONDS, RENEW_SECONDS = 20.0, 5.0


class HeldError(Exception):
    """Another process holds the folder; the message names it."""


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder for writing. Raises `HeldError` if another process holds it, OSError if it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / ".lock.pid"
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                pid = holder.read_text(encoding="utf-8") if holder.exists() else "unknown"
                raise HeldError(f"pid {pid}") from None
            with _lease(folder / ".lease"):
                write_text(holder, str(os.getpid()))
                yield
            return
        write_text(holder, str(os.getpid()))
        yield


@contextlib.contextmanager
def _lease(path: Path) -> Iterator[None]:
    me = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(me)
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
    """Remove a lease whose holder is gone. Raises `HeldError` if it is renewed meanwhile."""
    try:
        host, pid, _ = path.read_text(encoding="utf-8").split()
        renewed = path.stat().st_mtime_ns
    except (OSError, ValueError):
        time.sleep(0.1)  # just made, or just removed
        return
    if host == socket.gethostname() and not _alive(int(pid)):
        path.unlink(missing_ok=True)
        return
    began = time.monotonic()  # clocks of machines differ; that a lease is renewed can be seen on any
    while time.monotonic() - began < (LEASE_SECONDS if host != socket.gethostname() else 2 * RENEW_SECONDS):
        time.sleep(0.5)
        if not path.exists():
            return
        if path.stat().st_mtime_ns != renewed:
            raise HeldError(f"pid {pid} on {host}")
    path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
