"""A release that somebody tampered with, as `nanophi verify` sees it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanophi.core.files import read_json, write_json
from nanophi.model_card import checks, verify
from nanophi.model_card.manifest import write_manifest
from nanophi.model_card.records import ShippedRecords, read_records


def failures(folder: Path, **options: Any) -> dict[str, str]:
    """Name -> detail of the checks that do not pass."""
    found = verify.check(str(folder), report=lambda line: None, **options)
    return {check["name"]: check["detail"] for check in found if not check["passed"]}


def card_problems(folder: Path, records: ShippedRecords | None = None) -> list[str]:
    """What is wrong with a release's card, by its own records or by others."""
    return checks.card(folder, records or read_records(folder / "records"))[0]


def sign_again(folder: Path) -> None:
    """What a forger would do: make the manifest fit the changed files."""
    write_manifest(folder, read_json(folder / "MANIFEST.json")["provenance"])


def edit_json(name: str, **fields: Any) -> Callable[[Path], None]:
    """A change of a file's fields."""
    return lambda folder: write_json(folder / name, {**read_json(folder / name), **fields})
