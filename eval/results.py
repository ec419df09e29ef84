"""The result file that `nanophi eval` writes: its format's version, and how to read one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanophi.files import UserError, read_json

FORMAT = 1
"""Version of the `nanophi` key in result files. A reader refuses another one."""


def read_result(path: Path) -> dict[str, Any]:
    """A result file's contents. Raises `UserError` if it is none of ours or of another format."""
    content = read_json(path)
    written = content.get("nanophi") if isinstance(content, dict) else None
    if not isinstance(written, dict) or "headline" not in written:
        raise UserError(f"{path} is not a result of `nanophi eval`; run it again on that model")
    if written.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {written.get('format')}, this version reads {FORMAT}; run `nanophi eval` again"
        )
    return content
