"""Publish a release: `main`, a branch for every kept checkpoint, a tag for the version; beside it its GGUF files, its
quality scorer and its data.

Everything that can be refused is looked at before anything is created. Branches come first, then `main`, the tag, and
finally, if requested, the repositories are made public: whoever sees a revision can load it. A push that was cut off
is finished by running it again.

A push touches only what an earlier push of the same run put there: a repository without a manifest of ours, of another
run, or with files that were added or edited since, is refused unless it is forced.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.core.names import is_hub_id
from nanophi.core.recipe import Recipe, load_recipe
from nanophi.model_card import card as model_card
from nanophi.model_card import file_checks, secrets, signature, upload, verify
from nanophi.model_card import release as releases
from nanophi.model_card.records import complete_records, read_records
from nanophi.model_card.release import MANIFEST, list_files
from nanophi.model_card.upload import Echo, Repository

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TRAINING_STATE = re.compile(
    r"(^|/)(optimizer|scheduler|scaler|rng_state|trainer_state|training_args|training_state)[^/]*"
)


def push(
    release: Path,
    repo_id: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    force: bool = False,
    signing_key: Path | None = None,
    gguf: Sequence[str] = (),
    scorer: bool = False,
    data: Literal["scores", "text"] | None = None,
    control: str | None = None,
    collection: str | None = None,
    echo: Echo = print,
) -> dict[str, Any]:
    """Publish a release folder on the Hub, or resume a push that was cut off.

    Args:
        release: the folder that `release.build` wrote. The branches' checkpoints are those of the run directory around
            it; away from its run, a release is published without them.
        repo_id: `ORG/NAME`.
        public: make the repositories public once everything is uploaded; otherwise new ones are private, and those
            that exist stay as they are.
        dry_run: list what would be sent, replaced and deleted; send nothing.
        force: replace and delete another run, and what no push of ours put into the repositories, too.
        signing_key: PEM file of a private key; if given, every revision is signed (`model.sig`).
        gguf: kinds of GGUF files to publish too, in a companion repository `ORG/NAME-GGUF` with the same tag.
        scorer: publish the run's linear scorer as `ORG/NAME-quality`.
        data: publish the documents' scores, or the documents with their text, as the data set `ORG/NAME-data`.
        control: Hub id of the control's model, which the card links.
        collection: title of a collection of ORG that is made, or extended by what is published here.
        echo: called with one line for each thing worth telling.

    Returns:
        `{"repo_id", "revisions": {name: {"files", "bytes", "commit", "new", "replaced", "deleted"}}, "tag", "url"}`;
        in a dry run commits and url are None. Under `"gguf"`, `"scorer"` and `"data"` the same of those companions,
        and under `"collection"` `{"url"}`.

    Raises:
        UserError: if the release must not be published (training state, secrets, paths of this machine, files that
            are not what the manifest says, a card that does not follow from its records), if the repository holds
            something else, or if the Hub refuses it.
    """
    from huggingface_hub import HfApi

    from nanophi.model_card import gguf as llama
    from nanophi.model_card import hub

    asked = {"scorer": scorer, "data": data is not None, "gguf": bool(gguf)}
    names = {part: f"{repo_id}-{SUFFIXES[part]}" for part, wanted in asked.items() if wanted}
    for name in (repo_id, *names.values()):
        if not is_hub_id(name):
            raise UserError(f"--repo-id {repo_id}: {name} is not ORG/NAME as the Hub takes it (at most 96 characters)")
    if control is not None and not is_hub_id(control):
        raise UserError(f"--control {control} is not a Hub id like ORG/NAME")
    if collection is not None and not 0 < len(collection.strip()) < 60:
        raise UserError("--collection: the Hub takes a title of 1 to 59 characters")
    for kind in gguf:
        llama.check_kind(kind)
    if not (release / MANIFEST).is_file():
        if not release.is_dir():
            raise UserError(f"folder {release} does not exist")
        raise UserError(
            f"{release} is not a release (no {MANIFEST}){verify.hint(release) or '; run `nanophi release` first'}"
        )
    recipe = _recipe_of_run(release) if scorer or data else None
    _refuse(release, problems(release))
    with complete_records():
        api, tag = HfApi(), read_json(release / "records" / "run.json")["tag"]
    links = {part: name for part, name in names.items() if part != "gguf"}
    links |= {"control": control} if control else {}
    with tempfile.TemporaryDirectory(prefix="nanophi-push-") as temporary:
        scratch = Path(temporary)
        links = {**_links_there(api, repo_id, scratch / "there", dry_run), **links}
        repositories = {"model": Repository(repo_id, _revisions(release, repo_id, scratch, echo, links), tag)}
        for part, name in names.items():
            folder = scratch / part
            if part == "gguf":
                # From what `main` will be: only there do the records name the repository that the files come from.
                llama.export(repositories["model"].revisions["main"], gguf, folder)
            elif recipe is not None:
                _build_companion(part, release.resolve().parent, recipe, name, repo_id, links, data == "text", folder)
            repositories[part] = Repository(name, {"main": folder}, tag, "dataset" if part == "data" else "model")
        for part, repository in repositories.items():
            for name, folder in repository.revisions.items():
                _refuse(name if part == "model" else repository.name, problems(folder, release, FILES[part]))
                if signing_key is not None:
                    signature.sign(folder, signing_key)
        plans, results = {}, {}
        for part, repository in repositories.items():
            try:
                with hub.one_line_errors(repository.name):
                    plans[part] = upload.plan(api, repository, scratch / "there")
            except UserError as error:
                if not dry_run or "connection failed" not in str(error):
                    raise
                echo(f"{repository.name}: the Hub cannot be reached; files are listed as if there were none")
                plans[part] = dict.fromkeys(repository.revisions)
            results[part] = upload.announce(repository, plans[part], dry_run, echo)
            upload.refuse_foreign(repository, plans[part], force, dry_run, echo)
        if dry_run:
            echo(f"tag {tag}; nothing was sent (dry run)")
        else:
            for repository in repositories.values():
                with hub.one_line_errors(repository.name):
                    upload.check_metadata(repository, echo)
            for part, repository in repositories.items():
                with hub.one_line_errors(repository.name):
                    upload.send(api, repository, plans[part], results[part], echo)
            for repository in repositories.values() if public else ():
                publish = functools.partial(api.update_repo_settings, repository.name, repo_type=repository.kind)
                with hub.one_line_errors(repository.name):
                    hub.patiently(functools.partial(publish, private=False), echo)
            if collection is not None:
                items = [(entry.name, entry.kind, NOTES[part]) for part, entry in repositories.items()]
                items += [(control, "model", "The control, trained on unfiltered text")] if control else []
                with hub.one_line_errors(f"collection {collection}"):
                    results["collection"] = {"url": upload.collect(api, collection, items, public, echo)}
        return {**results.pop("model"), **results}


SUFFIXES = {"scorer": "quality", "data": "data", "gguf": "GGUF"}
"""What a companion's name ends in; they are sent in this order, after the model."""

