"""The `nanophi` command: one verb, one plain function.

Verbs import what they use of data, training, eval and model_card themselves: torch and transformers take seconds to
import, and `nanophi --help` or a mistyped recipe must be answered at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from nanophi.cli_push import Gguf, push
from nanophi.cli_quality import quality_app
from nanophi.core.errors import UserError
from nanophi.core.jobs import stop_with_parent
from nanophi.core.names import resolve
from nanophi.core.recipe import load_recipe
from nanophi.core.version import __version__
from nanophi.eval.compare import compare
from nanophi.eval.evaluate import evaluate
from nanophi.pipeline import PREPARE, Pipeline, is_main_process, run_recipes

app = typer.Typer(
    help="Pretrain small language models from scratch, measure them honestly, publish them on the Hugging Face Hub.",
    epilog="RECIPE is a YAML file or the name of a built-in recipe. With --debug, errors show their traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Arguments and options that several verbs share
Recipes = Annotated[list[Path], Argument(metavar="RECIPE...", help="YAML files, or names of built-in recipes.")]
OneRecipe = Annotated[Path, Argument(metavar="RECIPE", help="YAML file, or name of a built-in recipe.")]
Runs = Annotated[Path, Option("--runs", help="Folder that holds the run directories.")]
Overrides = Annotated[
    list[str], Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the recipe; repeatable.")
]
ReleaseOrId = Annotated[str, Argument(metavar="RELEASE", help="Release folder, or id on the Hub.")]
Revision = Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")]
Trust = Annotated[bool, Option("--trust-remote-code", help="Run the Python code that comes with the model.")]
Restart = Annotated[
    bool, Option("--restart", help="Remove the weights of a run that the recipe cannot continue from, and start over.")
]
Jobs = Annotated[int, Option(min=1, help="Trainings at once, each with one GPU or its share of the cores.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nanophi {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself; `--debug` is taken out in `cli.py`, wherever it is given."""


@contextmanager
def _open(
    recipe: Path, runs: Path, overrides: list[str], build: tuple[str, ...], restart: bool = False
) -> Iterator[Pipeline]:
    """The recipe's pipeline, its run directory locked; stages outside `build` must be up to date already."""
    pipeline = Pipeline(load_recipe(recipe, overrides), runs, build, restart=restart)
    if "tokens" not in build and not pipeline.path.is_dir():
        raise UserError(f"{pipeline.path} does not exist; run `nanophi prepare` or `nanophi run` first, or name --runs")
    with pipeline.run.lock():
        yield pipeline


@app.command()
def run(
    recipes: Recipes,
    jobs: Jobs = 1,
    restart: Restart = False,
    runs: Runs = Path("runs"),
    overrides: Overrides = [],
) -> None:
    """Run every stage of a recipe, from text to release.

    Several recipes are compared at the end; the last one is the baseline.

    Example: nanophi run demo demo-control --jobs 2
    """
    run_recipes([load_recipe(recipe, overrides) for recipe in recipes], runs, jobs=jobs, restart=restart)


@app.command()
def ablate(
    recipe: OneRecipe,
    seed: Annotated[list[int], Option(min=0, help="Seed of the runs; repeatable.")] = [0, 1, 2],
    learning_rate: Annotated[
        list[float], Option(help="Peak learning rate; repeatable. Default: the recipe's and a fifth of it.")
    ] = [],
    epochs: Annotated[
        float | None, Option(help="How often a share of the text is repeated. Default: as in the recipe's own run.")
    ] = None,
    tasks: Annotated[
        str, Option(help="Multiple-choice tasks whose right answers decide, or 'none': held-out text decides.")
    ] = "arc_easy,hellaswag",
    output: Annotated[
        Path | None, Option(help="Where plan, records and answer go. [default: ablations/NAME]", show_default=False)
    ] = None,
    plan: Annotated[bool, Option("--plan", help="Write the plan and stop, before anything is trained.")] = False,
    jobs: Jobs = 1,
    runs: Runs = Path("runs"),
    overrides: Overrides = [],
) -> None:
    """Measure whether the recipe's filter helps, with controls, seeds and error bars.

    The best share of the text is compared with a random share, the worst share and all of it, at equal compute.

    Example: nanophi ablate nano-phi-115m-fast --epochs 4 --seed 0 --seed 1 --seed 2
    """
    from nanophi.experiments import ablate as ablation
    from nanophi.experiments.ablation_render import paragraph

    resolved = load_recipe(recipe, overrides)
    output = Path("ablations") / resolved.name if output is None else output
    result = ablation.ablate(
        resolved,
        runs,
        output,
        seeds=seed,
        learning_rates=learning_rate,
        epochs=epochs,
        tasks=[] if tasks == "none" else [task.strip() for task in tasks.split(",")],
        jobs=jobs,
        plan_only=plan,
    )
    typer.echo(f"\n{paragraph(result)}\n\n{output / 'ablation.md'}" if result else output / "plan.json")


