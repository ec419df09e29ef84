"""Publish a release: `main`, a branch for every kept checkpoint, a tag for the version; its GGUF files beside it.

Everything that can be refused is looked at before anything is created. Every revision is one commit, so the Hub has it
whole or not at all; large files are uploaded ahead of it and never twice. Branches come first, then `main`, the tag,
and finally, if requested, the repository is made public: whoever sees a revision can load it. A push that was cut off
is finished by running it again.

A push touches only what an earlier push put there: a repository without a manifest of ours, or with files that were
added or edited since, is refused unless it is forced.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanophi.files import UserError, read_json
from nanophi.inputs import is_hub_id
from nanophi.model_card import card as model_card
from nanophi.model_card import release as releases
from nanophi.model_card import secrets, signature, verify
from nanophi.model_card.release import MANIFEST, list_files
from nanophi.model_card.shipped import read_records
from nanophi.model_card.signature import SIGNATURE

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoFile

TRAINING_STATE = re.compile(
    r"(^|/)(optimizer|scheduler|scaler|rng_state|trainer_state|training_args|training_state)[^/]*"
)

Echo = Callable[[str], None]


@dataclasses.dataclass
class Change:
    """What a push does to one branch: names of files by what happens to them, and the commit that it starts from."""

    head: str
    new: list[str]
    replaced: list[str]
    deleted: list[str]
    foreign: list[str]
    """Of those that are replaced or deleted, the ones that no push put there, with what is known about them."""

    def __bool__(self) -> bool:
        return bool(self.new or self.replaced or self.deleted)


def push(
    release: Path,
    repo_id: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    force: bool = False,
    signing_key: Path | None = None,
    gguf: Sequence[str] = (),
    echo: Echo = print,
) -> dict[str, Any]:
    """Publish a release folder on the Hub, or resume a push that was cut off.

    Args:
        release: the folder that `release.build` wrote. The branches' checkpoints are those of the run directory around
            it; away from its run, a release is published without them.
        repo_id: `ORG/NAME`.
        public: make the repository public once everything is uploaded; otherwise a new one is private, and one that
            exists stays as it is.
        dry_run: list what would be sent, replaced and deleted; send nothing.
        force: replace and delete what no push of ours put into the repository, too.
        signing_key: PEM file of a private key; if given, every revision is signed (`model.sig`).
        gguf: kinds of GGUF files to publish too, in a companion repository `ORG/NAME-GGUF` with the same tag.
        echo: called with one line for each thing worth telling.

    Returns:
        `{"repo_id", "revisions": {name: {"files", "bytes", "commit", "new", "replaced", "deleted"}}, "tag", "url"}`;
        in a dry run commits and url are None. With `gguf` also `"gguf"`: the same of the companion.

    Raises:
        UserError: if the release must not be published (training state, secrets, paths of this machine, files that
            are not what the manifest says, a card that does not follow from its records), if the repository holds
            something else, or if the Hub refuses it.
    """
    from huggingface_hub import HfApi

    from nanophi.model_card import gguf as llama
    from nanophi.model_card import hub

    companion = f"{repo_id}-GGUF"
    for name in (repo_id, companion) if gguf else (repo_id,):
        if not is_hub_id(name):
            raise UserError(f"--repo-id {repo_id}: {name} is not ORG/NAME as the Hub takes it (at most 96 characters)")
    for kind in gguf:
        llama.check_kind(kind)
    if not (release / MANIFEST).is_file():
        raise UserError(f"{release} is not a release folder (no {MANIFEST}); run `nanophi release` first")
    _refuse(release, problems(release))
    with tempfile.TemporaryDirectory(prefix="nanophi-push-") as scratch:
        folders = _revisions(release, repo_id, Path(scratch), echo)
        repositories = {repo_id: folders}
        if gguf:
            # From what `main` will be: only there do the records name the repository that the files come from.
            llama.export(folders["main"], gguf, Path(scratch) / "gguf")
            repositories[companion] = {"main": Path(scratch) / "gguf"}
        for name, folder in (entry for revisions in repositories.values() for entry in revisions.items()):
            _refuse(name, problems(folder, release))
            if signing_key is not None:
                signature.sign(folder, signing_key)
        api, tag, results, plans = HfApi(), read_json(release / "records" / "run.json")["tag"], [], {}
        for name, revisions in repositories.items():
            try:
                with hub.one_line_errors(name):
                    plans[name] = _plan(api, name, revisions, tag, Path(scratch) / "there")
            except UserError as error:
                if not dry_run or "connection failed" not in str(error):
                    raise
                echo(f"what {name} holds is not known: {error}")
                plans[name] = dict.fromkeys(revisions)
            results.append(_announce(name, revisions, plans[name], tag, dry_run, echo))
            _refuse_foreign(name, plans[name], force, dry_run, echo)
        if dry_run:
            echo(f"tag {tag}; nothing was sent (dry run)")
        else:
            for name, revisions in repositories.items():
                with hub.one_line_errors(name):
                    _check_metadata(name, revisions, echo)
            for result in results:  # The model comes before what is made from it.
                name = result["repo_id"]
                with hub.one_line_errors(name):
                    _send(api, repositories[name], plans[name], result, public, echo)
        return {**results[0], "gguf": results[1]} if gguf else results[0]


# Before anything is sent


def problems(folder: Path, release: Path | None = None) -> list[str]:
    """What must not be published, one line each, secrets named by file and kind only.

    Args:
        folder: what would be sent.
        release: where it was built, if that is elsewhere: its path is private too.
    """
    wrong = verify.file_problems(folder)
    wrong += [f"{name} is training state" for name in list_files(folder) if TRAINING_STATE.search(name)]
    private = [folder, *([release] if release else [])]
    leaks = [
        f"{name} {'names' if found.startswith('a path') else 'holds'} {found}"
        for name in list_files(folder)
        for found in secrets.found_in(_readable(folder / name), private)
    ]
    # What is wrong with a card is said in its words, which must not be those of a secret.
    if not leaks and (folder / "records").is_dir():
        card = verify.card_problems(folder, read_records(folder / "records"))
        wrong += [*card, "the card is not the one that its records give: run `nanophi release` again"] if card else []
    return wrong + leaks


def _readable(path: Path) -> bytes:
    """What a reader could find in a file: everything, of weights the header."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            return file.read(int.from_bytes(file.read(8), "little"))
        return file.read()


