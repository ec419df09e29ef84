"""Train a published model again from what its release says, and set the results beside the published ones.

recipe = prepare("ORG/NAME", Path("reproductions"))     the recipe, and what differs between there and here
...                                                     the run itself
compare(Path("reproductions/published"), run)           published against reproduced, number by number
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from nanophi.files import UserError, read_json, write_text
from nanophi.inputs import is_hub_id
from nanophi.model_card import release, shipped, verify
from nanophi.version import __version__

Row = dict[str, Any]
"""`{"name", "published", "here", "agrees"}`; `agrees` is None where a difference means nothing by itself."""


def prepare(published: str, output: Path, revision: str | None = None, report: Callable[[str], None] = print) -> Path:
    """Fetch a release's records and set out its recipe.

    Args:
        published: release folder, or `ORG/NAME` on the Hub. Only its manifest and records are fetched.
        output: folder for the reproduction; `published/` in it takes the records.
        revision: branch, tag or commit of a Hub repository.
        report: called with one line for each difference between the environment there and here.

    Returns:
        the recipe file, to be run with `output` as the folder of runs.

    Raises:
        UserError: if there is no such release, or its recipe names data that was not published.
    """
    folder = verify.locate(published, revision, ["MANIFEST.json", "records/*"])
    told = ("records/", release.MANIFEST)
    wrong = [line for line in verify.file_problems(folder, partial=True) if any(name in line for name in told)]
    if wrong:
        raise UserError(f"{published}: the records are not those of the manifest: {'; '.join(wrong)}")
    records = shipped.read_records(folder / "records")
    recipe = records["recipe.yaml"]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(recipe.get("name"))):
        raise UserError(f"{published}: its recipe has the name {recipe.get('name')!r}, which no run can have")
    kept = output / "published"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder / "records", kept / "records", copy_function=shutil.copyfile)
    shutil.copyfile(folder / release.MANIFEST, kept / release.MANIFEST)
    recipe["name"] = f"{recipe['name']}-reproduced"
    path = output / f"{recipe['name']}.yaml"
    write_text(path, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    for row in environment_rows(records["run.json"]["environment"]):
        report(f"{row['name']}: published with {row['published']}, here {row['here']}")
    if recipe["training"]["arguments"]:
        report(f"the recipe sets training.arguments {recipe['training']['arguments']}; read them before you run it")
    private = [source["files"] or source["hub"] for source in recipe["data"]["sources"] if not _is_public(source)]
    if private:
        report(
            f"the recipe names data that was not published ({', '.join(private)}); "
            "say where it lies here with --set data.sources"
        )
    return path


def environment_rows(published: dict[str, Any]) -> list[Row]:
    """Versions and hardware that differ between a release's environment and this one."""
    here = {"nanophi": __version__, "python": platform.python_version()}
    there = {"nanophi": published["nanophi"], "python": published["python"]}
    for name, version in published["packages"].items():
        there[name] = version
        try:
            here[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here[name] = "not installed"
    return [_row(name, there[name], here[name], None) for name in there if there[name] != here[name]]


def compare(published: Path, run: Path, report: Callable[[str], None] = print) -> list[Row]:
    """Set a reproduced run beside the published records.

    Args:
        published: folder with the published `records/` and manifest.
        run: the run directory of the reproduction.
        report: called with one line for each row.

    Returns:
        rows for the data, the weights, the losses and every leading score. Scores agree if they lie within two
        standard errors of each other; hashes if they are equal.
    """
    theirs = shipped.read_records(published / "records")
    ours = shipped.collect(run, shipped.final_checkpoint(run))
    manifest = read_json(published / release.MANIFEST)
    tokens = read_json(run / "data" / "tokens" / "tokens.json")
    rows = [
        _row(f"{split} tokens, SHA-256", sha256, tokens[split]["sha256"], sha256 == tokens[split]["sha256"])
        for split, sha256 in manifest["provenance"]["data_sha256"].items()
    ]
    # Weights are equal only with the same versions, kind of processor and number of threads: worth knowing, no fault.
    there, here = (records["training.json"]["summary"] for records in (theirs, ours))
    same = there["weights_sha256"] == here["weights_sha256"]
    rows.append(_row("weights, SHA-256", there["weights_sha256"], here["weights_sha256"], True if same else None))
    rows.append(_row("parameters", there["parameters"], here["parameters"], there["parameters"] == here["parameters"]))
    for key in ("final_loss", "final_bits_per_byte", "seconds"):
        equal = there[key] == here[key]
        rows.append(_row(key.replace("_", " "), there[key], here[key], True if equal else None))
    found = {(row["suite"], row["task"], row["metric"]): row for row in shipped.leading_scores(ours)}
    for row in shipped.leading_scores(theirs):
        again = found.get((row["suite"], row["task"], row["metric"]))
        name = f"{row['task']}, {row['metric']}"
        if again is None:
            rows.append(_row(name, row["value"], None, False))
            continue
        noise = 2 * math.hypot(row["stderr"] or 0, again["stderr"] or 0)
        agrees = abs(row["value"] - again["value"]) <= noise
        rows.append(_row(name, row["value"], again["value"], agrees))
    for row in rows:
        verdict = {True: "agrees", False: "DIFFERS", None: "differs, may"}[row["agrees"]]
        report(f"  {verdict:<13} {row['name']:<40} {_shown(row['published']):>14} {_shown(row['here']):>14}")
    return rows


def _row(name: str, published: Any, here: Any, agrees: bool | None) -> Row:
    return {"name": name, "published": published, "here": here, "agrees": agrees}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}"
    return value[:12] if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else "missing"


def _is_public(source: dict[str, Any]) -> bool:
    return bool(source["embedded"]) or is_hub_id(source["hub"] or "")
