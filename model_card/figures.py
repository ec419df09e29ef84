"""The card's figures, drawn from the shipped records: the loss curve, the scores of the filter, the evaluation."""

import importlib.metadata
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from nanophi.core import plots
from nanophi.core.formatting import percent
from nanophi.core.plots import BLUE, DARK, GREY, ORANGE
from nanophi.core.version import __version__
from nanophi.eval.results import Score
from nanophi.model_card.records import ShippedRecords, leading_scores

UNLIKE = 0.05  # share of differing pixels of another figure; machines set text a little differently


def names(records: ShippedRecords) -> list[str]:
    """File stems of the figures that these records allow, in the order of the card."""
    scored = "histogram" in records.get("quality.json", {})
    return ["loss", *(["quality"] if scored else []), *(["evaluation"] if _bars(records) else [])]


def build(records: ShippedRecords, output: Path) -> list[str]:
    """Draw every figure as PNG. Returns the file names."""
    draw = {"loss": _loss, "quality": _quality, "evaluation": _evaluation}
    for name in names(records):
        height = 4.0 if name != "evaluation" else 1.3 + 0.42 * len(_bars(records))
        with plots.picture(output / f"{name}.png", 9.0, height) as figure:
            draw[name](records, figure.subplots())
    return [f"{name}.png" for name in names(records)]


def drawn_alike(records: ShippedRecords) -> bool:
    """Whether this nanophi and matplotlib are those that drew a release's figures, so that they can be compared."""
    there, here = records["run.json"]["environment"], importlib.metadata.version("matplotlib")
    return (there["nanophi"], there["packages"].get("matplotlib")) == (__version__, here)


def problems(records: ShippedRecords, folder: Path) -> list[str]:
    """Figures in a folder that are not those of the records, by drawing them again if they were `drawn_alike`."""
    from matplotlib.image import imread

    expected, there = {f"{name}.png" for name in names(records)}, {path.name for path in folder.glob("*.png")}
    wrong = [f"figures/{name} is {'missing' if name in expected else 'unknown'}" for name in sorted(expected ^ there)]
    if not drawn_alike(records):
        return wrong
    with tempfile.TemporaryDirectory(prefix="nanophi-figures-") as scratch:
        build(records, Path(scratch))
        for name in sorted(expected & there):
            try:
                pixels, drawn = imread(folder / name), imread(Path(scratch) / name)
            except (OSError, ValueError, SyntaxError) as error:  # the image library raises all of these
                wrong.append(f"figures/{name} is not an image ({type(error).__name__})")
                continue
            if pixels.shape != drawn.shape or (np.abs(pixels - drawn).max(-1) > 0.1).mean() > UNLIKE:
                wrong.append(f"figures/{name} does not show the records")
    return wrong


def _loss(records: ShippedRecords, axes: Any) -> None:
    training = records["training.json"]
    log, evaluations = training["log"], training.get("evaluations", [])
    most = log[-1]["tokens_seen"]
    units = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
    scale, unit = next((entry for entry in units if most >= 2 * entry[0]), (1, ""))
    axes.plot([e["tokens_seen"] / scale for e in log], [e["loss"] for e in log], color=BLUE, lw=1.2, label="training")
    if evaluations:
        seen, losses = [e["tokens_seen"] / scale for e in evaluations], [e["loss"] for e in evaluations]
        axes.plot(seen, losses, "o-", color=ORANGE, ms=4, lw=1.2, label="held-out documents")
        place = axes.annotate(f"{losses[-1]:.3f}", (seen[-1], losses[-1]), (7, 0), textcoords="offset points")
        place.set(va="center", color=ORANGE)
    axes.set_xlabel("tokens seen" + (f" ({unit})" if unit else ""))
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_xlim(0, 1.09 * most / scale)  # Room for the last loss.
    # The first steps fall from ln(vocabulary); they would press the rest of the curve flat.
    later = [e["loss"] for e in log[len(log) // 10 :]] + [e["loss"] for e in evaluations[1:]]
    low, high = min(later), max(later)
    axes.set_ylim(low - 0.08 * (high - low) - 0.02, high + 0.25 * (high - low) + 0.02)
    axes.legend()


def _quality(records: ShippedRecords, axes: Any) -> None:
    quality = records["quality.json"]
    counts, edges = quality["histogram"]["documents"], quality["histogram"]["edges"]
    cut = quality["cutoff"] if quality["threshold"] is None else quality["threshold"]
    width = edges[1] - edges[0]
    kept = [cut is None or (edge + width / 2 > cut) == (quality["select"] != "worst") for edge in edges[:-1]]
    colours = [BLUE if keep else GREY for keep in kept]
    axes.bar(edges[:-1], counts, width=width, align="edge", color=colours, edgecolor="white", linewidth=0.4)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("quality score")
    # Most scores lie at the ends; on a linear scale the middle, where the threshold is, would vanish.
    axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    axes.set_yticks(_square_root_ticks(max(counts)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(0, 1.08 * max(counts))
    axes.set_ylabel("documents (square-root scale)")
    if cut is not None:
        axes.axvline(cut, color=ORANGE, lw=1.5)
    kept_documents, total = quality["kept_documents"], quality["documents"]
    axes.set_title(f"kept: {quality['rule']}, {kept_documents:,} of {total:,} documents", loc="left")


def _square_root_ticks(highest: int) -> list[int]:
    """0 and round counts up to `highest`, at least a tenth of a square-root axis apart."""
    ticks = [0]
    for tick in (factor * 10**power for power in range(len(str(highest))) for factor in (1, 2, 5)):
        if tick <= highest and (tick / highest) ** 0.5 >= (ticks[-1] / highest) ** 0.5 + 0.1:
            ticks.append(tick)
    return ticks


def _bars(records: ShippedRecords) -> list[Score]:
    return [score for score in leading_scores(records) if score.percent]


def _evaluation(records: ShippedRecords, axes: Any) -> None:
    scores = _bars(records)[::-1]
    for position, score in enumerate(scores):
        error = 1.96 * score.stderr if score.stderr else 0
        axes.barh(position, score.value, color=BLUE, height=0.55)
        axes.errorbar(score.value, position, xerr=error, color=DARK, capsize=3, lw=1.2)
        if score.chance is not None:
            axes.plot([score.chance] * 2, [position - 0.4, position + 0.4], color=ORANGE, lw=2)
        end = max(score.value + error, score.chance or 0)
        axes.text(end + 0.015, position, percent(score.value), va="center")
    axes.set_yticks(range(len(scores)), [score.title for score in scores])
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, len(scores) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("percent, with 95 % confidence intervals")
    if chances := [line for line in axes.lines if line.get_color() == ORANGE]:
        # Above the plot: inside it would hide a bar.
        axes.legend(chances[:1], ["chance"], loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
