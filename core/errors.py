"""Errors that a person sees: one line each, raised where the thing is known and printed by `cli.py`."""

import contextlib
import difflib
import errno
import re
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, with its name, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # names come from the user's disk and data


def printable(text: str) -> str:
    r"""Text on one line that any stream can encode: line ends, control characters and lone surrogates are escaped."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def one_line(error: BaseException) -> str:
    """One line on why a library failed: its message, and the innermost one where it wraps another."""
    innermost = [one for one in _chain(error) if not isinstance(one, StopIteration)][-1]
    # The query of a URL may be a signature.
    outer, inner = (re.sub(r"(\w://[^\s?]*)\?\S*", r"\1", _first_line(one)) for one in (error, innermost))
    return printable(outer if inner in outer else inner if outer in inner else f"{outer}: {inner}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return ("" if error.filename is None else f"{error.filename}: ") + error.strerror
    if isinstance(error, FileNotFoundError):  # pyarrow's have the path alone
        return f"no such file or folder: {error}"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    # The message of a KeyError is the key alone.
    return f"{type(error).__name__}: {text}" if isinstance(error, LookupError) or not text else text


FULL = ("No space left on device", "Disk quota exceeded")
FULL_OF_TORCH = ("PytorchStreamWriter failed", "unexpected pos", "basic_ios::clear: iostream error")


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the system refused to write, also where safetensors, torch or shutil report it in their own words."""
    return any(
        (isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(words in str(one) for words in FULL + FULL_OF_TORCH)
        for one in _chain(error)
    )


@contextlib.contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Whatever a library raises where a stage meets the user's data becomes `UserError`; a full disk is passed on."""
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
