"""What a process finds around it, settled once at the start: streams, environment, folders for caches, limits.

What cannot be had is worked around here, before a library reads it; nothing later asks again.
"""

import atexit
import contextlib
import errno
import io
import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path

from nanophi.core.errors import UserError
from nanophi.core.files import can_make

SOCKET_ROOM = 70  # bytes of a temporary folder's name that leave room for sockets (107 in all on Linux)
OPEN_FILES = 65_536
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
COUNTS = (*LAUNCHER, "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def settle() -> None:
    """Make this process and those that it starts work where streams, a home, a cache or a short TMPDIR are missing.

    Raises `UserError` without any temporary folder, or if a launcher's variable is not a number.
    """
    _streams()
    for name in COUNTS:
        value = os.environ.get(name, "").strip()
        if not value:
            os.environ.pop(name, None)
        elif name in LAUNCHER and not value.removeprefix("-").isdecimal():
            raise UserError(f"the environment variable {name} is {value!r}, which is not a whole number; unset it")
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise UserError("no temporary folder can be written; set TMPDIR to one") from None
    _folders()
    _short_temporary_folder()
    with contextlib.suppress(ValueError, OSError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # every shard of tokens is mapped at once
        wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


class Stream(io.TextIOWrapper):
    """Standard output that outlives its reader: no training stops because of `| head` or a terminal that hung up."""

    def write(self, text: str) -> int:
        with self._survive():
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._survive():
            super().flush()

    @contextlib.contextmanager
    def _survive(self):  # type: ignore[no-untyped-def]
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


def _streams() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would take its number
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, encoding="utf-8")  # noqa: SIM115
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            buffer = stream.buffer if stream else open(number, "wb")  # noqa: PTH123, SIM115
            encoding = getattr(stream, "encoding", "utf-8")
            # A sample or a sign such as ± must not stop a run where the output's encoding lacks it.
            # Line by line into a file too, where someone may be following a long training.
            setattr(sys, name, Stream(buffer, encoding=encoding, errors="replace", line_buffering=True))


def _folders() -> None:
    """A name for the user, a home, and folders for what libraries cache, where there are none that can be written."""
    os.environ.setdefault("USER", f"uid-{os.getuid()}")  # torch asks for it, and an unknown uid has no name
    home = os.path.expanduser("~")  # noqa: PTH111 (which raises nothing where there is none)
    cache = os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
    hub = Path(os.environ.get("HF_HOME") or f"{cache}/huggingface")
    if home != "~" and can_make(hub):
        return
    scratch = Path(tempfile.gettempdir()) / f"nanophi-{os.getuid()}"
    with contextlib.suppress(OSError):
        scratch.mkdir(mode=0o700, exist_ok=True)
        if scratch.is_symlink() or scratch.stat().st_uid != os.getuid():  # made by somebody else, who may read it
            scratch = Path(tempfile.mkdtemp(prefix="nanophi-"))
        if not (own := os.environ.get("HOME")) or not os.access(f"{own}/", os.X_OK):
            os.environ["HOME"] = str(scratch)
        os.environ["XDG_CACHE_HOME"], os.environ["MPLCONFIGDIR"] = str(scratch), str(scratch / "matplotlib")
        os.environ["HF_HOME"] = str(scratch / "huggingface")
        for name, place in (("HF_HUB_CACHE", hub / "hub"), ("HF_TOKEN_PATH", hub / "token")):
            if os.access(place, os.R_OK):  # what was downloaded before can still be read
                os.environ.setdefault(name, str(place))


def _short_temporary_folder() -> None:
    """A short link to a TMPDIR that is too long for sockets; the files stay where the user wants them."""
    folder = tempfile.gettempdir()
    if len(folder) <= SOCKET_ROOM:
        return
    with contextlib.suppress(OSError):
        beside = tempfile.mkdtemp(prefix="nanophi-", dir="/tmp")
        link = Path(beside) / "t"
        link.symlink_to(folder)
        os.environ["TMPDIR"] = tempfile.tempdir = str(link)

        def remove(owner: int = os.getpid()) -> None:
            if os.getpid() == owner:
                shutil.rmtree(beside, ignore_errors=True)

        atexit.register(remove)
