"""Measure several checkpoints on a suite, and draw their scores over the tokens seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanophi.core.files import sha256_of, write_json
from nanophi.core.names import resolve
from nanophi.eval.evaluate import evaluate
from nanophi.eval.models import checkpoints_of
from nanophi.eval.render import draw_curve
from nanophi.eval.results import ANSWER_METRIC, FORMAT, distinct, file_stem

CURVE_KEYS = ("metric", "value", "stderr", "chance", "higher_is_better", "items", ANSWER_METRIC)


def evaluate_checkpoints(
    models: Sequence[str | Path], suite: str, folder: Path, *, report: Callable[[str], None] = print, **options: Any
) -> tuple[list[dict[str, Any]], Path | None]:
    """Measure several models, and draw the scores of our checkpoints over the tokens seen.

    Args:
        models: folders and Hub ids, as for `evaluate`; a run directory stands for all its checkpoints.
        suite: as for `evaluate`.
        folder: where the result files go, and `curve-<suite>-<hash>.json` and `.png` if two models or more are
            checkpoints of ours. Each run is a line of its own in it.
        report: called with one line of progress at a time.
        options: the other arguments of `evaluate`.

    Returns:
        the result files' contents, in the order of the models, and the curve's JSON file, if there is one.
    """
    for model in models:
        resolve(model)  # before anything slow: a name that is wrong
    expanded = [checkpoint for model in models for checkpoint in checkpoints_of(model)]
    results = [evaluate(model, suite, Path(folder), report=report, **options) for model in expanded]
    report(f"results are in {folder}")
    points = []
    for model, result in zip(expanded, results, strict=True):
        ours = result["nanophi"]
        if "tokens_seen" in ours["model"]:
            points.append(
                {
                    "run": _run_of(model),
                    **{key: ours["model"].get(key) for key in ("name", "sha256", "step", "tokens_seen")},
                    "scores": {line["task"]: {key: line[key] for key in CURVE_KEYS} for line in ours["headline"]},
                }
            )
    if len(points) < 2:
        return results, None
    points.sort(key=lambda point: (point["run"], point["tokens_seen"]))
    for point, run in zip(points, distinct([point["run"] for point in points]), strict=True):
        point["run"] = run
    name = results[0]["nanophi"]["suite"]
    keys = sorted(result["nanophi"]["key"] for result in results)
    path = Path(folder) / f"curve-{file_stem(name)}-{sha256_of(keys)[:8]}.json"
    write_json(path, {"format": FORMAT, "suite": name, "points": points})
    draw_curve(points, path.with_suffix(".png"))
    return results, path


def _run_of(model: str | Path) -> str:
    """The run directory that a checkpoint belongs to, or the repository, or the folder that holds it."""
    if resolve(model).folder is None:
        return str(model).partition("@")[0]
    folder = Path(model).resolve()
    return str(folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent)
