"""The verb `eval`: measure models on a suite, and draw the scores of checkpoints over the tokens seen.

How one model is measured is in measure.py, which imports torch and lm-eval and so is only imported when it is used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from nanophi.core.files import check_own_file, check_writable, sha256_of, write_json
from nanophi.core.names import resolve
from nanophi.core.options import Trust
from nanophi.eval.models import checkpoints_of, model_name
from nanophi.eval.results import ANSWER_METRIC, answer_scores, distinct, file_stem, is_result_of, leading_scores

CURVE_FORMAT = 2


def evaluate(
    models: Annotated[
        list[str], Argument(metavar="MODEL...", help="Folders, run directories, or Hub ids with optional @revision.")
    ],
    suite: Annotated[
        str, Option(help="heldout, quick, signal, open-llm-v1, or lm-eval tasks: arc_easy,winogrande:5.")
    ] = "quick",
    data: Annotated[Path | None, Option(help="Benchmarks under their Hub ids (default: the Hub).")] = None,
    heldout: Annotated[Path | None, Option(help="A run's data/documents, for the suite heldout.")] = None,
    output: Annotated[Path, Option(help="Where the result files go.")] = Path("evals"),
    limit: Annotated[int | None, Option(min=1, help="Items per task at most.")] = None,
    num_fewshot: Annotated[
        int | None, Option(min=0, help="Examples in the prompt of the named tasks (default: as lm-eval defines them).")
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Sequences per forward pass.")] = 16,
    dtype: Annotated[str, Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Evaluate models with lm-eval. If interrupted, run the same command to resume.

    Example: nanophi eval runs/demo/release microsoft/phi-2 --suite arc_easy --limit 200
    """
    named = [resolve(model) for model in models]  # a mistyped name, before anything slow is imported
    if output.suffix == ".json":
        check_own_file(output, lambda: is_result_of(output, [model_name(one) for one in named]), f"eval {models[0]}")
    check_writable(output, output.parent if output.suffix == ".json" else output)
    from nanophi.eval.measure import Options, measure

    options = Options(data, heldout, limit, num_fewshot, batch_size, dtype, trust_remote_code)
    expanded = [checkpoint for model in models for checkpoint in checkpoints_of(model)]
    results = [measure(model, suite, output, options, shared=len(expanded) > 1) for model in expanded]
    folder = output.parent if output.suffix == ".json" else output
    typer.echo(f"results are in {output if len(expanded) == 1 else folder}")
    if curve := write_curve(expanded, results, folder):
        typer.echo(curve)


def write_curve(models: Sequence[str | Path], results: Sequence[dict[str, Any]], folder: Path) -> Path | None:
    """Write `curve-<suite>-<hash>.json` and `.png`: scores over the tokens seen, each run a line of its own.

    None if fewer than two of the models are checkpoints of a run. `results` has the result file's contents of each.
    """
    points = [
        {
            "run": _run_of(model),
            **{key: result["nanophi"]["model"].get(key) for key in ("name", "sha256", "step", "tokens_seen")},
            "scores": _scores(result),
        }
        for model, result in zip(models, results, strict=True)
        if "tokens_seen" in result["nanophi"]["model"]
    ]
    if len(points) < 2:
        return None
    from nanophi.eval.render import draw_curve

    points.sort(key=lambda point: (point["run"], point["tokens_seen"]))
    for point, run in zip(points, distinct([point["run"] for point in points]), strict=True):
        point["run"] = run
    name = results[0]["nanophi"]["suite"]
    keys = sorted(result["nanophi"]["key"] for result in results)
    path = folder / f"curve-{file_stem(name)}-{sha256_of(keys)[:8]}.json"
    write_json(path, {"format": CURVE_FORMAT, "suite": name, "points": points})
    draw_curve(points, path.with_suffix(".png"))
    return path


def _scores(result: dict[str, Any]) -> dict[str, Any]:
    answers = {score.task: {"value": score.value, "stderr": score.stderr} for score in answer_scores(result)}
    keys = ("metric", "value", "stderr", "chance", "higher_is_better", "items")
    return {
        score.task: {key: getattr(score, key) for key in keys} | {ANSWER_METRIC: answers.get(score.task)}
        for score in leading_scores(result)
    }


def _run_of(model: str | Path) -> str:
    """The run directory that a checkpoint belongs to, or the repository, or the folder that holds it."""
    named = resolve(model)
    if named.folder is None:
        return str(named.repo_id)
    folder = named.folder.resolve()
    return str(folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent)
