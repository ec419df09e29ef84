"""One style for every picture: colours, axes, and a PNG without date or version inside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanophi.core.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, GREY, DARK = "#2f6db3", "#d9772b", "#3f8f5f", "#7d5ba6", "#b8bec6", "#30363d"
SERIES = (BLUE, ORANGE, GREEN, PURPLE)
STYLE: Any = {
    **dict.fromkeys(("axes.axisbelow", "axes.grid", "figure.constrained_layout.use"), True),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), DARK),
    "axes.edgecolor": GREY,
    "axes.titlepad": 10,
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "grid.color": "#e6e9ed",
    "savefig.dpi": 150,
    "svg.hashsalt": "nanophi",
}


@contextlib.contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on, in inches, written to `path` (PNG, 150 dots per inch) at the end, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({**plt.rcParamsDefault, **STYLE}), whole_file(path) as partial:
        figure = plt.figure(figsize=(width, height))
        try:
            yield figure
            figure.savefig(partial, format="png", metadata={"Software": None})
        finally:
            plt.close(figure)
