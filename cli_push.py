"""The verb `nanophi push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

Gguf = Annotated[str | None, Option(metavar="KINDS", help="llama.cpp files too, any of f16,q8_0,bf16,f32.")]


def push(
    release: Annotated[Path, Argument(metavar="RELEASE", help="Release folder.")],
    repo_id: Annotated[str, Option(metavar="ORG/NAME", help="Repository on the Hub.")],
    public: Annotated[bool, Option("--public", help="Make it public once everything is uploaded.")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="List what would be sent, replaced and deleted; send nothing.")
    ] = False,
    force: Annotated[
        bool, Option("--force", help="Replace and delete another run, and files that no push put there.")
    ] = False,
    signing_key: Annotated[Path | None, Option(help="Sign every revision with this private key (PEM).")] = None,
    gguf: Gguf = None,
    scorer: Annotated[bool, Option("--scorer", help="Publish the quality scorer as ORG/NAME-quality.")] = False,
    data: Annotated[
        Literal["scores", "text"] | None,
        Option(help="Publish the documents' scores, or also their text, as the data set ORG/NAME-data."),
    ] = None,
    control: Annotated[
        str | None, Option(metavar="ORG/NAME", help="The control's model on the Hub, for the card to link.")
    ] = None,
    collection: Annotated[
        str | None, Option(metavar="TITLE", help="Collection to make, or to extend by all that is published here.")
    ] = None,
) -> None:
    """Publish a release on the Hub, or resume its upload.

    Sends the main branch, a branch for each kept checkpoint and a tag; llama.cpp files go to ORG/NAME-GGUF. The
    repositories are private unless --public is given.

    Example: nanophi push runs/demo/release --repo-id ORG/nano-phi-demo --dry-run
    """
    from nanophi.model_card import push as pushing
    from nanophi.model_card.gguf import parse_kinds

    result = pushing.push(
        release,
        repo_id,
        public=public,
        dry_run=dry_run,
        force=force,
        signing_key=signing_key,
        gguf=parse_kinds(gguf),
        scorer=scorer,
        data=data,
        control=control,
        collection=collection,
    )
    for made in (result, *(result[part] for part in (*pushing.SUFFIXES, "collection") if part in result)):
        if made["url"]:
            typer.echo(made["url"])
