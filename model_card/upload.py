"""Bring a repository on the Hub to what folders here hold: what would change, what is not ours, and the commits.

Every revision is one commit, so the Hub has it whole or not at all; large files are uploaded ahead of it and never
twice. What was cut off is finished by doing it again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nanophi.core.errors import UserError
from nanophi.core.inputs import Kind, same_on_hub
from nanophi.model_card import hub
from nanophi.model_card.release import MANIFEST, list_files
from nanophi.model_card.signature import SIGNATURE

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoFile

Echo = Callable[[str], None]

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

    head: str
    new: list[str]
    replaced: list[str]
    deleted: list[str]
    foreign: list[str]
    """Of those that are replaced or deleted, the ones that no push put there, with what is known about them."""
    run: str = ""
    """The run whose release a push put there, if it is another one."""

    def __bool__(self) -> bool:
        return bool(self.new or self.replaced or self.deleted)


def plan(api: HfApi, repository: Repository, scratch: Path) -> dict[str, Change | None]:
    """What would change on each branch, by comparing file by file; None where the repository does not exist yet.

    Raises:
        UserError: if the tag is there for another release: tags are never moved.
    """
    name, kind, tag = repository.name, repository.kind, repository.tag
    refs = hub.branches_and_tags(api, name, kind)
    if refs is None:
        return dict.fromkeys(repository.revisions)
    branches, tags = refs
    # A branch starts at the empty first commit: one that was only begun must not show other weights.
    first = api.list_repo_commits(name, repo_type=kind)[-1].commit_id
    if tag in tags:
        since = _change(api, repository, tags[tag], repository.revisions["main"])
        if not LINKED.issuperset([*since.new, *since.replaced, *since.deleted]):
            raise UserError(
                f"{name} has a tag {tag} of another release; if it is to hold this model, raise card.version in the "
                "recipe and run `nanophi release`; if not, choose another --repo-id"
            )
    return {
        branch: _change(api, repository, branches.get(branch, first), folder, scratch)
        for branch, folder in repository.revisions.items()
    }


def _change(api: HfApi, repository: Repository, commit: str, folder: Path, scratch: Path | None = None) -> Change:
    """From a commit on the Hub to a folder here. With `scratch`, also which of the files there are not ours."""
    there, here = hub.files_at(api, repository.name, commit, repository.kind), list_files(folder)
    new = [name for name in here if name not in there]
    replaced = [name for name in here if name in there and not same_on_hub(folder / name, there[name])]
    deleted = sorted(set(there) - set(here))
    if replaced == [SIGNATURE] and not new and not deleted:
        replaced = []  # Two signatures of the same files differ.
    foreign, run = [], ""
    if scratch is not None and (replaced or deleted):
        read = functools.partial(
            hub.read_file, api, repository.name, revision=commit, folder=scratch, kind=repository.kind
        )
        foreign = _foreign(read, {name: there[name] for name in (*replaced, *deleted)})
        if RECIPE in replaced and (named := _run_name(read(RECIPE))) != _run_name((folder / RECIPE).read_bytes()):
            run = named
    return Change(commit, new, replaced, deleted, foreign, run)


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
        elif file.lfs is not None:
            if file.lfs.sha256 != listed[name]:
                wrong.append(f"{name} (changed there)")
        elif hashlib.sha256(read(name) or b"").hexdigest() != listed[name]:
            wrong.append(f"{name} (changed there)")
    return wrong


def announce(repository: Repository, changes: dict[str, Change | None], dry_run: bool, echo: Echo) -> dict[str, Any]:
    """What is to happen to one repository, as `push` returns it, and on screen: in a dry run file by file."""
    result: dict[str, Any] = {"repo_id": repository.name, "revisions": {}, "tag": repository.tag, "url": None}
    for name, folder in repository.revisions.items():
        sizes, change = {file: (folder / file).stat().st_size for file in list_files(folder)}, changes[name]
        new, replaced, deleted = (change.new, change.replaced, change.deleted) if change else (list(sizes), [], [])
        if change is not None and not change:
            new = []
        result["revisions"][name] = {
            "files": len(sizes),
            "bytes": sum(sizes.values()),
            "commit": None,
            "new": new,
            "replaced": replaced,
            "deleted": deleted,
        }
        if dry_run:
            echo(
                f"{repository.name} {name}: {len(sizes)} files, {sum(sizes.values()):,} bytes; {len(new)} new, "
                f"{len(replaced)} replaced, {len(deleted)} deleted"
            )
            for file, size in sizes.items():
                what = "new" if file in new else "replaced" if file in replaced else "same"
                echo(f"    {size:>14,}  {what:<8}  {file}")
            for file in deleted:
                echo(f"    {'':>14}  deleted   {file}")
        elif replaced or deleted:
            parts = [f"{word} {', '.join(files)}" for word, files in (("replaces", replaced), ("deletes", deleted))]
            echo(f"{name}: {'; '.join(part for part, files in zip(parts, (replaced, deleted), strict=True) if files)}")
    return result


def refuse_foreign(
    repository: Repository, changes: dict[str, Change | None], force: bool, dry_run: bool, echo: Echo
) -> None:
    """Raise `UserError` if another run, or files that no push of ours put there, would go; a dry run tells them."""
    wrong = [f"{name}: {', '.join(change.foreign)}" for name, change in changes.items() if change and change.foreign]
    runs = sorted({change.run for change in changes.values() if change and change.run})
    if not (wrong or runs) or force:
        return
    message = f"{repository.name} holds files that no push of ours put there: {'; '.join(wrong)}"
    if runs:
        ours = _run_name((repository.revisions["main"] / RECIPE).read_bytes())
        message = f"{repository.name} holds the run '{', '.join(runs)}', this is '{ours}'"
    if not dry_run:
        what = "replace it" if runs else "replace and delete them"
        raise UserError(f"{message}; choose another --repo-id, or {what} with --force")
    echo(f"refused without --force: {message}")


def check_metadata(repository: Repository, echo: Echo) -> None:
    """Ask the Hub whether it takes the cards, before there is a repository."""
    from huggingface_hub import RepoCard

    folders = repository.revisions.values()
    for text in {(folder / "README.md").read_text(encoding="utf-8") for folder in folders}:
        card = RepoCard(text)
        try:
            hub.patiently(functools.partial(card.validate, repo_type=repository.kind), echo)
        except ValueError as error:
            raise UserError(
                f"{repository.name}: the Hub refuses the card's metadata: {' '.join(str(error).split())}"
            ) from None


def send(
    api: HfApi, repository: Repository, changes: dict[str, Change | None], result: dict[str, Any], echo: Echo
) -> None:
    """Bring one repository to what its folders say; commits and url are added to `result`."""
    name, kind, tag = repository.name, repository.kind, repository.tag
    result["url"] = str(hub.patiently(lambda: api.create_repo(name, private=True, exist_ok=True, repo_type=kind), echo))
    branches, tags = hub.branches_and_tags(api, name, kind) or ({}, {})
    first = api.list_repo_commits(name, repo_type=kind)[-1].commit_id
    for branch, folder in repository.revisions.items():
        if branch not in branches:
            create = functools.partial(api.create_branch, name, branch=branch, revision=first, repo_type=kind)
            hub.patiently(functools.partial(create, exist_ok=True), echo)
        change = changes[branch]
        if change is None:  # there was no repository when the changes were planned
            change = _change(api, repository, branches.get(branch, first), folder)
        result["revisions"][branch]["commit"] = _commit(api, repository, branch, change, echo)
    if tag not in tags:
        head = result["revisions"]["main"]["commit"]
        hub.patiently(lambda: api.create_tag(name, tag=tag, revision=head, exist_ok=True, repo_type=kind), echo)
    echo(f"{result['url']}: {', '.join(result['revisions'])}, tag {tag}")


def _commit(api: HfApi, repository: Repository, branch: str, change: Change, echo: Echo) -> str:
    """Make a branch hold exactly its folder, in one commit; returns its hash."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    folder = repository.revisions[branch]
    if not change:
        echo(f"{branch}: up to date")
        return change.head

    def commit() -> str:
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
        return str(made.oid)

    try:
        oid = hub.patiently(commit, echo)
    except HfHubHTTPError as error:
        head = str(api.repo_info(repository.name, repo_type=repository.kind, revision=branch).sha)
        # The commit may have been made although the answer said otherwise.
        if error.response.status_code != 412 or _change(api, repository, head, folder):
            raise
        oid = head
    echo(f"{branch}: uploaded")
    return oid


