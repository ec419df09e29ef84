"""The verb `verify`: check a release as a stranger would, with nothing taken from the run that made it.

Files are checked before anything is loaded. Then both loaders, stock Phi and remote code, load the release, and what
they compute is compared: with each other, with the card's sample, with the shipped results. The order is here, the
checks are in `manifest.py` and `checks.py`.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from nanophi.core.errors import UserError
from nanophi.core.names import resolve
from nanophi.core.options import Json, ReleaseOrId, Revision, Trust
from nanophi.core.version import __version__
from nanophi.model_card import checks, signature
from nanophi.model_card.manifest import MANIFEST, checksums, foreign_files, foreign_references, list_files
from nanophi.model_card.records import complete_records, read_records

Check = dict[str, Any]  # {"name": str, "passed": bool, "detail": one line}


def verify(
    release: ReleaseOrId,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    public_key: Annotated[Path | None, typer.Option(help="Check the signature with this public key (PEM).")] = None,
    as_json: Json = False,
) -> None:
    """Check a release: checksums, loading, the card's numbers.

    The exit status is 1 if a check fails.

    Example: nanophi verify runs/demo/release
    """
    report = functools.partial(typer.echo, err=as_json)
    checks = check(release, revision, report, trust_remote_code=trust_remote_code, public_key=public_key)
    if as_json:
        typer.echo(json.dumps(checks))
    demand_all(release, checks)


def demand_all(release: str | Path, checks: list[Check]) -> None:
    """Raise `UserError` with the names of the checks that failed."""
    if failed := [check["name"] for check in checks if not check["passed"]]:
        raise UserError(f"{release} does not verify: {', '.join(failed)}")


def check(
    release: str,
    revision: str | None = None,
    report: Callable[[str], None] = typer.echo,
    *,
    trust_remote_code: bool = False,
    public_key: Path | None = None,
) -> list[Check]:
    """Check a release folder, or `ORG/NAME` or `ORG/NAME@revision` on the Hub; `report` gets a line for each check.

    With `trust_remote_code` the release's code is run even if it is not that of this nanophi; with a `public_key` (PEM)
    the release must have its owner's signature. Raises `UserError` if there is no such release.
    """
    folder = find_release(release, revision)
    found: list[Check] = []

    def add(name: str, wrong: list[str], right: str) -> bool:
        detail = right if not wrong else "; ".join(wrong[:3]) + (f"; {len(wrong) - 3} more" if wrong[3:] else "")
        found.append({"name": name, "passed": not wrong, "detail": detail})
        report(f"  {'ok    ' if not wrong else 'FAILED'}  {name:<20} {detail}")
        return not wrong

    files = list_files(folder)
    safe = add("checksums", checksums(folder, files), f"{len(files) - 1} files as the manifest says")
    if public_key is not None:
        safe &= add("signature", signature.problems(folder, public_key), f"by the owner of {public_key.name}")
    safe &= add("files", foreign_files(folder, files), "safetensors only, no code but the two files")
    safe &= add("code references", foreign_references(folder), "no file names code outside this release")
    same, ours = checks.has_same_code(folder), f"nanophi {__version__}"
    foreign = [] if same or trust_remote_code else [f"differs from {ours}; --trust-remote-code runs it"]
    safe &= add("code", foreign, f"that of {ours}" if same else "not that of this nanophi, trusted by the user")
    try:
        records = read_records(folder / "records")
        add("card", *checks.card(folder, records))
        add("provenance", checks.provenance(folder, records), "the manifest and the records agree")
        if not safe:
            add("loaders", ["not tried, because of the failures above"], "")
            return found
        with complete_records(), tempfile.TemporaryDirectory(prefix="nanophi-verify-") as scratch:
            for name, wrong, right in checks.computed(folder, records, Path(scratch)):
                add(name, wrong, right)
    except (UserError, OSError) as error:
        add("records", [str(error)], "")
    return found


def find_release(release: str, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    """A release's folder; one on the Hub, or what `patterns` match there, is downloaded into the Hub's cache."""
    named = resolve(release)
    if revision is not None and named.folder is not None:
        raise UserError(f"--revision is for a repository on the Hub; {release} is a folder")
    folder = dataclasses.replace(named, revision=revision or named.revision).fetch(patterns)
    if not (folder / MANIFEST).is_file():
        inside = folder / "release"
        if named.is_run and not inside.is_dir():
            named.model()  # raises for a run that has not finished
        hint = f"did you mean {inside}?" if (inside / MANIFEST).is_file() else "run `nanophi release` first"
        raise UserError(f"{release} is not a release (no {MANIFEST}); {hint}")
    return folder.resolve()
