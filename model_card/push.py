"""Publish a release: `main`, a branch for every kept checkpoint, a tag for the version; its GGUF files beside it.

Every revision arrives as one commit, so it is on the Hub whole or not at all; large files go ahead of it and are not
sent twice. Branches come first, then `main`, the tag, and at last, if asked for, the world: whoever sees a revision
can load it. A push that was cut off is finished by running it again.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanophi.files import UserError, read_json, sha256_of_file
from nanophi.model_card import card as model_card
from nanophi.model_card import release as releases
from nanophi.model_card import secrets, signature, verify
from nanophi.model_card.shipped import read_records

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
    signing_key: Path | None = None,
    gguf: Sequence[str] = (),
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Publish a release folder on the Hub, or go on with a push that was cut off.

    Args:
        release: the folder that `release.build` wrote. The checkpoints of its branches are taken from the run
            directory around it.
        repo_id: `ORG/NAME`.
        public: make the repository public once everything is there; otherwise a new one is private, and one that
            exists stays as it is.
        dry_run: say what would go, and send nothing.
        signing_key: PEM file of a private key; if given, every revision is signed (`model.sig`).
        gguf: kinds of GGUF files to publish too, in a companion repository `ORG/NAME-GGUF` with the same tag.
        report: called with one line for each thing worth telling.

    Returns:
        `{"repo_id", "revisions": {name: {"files", "bytes", "commit"}}, "tag", "url"}`; in a dry run commits and url
        are None. With `gguf` also `"gguf"`: the same of the companion.

    Raises:
        UserError: if the release must not be published (training state, secrets, paths of this machine, files that
            are not what the manifest says, a card with placeholders), or the Hub refuses it.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo-id {repo_id}: expected ORG/NAME ({error})") from None
    if "/" not in repo_id:
        raise UserError(f"--repo-id {repo_id}: expected ORG/NAME")
    if not (release / releases.MANIFEST).is_file():
        raise UserError(f"{release} is not a release folder (no {releases.MANIFEST}); run `nanophi release` first")
    _refuse(release, problems(release))
    with tempfile.TemporaryDirectory(prefix="nanophi-push-") as scratch:
        folders = _revisions(release, repo_id, Path(scratch))
        repositories = {repo_id: folders}
        if gguf:
            from nanophi.model_card import gguf as llama

            # From what `main` will be: only there do the records name the repository that the files come from.
            llama.export(folders["main"], gguf, Path(scratch) / "gguf")
            repositories[f"{repo_id}-GGUF"] = {"main": Path(scratch) / "gguf"}
        for name, folder in (entry for revisions in repositories.values() for entry in revisions.items()):
            _refuse(name, problems(folder, release))
            if signing_key is not None:
                signature.sign(folder, signing_key)
        tag = read_json(release / "records" / "run.json")["tag"]
        results = [_announce(name, revisions, tag, dry_run, report) for name, revisions in repositories.items()]
        if dry_run:
            report(f"tag {tag}; nothing was sent (dry run)")
        else:
            for result in results:  # The model comes before what is made from it.
                _send(repositories[result["repo_id"]], result, public, report)
        return {**results[0], "gguf": results[1]} if gguf else results[0]


def _announce(
    repo_id: str, folders: dict[str, Path], tag: str, dry_run: bool, report: Callable[[str], None]
) -> dict[str, Any]:
    """What is to be sent to one repository, as `push` returns it; in a dry run also told, file by file."""
    result: dict[str, Any] = {"repo_id": repo_id, "revisions": {}, "tag": tag, "url": None}
    for name, folder in folders.items():
        sizes = {file: (folder / file).stat().st_size for file in releases.list_files(folder)}
        result["revisions"][name] = {"files": len(sizes), "bytes": sum(sizes.values()), "commit": None}
        if dry_run:
            report(f"{repo_id} {name}: {len(sizes)} files, {sum(sizes.values()):,} bytes")
            for file, size in sizes.items():
                report(f"    {size:>14,}  {file}")
    return result


def _refuse(what: Path | str, wrong: list[str]) -> None:
    if wrong:
        raise UserError(f"{what} is not fit to publish: {'; '.join(wrong)}")


def problems(folder: Path, release: Path | None = None) -> list[str]:
    """What must not be published, one line each, secrets named by file and kind only.

    Args:
        folder: what would be sent.
        release: where it was built, if that is elsewhere: its path must not be told either.
    """
    wrong = verify.file_problems(folder)
    for name in releases.list_files(folder):
        if TRAINING_STATE.search(name):
            wrong.append(f"{name} is training state")
    private = [folder, *([release] if release else [])]
    leaks = [
        f"{name} {'names' if found.startswith('a path') else 'holds'} {found}"
        for name in releases.list_files(folder)
        for found in secrets.found_in(_readable(folder / name), private)
    ]
    # What is wrong with a card is said in its words, which must not be those of a secret.
    if not leaks and (folder / "records").is_dir():
        wrong += verify.card_problems(folder, read_records(folder / "records"))
    return wrong + leaks


def _readable(path: Path) -> bytes:
    """What a reader could find in a file: everything, of weights the header."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            return file.read(int.from_bytes(file.read(8), "little"))
        return file.read()


