"""Data in Markdown: text from recipes, sources and models is shown as it is, whatever characters it has."""

from __future__ import annotations

import re
import unicodedata

_SPECIAL = re.compile(r"[\\`*_\[\]<>|~&$#@{}!]|(?<=\w):(?=//)|(?<=www)\.")


def text(value: object) -> str:
    """Inline text: one line, with everything escaped that Markdown, GitHub's tables and links, or HTML would read."""
    line = " ".join(_printable(str(value)).split())
    return _SPECIAL.sub(lambda match: "\\" + match.group(), line)


def code(value: object, cell: bool = False) -> str:
    """An inline code span; in the `cell` of a table bars are escaped, which they are not elsewhere."""
    line = " ".join(_printable(str(value)).split())
    line = line.replace("|", "\\|") if cell else line
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    padding = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def fenced(value: str) -> str:
    """A code block that its text cannot break out of."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", value)), default=0))
    return f"{fence}text\n{_printable(value)}\n{fence}"


def _printable(value: str) -> str:
    """The text with control characters, those that change its direction, and lone surrogates replaced."""
    hidden = (character for character in set(value) - set("\n\t") if unicodedata.category(character)[0] == "C")
    return value.translate(dict.fromkeys(map(ord, hidden), "\ufffd"))
