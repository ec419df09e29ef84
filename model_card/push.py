"""The verb `push`: publish a release, and beside it its quality scorer, its data and its GGUF files.

Everything is built, checked and planned before anything is created; repositories become public when all are whole. A
push touches only what an earlier push of the same run put there, unless it is forced. The comparison with the Hub and
the commits are in `upload.py`.
"""

import dataclasses
import functools
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.core.names import is_hub_id
from nanophi.core.options import Gguf, Json
from nanophi.model_card import card, checks, secrets, signature, upload
from nanophi.model_card import release as releases
from nanophi.model_card.companions import COMPANIONS, Companion, Source, recipe_of_run
from nanophi.model_card.manifest import FILES, MANIFEST, file_problems, list_files
from nanophi.model_card.metadata import LINKS
from nanophi.model_card.records import complete_records, read_records
from nanophi.model_card.upload import Report, Repository, RetryingApi
from nanophi.model_card.verify import find_release


def push(
    release: Annotated[Path, Argument(metavar="RELEASE", help="Release folder.")],
    repo_id: Annotated[str, Option(metavar="ORG/NAME", help="Repository on the Hub.")],
    public: Annotated[bool, Option("--public", help="Make it public once everything is uploaded.")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="List what would be sent, replaced and deleted; send nothing.")
    ] = False,
    force: Annotated[
        bool, Option("--force", help="Replace and delete another run, and files that no push put there.")
    ] = False,
    signing_key: Annotated[Path | None, Option(help="Sign every revision with this private key (PEM).")] = None,
    gguf: Gguf = None,
    scorer: Annotated[bool, Option("--scorer", help="Publish the quality scorer as ORG/NAME-quality.")] = False,
    data: Annotated[
        Literal["scores", "text"] | None,
        Option(help="Publish the documents' scores, or also their text, as the data set ORG/NAME-data."),
    ] = None,
    control: Annotated[
        str | None, Option(metavar="ORG/NAME", help="The control's model on the Hub, for the card to link.")
    ] = None,
    space: Annotated[
        bool, Option("--space", help="Make a page that runs its q8_0 file in the browser, the Space ORG/NAME-demo.")
    ] = False,
    new_version: Annotated[
        str | None, Option(metavar="ORG/NAME", help="The model that replaces this one, for the card to name.")
    ] = None,
    collection: Annotated[
        str | None, Option(metavar="TITLE", help="Collection to make, or to extend by all that is published here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Publish a release on the Hub, or resume its upload.

    Sends the main branch, a branch for each kept checkpoint and a tag; llama.cpp files go to ORG/NAME-GGUF. The
    repositories are private unless --public is given.

    Example: nanophi push runs/demo/release --repo-id ORG/nano-phi-demo --dry-run
    """
    from nanophi.model_card.gguf import parse_kinds  # with transformers, which takes a second

    kinds = parse_kinds(f"{gguf or ''}{',q8_0' if space else ''}")
    asked = {"scorer": scorer, "data": data, "gguf": kinds, "space": space}
    options = Options(repo_id, public, dry_run, force, signing_key, control, collection, new_version, asked)
    sent = publish(release, options, functools.partial(typer.echo, err=as_json))
    if as_json:
        typer.echo(json.dumps(sent))
    elif not dry_run:
        typer.echo("\n".join(sent))


IN_CARD = ("data", *LINKS)  # what the model's card links


@dataclasses.dataclass(frozen=True)
class Options:
    """The verb's options; those that ask for companions are in `asked`, by part."""

    repo_id: str
    public: bool = False
    dry_run: bool = False
    force: bool = False
    signing_key: Path | None = None
    control: str | None = None
    collection: str | None = None
    new_version: str | None = None
    asked: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """Raise `UserError` for what the Hub would not take."""
        if bad := [name for name in (self.repo_id, *self.companions().values()) if not is_hub_id(name)]:
            wrong = f"{bad[0]} is not ORG/NAME as the Hub takes it (at most 96 characters)"
            raise UserError(f"--repo-id {self.repo_id}: {wrong}")
        for option, name in (("--control", self.control), ("--new-version", self.new_version)):
            if name is not None and not is_hub_id(name):
                raise UserError(f"{option} {name} is not a Hub id like ORG/NAME")
            if name == self.repo_id:
                raise UserError(f"{option} {name} is the model itself; name another one")
        if self.collection is not None and not 0 < len(self.collection.strip()) < 60:
            raise UserError("--collection: the Hub takes a title of 1 to 59 characters")

    def companions(self) -> dict[Companion, str]:
        """The companions that are asked for, with their Hub ids."""
        return {entry: f"{self.repo_id}-{entry.suffix}" for entry in COMPANIONS if self.asked.get(entry.part)}


def publish(release: Path, options: Options, report: Report = typer.echo) -> list[Any]:
    """Publish a release folder on the Hub, or resume a push that was cut off.

    Returns the URLs; in a dry run what would happen to each repository, as `upload.described` has it.
    """
    options.check()
    if not release.is_dir():
        raise UserError(f"folder {release} does not exist")
    find_release(str(release))
    with tempfile.TemporaryDirectory(prefix="nanophi-push-") as temporary:
        scratch, api = Path(temporary), upload.RetryingApi(report)
        repositories = _build(api, release, options, scratch, report)
        for repository in repositories:
            _plan(api, repository, options, scratch / "there", report)
        if options.dry_run:
            report(f"tag {repositories[0].tag}; nothing was sent (dry run)")
            return [upload.described(repository) for repository in repositories]
        urls: list[str] = []
        steps: list[Callable[[Repository], Any]] = [
            lambda repository: upload.check_metadata(repository, report),
            lambda repository: urls.append(upload.send(api, repository, report)),
            lambda repository: api.update_repo_settings(repository.name, repo_type=repository.kind, private=False),
        ]
        for step in steps if options.public else steps[:2]:  # of all repositories, before the next step of any
            for repository in repositories:
                with upload.one_line_errors(repository.name):
                    step(repository)
        if options.collection is not None:
            notes = ["The model", *(companion.note for companion in options.companions())]
            items = [(entry.name, entry.kind, note) for entry, note in zip(repositories, notes, strict=True)]
            if options.control:
                items.append((options.control, "model", "The control, trained on unfiltered text"))
            with upload.one_line_errors(f"collection {options.collection}"):
                urls.append(upload.collect(api, options.collection, items, options.public, report))
        return urls


def _build(api: RetryingApi, release: Path, options: Options, scratch: Path, report: Report) -> list[Repository]:
    """The folders of every repository as they will be on the Hub, the model's first; all are fit to publish."""
    companions = options.companions()
    recipe: Any = recipe_of_run(release) if any(entry.of_run for entry in companions) else None
    _refuse(release, problems(release))
    with complete_records():
        tag = read_json(release / "records" / "run.json")["tag"]
    links = _links_there(api, options, scratch / "there")
    links |= {entry.part: name for entry, name in companions.items() if entry.part in IN_CARD}
    links |= {part: name for part in ("control", "new_version") if (name := getattr(options, part))}
    repositories = [Repository(options.repo_id, _revisions(release, options.repo_id, scratch, report, links), tag)]
    main = repositories[0].revisions["main"]
    source = Source(main, release.resolve().parent, recipe, options.repo_id, links, options.asked)
    for entry, name in companions.items():
        entry.write(source, name, scratch / entry.part)
        repositories.append(Repository(name, {"main": scratch / entry.part}, tag, entry.kind))
    for repository, written in zip(repositories, [FILES, *(entry.written for entry in companions)], strict=True):
        for branch, folder in repository.revisions.items():
            _refuse(f"{repository.name} {branch}", problems(folder, release, written))
            if options.signing_key is not None:
                signature.sign(folder, options.signing_key)
    return repositories


def _plan(api: RetryingApi, repository: Repository, options: Options, scratch: Path, report: Report) -> None:
    """Find what changes in one repository; shown, and refused where that must not be. Nothing is sent."""
    try:
        with upload.one_line_errors(repository.name):
            upload.plan(api, repository, scratch)
    except UserError as error:
        if not options.dry_run or "connection failed" not in str(error):
            raise
        report(f"{repository.name}: the Hub cannot be reached; files are listed as if there were none")
    upload.show(repository, options.dry_run, report)
    if not options.force and (refused := upload.refusal(repository)):
        if not options.dry_run:
            raise UserError(refused)
        report(f"refused without --force: {refused.partition('; choose another')[0]}")


def problems(folder: Path, release: Path | None = None, written: re.Pattern[str] = FILES) -> list[str]:
    """What in a folder must not be published, one line each, secrets named by file and kind only."""
    wrong, private = file_problems(folder, written=written), [folder, *([release] if release else [])]
    leaks = [
        f"{name} {'names' if found.startswith('a path') else 'holds'} {found}"
        for name in list_files(folder)
        for found in secrets.found_in_file(folder / name, private)
    ]
    # What is wrong with a card is told in its words, which must not be those of a secret.
    if not leaks and (folder / "records").is_dir():
        wrong += checks.card(folder, read_records(folder / "records"))[0]
    return wrong + leaks


def _refuse(what: Path | str, wrong: list[str]) -> None:
    if wrong:
        raise UserError(f"{what} is not fit to publish: {'; '.join(wrong)}")


def _links_there(api: RetryingApi, options: Options, scratch: Path) -> dict[str, str]:
    """What the card on the Hub links already: published by an earlier push, it stays linked."""
    try:
        with upload.one_line_errors(options.repo_id):
            record = upload.read_file(api, options.repo_id, "records/run.json", "main", scratch)
        links = json.loads(record or b"{}").get("links", {})
        return {key: name for key, name in links.items() if key in IN_CARD and is_hub_id(name)}
    except (UserError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError) and not options.dry_run:
            raise
        return {}  # A repository of somebody else is refused later.


def _revisions(release: Path, repo_id: str, scratch: Path, report: Report, links: dict[str, str]) -> dict[str, Path]:
    """Name of each revision -> folder as it will be on the Hub, `main` last; branches need the run's checkpoints."""
    run = release.resolve().parent
    records = read_records(release / "records")
    dtype, described = records["recipe.yaml"]["release"]["dtype"], records["run.json"]["revision"]
    trained = read_json(release / MANIFEST)["provenance"]["stages"].get("training")
    stages = read_json(run / "record.json")["stages"] if (run / "record.json").is_file() else {}
    same_run = stages.get("training", {}).get("key") == trained
    folders = {}
    for name in (entry["revision"] for entry in read_json(release / "revisions.json")):
        checkpoint, made = run / "checkpoints" / name, scratch / f"{name}-card"
        if name == described:
            continue
        if not same_run or not checkpoint.is_dir():
            report(f"{name}: its checkpoint is not in the run directory around {release}; no branch is published")
            continue
        card.build(run, made, checkpoint, repo_id)
        releases.build(run, checkpoint, made, scratch / name, dtype)
        folders[name] = scratch / name
    releases.copy_for_repo(release, repo_id, scratch / "main", links)
    return {**folders, described: scratch / "main", "main": scratch / "main"}