_PAGE = r"README\.md|LICENSE|MANIFEST\.json|model\.sig|"
FILES = {
    "model": releases.FILES,
    "scorer": re.compile(_PAGE + r"quality\.png|scorer\.(json|safetensors)"),
    "data": re.compile(_PAGE + r"quality\.png|data/(train|heldout)-\d+\.parquet"),
    "gguf": re.compile(_PAGE + r"[^/]+\.gguf"),
}
"""The files that each may have."""

NOTES = {
    "model": "The model",
    "scorer": "The quality filter that chose its text",
    "data": "The documents' quality scores",
    "gguf": "The model for llama.cpp",
}
"""What a collection says of each."""


# Before anything is sent


def problems(folder: Path, release: Path | None = None, written: re.Pattern[str] = releases.FILES) -> list[str]:
    """What must not be published, one line each, secrets named by file and kind only.

    Args:
        folder: what would be sent.
        release: where it was built, if that is elsewhere: its path is private too.
        written: names of the files that nanophi writes into such a folder.
    """
    wrong = file_checks.file_problems(folder, written=written)
    wrong += [f"{name} is training state" for name in list_files(folder) if TRAINING_STATE.search(name)]
    private = [folder, *([release] if release else [])]
    leaks = [
        f"{name} {'names' if found.startswith('a path') else 'holds'} {found}"
        for name in list_files(folder)
        for found in secrets.found_in_file(folder / name, private)
    ]
    # What is wrong with a card is said in its words, which must not be those of a secret.
    if not leaks and (folder / "records").is_dir():
        card = verify.card_problems(folder, read_records(folder / "records"))
        wrong += [*card, "the card is not the one that its records give: run `nanophi release` again"] if card else []
    return wrong + leaks


