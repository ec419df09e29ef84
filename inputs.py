"""What a name in a recipe or on the command line refers to: a path, or a repository on the Hub."""

from __future__ import annotations

import re

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `ORG/NAME` of a repository on the Hub."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name
