"""The sources of a recipe: which files one has, the parts they are cut into, and the documents of a part.

A source is the embedded corpus, files (a path, a folder or a glob), or a dataset in Hub layout (a folder, one that
`save_to_disk` wrote, or an id on the Hub), of which `datasets` lists the files of a split.
"""

import errno
import glob
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanophi.core.errors import UserError, one_line, printable, user_errors
from nanophi.core.files import read_json, write_json
from nanophi.core.formatting import integer, percent
from nanophi.core.inputs import Contents, resolve_commit
from nanophi.core.names import is_hub_id, local, shown, walk
from nanophi.core.recipe import Source
from nanophi.data import installed_docs
from nanophi.data.documents import SPLITS
from nanophi.data.formats import KNOWN, PART_BYTES, READERS, Reader, Row, Unusable, clean, format_of

_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
REFUSED = 20
"""Unusable documents that a part names."""

Part = tuple[tuple[str, Any], ...]
"""What one process reads: files, each with the piece of it that its reader gave; or groups of the embedded corpus."""


class Document(NamedTuple):
    """A usable document: its `file`, its source's `label`, clean UTF-8 `text`, and the quality column's number."""

    file: str
    label: str
    text: bytes
    score: float | None


class Tally:
    """`counts` by label: documents `read`, the usable ones' `bytes`, and those dropped, by reason."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.refused: list[dict[str, str]] = []

    def drop(self, label: str, where: str, bad: Unusable) -> None:
        """Count a document that cannot be used; the first ones are named."""
        self.counts[label][bad.reason] += 1
        if bad.reason != "empty" and len(self.refused) < REFUSED:
            self.refused.append({"document": where, "reason": bad.reason, "remedy": printable(bad.remedy)})

    def total(self) -> Counter[str]:
        return sum(self.counts.values(), Counter())


def dropped(counts: Counter[str]) -> Counter[str]:
    """Of counts of documents those that were dropped, by reason: what was read and not kept, always."""
    return Counter({what: count for what, count in counts.items() if what not in ("read", "bytes", *SPLITS)})


def reasons(counts: Counter[str]) -> str:
    """`near_duplicate 1,200, empty 3`."""
    return ", ".join(f"{reason} {integer(count)}" for reason, count in counts.most_common() if count)


def check_usable(
    name: str, counts: Counter[str], refused: Sequence[dict[str, str]], max_dropped: float, what: str = "documents"
) -> None:
    """Raise `UserError` for a source without a usable document, or with too many unusable ones (empty apart)."""
    total, lost = counts["read"], dropped(counts)
    if total == 0:
        raise UserError(f"source {name} holds no {what}")
    share = (lost.total() - lost["empty"]) / total
    if share <= max_dropped and lost.total() < total:
        return
    usable = "none" if lost.total() == total else f"only {percent(1 - share)}"
    limit = f" (data.max_dropped is {max_dropped:g})" * (lost.total() < total)
    example = "".join(f"; the first is {first['document']}: {first['remedy']}".rstrip(": ") for first in refused[:1])
    raise UserError(f"source {name}: {usable} of {integer(total)} {what} can be used{limit}: {reasons(lost)}{example}")


def name_of(source: Source) -> str:
    """A source's own name, which its documents have unless a column names another."""
    return shown(source.name or source.hub or source.files or "embedded")


def by_name(sources: Sequence[Source], origins: Mapping[str, Sequence[int]]) -> dict[str, Source]:
    """A source of every name, from the numbers of those that give it. Raises `UserError` if weight or phase differ."""
    found = {}
    for name, numbers in origins.items():
        named = [s for s in map(sources.__getitem__, numbers) if not s.heldout] or [sources[numbers[0]]]
        for key in ("weight", "phase"):
            if len({getattr(source, key) for source in named}) > 1:
                raise UserError(f"two sources of different {key} give the same name '{name}'; set their 'name'")
        found[name] = named[0]
    return found


def of_documents(sources: Sequence[Source], documents: Path) -> dict[str, Source]:
    """`by_name` of a run's documents: what they were checked by may have been changed since."""
    read = read_json(documents / "documents.json")["sources"]
    return by_name(sources, {name: one.get("origins", [one["origin"]]) for name, one in read.items()})


