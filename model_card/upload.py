"""Bring a repository on the Hub to what folders here hold: what would change, what is not ours, and the commits.

Every revision is one commit, so the Hub has it whole or not at all. What was cut off is finished by doing it again;
errors are one line with their remedy. What a repository holds, and when it is sent, is decided in `push.py`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, RepoFile
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from nanophi.core.errors import UserError, one_line
from nanophi.core.inputs import Kind, same_on_hub
from nanophi.model_card.manifest import MANIFEST, SIGNATURE, list_files

Report = Callable[[str], None]
TEMPORARY = (429, *range(500, 600))
ATTEMPTS = 5
LONGEST_WAIT = 300  # seconds; a server that asks for more is reported, not waited for
RESUME = "run the same command to resume"


@contextlib.contextmanager
def one_line_errors(repo_id: str) -> Iterator[None]:
    """Errors of the client and the connection become a `UserError`: what the Hub answered, and the remedy."""
    from httpx2 import HTTPError

    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError("no token for the Hub; run `hf auth login`, or set HF_TOKEN") from None
    except (HfHubHTTPError, HTTPError, OSError, RuntimeError) as error:
        # The client raises RuntimeError when an upload fails, and LocalEntryNotFoundError when there is no answer.
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
        if isinstance(cause, HfHubHTTPError):
            raise UserError(f"{repo_id}: {_explain(cause)}") from None
        if isinstance(error, RuntimeError) and not isinstance(cause, HTTPError | OSError):
            raise
        raise UserError(f"{repo_id}: the connection failed ({one_line(cause)}); {RESUME}") from None


def _explain(error: HfHubHTTPError) -> str:
    status, text = error.response.status_code, " ".join(str(error).split())
    if status in TEMPORARY:
        return f"the Hub is busy ({status}: {error.server_message or text}); {RESUME}"
    return {
        401: "the Hub does not accept the token, or does not show this repository to it; run `hf auth login`",
        403: f"the Hub refuses: {text}",
        412: f"somebody else committed there at the same time; look at the repository, then {RESUME}",
    }.get(status, f"the Hub answered: {text}")


def with_retries(call: Callable[[], Any], report: Report) -> Any:
    """The result of a call, made again after the time that a busy Hub asks for: the client retries lists alone."""
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except HfHubHTTPError as error:
            status, headers = error.response.status_code, error.response.headers
            limit = parse_ratelimit_headers(headers) if status == 429 else None
            wait = limit.reset_in_seconds + 1 if limit else 2 ** (attempt - 1)
            wait = int(asked) if (asked := headers.get("Retry-After", "")).isdigit() else wait
            if status not in TEMPORARY or wait > LONGEST_WAIT:
                raise
        report(f"the Hub is busy ({status}); trying again in {wait} s")
        time.sleep(wait)
    return call()


class RetryingApi(HfApi):
    """The client, with retries for what it sends and for single objects that it asks for."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith(("create_", "add_", "update_", "get_")):
            return found
        return lambda *args, **options: with_retries(functools.partial(found, *args, **options), self._report)


def branches_and_tags(api: HfApi, repo_id: str, kind: Kind = "model") -> tuple[dict[str, str], dict[str, str]] | None:
    """Name -> commit of a repository's branches and tags; None if there is no such repository for this token."""
    try:
        refs = api.list_repo_refs(repo_id, repo_type=kind)
    except RepositoryNotFoundError:
        return None
    branches, tags = ({entry.name: entry.target_commit for entry in group} for group in (refs.branches, refs.tags))
    return branches, tags


