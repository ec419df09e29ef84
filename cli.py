"""The `nanophi` command as a process: its settings, its errors and its exit status; the verbs are in `cli_verbs.py`."""

import errno
import os
import sys

from nanophi.core.errors import UserError, one_line

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C stopped (128 + SIGINT); typer sets it."""


def _prepare_environment(debug: bool) -> None:
    """Settings that libraries read when they are imported: the stages report for themselves."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        # A sample or a sign such as ± must not stop a run where the output's encoding lacks it.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def main() -> None:
    """Entry point: a `UserError` becomes one line and exit status 1; `--debug` shows the traceback instead."""
    debug = "--debug" in sys.argv
    _prepare_environment(debug)
    try:
        from nanophi.cli_verbs import app

        app(args=[argument for argument in sys.argv[1:] if argument != "--debug"], prog_name="nanophi")
    except UserError as error:
        if debug:
            raise
        sys.exit(f"nanophi: {error}")
    except OSError as error:
        if debug or error.errno is None:  # without one it is no error of the system's but a library's
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(f"nanophi: no disk space left ({error.filename or 'unknown file'}); free some and run it again")
        sys.exit(f"nanophi: {one_line(error)}")
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            raise
        print("\nnanophi: interrupted; run the same command to resume", file=sys.stderr)
        sys.exit(INTERRUPTED)
