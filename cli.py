"""The `nanophi` command: one verb, one plain function.

Imports of the stages stand inside the verbs, so that `nanophi --help` and a mistyped recipe answer at once.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import logging

from nanophi.files import UserError

app = typer.Typer(
    help="Pretrain small language models from scratch, measure them honestly, publish them on the Hub.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Recipes = Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="YAML files, or names of built-in recipes.")]
OneRecipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file, or name of a built-in recipe.")]
Runs = Annotated[Path, typer.Option("--runs", help="Folder that holds the run directories.")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the recipe.")]


def _pipeline(recipe: Path, runs: Path, overrides: list[str], build: tuple[str, ...]) -> Any:
    from nanophi.pipeline import Pipeline
    from nanophi.recipe import load_recipe

    return Pipeline(load_recipe(recipe, overrides), runs, build)


@app.command()
def run(recipes: Recipes, runs: Runs = Path("runs"), overrides: Overrides = []) -> None:  # noqa: B006
    """Every stage through the release; several recipes end in one comparison, the last being the baseline.

    Example: nanophi run recipes/demo.yaml recipes/demo-control.yaml
    """
    from nanophi.pipeline import run_recipes
    from nanophi.recipe import load_recipe

    run_recipes([load_recipe(recipe, overrides) for recipe in recipes], runs)


@app.command()
def prepare(recipe: OneRecipe, runs: Runs = Path("runs"), overrides: Overrides = []) -> None:  # noqa: B006
    """Sources to packed tokens: gather, deduplicate, score, filter, tokenize, pack.

    Example: nanophi prepare recipes/demo.yaml --set quality.threshold=0.6
    """
    from nanophi.pipeline import PREPARE

    pipeline = _pipeline(recipe, runs, overrides, PREPARE)
    with pipeline.run.lock():
        pipeline.write_recipe()
        pipeline.tokens()


@app.command()
def train(recipe: OneRecipe, runs: Runs = Path("runs"), overrides: Overrides = []) -> None:  # noqa: B006
    """Train the recipe's model on prepared tokens, or go on from its last checkpoint.

    Example: accelerate launch -m nanophi train recipes/nano-phi-115m.yaml
    """
    from nanophi.pipeline import is_main_process

    pipeline = _pipeline(recipe, runs, overrides, ("training",))
    if not is_main_process():
        pipeline.training()
        return
    with pipeline.run.lock():
        pipeline.training()


@app.command()
def estimate(
    recipe: OneRecipe,
    device: Annotated[str, typer.Option(help="a100-40g, a100-80g, h100, h200, l40s, l4, rtx-4090, ...")] = "a100-40g",
    devices: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1,
    mfu: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Share of the device's peak; else what such runs reach.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars per hour of one; else the table's.")] = None,
    grid: Annotated[float | None, typer.Option(min=0, help="Grams of CO2e per kWh; else the world's average.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time a few steps here instead; DEVICE says what this machine is.")
    ] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Time, money, energy and memory of a recipe's training, beside the published run's.

    Example: nanophi estimate nano-phi-115m --device h100
    """
    from nanophi.recipe import load_recipe
    from nanophi.training import estimate as estimates

    resolved, chosen = load_recipe(recipe, overrides), estimates.find_device(device)
    result = estimates.estimate(
        resolved,
        chosen,
        devices=devices,
        mfu=estimates.ASSUMED_MFU if mfu is None else mfu,
        tokens_per_second=estimates.measure(resolved) if measure else None,
        dollars_per_hour=price,
        grams_per_kwh=estimates.GRID_GRAMS_PER_KWH if grid is None else grid,
    )
    name = f"{devices} x {device}" if devices > 1 else device
    typer.echo(estimates.render(resolved, name, result, estimates.published_run(resolved)))


@app.command()
def card(recipe: OneRecipe, runs: Runs = Path("runs"), overrides: Overrides = []) -> None:  # noqa: B006
    """Write the model card of a finished run, from its records.

    Example: nanophi card recipes/demo.yaml
    """
    pipeline = _pipeline(recipe, runs, overrides, ("sample", "evaluation", "card"))
    with pipeline.run.lock():
        pipeline.card()
    typer.echo(pipeline.path / "card" / "README.md")