def locate(source: Source) -> list[str]:
    """The files of a source that is not embedded, as paths or `hf://` addresses. Raises `UserError` if none."""
    if source.files:
        return _locate_files(source)
    if is_on_hub(source):
        return _locate_on_hub(source)
    folder = local(str(source.hub))
    return _locate_saved(source, folder) or _locate_split(source, str(folder))


def is_on_hub(source: Source) -> bool:
    """Whether a dataset is on the Hub, and not a folder here. Raises `UserError` if its name is neither."""
    path = local(str(source.hub))
    if path.is_dir() and source.revision is not None:
        raise UserError(f"dataset {source.hub} is a folder here, which has no revisions; leave out 'revision'")
    if not path.is_dir() and (path.exists() or not is_hub_id(str(source.hub))):
        raise UserError(f"dataset {source.hub} is no folder and no Hub id like ORG/NAME; name files by 'files'")
    return not path.is_dir()


def _locate_files(source: Source) -> list[str]:
    given = local(str(source.files))
    found = [given] if os.path.lexists(given) else map(Path, sorted(_glob(given)))
    files: list[str] = []
    for path in found:
        if path.is_dir():
            files += _locate_saved(source, path) or _files_below(path)
        elif _is_read(path):
            files.append(str(path))
        else:
            raise UserError(f"source {shown(path)}: not a {KNOWN} file")
    if not files:
        raise UserError(f"source {source.files}: no {KNOWN} file is there")
    return list(dict.fromkeys(files))


def _glob(pattern: Path) -> list[str]:
    """What a pattern stands for. Raises PermissionError for a folder that `glob` would pass over in silence."""
    for depth in range(1, len(pattern.parts)):
        above, needed = str(Path(*pattern.parts[:depth])), os.X_OK
        if glob.has_magic(pattern.parts[depth]):
            needed |= os.R_OK
        for folder in glob.glob(above, recursive=True):  # noqa: PTH207 (may be absolute)
            if Path(folder).is_dir() and not os.access(folder, needed):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
    return glob.glob(str(pattern), recursive=True)  # noqa: PTH207


def _files_below(folder: Path) -> list[str]:
    found = [path for path in walk(folder) if _is_read(path) and path.name not in _METADATA]
    # The card of a dataset is not one of its documents.
    has_card = not all(READERS[format_of(path.name)].one_document for path in found)
    return [str(path) for path in found if not (has_card and path.name == "README.md")]


def _is_read(path: Path) -> bool:
    """Whether a file is in a format that is read. Raises `UserError` for a pipe, which would never end, or the like."""
    if not path.is_file():
        raise UserError(f"source {shown(path)} is a dangling link, or not a regular file; remove it")
    return format_of(path.name) in READERS


def _locate_saved(source: Source, folder: Path) -> list[str]:
    """The files of a folder that `save_to_disk` wrote (`datasets.Dataset`, or a `DatasetDict` of splits), if it did."""
    splits = folder / "dataset_dict.json"
    if splits.exists():
        _check_split(source, folder, read_json(splits).get("splits", []))
        folder = folder / source.split
    state = read_json(folder / "state.json") if (folder / "state.json").exists() else {}
    return [str(folder / entry["filename"]) for entry in state.get("_data_files", [])]


def _check_split(source: Source, path: str | Path, splits: Collection[str]) -> None:
    if source.split not in splits:
        known = ", ".join(splits) or "no files"
        raise UserError(f"dataset {shown(path)} has no split '{source.split}'; it has {known}")


def _locate_split(source: Source, path: str) -> list[str]:
    """The files that `datasets` finds for a split of a folder or of a repository on the Hub."""
    import datasets

    with user_errors(f"dataset {shown(path)} cannot be loaded; files can be named by 'files'"):
        builder = datasets.load_dataset_builder(path, source.config, revision=source.revision)
    splits = {str(split): files for split, files in (builder.config.data_files or {}).items()}
    _check_split(source, path, splits)
    files = [str(file) for file in splits[source.split]]
    if unknown := [file for file in files if format_of(file) not in READERS]:
        raise UserError(f"dataset {shown(path)}: {shown(Path(unknown[0]).name)} is not a {KNOWN} file")
    return files