def collect(api: HfApi, title: str, items: list[tuple[str, Kind, str]], public: bool, echo: Echo) -> str:
    """Make a collection, or extend the one of that title; what is in it already stays.

    Args:
        api: the client.
        title: of the collection; its owner is that of the first item.
        items: Hub id, kind and note of each repository.
        public: make it public; otherwise a new one is private, and one that exists stays as it is.
        echo: called with a line for the collection.

    Returns:
        its URL.
    """
    owner = items[0][0].partition("/")[0]
    found = hub.patiently(lambda: [entry for entry in api.list_collections(owner=owner) if entry.title == title], echo)
    make = functools.partial(api.create_collection, title, namespace=owner, private=not public, exists_ok=True)
    slug = (found[0] if found else hub.patiently(make, echo)).slug
    collection = hub.patiently(lambda: api.get_collection(slug), echo)
    there = {(item.item_type, item.item_id) for item in collection.items}
    for name, kind, note in items:
        if (kind, name) not in there:
            add = functools.partial(api.add_collection_item, slug, name, kind, note=note, exists_ok=True)
            hub.patiently(add, echo)
    if public and collection.private:
        hub.patiently(lambda: api.update_collection_metadata(slug, private=False), echo)
    echo(f"{collection.url}: {', '.join(name for name, _, _ in items)}")
    return str(collection.url)
