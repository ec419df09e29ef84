"""Arguments and options that several verbs share, each with its help once.

A verb is a function where its work is done, and its own options are declared there, on its parameters.
"""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Recipes = Annotated[list[Path], Argument(metavar="RECIPE...", help="YAML files, or names of built-in recipes.")]
OneRecipe = Annotated[Path, Argument(metavar="RECIPE", help="YAML file, or name of a built-in recipe.")]
Runs = Annotated[Path, Option("--runs", help="Folder that holds the run directories.")]
Overrides = Annotated[
    list[str], Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the recipe; repeatable.")
]
Mirror = Annotated[
    str | None,
    Option(metavar="URL", envvar="NANOPHI_MIRROR", help="Keep a copy at a folder, s3://, hf://; resume from it."),
]
Restart = Annotated[
    bool, Option("--restart", help="Remove the weights of a run that the recipe cannot continue from, and start over.")
]
Jobs = Annotated[int, Option(min=1, help="Trainings at once, each with one GPU or its share of the cores.")]
ReleaseOrId = Annotated[str, Argument(metavar="RELEASE", help="Release folder, or id on the Hub.")]
Revision = Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")]
Trust = Annotated[bool, Option("--trust-remote-code", help="Run the Python code that comes with the model.")]
Json = Annotated[bool, Option("--json", help="Print the result as JSON, and what is told on the way to stderr.")]
TextColumn = Annotated[str, Option(help="Column or JSON key that holds the text.")]
Gguf = Annotated[str | None, Option(metavar="KINDS", help="llama.cpp files too, any of f16,q8_0,bf16,f32.")]
