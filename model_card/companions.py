"""What can be published beside a model, each in a repository of its own: its scorer, its data, its GGUF files.

A new one is a line of `COMPANIONS` and a module that writes its folder. When they are sent is decided in `push.py`.
"""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CardData

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_text
from nanophi.core.inputs import Kind
from nanophi.core.recipe import Recipe, load_recipe
from nanophi.data import quality_report
from nanophi.model_card import pages, secrets
from nanophi.model_card.manifest import MANIFEST
from nanophi.model_card.release import license_line


@dataclasses.dataclass(frozen=True)
class Source:
    """What companions are made from: the release as on `main`, the run around it; Hub ids and options by part."""

    release: Path
    run: Path
    recipe: Recipe
    model_id: str
    links: dict[str, str]
    asked: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Companion:
    """A repository beside a model's, `ORG/NAME-suffix`.

    `part` is its name in `push.Options.asked` and in the links of the model's card; `files` the pattern of its own
    files' names; `note` what a collection has beside it; `of_run` whether it is made from the run around the release.
    The `build` of its module, called with a `Source`, the Hub id and a folder to create, writes what is sent.
    """

    part: str
    suffix: str
    module: str
    files: str
    note: str
    kind: Kind = "model"
    of_run: bool = True

    @property
    def written(self) -> re.Pattern[str]:
        """The names of all files that its folder may have."""
        return re.compile(rf"README\.md|LICENSE|MANIFEST\.json|model\.sig|{self.files}")

    def write(self, source: Source, repo_id: str, folder: Path) -> None:
        importlib.import_module(f"nanophi.model_card.{self.module}").build(source, repo_id, folder)


_SCORER_FILES = r"quality\.png|scorer\.(json|safetensors)"
_DATA_FILES = r"quality\.png|data/(train|heldout)-\d+\.parquet"
# In the order in which they are sent, after the model.
COMPANIONS = (
    Companion("scorer", "quality", "scorer_page", _SCORER_FILES, "The quality filter that chose its text"),
    Companion("data", "data", "data_page", _DATA_FILES, "The documents' quality scores", kind="dataset"),
    Companion("gguf", "GGUF", "gguf", r"[^/]+\.gguf", "The model for llama.cpp", of_run=False),
    Companion("space", "demo", "space", r"index\.html", "The model in the browser", kind="space", of_run=False),
)


def recipe_of_run(release: Path) -> Recipe:
    """The recipe of the run around a release. Raises `UserError` if the documents there are not the release's."""
    run = release.resolve().parent
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{release} is not in its run directory, which holds what --scorer and --data publish")
    recipe = load_recipe(run / "recipe.yaml")
    if recipe.quality.scorer == "none" or not (run / "data" / "scores" / "scores.parquet").is_file():
        what = "scored documents, which --scorer and --data publish (a chat model's are its base's)"
        raise UserError(f"{run} has no {what}; leave them out")
    made = read_json(release / MANIFEST)["provenance"]["stages"]
    there = {name: stage["key"] for name, stage in read_json(run / "record.json")["stages"].items()}
    if any(made.get(name) != there.get(name) for name in ("documents", "scores", "quality")):
        raise UserError(f"{run}: its documents or scores are not those of {release}; run `nanophi release` again")
    return recipe


def license_of(recipe: Recipe) -> dict[str, Any]:
    """The card's licence, as the Hub's metadata has it."""
    return recipe.card.model_dump(include={"license", "license_name", "license_link"}, exclude_none=True)


def write_filter_page(
    source: Source, repo_id: str, folder: Path, template: str, metadata: CardData, **values: Any
) -> None:
    """Write the page of what belongs to the run's filter, the filter's figure, the licence and the manifest."""
    recipe = source.recipe.model_dump(mode="json")
    quality = secrets.PathRemover(source.run)(read_json(source.run / "data" / "quality" / "quality.json"))
    quality_report.plot(quality, folder / "quality.png")
    write_text(folder / "LICENSE", license_line(recipe["card"]))
    stages = read_json(source.run / "record.json")["stages"]
    keys = {name: stages[name]["key"] for name in ("documents", "scores", "quality")}
    values |= {"name": repo_id.rpartition("/")[2], "tag": recipe["card"]["version"], "quality": quality}
    values |= {"recipe": recipe, "repo_id": repo_id, "model_id": source.model_id, "links": source.links}
    pages.write_page(folder, template, metadata, {"model": source.model_id, "stages": keys}, **values)