def read_file(api: HfApi, repo_id: str, path: str, revision: str, folder: Path, kind: Kind = "model") -> bytes | None:
    """A file's contents; None if it is not there. `folder` takes the download."""
    try:
        file = api.hf_hub_download(repo_id, path, revision=revision, cache_dir=folder, repo_type=kind)
    except LocalEntryNotFoundError:
        raise  # No answer at all, though it is called like a missing file.
    except (EntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
        return None
    return Path(file).read_bytes()


KINDS = ("new", "replaced", "deleted")
RECIPE = "records/recipe.yaml"
# Files of a release that change when its card comes to link what was published beside it; the tag stays.
LINKED = {"README.md", "index.html", "records/run.json", MANIFEST, SIGNATURE}


@dataclasses.dataclass
class Change:
    """What a push does to one branch: what happens to which `files` (`new`, `replaced`, `deleted`).

    `head`: the commit that it starts from, None without a repository; `foreign`: the replaced and deleted files that no
    push put there, with what is known of them; `run`: the run whose release is there, if it is another one.
    """

    head: str | None
    files: dict[str, str]
    foreign: list[str] = dataclasses.field(default_factory=list)
    run: str = ""


@dataclasses.dataclass
class Repository:
    """What a repository is to hold: folders by branch, `main` last, which gets the tag; and what a push will change."""

    name: str
    revisions: dict[str, Path]
    tag: str
    kind: Kind = "model"
    changes: dict[str, Change] = dataclasses.field(default_factory=dict)


def plan(api: HfApi, repository: Repository, scratch: Path) -> None:
    """Find what would change on each branch. `UserError` if another release has the tag: it is never moved."""
    name, tag, revisions = repository.name, repository.tag, repository.revisions
    new = {branch: dict.fromkeys(list_files(folder), "new") for branch, folder in revisions.items()}
    repository.changes = {branch: Change(None, files) for branch, files in new.items()}
    if (refs := branches_and_tags(api, name, repository.kind)) is None:
        return
    branches, tags = refs
    if tag in tags and not LINKED.issuperset(_change(api, repository, tags[tag], revisions["main"]).files):
        raise UserError(
            f"{name} has a tag {tag} of another release; if it is to hold this model, raise card.version in the "
            "recipe and run `nanophi release`; if not, choose another --repo-id"
        )
    first = _first_commit(api, repository)
    for branch, folder in revisions.items():
        repository.changes[branch] = _change(api, repository, branches.get(branch, first), folder, scratch)


def _first_commit(api: HfApi, repository: Repository) -> str:
    """The empty commit at which a branch starts: one that was only begun must not show other weights."""
    return str(api.list_repo_commits(repository.name, repo_type=repository.kind)[-1].commit_id)


def _change(api: HfApi, repository: Repository, commit: str, folder: Path, scratch: Path | None = None) -> Change:
    """From a commit on the Hub to a folder here. With `scratch`, also which of the files there are not ours."""
    tree = api.list_repo_tree(repository.name, recursive=True, revision=commit, repo_type=repository.kind)
    there, here = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}, list_files(folder)
    there.pop(".gitattributes", None)  # the Hub's own
    files = {name: "new" for name in here if name not in there}
    files |= {name: "replaced" for name in here if name in there and not same_on_hub(folder / name, there[name])}
    files |= dict.fromkeys(sorted(set(there) - set(here)), "deleted")
    # Two signatures of the same files differ.
    change = Change(commit, {} if files == {SIGNATURE: "replaced"} else files)
    if scratch is not None and (touched := {name: there[name] for name in change.files if name in there}):
        read = functools.partial(read_file, api, repository.name, revision=commit, folder=scratch, kind=repository.kind)
        change.foreign = _foreign(read, touched)
        if RECIPE in touched and RECIPE in here:
            run = _run_name(read(RECIPE))
            change.run = "" if run == _run_name((folder / RECIPE).read_bytes()) else run
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
        ours = False
    if not ours:
        # The Hub writes a page's header when a licence is chosen for a new repository.
        if set(touched) == {"README.md"} and re.fullmatch(rb"\s*---\s.*?\n---\s*", read("README.md") or b"", re.DOTALL):
            return []
        return [f"{name} (there is no {MANIFEST} of ours)" for name in sorted(touched)]
    wrong = []
    for name, file in touched.items():
        sha256 = file.lfs.sha256 if file.lfs else hashlib.sha256(read(name) or b"").hexdigest()
        if name not in (MANIFEST, SIGNATURE) and listed.get(name) != sha256:
            wrong.append(f"{name} ({'changed' if name in listed else 'added'} there)")
    return wrong


def show(repository: Repository, dry_run: bool, report: Report) -> None:
    """Name the files that a push is about to replace and delete; in a dry run, all files with what happens to them."""
    for branch, change in repository.changes.items():
        by_kind = {kind: [name for name, what in change.files.items() if what == kind] for kind in KINDS}
        if not dry_run:
            words = {"replaces": by_kind["replaced"], "deletes": by_kind["deleted"]}
            if losses := [f"{word} {', '.join(files)}" for word, files in words.items() if files]:
                report(f"{branch}: {'; '.join(losses)}")
            continue
        files = described(repository)["branches"][branch]
        sizes = [file["bytes"] for file in files.values() if file["bytes"] is not None]
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in by_kind.items())
        report(f"{repository.name} {branch}: {len(sizes)} files, {sum(sizes):,} bytes; {counts}")
        for name, file in files.items():
            size = "" if file["bytes"] is None else f"{file['bytes']:,}"
            report(f"    {size:>14}  {file['change']:<8}  {name}")


