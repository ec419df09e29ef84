"""The `nanophi` command: which function each verb is, and how an error ends the process.

A verb is a function where its work is done. It is imported when it is called, so that `nanophi --help` or a mistyped
recipe is answered at once: torch and transformers take seconds to import.
"""

import ast
import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nanophi.core.errors import UserError, is_disk_full, one_line, printable, suggest
from nanophi.core.surroundings import settle
from nanophi.core.version import __version__

VERBS = {
    "run": "pipeline:run",
    "ablate": "experiments.ablate:ablate",
    "ladder": "experiments.ladder:ladder",
    "worker": "pipeline:worker",
    "recipe": "core.recipe:print_recipe",
    "prepare": "pipeline:prepare",
    "train": "pipeline:train",
    "estimate": "training.estimate:estimate",
    "launch": "training.launch:launch",
    "eval": "eval.evaluate:evaluate",
    "compare": "eval.compare:compare",
    "card": "pipeline:card",
    "release": "pipeline:release",
    "generate": "core.generate:generate",
    "trace": "data.trace:trace",
    "show": "model_card.space:show",
    "verify": "model_card.verify:verify",
    "push": "model_card.push:push",
    "reproduce": "experiments.reproduce:reproduce",
    "submit": "eval.submission:submit",
    "quality": {"fit": "data.quality:fit", "score": "data.quality:score", "report": "data.quality:report"},
}
"""Verb -> `module:function`, or the verbs of a group."""
HIDDEN = ("worker",)
GROUPS = {"quality": "Apply the quality filter to text files of your own."}
SETTINGS: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C stopped (128 + SIGINT); typer sets it."""


def help_of(verb: str) -> str:
    """The first sentence of a verb's docstring, without importing its module."""
    module, _, name = verb.partition(":")
    tree = ast.parse(Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return str(ast.get_docstring(function)).splitlines()[0].partition(". ")[0].rstrip(".") + "."


class Verbs(typer.core.TyperGroup):
    """The verbs of a table, each a command once it is asked for."""

    table: dict[str, Any] = VERBS

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in self.table if name not in HIDDEN]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.table and not args[0].startswith("-"):
            hint = suggest(args[0], self.list_commands(ctx))
            ctx.fail(f"No such command '{args[0]}'. {hint[0].upper()}{hint[1:]}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, name: str) -> Any:
        verb = self.table.get(name)
        if verb is None:
            return None
        if isinstance(verb, dict):
            below = type("Group", (Verbs,), {"table": verb})
            app = typer.Typer(cls=below, help=GROUPS[name], no_args_is_help=True, **SETTINGS)
            app.callback()(lambda: None)
        else:
            module, _, function = verb.partition(":")
            app = typer.Typer(**SETTINGS)
            app.command(name)(getattr(importlib.import_module(f"nanophi.{module}"), function))
        command: Any = typer.main.get_command(app)
        command.name = name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, GROUPS.get(name) or help_of(self.table[name])) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


app = typer.Typer(
    cls=Verbs,
    help="Pretrain small language models from scratch, measure them honestly, publish them on the Hugging Face Hub.",
    epilog="RECIPE is a YAML file or the name of a built-in recipe. With --debug, errors show their traceback.",
    no_args_is_help=True,
    **SETTINGS,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nanophi {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself; `--debug` is taken out in `main`, wherever it is given."""


QUIET = dict.fromkeys(("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"), "1")
QUIET["TRANSFORMERS_VERBOSITY"] = "error"
"""Settings that libraries read when they are imported, but for `--debug`: the stages report for themselves."""


def _message(error: Exception) -> str:
    """An error that nothing expected, in one line."""
    if is_disk_full(error):
        file = getattr(error, "filename", None)
        return f"no disk space left{f' ({file})' if file else ''}: {one_line(error)}; free some and run it again"
    if isinstance(error, OSError) and error.errno is not None:
        return one_line(error)
    return f"{type(error).__name__}: {one_line(error)}; run it again with --debug to see where"


def main() -> None:
    """Entry point: an error becomes one line and exit status 1; `--debug` shows the traceback instead."""
    debug = "--debug" in sys.argv
    try:
        settle()
        for name, value in {"TOKENIZERS_PARALLELISM": "true", **({} if debug else QUIET)}.items():
            os.environ.setdefault(name, value)
        app(args=[argument for argument in sys.argv[1:] if argument != "--debug"], prog_name="nanophi")
    except Exception as error:
        if debug:
            raise
        sys.exit(f"nanophi: {error if isinstance(error, UserError) else printable(_message(error))}")
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            raise
        print("\nnanophi: interrupted; run the same command to resume", file=sys.stderr)
        sys.exit(INTERRUPTED)
