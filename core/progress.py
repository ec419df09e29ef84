"""One progress bar for all long work: it moves on a terminal and writes a line now and then elsewhere."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, label: str, **options: Any) -> "tqdm[Any]":
    """A bar on stderr that disappears when it is done; in a pipe or a file, a line every half minute."""
    lively = sys.stderr.isatty()
    pace: dict[str, Any] = {"mininterval": 0.5, "delay": 2} if lively else {"mininterval": 30, "delay": 30}
    return tqdm(total=total, desc=label, file=sys.stderr, leave=False, miniters=1, **pace, **options)
