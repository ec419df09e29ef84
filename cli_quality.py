"""The verbs of `nanophi quality`: the filter on files, without a run."""

from __future__ import annotations

import typer

from nanophi.data import quality

quality_app = typer.Typer(help="Apply the quality filter to text files of your own.", no_args_is_help=True)
for verb in (quality.fit, quality.score, quality.report):
    quality_app.command()(verb)
