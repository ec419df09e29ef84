"""What a name in a recipe or on the command line refers to: a path, or a repository on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from nanophi.files import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `ORG/NAME` of a repository on the Hub."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def model_folder(model: str | Path) -> Path | None:
    """The folder that a model's name refers to; None for a repository on the Hub, `ORG/NAME` or `ORG/NAME@revision`.

    Looks at the name and the file system only: nothing is loaded and the Hub is not asked.

    Raises:
        UserError: if it is neither.
    """
    if Path(model).is_dir():
        return Path(model)
    if not is_hub_id(str(model).partition("@")[0]):
        raise UserError(f"folder {model} does not exist, and it is not a Hub id like ORG/NAME")
    return None