@app.command(hidden=True)
def worker(recipe: OneRecipe, restart: Restart = False, runs: Runs = Path("runs")) -> None:
    """Train and evaluate one prepared run, for `--jobs`; stop when standard input ends.

    Example: nanophi worker runs/demo/recipe.yaml
    """
    stop_with_parent()
    with _open(recipe, runs, [], ("training", "sample", "evaluation"), restart) as pipeline:
        pipeline.sample()
        pipeline.evaluation()


@app.command()
def prepare(recipe: OneRecipe, restart: Restart = False, runs: Runs = Path("runs"), overrides: Overrides = []) -> None:
    """Prepare packed tokens: gather, deduplicate, score, filter, tokenize, pack.

    Example: nanophi prepare demo --set name=demo-06 --set quality.threshold=0.6
    """
    with _open(recipe, runs, overrides, PREPARE, restart) as pipeline:
        pipeline.tokens()
        pipeline.write_recipe()  # once nothing can refuse it any more


@app.command()
def train(recipe: OneRecipe, restart: Restart = False, runs: Runs = Path("runs"), overrides: Overrides = []) -> None:
    """Train on prepared tokens, or resume from the last checkpoint.

    Example: nanophi train demo

    On several GPUs: accelerate launch -m nanophi train nano-phi-115m
    """
    if is_main_process():
        with _open(recipe, runs, overrides, ("training",), restart) as pipeline:
            pipeline.check()
            pipeline.training()
    else:
        Pipeline(load_recipe(recipe, overrides), runs, ("training",), restart=restart).training()


@app.command()
def estimate(
    recipe: OneRecipe,
    device: Annotated[str, Option(help="a100-40g, a100-80g, h100, h200, l40s, l4, rtx-4090, ...")] = "a100-40g",
    devices: Annotated[int, Option(min=1, help="Number of devices.")] = 1,
    mfu: Annotated[
        float | None,
        Option(min=0.01, max=1, help="Share of the device's peak that is reached (default: what is typical)."),
    ] = None,
    price: Annotated[float | None, Option(min=0, help="Dollars per device-hour (default: built-in table).")] = None,
    grid: Annotated[float | None, Option(min=0, help="Grams of CO2e per kWh (default: world average).")] = None,
    measure: Annotated[bool, Option("--measure", help="Time a few steps here; --device names this machine.")] = False,
    overrides: Overrides = [],
) -> None:
    """Estimate time, cost, energy and memory of a training run.

    The figures of the published run are shown beside them.

    Example: nanophi estimate nano-phi-115m --device h100
    """
    resolved = load_recipe(recipe, overrides)
    from nanophi.training import budget
    from nanophi.training import estimate as estimates

    chosen = budget.find_device(device)
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
    typer.echo(estimates.render(resolved, name, result, estimates.published_run()))


app.command("eval")(evaluate)
app.command()(compare)


@app.command()
def card(recipe: OneRecipe, runs: Runs = Path("runs"), overrides: Overrides = []) -> None:
    """Write the model card of a finished run from its records.

    Example: nanophi card demo
    """
    with _open(recipe, runs, overrides, ("sample", "evaluation", "card")) as pipeline:
        pipeline.card()
    typer.echo(pipeline.path / "card" / "README.md")


