"""The base of a chat model: a finished run, a release folder, or a release on the Hub, with its recipe and records."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import read_json
from nanophi.core.names import local, resolve, split_revision, step_folders

INHERITED = ("data", "quality", "tokenizer", "model")
"""Sections that say how the base was made. A chat model's recipe repeats them: its card is about the whole of it."""


class Base(NamedTuple):
    """Where the parts of a base are.

    `model` is a folder with config, weights and tokenizer; `records` are files by name; `documents` a run's, None where
    they are not here; `repo_id` None for what is not on the Hub.
    """

    model: Path
    recipe: dict[str, Any]
    records: dict[str, Path]
    documents: Path | None
    repo_id: str | None


def final_checkpoint(folder: Path, name: str) -> Path | None:
    """The last weights of a run directory, which a recipe calls `name`; None for another folder.

    Raises:
        UserError: if the run is not finished.
    """
    if not (folder / "record.json").is_file():
        return None
    checkpoints = step_folders(folder / "checkpoints")
    if "training" not in read_json(folder / "record.json")["stages"] or not checkpoints:
        raise UserError(f"base: the run {name} has not finished; run `nanophi run` on its recipe first")
    return checkpoints[-1]


def find(name: str) -> Base:
    """The base that a recipe names. Raises `UserError` if it is none, or incomplete."""
    folder, repo_id = resolve(name, "base").folder, None
    if folder is None:
        repo_id, revision = split_revision(name)
        from huggingface_hub import snapshot_download

        with user_errors(f"base: there is no folder {name} here, and it cannot be downloaded from the Hub"):
            folder = Path(snapshot_download(repo_id, revision=revision))
    model, recipe_file, pattern, run = folder, folder / "records/recipe.yaml", "records/{0}.json", folder.parent
    if checkpoint := final_checkpoint(folder, name):
        model, recipe_file = checkpoint, folder / "recipe.yaml"
        pattern, run = "data/{0}/{0}.json", folder
    if not recipe_file.is_file():
        raise UserError(f"base: {name} is neither a run nor a release of nanophi: {recipe_file.name} is missing")
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if not (model / file).is_file():
            what = "has no tokenizer" if file.startswith("tokenizer") else "is incomplete"
            raise UserError(f"base: {name} {what} ({model / file} is missing)")
    with user_errors(f"base: {recipe_file} cannot be read"):
        recipe = yaml.safe_load(recipe_file.read_text(encoding="utf-8"))
        repo_id = repo_id or recipe["card"]["repo_id"]
    records = {record: folder / pattern.format(record) for record in ("documents", "quality", "tokens")}
    documents = run / "data/documents"
    return Base(model, recipe, records, documents if any(documents.glob("heldout-*.parquet")) else None, repo_id)


def contradiction(theirs: Any, given: Any, key: str = "") -> str | None:
    """What the first value of a recipe's sections that is not its base's is; what they leave out is the base's."""
    if isinstance(theirs, dict) and isinstance(given, dict):
        pairs = [(theirs.get(name), value, f"{key}.{name}" if key else name) for name, value in given.items()]
        return next(filter(None, (contradiction(*pair) for pair in pairs)), None)
    if isinstance(theirs, list) and isinstance(given, list) and len(theirs) == len(given):
        return next(filter(None, (contradiction(*pair, key) for pair in zip(theirs, given, strict=True))), None)
    return None if theirs == given else f"'{key}' is its base's ({theirs} -> {given}); leave it out"


def inherit(values: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """A chat recipe's mapping with what it leaves to its base: how that was made, its suites and its licence.

    A recipe that says all that itself, by `extends` or because it was written by a run, can be read where its base is
    not.

    Args:
        values: the whole mapping.
        said: the part of it that is neither a default nor of a recipe that this one extends.

    Raises:
        UserError: if it says otherwise than its base.
    """
    name = values.get("base")
    if not name or not isinstance(name, str):
        raise UserError("'conversations' needs 'base': the run or release that learns from them")
    if not local(name).is_dir() and all(key in values for key in INHERITED):
        return values
    recipe = find(name).recipe
    if other := contradiction(recipe, {key: said[key] for key in INHERITED if key in said}):
        raise UserError(other)
    licence = {key: recipe["card"].get(key) for key in ("license", "license_name", "license_link")}
    suites = {key: recipe["evaluation"][key] for key in ("suites", "data", "limit")}
    inherited = {key: recipe[key] for key in INHERITED}
    for key, theirs in (("evaluation", suites), ("card", licence)):
        given = values.get(key, {})
        # What is no mapping is refused by the recipe's own check.
        inherited[key] = theirs | given if isinstance(given, dict) else given
    return values | inherited