def _revisions(release: Path, repo_id: str, scratch: Path) -> dict[str, Path]:
    """Name of each revision -> folder as it will be on the Hub; `main` last."""
    run = release.resolve().parent
    recipe = read_records(release / "records")["recipe.yaml"]
    described = read_json(release / "records" / "run.json")["revision"]
    folders = {}
    for entry in read_json(release / "revisions.json"):
        name = entry["revision"]
        checkpoint = run / "checkpoints" / name
        if name == described:
            continue
        if not checkpoint.is_dir():
            raise UserError(f"{checkpoint} is missing, which revisions.json lists; push from inside the run directory")
        model_card.build(run, scratch / f"{name}-card", checkpoint, repo_id)
        releases.build(run, checkpoint, scratch / f"{name}-card", scratch / name, recipe["release"]["dtype"])
        folders[name] = scratch / name
    releases.retarget(release, repo_id, scratch / "main")
    return {**folders, described: scratch / "main", "main": scratch / "main"}


def _send(folders: dict[str, Path], result: dict[str, Any], public: bool, report: Callable[[str], None]) -> None:
    """Bring one repository to what `folders` say; commits and url are added to `result`."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api, repo_id, tag = HfApi(), result["repo_id"], result["tag"]
    try:
        result["url"] = str(api.create_repo(repo_id, private=True, exist_ok=True))
        refs = api.list_repo_refs(repo_id)
        tagged = {entry.name: entry.target_commit for entry in refs.tags}
        if tag in tagged and not _is_there(api, repo_id, tagged[tag], folders["main"]):
            raise UserError(f"{repo_id} has a tag {tag} of another release; raise card.version in the recipe")
        first = api.list_repo_commits(repo_id)[-1].commit_id
        existing = {entry.name for entry in refs.branches}
        for name, folder in folders.items():
            if name not in existing:
                # From the empty first commit: a branch that was only begun must not show other weights.
                api.create_branch(repo_id, branch=name, revision=first, exist_ok=True)
            result["revisions"][name]["commit"] = _commit(api, repo_id, name, folder, report)
        if tag not in tagged:
            api.create_tag(repo_id, tag=tag, revision=result["revisions"]["main"]["commit"], exist_ok=True)
        if public:
            api.update_repo_settings(repo_id, private=False)
    except LocalTokenNotFoundError:
        raise UserError("no token for the Hub; run `hf auth login`, or set HF_TOKEN") from None
    except ValueError as error:
        if not str(error).startswith("Invalid metadata"):
            raise
        raise UserError(f"{repo_id}: the Hub refuses the card's metadata: {' '.join(str(error).split())}") from None
    except HfHubHTTPError as error:
        raise UserError(f"{repo_id}: the Hub answered: {str(error).splitlines()[0]}") from None
    except (HTTPError, OSError, RuntimeError) as error:
        # The client raises RuntimeError when an upload fails, and LocalEntryNotFoundError for want of an answer.
        if isinstance(error, RuntimeError) and not isinstance(error.__cause__, HTTPError | OSError):
            raise
        reason = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise UserError(f"{repo_id}: the connection failed ({reason[0]}); the same command goes on from here") from None
    report(f"{result['url']}: {', '.join(result['revisions'])}, tag {tag}")


def _is_there(api: HfApi, repo_id: str, revision: str, folder: Path) -> bool:
    """Whether a revision holds exactly this release: its manifest vouches for the rest."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        with tempfile.TemporaryDirectory() as scratch:
            there = api.hf_hub_download(repo_id, releases.MANIFEST, revision=revision, cache_dir=scratch)
            return sha256_of_file(Path(there)) == sha256_of_file(folder / releases.MANIFEST)
    except LocalEntryNotFoundError:
        raise  # No answer at all, though it is named like one.
    except EntryNotFoundError:
        return False


def _commit(api: HfApi, repo_id: str, branch: str, folder: Path, report: Callable[[str], None]) -> str:
    """Make a branch hold exactly `folder`, in one commit; returns its hash."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if _is_there(api, repo_id, branch, folder):
        report(f"{branch}: up to date")
        return str(api.model_info(repo_id, revision=branch).sha)
    files = releases.list_files(folder)
    there = api.list_repo_files(repo_id, revision=branch)
    stale = [name for name in there if name not in files and name != ".gitattributes"]
    head = api.model_info(repo_id, revision=branch).sha
    made = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ],
        commit_message=f"Release {branch}",
        revision=branch,
        parent_commit=head,  # Somebody else's commit in between makes this one fail, instead of mixing the two.
    )
    report(f"{branch}: sent")
    return str(made.oid)