def _locate_on_hub(source: Source) -> list[str]:
    """The files of a split of a dataset on the Hub: `hf://` addresses when streaming, else in the Hub's cache here."""
    import huggingface_hub

    repo_id = str(source.hub)
    commit = resolve_commit(repo_id, source.revision, "dataset")
    start = f"hf://datasets/{repo_id}@{commit}/"
    # A commit does not change, so its files need no second look, and a second run needs no network.
    listed = huggingface_hub.cached_assets_path("nanophi", repo_id, commit) / f"{source.config}-{source.split}.json"
    if not listed.exists():
        found = _locate_split(source.model_copy(update={"revision": commit}), repo_id)
        write_json(listed, [file.removeprefix(start) for file in found])
    files = read_json(listed)
    if source.streaming:
        return [start + file for file in files]
    with user_errors(f"dataset {repo_id} cannot be downloaded"):
        download = huggingface_hub.hf_hub_download
        return [download(repo_id, file, repo_type="dataset", revision=commit) for file in files]


def plan(source: Source, score: str | None) -> list[Part]:
    """The parts of a source; of one with `max_documents` a single one. `score` is the column with a quality score."""
    if source.embedded:
        if score:
            raise UserError(f"the embedded corpus has no column '{score}'; use quality.scorer 'linear' or 'model:'")
        groups = [(group, None) for group in installed_docs.groups()]
        parts: list[Part] = [tuple(groups[start : start + 16]) for start in range(0, len(groups), 16)]
    else:
        files = locate(source)
        parts = _parts(source, files, score)
        if source.separator and not any(reader(source, file).one_document for file in files):
            raise UserError(f"source {name_of(source)}: 'separator' is for text files (.txt, .md), and it has none")
    if source.max_documents and parts:
        parts = [tuple(piece for part in parts for piece in part)]
    return parts


def _parts(source: Source, files: Sequence[str], score: str | None) -> list[Part]:
    """The pieces of files in order, in parts of about `PART_BYTES`."""
    parts: list[Part] = []
    begun: list[tuple[str, Any]] = []
    size = 0
    for file in files:
        pieces = reader(source, file, score).pieces()
        # How large a file on the Hub is, only the Hub knows.
        whole = len(pieces) == 1 and not file.startswith("hf://")
        for piece in pieces:
            begun.append((file, piece))
            size += Path(file).stat().st_size if whole else PART_BYTES
            if size >= PART_BYTES:
                parts.append(tuple(begun))
                begun, size = [], 0
    return [*parts, tuple(begun)] if begun else parts


def reader(source: Source, file: str, score: str | None = None) -> Reader:
    """The reader of a file that `locate` found."""
    return READERS[format_of(file)](file, source, score)


def fingerprint(source: Source, contents: Contents) -> Any:
    """JSON-able identity of what a source holds now: versions, a commit, or names and hashes of files."""
    if source.embedded:
        return installed_docs.inputs()
    if source.hub and is_on_hub(source):
        commit = resolve_commit(source.hub, source.revision, "dataset")
        return {"hub": source.hub, "config": source.config, "split": source.split, "commit": commit}
    return contents.files(Path(file) for file in locate(source))


def read(source: Source, part: Part, score: str | None, tally: Tally) -> Iterator[Document]:
    """The usable documents of a part, in order; the others are counted in `tally`."""
    default = _label(name_of(source))
    for file, row in itertools.islice(_rows(source, part, score), source.max_documents):
        label = default if row.label is None else _label(row.label) or default
        tally.counts[label]["read"] += 1
        if isinstance(row.text, Unusable):
            tally.drop(label, row.where, row.text)
            continue
        tally.counts[label]["bytes"] += len(row.text)
        yield Document(shown(file), label, row.text, row.score)


def _rows(source: Source, part: Part, score: str | None) -> Iterator[tuple[str, Row]]:
    for file, piece in part:
        if source.embedded:
            texts = enumerate(installed_docs.documents(file))
            yield from ((file, Row(f"{file}:{number}", clean(text), name)) for number, (name, text) in texts)
        else:
            yield from ((file, row) for row in guarded(file, reader(source, file, score).rows(piece)))


def guarded(file: str, rows: Iterable[Any]) -> Iterator[Any]:
    """Rows, which begin with where they are; whatever a decoder raises of a damaged file names the last of them."""
    last = "its beginning"
    try:
        for row in rows:
            last = row[0]
            yield row
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{shown(file)} cannot be read after {last} ({one_line(error)})") from error


def _label(value: Any) -> str:
    """A source's name in one line of valid text."""
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    return printable(" ".join(text.split()))
