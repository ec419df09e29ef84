"""Bring a repository on the Hub to what folders here hold: what would change, what is not ours, and the commits.

Every revision is one commit, so the Hub has it whole or not at all; large files are uploaded ahead of it and never
twice. What was cut off is finished by doing it again. What a repository holds, and when it is sent, is decided in
`push.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from nanophi.core.errors import UserError
from nanophi.core.inputs import Kind, same_on_hub
from nanophi.model_card import hub
from nanophi.model_card.manifest import MANIFEST, SIGNATURE, list_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoFile

Report = Callable[[str], None]

RECIPE = "records/recipe.yaml"

LINKED = {"README.md", "records/run.json", MANIFEST, SIGNATURE}
"""Files of a release that change when its card comes to link what was published beside it; the tag stays."""


@dataclasses.dataclass(frozen=True)
class Repository:
    """What a repository is to hold: folders by branch, `main` last; `main` gets the tag."""

    name: str
    revisions: dict[str, Path]
    tag: str
    kind: Kind = "model"


@dataclasses.dataclass
class Change:
    """What a push does to one branch: names of files by what happens to them, and the commit that it starts from."""

    head: str | None
    """None where there is no repository yet."""
    new: list[str]
    replaced: list[str] = dataclasses.field(default_factory=list)
    deleted: list[str] = dataclasses.field(default_factory=list)
    foreign: list[str] = dataclasses.field(default_factory=list)
    """Of those that are replaced or deleted, the ones that no push put there, with what is known about them."""
    run: str = ""
    """The run whose release a push put there, if it is another one."""

    @property
    def files(self) -> list[str]:
        """All that it touches."""
        return [*self.new, *self.replaced, *self.deleted]


Plan = dict[str, Change]
"""By branch."""


def everything(repository: Repository) -> Plan:
    """The plan where there is no repository yet."""
    return {branch: Change(None, list_files(folder)) for branch, folder in repository.revisions.items()}


def plan(api: HfApi, repository: Repository, scratch: Path) -> Plan:
    """What would change on each branch, file by file. `UserError` if another release has the tag: it is never moved."""
    name, kind, tag = repository.name, repository.kind, repository.tag
    if (refs := hub.branches_and_tags(api, name, kind)) is None:
        return everything(repository)
    branches, tags = refs
    if tag in tags and not LINKED.issuperset(_change(api, repository, tags[tag], repository.revisions["main"]).files):
        raise UserError(
            f"{name} has a tag {tag} of another release; if it is to hold this model, raise card.version in the "
            "recipe and run `nanophi release`; if not, choose another --repo-id"
        )
    first = _first_commit(api, repository)
    return {
        branch: _change(api, repository, branches.get(branch, first), folder, scratch)
        for branch, folder in repository.revisions.items()
    }


def _first_commit(api: HfApi, repository: Repository) -> str:
    """The empty commit at which a branch starts: one that was only begun must not show other weights."""
    return str(api.list_repo_commits(repository.name, repo_type=repository.kind)[-1].commit_id)


def _change(api: HfApi, repository: Repository, commit: str, folder: Path, scratch: Path | None = None) -> Change:
    """From a commit on the Hub to a folder here. With `scratch`, also which of the files there are not ours."""
    there, here = hub.files_at(api, repository.name, commit, repository.kind), list_files(folder)
    change = Change(
        commit,
        new=[name for name in here if name not in there],
        replaced=[name for name in here if name in there and not same_on_hub(folder / name, there[name])],
        deleted=sorted(set(there) - set(here)),
    )
    if change.files == [SIGNATURE] and change.replaced:
        change.replaced = []  # Two signatures of the same files differ.
    if scratch is not None and (change.replaced or change.deleted):
        read = functools.partial(
            hub.read_file, api, repository.name, revision=commit, folder=scratch, kind=repository.kind
        )
        change.foreign = _foreign(read, {name: there[name] for name in (*change.replaced, *change.deleted)})
        if RECIPE in change.replaced and (run := _run_name(read(RECIPE))) != _run_name((folder / RECIPE).read_bytes()):
            change.run = run
    return change


def _run_name(recipe: bytes | None) -> str:
    """The name in a recipe; empty where there is none."""
    try:
        return str(yaml.safe_load(recipe or b"")["name"])
    except (yaml.YAMLError, ValueError, KeyError, TypeError):
        return ""


def _foreign(read: Callable[[str], bytes | None], touched: dict[str, RepoFile]) -> list[str]:
    """Which of these files on the Hub were not put there by a push: what their own manifest does not vouch for."""
    try:
        manifest = json.loads(read(MANIFEST) or b"{}")
        listed = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        ours = "nanophi" in manifest["provenance"]
    except (ValueError, KeyError, TypeError, AttributeError):
        ours, listed = False, {}
    if not ours:
        header = read("README.md") if set(touched) == {"README.md"} else None
        if header is not None and re.fullmatch(rb"\s*---\s.*?\n---\s*", header, re.DOTALL):
            return []  # What the Hub writes when a licence is chosen for a new repository.
        return [f"{name} (there is no {MANIFEST} of ours)" for name in sorted(touched)]
    wrong = []
    for name, file in touched.items():
        if name in (MANIFEST, SIGNATURE):
            continue
        if name not in listed:
            wrong.append(f"{name} (added there)")
        elif (file.lfs.sha256 if file.lfs else hashlib.sha256(read(name) or b"").hexdigest()) != listed[name]:
            wrong.append(f"{name} (changed there)")
    return wrong


def show(repository: Repository, changes: Plan, dry_run: bool, report: Report) -> None:
    """Name the files that a push is about to replace and delete; in a dry run, all files with what happens to them."""
    for branch, change in changes.items():
        folder = repository.revisions[branch]
        if not dry_run:
            words = {"replaces": change.replaced, "deletes": change.deleted}
            if losses := [f"{word} {', '.join(files)}" for word, files in words.items() if files]:
                report(f"{branch}: {'; '.join(losses)}")
            continue
        sizes = {name: (folder / name).stat().st_size for name in list_files(folder)}
        report(
            f"{repository.name} {branch}: {len(sizes)} files, {sum(sizes.values()):,} bytes; {len(change.new)} new, "
            f"{len(change.replaced)} replaced, {len(change.deleted)} deleted"
        )
        for name, size in sizes.items():
            what = "new" if name in change.new else "replaced" if name in change.replaced else "same"
            report(f"    {size:>14,}  {what:<8}  {name}")
        for name in change.deleted:
            report(f"    {'':>14}  deleted   {name}")


def refusal(repository: Repository, changes: Plan) -> str | None:
    """Why a push needs --force: the repository is another run's, or has files of no push of ours; None if neither."""
    advice = "; choose another --repo-id, or {} with --force"
    runs = sorted({change.run for change in changes.values() if change.run})
    if runs:
        ours = _run_name((repository.revisions["main"] / RECIPE).read_bytes())
        return f"{repository.name} holds the run '{', '.join(runs)}', this is '{ours}'" + advice.format("replace it")
    wrong = "; ".join(f"{branch}: {', '.join(change.foreign)}" for branch, change in changes.items() if change.foreign)
    message = f"{repository.name} holds files that no push of ours put there: {wrong}"
    return message + advice.format("replace and delete them") if wrong else None