def _refuse(what: Path | str, wrong: list[str]) -> None:
    if wrong:
        raise UserError(f"{what} is not fit to publish: {'; '.join(wrong)}")


def _recipe_of_run(release: Path) -> Recipe:
    """The recipe of the run around a release. Raises `UserError` if the documents there are not the release's."""
    run = release.resolve().parent
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{release} is not in its run directory, which holds what --scorer and --data publish")
    made, there = (
        {name: stages.get(name) for name in ("documents", "scores", "quality")}
        for stages in (
            read_json(release / MANIFEST)["provenance"]["stages"],
            {name: stage["key"] for name, stage in read_json(run / "record.json")["stages"].items()},
        )
    )
    if made != there:
        raise UserError(f"{run}: its documents or scores are not those of {release}; run `nanophi release` again")
    return load_recipe(run / "recipe.yaml")


def _build_companion(
    part: str, run: Path, recipe: Recipe, name: str, model_id: str, links: dict[str, str], text: bool, folder: Path
) -> None:
    """Write the folder of the scorer's or the data's repository."""
    from nanophi.model_card import data_page, scorer_page

    if part == "scorer":
        scorer_page.build(run, recipe, name, model_id, links, folder)
    else:
        data_page.build(run, recipe, name, model_id, links, text, folder)


def _links_there(api: HfApi, repo_id: str, scratch: Path, dry_run: bool) -> dict[str, str]:
    """What the card on the Hub links already: published by an earlier push, it stays linked."""
    from nanophi.model_card import hub

    try:
        with hub.one_line_errors(repo_id):
            if hub.branches_and_tags(api, repo_id) is None:
                return {}
            record = hub.read_file(api, repo_id, "records/run.json", "main", scratch)
        links = json.loads(record or b"{}").get("links", {})
        return {key: name for key, name in links.items() if key in ("data", "scorer", "control") and is_hub_id(name)}
    except (ValueError, TypeError, AttributeError):
        return {}  # A repository of somebody else, which is refused later.
    except UserError:
        if dry_run:
            return {}
        raise


def _revisions(release: Path, repo_id: str, scratch: Path, echo: Echo, links: dict[str, str]) -> dict[str, Path]:
    """Name of each revision -> folder as it will be on the Hub; `main` last."""
    run = release.resolve().parent
    recipe = read_records(release / "records")["recipe.yaml"]
    described = read_json(release / "records" / "run.json")["revision"]
    trained = read_json(release / MANIFEST)["provenance"]["stages"].get("training")
    record = read_json(run / "record.json") if (run / "record.json").is_file() else {"stages": {}}
    same_run = record["stages"].get("training", {}).get("key") == trained
    folders = {}
    for entry in read_json(release / "revisions.json"):
        name = entry["revision"]
        checkpoint = run / "checkpoints" / name
        if name == described:
            continue
        if not same_run or not checkpoint.is_dir():
            echo(f"{name}: its checkpoint is not in the run directory around {release}; no branch is published")
            continue
        model_card.build(run, scratch / f"{name}-card", checkpoint, repo_id)
        releases.build(run, checkpoint, scratch / f"{name}-card", scratch / name, recipe["release"]["dtype"])
        folders[name] = scratch / name
    releases.retarget(release, repo_id, scratch / "main", links)
    return {**folders, described: scratch / "main", "main": scratch / "main"}
