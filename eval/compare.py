"""The verb `compare`: which models some paths lead to, what each is called, and the comparison of them on screen.

What is tested, and how, is in comparison.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from nanophi.core.errors import UserError
from nanophi.eval.models import model_key
from nanophi.eval.results import distinct, final_results, read_result


def compare(
    results: Annotated[
        list[Path], Argument(metavar="RESULT...", help="Run directories, result files, or folders of result files.")
    ],
    output: Annotated[Path, Option(help="Where comparison.json, .md and .png go.")] = Path("comparison"),
    baseline: Annotated[
        str | None, Option(help="The model that the others are compared with: a label, or one of RESULT.")
    ] = None,
) -> None:
    """Compare models item by item, with confidence intervals.

    The last one is the baseline, unless --baseline names another.

    Example: nanophi compare runs/demo runs/demo-control --baseline demo-control
    """
    files = label_results(results)
    from nanophi.eval.comparison import compare_models
    from nanophi.eval.render import to_text

    typer.echo(to_text(compare_models(files, output, baseline=find_label(files, baseline))))
    typer.echo(output / "comparison.md")


def label_results(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """A label for each model that some paths lead to -> its result files.

    Of a run directory the last checkpoint counts; result files, also all those in another folder, are grouped by the
    model that they name. Raises `UserError` if a path leads to no results, or is named twice.
    """
    runs: list[Path] = []
    files: list[Path] = []
    for path in paths:
        resolved = path.resolve()
        if resolved in (*runs, *files):
            raise UserError(f"{path} is named twice; name each run or result once")
        if (path / "checkpoints").is_dir() or (path / "record.json").is_file():
            runs.append(resolved)
        elif (path / "config.json").is_file():
            raise UserError(
                f"{path} is a model, not results of one: name its run directory, or run `nanophi eval {path}` and name "
                "the file that it writes"
            )
        elif path.is_dir():
            found = sorted(file.resolve() for file in path.glob("*.json") if not file.name.startswith("curve-"))
            if not found:
                raise UserError(f"{path} holds no results; name a run directory, or files that `nanophi eval` wrote")
            files += found
        elif len(paths) == 1 or not path.name.startswith("curve-"):  # `evals/*.json` names curves too
            files.append(resolved)
    models: dict[str, list[Path]] = {}
    identities: dict[str, dict[str, Any]] = {}
    for file in dict.fromkeys(files):
        identity = read_result(file)["nanophi"]["model"]
        models.setdefault(model_key(identity), []).append(file)
        identities[model_key(identity)] = identity
    labelled = dict(zip(distinct([str(run) for run in runs]), map(final_results, runs), strict=True))
    for mark, found in models.items():
        labelled[_label(identities[mark], [*identities.values()], labelled)] = found
    # The order in which they were named decides which is the baseline.
    order = [path.resolve() for path in paths]

    def place(label: str) -> int:
        file = labelled[label][0]
        return next(i for i, path in enumerate(order) if file == path or file.is_relative_to(path))

    return {label: labelled[label] for label in sorted(labelled, key=place)}


def find_label(labelled: Mapping[str, Sequence[Path]], name: str | None) -> str | None:
    """The label that `name` is, or whose results lie at the path `name`; any other `name` as it is."""
    if name is None or name in labelled:
        return name
    path = Path(name).resolve()
    return next((label for label, files in labelled.items() if files[0].is_relative_to(path)), name)


def _label(identity: Mapping[str, Any], others: Sequence[Mapping[str, Any]], taken: Mapping[str, Any]) -> str:
    """A model's name, with its dtype or the beginning of its hash where the name alone is not unique."""
    same = [other for other in others if other["name"] == identity["name"]]
    label = str(identity["name"])
    if len({other.get("dtype") for other in same}) > 1:
        label += f" {identity['dtype']}"
        same = [other for other in same if other.get("dtype") == identity["dtype"]]
    if len(same) > 1 or label in taken:
        label += f" ({str(identity.get('sha256') or identity.get('revision'))[:8]})"
    return label
