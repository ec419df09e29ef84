"""The base of a chat model: a finished run, a release folder, or a release on the Hub, with its recipe and records."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import read_json
from nanophi.core.names import local, resolve
from nanophi.core.run import differences

INHERITED = ("data", "quality", "tokenizer", "model")
"""Sections that state how the base was made. A chat model's recipe repeats them: its card is about the whole of it."""
RECORDS = ("documents", "quality", "tokens")
"""Of how a base was made. One that is a chat model itself has `conversations` too."""


class Base(NamedTuple):
    """Where the parts of a base are."""

    model: Path  # a folder with config, weights and tokenizer
    recipe: dict[str, Any]
    records: dict[str, Path]
    documents: Path | None  # a run's; None where they are not here
    repo_id: str | None

    def history(self) -> dict[str, Any]:
        """What each chat model on the way learned from, the nearest first, and whose weights pretraining began with."""
        record = self.records["conversations"]
        if not record.is_file():
            return {"bases": [], "origin": self.recipe.get("base")}
        known = read_json(record)
        own = {"name": self.recipe["name"], "method": self.recipe["method"]}
        own |= {key: known[key] for key in ("base", "repo_id", "train", "heldout", "sources")}
        own["hub"] = [source["hub"] for source in self.recipe["conversations"] if not source.get("heldout")]
        return {"bases": [own, *known.get("bases", [])], "origin": known.get("origin")}

    def files(self, *names: str) -> list[Path]:
        """Those of the model's files that it has."""
        return [path for name in names if (path := self.model / name).is_file()]


def find(name: str) -> Base:
    """The base that a recipe names. Raises `UserError` if it is none, or incomplete."""
    named = resolve(name, "base")
    folder = named.fetch()
    model, recipe_file, pattern, run = folder, folder / "records/recipe.yaml", "records/{0}.json", folder.parent
    if named.is_run:
        model, recipe_file, pattern, run = named.model(), folder / "recipe.yaml", "data/{0}/{0}.json", folder
    if not recipe_file.is_file():
        raise named.error(f"is neither a run nor a release of nanophi: {recipe_file.name} is missing")
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if not (model / file).is_file():
            what = "has no tokenizer" if "tokenizer" in file else "is incomplete"
            raise named.error(f"{what} ({model / file} is missing)")
    with user_errors(f"base: {recipe_file} cannot be read"):
        recipe = yaml.safe_load(recipe_file.read_text(encoding="utf-8"))
        repo_id = named.repo_id or recipe["card"]["repo_id"]
    records = {record: folder / pattern.format(record) for record in (*RECORDS, "conversations")}
    documents = run / "data/documents"
    return Base(model, recipe, records, documents if any(documents.glob("heldout-*.parquet")) else None, repo_id)


def inherit(values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A chat recipe's mapping with what it leaves to its base: how that was made, its suites and its licence.

    One that states all of that can be read where its base is not. `own` is the file's part of the mapping. Raises
    `UserError` if it contradicts the base, `data.max_dropped` apart, which limits what conversations lose.
    """
    name = values.get("base")
    if not name or not isinstance(name, str):
        raise UserError("'conversations' needs 'base': the run or release that learns from them")
    if not local(name).is_dir() and all(key in values for key in INHERITED):
        return values
    recipe = find(name).recipe
    inherited = {key: recipe[key] for key in INHERITED}
    if isinstance(values.get("data"), dict) and "max_dropped" in values["data"]:
        inherited["data"] = {**recipe["data"], "max_dropped": values["data"]["max_dropped"]}
    if other := differences(inherited, {key: own[key] for key in INHERITED if key in own}, whole=False):
        key, _, change = other[0].partition(" ")
        raise UserError(f"'{key}' is its base's ({change}); leave it out")
    licence = {key: recipe["card"].get(key) for key in ("license", "license_name", "license_link")}
    suites = {key: recipe["evaluation"][key] for key in ("suites", "data", "limit")}
    for key, theirs in (("evaluation", suites), ("card", licence)):
        given = values.get(key, {})  # what is no mapping is refused by the recipe's own check
        inherited[key] = theirs | given if isinstance(given, dict) else given
    return values | inherited
