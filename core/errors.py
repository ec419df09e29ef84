"""Errors that a person sees: one line each, raised where the thing is known and printed by `cli.py`.

Nothing here prints or decides an exit status.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, with its name, and the remedy.

    Names come from the user's disk and data, so whatever could not be printed on one line is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    r"""Text on one line that any stream can encode: line ends, control characters and lone surrogates are escaped."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def one_line(error: BaseException) -> str:
    """One line on why a library failed: its message, and the innermost one where it wraps another."""
    innermost = error
    while True:
        inner = innermost.__cause__ or (None if innermost.__suppress_context__ else innermost.__context__)
        if inner is None or isinstance(inner, StopIteration):
            break
        innermost = inner
    outer, inner_text = _first_line(error), _first_line(innermost)
    return printable(outer if inner_text in outer else inner_text if outer in inner_text else f"{outer}: {inner_text}")


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return ("" if error.filename is None else f"{error.filename}: ") + error.strerror
    if isinstance(error, FileNotFoundError):  # pyarrow's have the path alone
        return f"no such file or folder: {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    # The message of a KeyError is the key alone.
    return f"{type(error).__name__}: {text}" if isinstance(error, LookupError) or not text else text


DISK_FULL = (
    *("No space left on device", "Disk quota exceeded"),
    *("PytorchStreamWriter failed", "unexpected pos", "basic_ios::clear: iostream error"),  # torch.save's
)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the system refused to write, also where safetensors, torch or shutil report it in their own words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Where a stage meets the user's data: whatever a library raises there becomes `UserError("what (reason)")`.

    A full disk is passed on: the command has its own message for it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise
        raise UserError(f"{what} ({one_line(error)})") from error


def suggest(name: str, known: Iterable[str], most: int = 1) -> str:
    """`did you mean 'x'?` for the nearest known names (`'x' or 'y'`), or `known: ...` where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name.lower(), [one.lower() for one in known], n=most, cutoff=0.5)
    near = [one for match in close for one in known if one.lower() == match]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
