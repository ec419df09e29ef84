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

from nanophi.records import UserError

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
    from nanophi.training.recipe import load_recipe

    return Pipeline(load_recipe(recipe, overrides), runs, build)


@app.command()
def run(recipes: Recipes, runs: Runs = Path("runs"), overrides: Overrides = []) -> None:  # noqa: B006
    """Every stage through the release; several recipes end in one comparison, the last being the baseline.

    Example: nanophi run recipes/demo.yaml recipes/demo-control.yaml
    """
    from nanophi.pipeline import run_recipes
    from nanophi.training.recipe import load_recipe

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


def main() -> None:
    """Entry point: a `UserError` becomes one line and exit status 1; `--debug` shows where it came from."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:
        arguments = [argument for argument in arguments if argument != "--debug"]
    # The bars and warnings of the libraries below would drown the stages' own lines.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
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