def check_metadata(repository: Repository, report: Report) -> None:
    """Ask the Hub whether it takes the cards, before there is a repository."""
    from huggingface_hub import RepoCard

    for text in {(folder / "README.md").read_text(encoding="utf-8") for folder in repository.revisions.values()}:
        try:
            hub.with_retries(functools.partial(RepoCard(text).validate, repo_type=repository.kind), report)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{repository.name}: the Hub refuses the card's metadata: {reason}") from None


def send(api: HfApi, repository: Repository, changes: Plan, report: Report) -> str:
    """Bring one repository to what its folders hold: the branches, `main` last, then the tag. Returns its URL."""
    name, kind, tag = repository.name, repository.kind, repository.tag
    url = str(api.create_repo(name, private=True, exist_ok=True, repo_type=kind))
    branches, tags = hub.branches_and_tags(api, name, kind) or ({}, {})
    first, head = _first_commit(api, repository), ""
    for branch, folder in repository.revisions.items():
        if branch not in branches:
            api.create_branch(name, branch=branch, revision=first, repo_type=kind, exist_ok=True)
        change = changes[branch]
        if change.head is None:
            change = _change(api, repository, branches.get(branch, first), folder)
        head = _commit(api, repository, branch, change, report)
    if tag not in tags:
        api.create_tag(name, tag=tag, revision=head, exist_ok=True, repo_type=kind)
    report(f"{url}: {', '.join(repository.revisions)}, tag {tag}")
    return url


def _commit(api: HfApi, repository: Repository, branch: str, change: Change, report: Report) -> str:
    """Make a branch hold exactly its folder, in one commit; returns its hash."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    folder = repository.revisions[branch]
    if not change.files:
        report(f"{branch}: up to date")
        return str(change.head)
    try:
        made = api.create_commit(
            repository.name,
            [
                *(CommitOperationAdd(name, folder / name) for name in (*change.new, *change.replaced)),
                *(CommitOperationDelete(name) for name in change.deleted),
            ],
            commit_message=f"Release {branch}",
            repo_type=repository.kind,
            revision=branch,
            parent_commit=change.head,  # Somebody else's commit in between makes this one fail, not mix with it.
        )
        head = str(made.oid)
    except HfHubHTTPError as error:
        head = str(api.repo_info(repository.name, repo_type=repository.kind, revision=branch).sha)
        # The commit may have been made although the answer was an error.
        if error.response.status_code != 412 or _change(api, repository, head, folder).files:
            raise
    report(f"{branch}: uploaded")
    return head


def collect(api: HfApi, title: str, items: list[tuple[str, Kind, str]], public: bool, report: Report) -> str:
    """Make a collection, or extend the one of that title; what is in it already stays. Returns its URL.

    `items` are Hub id, kind and note of each repository; the first one's owner is the collection's. Unless it is to be
    public a new one is private, and one that exists stays as it is.
    """
    owner = items[0][0].partition("/")[0]
    slug = next((entry.slug for entry in api.list_collections(owner=owner) if entry.title == title), None)
    slug = slug or api.create_collection(title, namespace=owner, private=not public, exists_ok=True).slug
    collection = api.get_collection(slug)
    there = {(item.item_type, item.item_id) for item in collection.items}
    for name, kind, note in items:
        if (kind, name) not in there:
            api.add_collection_item(slug, name, kind, note=note, exists_ok=True)
    if public and collection.private:
        api.update_collection_metadata(slug, private=False)
    report(f"{collection.url}: {', '.join(name for name, _, _ in items)}")
    return str(collection.url)