def _refuse(what: Path | str, wrong: list[str]) -> None:
    if wrong:
        raise UserError(f"{what} is not fit to publish: {'; '.join(wrong)}")


def _revisions(release: Path, repo_id: str, scratch: Path, echo: Echo) -> dict[str, Path]:
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
    releases.retarget(release, repo_id, scratch / "main")
    return {**folders, described: scratch / "main", "main": scratch / "main"}


def _plan(api: HfApi, repo_id: str, folders: dict[str, Path], tag: str, scratch: Path) -> dict[str, Change | None]:
    """What would change on each branch, by comparing file by file; None where the repository does not exist yet.

    Raises:
        UserError: if the tag is there for another release: tags are never moved.
    """
    from nanophi.model_card import hub

    refs = hub.branches_and_tags(api, repo_id)
    if refs is None:
        return dict.fromkeys(folders)
    branches, tags = refs
    # A branch starts at the empty first commit: one that was only begun must not show other weights.
    first = api.list_repo_commits(repo_id)[-1].commit_id
    if tag in tags and _change(api, repo_id, tags[tag], folders["main"]):
        raise UserError(
            f"{repo_id} has a tag {tag} of another release; raise card.version in the recipe and run `nanophi release`"
        )
    plan: dict[str, Change | None] = {}
    for name, folder in folders.items():
        plan[name] = _change(api, repo_id, branches.get(name, first), folder, scratch)
    return plan


def _change(api: HfApi, repo_id: str, commit: str, folder: Path, scratch: Path | None = None) -> Change:
    """From a commit on the Hub to a folder here. With `scratch`, also which of the files there are not ours."""
    from nanophi.model_card import hub

    there, here = hub.files_at(api, repo_id, commit), list_files(folder)
    new = [name for name in here if name not in there]
    replaced = [name for name in here if name in there and not hub.is_same(there[name], folder / name)]
    deleted = sorted(set(there) - set(here))
    if replaced == [SIGNATURE] and not new and not deleted:
        replaced = []  # Two signatures of the same files differ.
    foreign = []
    if scratch is not None and (replaced or deleted):
        foreign = _foreign(api, repo_id, commit, {name: there[name] for name in (*replaced, *deleted)}, scratch)
    return Change(commit, new, replaced, deleted, foreign)


def _foreign(api: HfApi, repo_id: str, commit: str, touched: dict[str, RepoFile], scratch: Path) -> list[str]:
    """Which of these files on the Hub were not put there by a push: what their own manifest does not vouch for."""
    from nanophi.model_card import hub

    try:
        manifest = json.loads(hub.read_file(api, repo_id, MANIFEST, commit, scratch) or b"{}")
        listed = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        ours = "nanophi" in manifest["provenance"]
    except (ValueError, KeyError, TypeError, AttributeError):
        ours, listed = False, {}
    if not ours:
        header = hub.read_file(api, repo_id, "README.md", commit, scratch) if set(touched) == {"README.md"} else None
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
        elif hashlib.sha256(hub.read_file(api, repo_id, name, commit, scratch) or b"").hexdigest() != listed[name]:
            wrong.append(f"{name} (changed there)")
    return wrong


