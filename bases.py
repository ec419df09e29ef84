"""The base of a chat model: a finished run, a release folder, or a release on the Hub, with its recipe and records."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from nanophi.files import UserError, read_json, user_errors
from nanophi.inputs import is_hub_id, local
from nanophi.run import step_folders

INHERITED = ("data", "quality", "tokenizer", "model")
"""Sections that say how the base was made. A chat model's recipe repeats them: its card is about the whole of it."""


@dataclasses.dataclass(frozen=True)
class Base:
    """Where the parts of a base are.

    Attributes:
        name: as the recipe says it.
        model: folder with config, weights and tokenizer.
        recipe: the base's own, as plain data.
        records: folder that holds `documents.json`, `quality.json` and `tokens.json`, by name or as a run has them.
        documents: the run's `data/documents`; None where the base does not bring its held-out text.
        repo_id: on the Hub; None: not published.
    """

    name: str
    model: Path
    recipe: dict[str, Any]
    records: Path
    documents: Path | None
    repo_id: str | None

    def record(self, name: str) -> Path:
        """The file of one record, such as `tokens`."""
        return next(
            (path for path in (self.records / f"{name}.json", self.records / name / f"{name}.json") if path.is_file()),
            self.records / f"{name}.json",
        )


def find(name: str) -> Base:
    """The base that a recipe names. Raises `UserError` if it is none, or incomplete."""
    folder = local(name)
    if not folder.is_dir():
        repo_id, _, revision = name.partition("@")
        if not is_hub_id(repo_id):
            raise UserError(f"base: {name} does not exist here, and is not a Hub id like ORG/NAME or ORG/NAME@REVISION")
        from huggingface_hub import snapshot_download

        with user_errors(f"base: {name} cannot be downloaded"):
            folder = Path(snapshot_download(repo_id, revision=revision or None))
    else:
        repo_id = ""
    if (folder / "record.json").is_file():
        if "training" not in read_json(folder / "record.json")["stages"] or not (folder / "recipe.yaml").is_file():
            raise UserError(f"base: the run {name} has not finished; run `nanophi run` on its recipe first")
        model, recipe_file, records = step_folders(folder / "checkpoints")[-1], folder / "recipe.yaml", folder / "data"
        documents = folder / "data/documents"
    else:
        model, recipe_file, records = folder, folder / "records/recipe.yaml", folder / "records"
        documents = folder.parent / "data/documents"
    if not recipe_file.is_file():
        raise UserError(f"base: {name} is neither a run nor a release of nanophi: {recipe_file.name} is missing")
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if not (model / file).is_file():
            what = "has no tokenizer" if file.startswith("tokenizer") else "is incomplete"
            raise UserError(f"base: {name} {what} ({model / file} is missing)")
    with user_errors(f"base: {recipe_file} cannot be read"):
        recipe = yaml.safe_load(recipe_file.read_text(encoding="utf-8"))
        repo_id = repo_id or (recipe["card"].get("repo_id") or "")
    held = documents if list(documents.glob("heldout-*.parquet")) else None
    return Base(name, model, recipe, records, held, repo_id or None)


def inherit(values: dict[str, Any]) -> dict[str, Any]:
    """A chat recipe's mapping with what it leaves to its base: how that was made, its suites and its licence.

    A recipe that says all that itself, by `extends`, can be read where its base is not.
    """
    try:
        base = find(str(values.get("base") or ""))
    except UserError:
        if all(key in values for key in INHERITED):
            return values
        raise
    recipe = base.recipe
    card = {key: recipe["card"][key] for key in ("license", "license_name", "license_link") if recipe["card"].get(key)}
    evaluation = {key: recipe["evaluation"].get(key) for key in ("suites", "data", "limit")}
    return {
        **values,
        **{key: recipe[key] for key in INHERITED},
        "evaluation": {**evaluation, **values.get("evaluation", {})},
        "card": {**card, **values.get("card", {})},
    }
