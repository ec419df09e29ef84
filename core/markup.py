"""Data in Markdown and HTML: text from recipes, sources and models is shown as it is, whatever characters it has.

The one place that escapes and that writes tables. HTML pages are Jinja templates with `autoescape`.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

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


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table of cells that are Markdown already (`text`, `code`); columns after the first `left` are right.

    The cells are padded, so that the same table can be read on a screen.
    """
    widths = [max(3, *(len(row[column]) for row in (head, *rows))) for column in range(len(head))]
    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    sides = ["<" if column < left else ">" for column in range(len(head))]
    lines = (
        " | ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
        for row in (head, rule, *rows)
    )
    return "\n".join(f"| {line} |" for line in lines)


def script_safe(value: Any) -> str:
    """JSON without a `<` that could end its script element, and without lone surrogates, which no file can hold."""
    text = re.sub("[\ud800-\udfff]", "\ufffd", json.dumps(value, ensure_ascii=False, allow_nan=False))
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match.group()):04x}", text)


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Plain text for a screen: rows of cells, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join((indent + line).rstrip() for line in lines)


def _printable(value: str) -> str:
    """The text with control characters, those that change its direction, and lone surrogates replaced."""
    hidden = (character for character in set(value) - set("\n\t") if unicodedata.category(character)[0] == "C")
    return value.translate(dict.fromkeys(map(ord, hidden), "\ufffd"))