def _announce(
    repo_id: str, folders: dict[str, Path], plan: dict[str, Change | None], tag: str, dry_run: bool, echo: Echo
) -> dict[str, Any]:
    """What is to happen to one repository, as `push` returns it, and on screen: in a dry run file by file."""
    result: dict[str, Any] = {"repo_id": repo_id, "revisions": {}, "tag": tag, "url": None}
    for name, folder in folders.items():
        sizes, change = {file: (folder / file).stat().st_size for file in list_files(folder)}, plan[name]
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
                f"{repo_id} {name}: {len(sizes)} files, {sum(sizes.values()):,} bytes; {len(new)} new, "
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


def _refuse_foreign(repo_id: str, plan: dict[str, Change | None], force: bool, dry_run: bool, echo: Echo) -> None:
    wrong = [f"{name}: {', '.join(change.foreign)}" for name, change in plan.items() if change and change.foreign]
    if not wrong or force:
        return
    message = f"{repo_id} holds files that no push of ours put there: {'; '.join(wrong)}"
    if not dry_run:
        raise UserError(f"{message}; choose another --repo-id, or replace and delete them with --force")
    echo(f"refused without --force: {message}")


def _check_metadata(repo_id: str, folders: dict[str, Path], echo: Echo) -> None:
    """Ask the Hub whether it takes the cards, before there is a repository."""
    from huggingface_hub import RepoCard

    from nanophi.model_card import hub

    for text in {(folder / "README.md").read_text(encoding="utf-8") for folder in folders.values()}:
        card = RepoCard(text)
        try:
            hub.patiently(functools.partial(card.validate, repo_type="model"), echo)
        except ValueError as error:
            raise UserError(f"{repo_id}: the Hub refuses the card's metadata: {' '.join(str(error).split())}") from None


# Sending


def _send(
    api: HfApi,
    folders: dict[str, Path],
    plan: dict[str, Change | None],
    result: dict[str, Any],
    public: bool,
    echo: Echo,
) -> None:
    """Bring one repository to what `folders` say; commits and url are added to `result`."""
    from nanophi.model_card import hub

    repo_id, tag = result["repo_id"], result["tag"]
    result["url"] = str(hub.patiently(lambda: api.create_repo(repo_id, private=True, exist_ok=True), echo))
    branches, tags = hub.branches_and_tags(api, repo_id) or ({}, {})
    first = api.list_repo_commits(repo_id)[-1].commit_id
    for name, folder in folders.items():
        if name not in branches:
            hub.patiently(
                functools.partial(api.create_branch, repo_id, branch=name, revision=first, exist_ok=True), echo
            )
        change = plan[name] or _change(api, repo_id, branches.get(name, first), folder)
        result["revisions"][name]["commit"] = _commit(api, repo_id, name, folder, change, echo)
    if tag not in tags:
        head = result["revisions"]["main"]["commit"]
        hub.patiently(lambda: api.create_tag(repo_id, tag=tag, revision=head, exist_ok=True), echo)
    if public:
        hub.patiently(lambda: api.update_repo_settings(repo_id, private=False), echo)
    echo(f"{result['url']}: {', '.join(result['revisions'])}, tag {tag}")


def _commit(api: HfApi, repo_id: str, branch: str, folder: Path, change: Change, echo: Echo) -> str:
    """Make a branch hold exactly `folder`, in one commit; returns its hash."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    from nanophi.model_card import hub

    if not change:
        echo(f"{branch}: up to date")
        return change.head

    def commit() -> str:
        made = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, folder / name) for name in (*change.new, *change.replaced)),
                *(CommitOperationDelete(name) for name in change.deleted),
            ],
            commit_message=f"Release {branch}",
            revision=branch,
            parent_commit=change.head,  # Somebody else's commit in between makes this one fail, not mix with it.
        )
        return str(made.oid)

    try:
        oid = hub.patiently(commit, echo)
    except HfHubHTTPError as error:
        head = str(api.model_info(repo_id, revision=branch).sha)
        # The commit may have been made although the answer said otherwise.
        if error.response.status_code != 412 or _change(api, repo_id, head, folder):
            raise
        oid = head
    echo(f"{branch}: uploaded")
    return oid