@app.command()
def release(
    recipe: OneRecipe,
    runs: Runs = Path("runs"),
    overrides: Overrides = [],  # noqa: B006
    gguf: Annotated[str | None, typer.Option(metavar="KINDS", help="Also llama.cpp files: f16,q8_0,bf16,f32.")] = None,
) -> None:
    """Build and verify the release folder of a finished run.

    Example: nanophi release recipes/demo.yaml --gguf f16,q8_0
    """
    pipeline = _pipeline(recipe, runs, overrides, ("sample", "evaluation", "card", "release", "verification"))
    with pipeline.run.lock():
        pipeline.verification()
        typer.echo(pipeline.path / "release")
        if gguf:
            from nanophi.model_card import gguf as llama

            for file in llama.export(pipeline.path / "release", gguf.split(","), pipeline.path / "gguf"):
                typer.echo(file["path"])


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Folders, run directories, or Hub ids with optional @revision."),
    ],
    suite: Annotated[
        str, typer.Option(help="heldout, quick, open-llm-v1, or lm-eval task names with commas.")
    ] = "quick",
    data: Annotated[
        Path | None, typer.Option(help="Folder with the benchmarks under their Hub ids; else the Hub.")
    ] = None,
    heldout: Annotated[Path | None, typer.Option(help="A run's data/documents, for the suite heldout.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the result files.")] = Path("evals"),
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many items per task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 16,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """Measure models on a suite with lm-eval; killed and called again, it goes on.

    Example: nanophi eval runs/demo/release microsoft/phi-2 --suite arc_easy --limit 200
    """
    from nanophi.eval import evaluate as evaluation

    _, curve = evaluation.evaluate_checkpoints(
        models,
        suite,
        output,
        data=data,
        heldout=heldout,
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if curve:
        typer.echo(curve)


@app.command()
def compare(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT...", help="Run directories, or result files.")],
    output: Annotated[Path, typer.Option(help="Folder for comparison.json, .md and .png.")] = Path("comparison"),
) -> None:
    """Compare models item by item, with noise bars; the last one named is the baseline.

    Example: nanophi compare runs/demo runs/demo-control
    """
    from nanophi.eval import compare as comparison

    files = {}
    for path in results:
        label = path.resolve().name if path.is_dir() else path.stem
        files[label] = _final_results(path) if path.is_dir() else [path]
    typer.echo(comparison.render(comparison.compare(files, output)))


def _final_results(run: Path) -> list[Path]:
    """Result files of a run's last checkpoint."""
    names = [path.name for path in sorted((run / "checkpoints").glob("step-*"))]
    found = sorted((run / "evals").glob(f"{names[-1]}-*.json")) if names else []
    if not found:
        raise UserError(f"{run} holds no evaluation of its last checkpoint; run `nanophi run` on its recipe")
    return found


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    prompt: Annotated[str, typer.Argument(help="Where the text begins.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Let a model write.

    Example: nanophi generate runs/demo/release "The function returns"
    """
    from transformers import pipeline, set_seed

    if not Path(model).is_dir() and model.count("/") != 1:
        raise UserError(f"{model} cannot be loaded: it is neither a folder nor a Hub id like ORG/NAME")
    try:
        generator = pipeline("text-generation", model=model)
    except (OSError, ValueError) as error:
        raise UserError(f"{model} cannot be loaded: {str(error).splitlines()[0]}") from None
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    typer.echo(generator(prompt, max_new_tokens=max_new_tokens, **sampling)[0]["generated_text"])


@app.command()
def verify(
    release: Annotated[str, typer.Argument(help="Release folder or Hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run the release's code even if it is not this version's.")
    ] = False,
    public_key: Annotated[Path | None, typer.Option(help="Check the signature against this key (PEM).")] = None,
) -> None:
    """Check a release: checksums, both doors, the card's numbers. Exit status 1 if anything fails.

    Example: nanophi verify runs/demo/release
    """
    from nanophi.model_card import verify as verification

    checks = verification.verify(release, revision, trust_remote_code=trust_remote_code, public_key=public_key)
    failed = [check["name"] for check in checks if not check["passed"]]
    if failed:
        raise UserError(f"{release} does not verify: {', '.join(failed)}")


@app.command()
def push(
    release: Annotated[Path, typer.Argument(help="Release folder.")],
    repo_id: Annotated[str, typer.Option(help="ORG/NAME on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public when all is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go, send nothing.")] = False,
    signing_key: Annotated[Path | None, typer.Option(help="Sign every revision with this private key (PEM).")] = None,
    gguf: Annotated[
        str | None, typer.Option(metavar="KINDS", help="Also llama.cpp files, in ORG/NAME-GGUF: f16,q8_0,bf16,f32.")
    ] = None,
) -> None:
    """Publish a release: main, a branch per kept checkpoint, a tag. Private unless told otherwise; resumable.

    Example: nanophi push runs/demo/release --repo-id ORG/nano-phi-demo --dry-run
    """
    from nanophi.model_card import push as pushing

    kinds = gguf.split(",") if gguf else ()
    result = pushing.push(release, repo_id, public=public, dry_run=dry_run, signing_key=signing_key, gguf=kinds)
    if result["url"]:
        typer.echo(result["url"])


@app.command()
def reproduce(
    release: Annotated[str, typer.Argument(help="Release folder or Hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder for the new run.")] = Path("reproductions"),
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Run a release's recipe again and set the outcome beside what was published.

    Example: nanophi reproduce ORG/nano-phi-demo
    """
    from nanophi.model_card import reproduce as reproduction
    from nanophi.pipeline import run_recipes
    from nanophi.recipe import load_recipe

    recipe = load_recipe(reproduction.prepare(release, runs, revision), overrides)
    run_recipes([recipe], runs)
    rows = reproduction.compare(runs / "published", runs / recipe.name)
    differing = [row["name"] for row in rows if row["agrees"] is False]
    if differing:
        raise UserError(f"{release} was not reproduced: {', '.join(differing)}")


@app.command()
def submit(
    model: Annotated[str, typer.Argument(help="Release folder or Hub id.")],
    repo_id: Annotated[str | None, typer.Option(help="ORG/NAME that the folder is, or will be, pushed to.")] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the Hub.")] = "main",
    precision: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "bfloat16",
    sender: Annotated[str, typer.Option(help="Your user name on the Hub.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for the request files.")] = Path("requests"),
) -> None:
    """The Open LLM Leaderboard's checks, and the request file in both its formats if all pass.

    Example: nanophi submit runs/demo/release --repo-id ORG/nano-phi-demo
    """
    from nanophi.eval import submission

    submission.submit(model, output, repo_id=repo_id, revision=revision, precision=precision, sender=sender)


quality_app = typer.Typer(help="The quality filter on text files of your own.", no_args_is_help=True)
app.add_typer(quality_app, name="quality")


@quality_app.command("fit")
def quality_fit(
    output: Annotated[Path, typer.Argument(help="Folder for the scorer.")],
    high: Annotated[list[str], typer.Option(help="Glob of files of good text; may be given again.")],
    low: Annotated[list[str], typer.Option(help="Glob of files of poor text; may be given again.")],
    text_column: Annotated[str, typer.Option()] = "text",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Fit a linear scorer; use it in a recipe as `quality.scorer: model:FOLDER`.

    Example: nanophi quality fit scorer --high "books/*.txt" --low "chat/*.jsonl.gz"
    """
    from nanophi.data import quality

    report = quality.fit_files(high, low, output, text_column, seed)
    typer.echo(
        f"{output}: area under the ROC curve {report['roc_auc']} on {report['test_documents']} documents left out"
    )


@quality_app.command("score")
def quality_score(
    files: Annotated[str, typer.Argument(help="Glob of .parquet, .jsonl(.gz, .zst) or .txt files.")],
    scorer: Annotated[str, typer.Option(help="column:NAME, or model:FOLDER or Hub id.")],
    output: Annotated[Path, typer.Option(help="Parquet file with a score for every document.")] = Path(
        "scores.parquet"
    ),
    text_column: Annotated[str, typer.Option()] = "text",
) -> None:
    """Score every document.

    Example: nanophi quality score "web/*.parquet" --scorer model:scorer
    """
    from nanophi.data import quality

    summary = quality.score_files(files, scorer, output, text_column)
    typer.echo(f"{output}: {summary['documents']} documents")


@quality_app.command("report")
def quality_report(
    scores: Annotated[Path, typer.Argument(help="What `nanophi quality score` wrote, or a run directory.")],
    threshold: Annotated[float, typer.Option(help="Documents above it are kept.")] = 0.5,
    output: Annotated[Path, typer.Option(help="Folder for quality.json, .md and .png.")] = Path("quality"),
) -> None:
    """What a threshold keeps and drops, with examples; of a run directory, its own report.

    Example: nanophi quality report scores.parquet --threshold 0.3
    """
    from nanophi.data import quality_report as reports

    if scores.is_dir():
        typer.echo(reports.report_run(scores))
    else:
        reports.report_files(scores, threshold, output)
        typer.echo(output / "quality.md")


def main() -> None:
    """Entry point: a `UserError` becomes one line and exit status 1; `--debug` shows where it came from."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:
        arguments = [argument for argument in arguments if argument != "--debug"]
    # The libraries' bars and advice would drown the stages' own lines.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not debug:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    try:
        app(args=arguments, prog_name="nanophi")
    except UserError as error:
        if debug:
            raise
        sys.exit(f"nanophi: {error}")
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"nanophi: no disk space left ({error.filename or 'unknown file'}); free some and run it again")
    except KeyboardInterrupt:
        sys.exit("nanophi: interrupted; the same command goes on from here")
