"""Train a published model again from its release, and compare the results with the published ones.

recipe = prepare("ORG/NAME", Path("reproductions"))     the recipe, and how the environments differ
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

from nanophi.core.bases import INHERITED
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_text
from nanophi.core.names import final_checkpoint, is_hub_id
from nanophi.core.version import __version__
from nanophi.model_card import records as shipped
from nanophi.model_card import verify
from nanophi.model_card.manifest import MANIFEST, file_problems

Row = dict[str, Any]
"""`{"name", "published", "here", "agrees"}`; `agrees` is None where a difference means nothing by itself."""

LEARNED_FROM = {
    "base_sha256": "base's weights",
    "chat_train_sha256": "conversations",
    "chat_heldout_sha256": "held-out conversations",
}
"""Key of checkpoint.json -> name of a row, of what training began with and, for a chat model, read."""


@shipped.complete_records()
def prepare(published: str, output: Path, revision: str | None = None, echo: Callable[[str], None] = print) -> Path:
    """Fetch a release's records and write its recipe.

    Args:
        published: release folder, or `ORG/NAME` on the Hub. Only its manifest and records are fetched.
        output: folder for the reproduction; `published/` in it takes the records.
        revision: branch, tag or commit of a Hub repository.
        echo: called with one line for each difference between the environment there and here.

    Returns:
        the recipe file, to be run with `output` as the folder of runs.

    Raises:
        UserError: if there is no such release, or its recipe names data that was not published.
    """
    folder = verify.find_release(published, revision, ["MANIFEST.json", "records/*"])
    fetched = ("records/", MANIFEST)
    wrong = [line for line in file_problems(folder, partial=True) if any(name in line for name in fetched)]
    if wrong:
        raise UserError(f"{published}: the records are not those of the manifest: {'; '.join(wrong)}")
    records = shipped.read_records(folder / "records")
    recipe = records["recipe.yaml"]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(recipe.get("name"))):
        raise UserError(f"{published}: its recipe has the name {recipe.get('name')!r}, which no run can have")
    kept = output / "published"
    if kept.exists() and not (kept / MANIFEST).is_file():
        raise UserError(f"{kept} is in the way: it does not hold the records of a release; choose another --runs")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder / "records", kept / "records", copy_function=shutil.copyfile)
    shutil.copyfile(folder / MANIFEST, kept / MANIFEST)
    if recipe.get("conversations"):  # how the base was made is the base's to say, whose copy here may lie elsewhere
        for key in INHERITED:
            recipe.pop(key, None)
    recipe["name"] = f"{recipe['name']}-reproduced"
    path = output / f"{recipe['name']}.yaml"
    write_text(path, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    for row in environment_rows(records["run.json"]["environment"]):
        echo(f"{row['name']}: published with {row['published']}, here {row['here']}")
    if recipe["training"]["arguments"]:
        echo(f"the recipe sets training.arguments {recipe['training']['arguments']}; read them before you run it")
    if private := _private(recipe, records.get("conversations.json")):
        echo(
            f"the recipe names data that was not published ({', '.join(name for _, names in private for name in names)}"
            f"); name your copy with {' '.join(f'--set {assignment}' for assignment, _ in private)}"
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


@shipped.complete_records()
def compare(published: Path, run: Path, echo: Callable[[str], None] = print) -> list[Row]:
    """Compare a reproduced run with the published records, at the checkpoint that they describe.

    Args:
        published: folder with the published `records/` and manifest.
        run: the run directory of the reproduction.
        echo: called with one line for each row.

    Returns:
        rows for the data, the weights, the losses and every leading score. Scores agree if they lie within two
        standard errors of each other; hashes if they are equal.

    Raises:
        UserError: if the run has no checkpoint of the published step.
    """
    theirs = shipped.read_records(published / "records")
    step = theirs["run.json"]["revision"]
    checkpoint = final_checkpoint(run) if theirs["run.json"]["final"] else run / "checkpoints" / step
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is missing: {published} describes {step}, which the new run did not keep")
    ours = shipped.collect(run, checkpoint)
    manifest = read_json(published / MANIFEST)
    tokens = read_json(run / "data" / "tokens" / "tokens.json")
    rows = [
        _row(f"{split} tokens, SHA-256", sha256, tokens[split]["sha256"], sha256 == tokens[split]["sha256"])
        for split, sha256 in manifest["provenance"]["data_sha256"].items()
        if "conversations.json" not in theirs  # else they are the base's, whose weights say more
    ]
    there, here = (records["checkpoint.json"] for records in (theirs, ours))
    for key, name in LEARNED_FROM.items():
        if key in there:
            rows.append(_row(f"{name}, SHA-256", there[key], here.get(key), there[key] == here.get(key)))
    there, here = (records["model.json"]["parameters"] for records in (theirs, ours))
    rows.append(_row("parameters", there, here, there == here))
    # Weights and losses are equal only with the same versions, kind of processor and number of threads: worth knowing,
    # no fault.
    keys = ["train_loss", "eval_loss"]
    there, here = (records["checkpoint.json"] for records in (theirs, ours))
    if theirs["run.json"]["final"]:
        there, here = (records["training.json"]["summary"] for records in (theirs, ours))
        keys = ["weights_sha256", "final_loss", "final_bits_per_byte", "seconds"]
    for key in keys:
        name = "weights, SHA-256" if key == "weights_sha256" else key.replace("_", " ")
        if (there[key], here[key]) != (None, None):  # a chat model has no bits per byte of held-out text
            rows.append(_row(name, there[key], here[key], True if there[key] == here[key] else None))
    found = {(score.suite, score.task, score.metric): score for score in shipped.leading_scores(ours)}
    for score in shipped.leading_scores(theirs):
        again = found.get((score.suite, score.task, score.metric))
        name = f"{score.task}, {score.metric}"
        if again is None:
            rows.append(_row(name, score.value, None, False))
            continue
        noise = 2 * math.hypot(score.stderr or 0, again.stderr or 0)
        rows.append(_row(name, score.value, again.value, abs(score.value - again.value) <= noise))
    for row in rows:
        verdict = {True: "agrees", False: "DIFFERS", None: "may differ"}[row["agrees"]]
        echo(f"  {verdict:<11} {row['name']:<40} {_shown(row['published']):>14} {_shown(row['here']):>14}")
    return rows


def _row(name: str, published: Any, here: Any, agrees: bool | None) -> Row:
    return {"name": name, "published": published, "here": here, "agrees": agrees}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}"
    return value[:12] if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else "missing"


def _private(recipe: dict[str, Any], chat: dict[str, Any] | None) -> list[tuple[str, list[str]]]:
    """What a recipe names that only its author has, each with the assignment that names another copy.

    Args:
        chat: the record of a chat model's conversations, which knows where its base is published.
    """
    found = []
    base = recipe.get("base")
    on_hub = chat["repo_id"] if chat else base if is_hub_id(str(base).partition("@")[0]) else None
    if base and base.partition("@")[0] != str(on_hub).partition("@")[0]:
        found.append((f"base={on_hub or '...'}", [base]))
    key, sources = ("conversations", recipe["conversations"]) if chat else ("data.sources", recipe["data"]["sources"])
    names = [source["files"] or source["hub"] for source in sources if not _is_public(source)]
    return [*found, *([(f"'{key}=[...]'", names)] if names else [])]


def _is_public(source: dict[str, Any]) -> bool:
    return bool(source["embedded"]) or is_hub_id(source["hub"] or "")