@app.command()
def release(recipe: OneRecipe, runs: Runs = Path("runs"), overrides: Overrides = [], gguf: Gguf = None) -> None:
    """Build and verify the release folder of a finished run.

    Example: nanophi release demo --gguf f16,q8_0
    """
    from nanophi.model_card import gguf as llama

    kinds = llama.parse_kinds(gguf)
    with _open(recipe, runs, overrides, ("sample", "evaluation", "card", "release", "verification")) as pipeline:
        pipeline.verification()
        typer.echo(pipeline.path / "release")
        if kinds:
            for file in llama.export(pipeline.path / "release", kinds, pipeline.path / "gguf"):
                typer.echo(file["path"])


@app.command()
def generate(
    model: Annotated[str, Argument(help="Folder, or id on the Hub.")],
    prompt: Annotated[str, Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, Option(min=1, help="Length of the continuation.")] = 100,
    temperature: Annotated[float, Option(min=0, help="0 always takes the most likely token.")] = 0.8,
    seed: Annotated[int, Option(min=0, help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, Option("--chat", help="Ask a chat model: the prompt is the user's message.")] = False,
) -> None:
    """Generate text from a prompt.

    Example: nanophi generate runs/demo/release "The function returns"

    With a chat model: nanophi generate --chat runs/demo-chat/release "What does os.path.join do?"
    """
    from nanophi.core.generate import generate as write

    typer.echo(write(model, prompt, max_new_tokens, temperature, seed, chat, lambda line: typer.echo(line, err=True)))


@app.command()
def verify(
    release: ReleaseOrId,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    public_key: Annotated[Path | None, Option(help="Check the signature with this public key (PEM).")] = None,
) -> None:
    """Check a release: checksums, loading, the card's numbers.

    The exit status is 1 if a check fails.

    Example: nanophi verify runs/demo/release
    """
    from nanophi.model_card import verify as verification

    checks = verification.verify(release, revision, trust_remote_code=trust_remote_code, public_key=public_key)
    failed = [check["name"] for check in checks if not check["passed"]]
    if failed:
        raise UserError(f"{release} does not verify: {', '.join(failed)}")


app.command()(push)


@app.command()
def reproduce(
    release: ReleaseOrId,
    revision: Revision = None,
    runs: Annotated[Path, Option("--runs", help="Folder for the new run.")] = Path("reproductions"),
    overrides: Overrides = [],
) -> None:
    """Run a release's recipe again and compare the results.

    Example: nanophi reproduce runs/demo/release
    """
    from nanophi.model_card import reproduce as reproduction

    recipe = load_recipe(reproduction.prepare(release, runs, revision), overrides)
    run_recipes([recipe], runs)
    rows = reproduction.compare(runs / "published", runs / recipe.name)
    differing = [row["name"] for row in rows if row["agrees"] is False]
    if differing:
        raise UserError(f"{release} was not reproduced: {', '.join(differing)}")


@app.command()
def submit(
    model: ReleaseOrId,
    repo_id: Annotated[str | None, Option(metavar="ORG/NAME", help="Repository of a release folder.")] = None,
    revision: Revision = None,
    model_type: Annotated[
        str | None, Option(help="pretrained, fine-tuned, chat, ... [default: as the release's records say]")
    ] = None,
    base_model: Annotated[
        str | None, Option(metavar="ORG/NAME", help="What it was tuned from. [default: as the records say]")
    ] = None,
    precision: Annotated[str, Option(help="float16, bfloat16 or float32.")] = "bfloat16",
    sender: Annotated[str, Option(help="Your user name on the Hub.")] = "",
    output: Annotated[Path, Option(help="Where the request files go.")] = Path("requests"),
) -> None:
    """Check a model for the Open LLM Leaderboard.

    If all checks pass, the request file is written in both of its formats.

    Example: nanophi submit runs/demo/release --repo-id ORG/nano-phi-demo
    """
    from nanophi.eval import submission

    submission.submit(
        model,
        output,
        repo_id=repo_id,
        revision=revision,
        model_type=model_type,
        base_model=base_model,
        precision=precision,
        sender=sender,
    )


app.add_typer(quality_app, name="quality")
