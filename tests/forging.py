"""A release that somebody tampered with, as `nanophi verify` sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanophi.core.files import read_json
from nanophi.model_card import release, verify


def failures(folder: Path, **options: Any) -> dict[str, str]:
    """Name -> detail of the checks that do not pass."""
    checks = verify.verify(str(folder), echo=lambda line: None, **options)
    return {check["name"]: check["detail"] for check in checks if not check["passed"]}


def sign_again(folder: Path) -> None:
    """What a forger would do: make the manifest fit the changed files."""
    provenance = read_json(folder / "MANIFEST.json")["provenance"]
    release.write_manifest(folder, provenance)