def described(repository: Repository) -> dict[str, Any]:
    """What a push does to a repository, as data: of each branch each file, its size in bytes and what happens to it."""
    branches = {}
    for branch, change in repository.changes.items():
        folder = repository.revisions[branch]
        changes = dict.fromkeys(list_files(folder), "same") | change.files
        sizes = {name: (folder / name).stat().st_size if (folder / name).exists() else None for name in changes}
        branches[branch] = {name: {"bytes": sizes[name], "change": changes[name]} for name in changes}
    rest = {"kind": repository.kind, "tag": repository.tag, "refused": refusal(repository)}
    return {"name": repository.name, **rest, "branches": branches}


def refusal(repository: Repository) -> str | None:
    """Why a push needs --force: the repository is another run's, or has files of no push of ours; None if neither."""
    advice, changes = "choose another --repo-id, or replace {} with --force", repository.changes
    if runs := sorted({change.run for change in changes.values() if change.run}):
        ours = _run_name((repository.revisions["main"] / RECIPE).read_bytes())
        return f"{repository.name} holds the run '{', '.join(runs)}', this is '{ours}'; {advice.format('it')}"
    wrong = "; ".join(f"{branch}: {', '.join(change.foreign)}" for branch, change in changes.items() if change.foreign)
    message = f"{repository.name} holds files that no push of ours put there: {wrong}; {advice.format('them')}"
    return message if wrong else None


def check_metadata(repository: Repository, report: Report) -> None:
    """Ask the Hub whether it takes the cards, before there is a repository."""
    for text in {(folder / "README.md").read_text(encoding="utf-8") for folder in repository.revisions.values()}:
        try:
            with_retries(functools.partial(RepoCard(text).validate, repo_type=repository.kind), report)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{repository.name}: the Hub refuses the card's metadata: {reason}") from None


def send(api: HfApi, repository: Repository, report: Report) -> str:
    """Bring one repository to what its folders hold: the branches, `main` last, then the tag. Returns its URL."""
    name, kind, tag = repository.name, repository.kind, repository.tag
    sdk = "static" if kind == "space" else None
    url = str(api.create_repo(name, private=True, exist_ok=True, repo_type=kind, space_sdk=sdk))
    branches, tags = branches_and_tags(api, name, kind) or ({}, {})
    first, head = _first_commit(api, repository), ""
    for branch in repository.revisions:
        if branch not in branches:
            api.create_branch(name, branch=branch, revision=first, repo_type=kind, exist_ok=True)
        parent = repository.changes[branch].head or branches.get(branch, first)
        head = _commit(api, repository, branch, parent, report)
    if tag not in tags:
        api.create_tag(name, tag=tag, revision=head, exist_ok=True, repo_type=kind)
    report(f"{url}: {', '.join(repository.revisions)}, tag {tag}")
    return url


def _commit(api: HfApi, repository: Repository, branch: str, parent: str, report: Report) -> str:
    """Make a branch hold exactly its folder, in one commit on `parent`; returns its hash."""
    name, folder, change = repository.name, repository.revisions[branch], repository.changes[branch]
    if not change.files:
        report(f"{branch}: up to date")
        return parent
    operations = [
        CommitOperationDelete(file) if what == "deleted" else CommitOperationAdd(file, folder / file)
        for file, what in change.files.items()
    ]
    where: Any = {"repo_type": repository.kind, "revision": branch}
    try:
        # With a parent, somebody else's commit in between makes this one fail, not mix with it.
        made = api.create_commit(name, operations, commit_message=f"Release {branch}", parent_commit=parent, **where)
        head = made.oid
    except HfHubHTTPError as error:
        head = str(api.repo_info(name, **where).sha)
        # The commit may have been made although the answer was an error.
        if error.response.status_code != 412 or _change(api, repository, head, folder).files:
            raise
    report(f"{branch}: uploaded")
    return head


def collect(api: HfApi, title: str, items: list[tuple[str, Kind, str]], public: bool, report: Report) -> str:
    """Make a collection, or extend the one of that title; what is in it stays. Returns its URL."""
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
