"""The sources of a recipe: which files one has, the parts they are cut into, and the documents of a part.

A source is the embedded corpus, files (a path, a folder or a glob), or a dataset in Hub layout (a folder, one that
`save_to_disk` wrote, or an id on the Hub). `datasets` says which files a split of the latter has; all files are read
by `nanophi.data.formats`, so that a format is the same everywhere.
"""

from __future__ import annotations

import datetime
import glob
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from nanophi.core.errors import UserError, one_line, printable, user_errors
from nanophi.core.files import read_json, write_json
from nanophi.core.formatting import integer, percent
from nanophi.core.inputs import Contents, resolve_commit
from nanophi.core.names import is_hub_id, local, shown, walk
from nanophi.core.recipe import Source
from nanophi.data import formats, installed_docs
from nanophi.data.compression import open_file
from nanophi.data.formats import MAXIMUM_DOCUMENT_BYTES, Row, TextColumn, Unusable

PART_BYTES = 16 << 20
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
REFUSED = 20
"""Unusable documents that a part names."""

Part = tuple[Any, ...]
"""What one process reads: `("embedded", groups)`, `("parquet", file, first row group, last)`, `(format, file)`,
`("text", files)` or, of a source with `max_documents`, `("all", parts)`."""


class Located(NamedTuple):
    """The files of a source in order, as paths or `hf://` addresses, and names of files that are none of its."""

    files: list[str]
    others: list[str]


class Document(NamedTuple):
    """A usable document: its `file`, its source's `label`, clean UTF-8 `text`, and the quality column's number."""

    file: str
    label: str
    text: bytes
    score: float | None


class Tally:
    """What was read and dropped, by label and reason: documents read are documents kept and dropped, always."""

    def __init__(self) -> None:
        self.read: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.dropped: dict[str, Counter[str]] = {}
        self.refused: list[dict[str, str]] = []

    def drop(self, label: str, where: str, bad: Unusable, column: TextColumn) -> None:
        """Count a document that cannot be used; the first ones are named."""
        self.dropped.setdefault(label, Counter())[bad.reason] += 1
        if bad.reason != "empty" and len(self.refused) < REFUSED:
            self.refused.append({"document": where, "reason": bad.reason, "remedy": printable(column.remedy(bad))})

    def dropped_total(self) -> Counter[str]:
        """Unusable documents by reason."""
        return sum(self.dropped.values(), Counter())

    def summary(self) -> dict[str, Any]:
        """JSON-able: read, bytes, dropped, refused."""
        dropped = {label: dict(reasons) for label, reasons in self.dropped.items()}
        return {"read": dict(self.read), "bytes": dict(self.bytes), "dropped": dropped, "refused": self.refused}


def reasons(counts: Counter[str]) -> str:
    """`near_duplicate 1,200, empty 3`."""
    return ", ".join(f"{reason} {integer(count)}" for reason, count in counts.most_common() if count)


def check_usable(
    name: str, total: int, dropped: Counter[str], refused: Sequence[dict[str, str]], max_dropped: float
) -> None:
    """Raise `UserError` for a source that has no usable document, or too many unusable ones (empty ones apart).

    Args:
        name: of the source.
        total: documents read.
        dropped: unusable ones by reason.
        refused: the first of them, as `Tally` names them.
        max_dropped: largest share of unusable ones.
    """
    if total == 0:
        raise UserError(f"source {name} holds no documents")
    nothing = dropped.total() == total
    share = (dropped.total() - dropped["empty"]) / total
    if share <= max_dropped and not nothing:
        return
    what = "none" if nothing else f"only {percent(1 - share)}"
    limit = "" if nothing else f" (data.max_dropped is {max_dropped:g})"
    example = ""
    if refused:
        example = f"; the first is {refused[0]['document']}" + (refused[0]["remedy"] and f": {refused[0]['remedy']}")
    raise UserError(
        f"source {name}: {what} of {integer(total)} documents can be used{limit}: {reasons(dropped)}{example}"
    )


def name_of(source: Source) -> str:
    """What a source is called where its documents do not say."""
    return shown(source.name or source.hub or source.files or "embedded")


def weights(sources: Sequence[Source], origins: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Every name's weight, from the numbers of the sources that give it. Raises `UserError` if they differ."""
    for name, numbers in origins.items():
        if len({sources[number].weight for number in numbers}) > 1:
            raise UserError(f"two sources of different weight give the same name '{name}'; set their 'name'")
    return {name: sources[numbers[0]].weight for name, numbers in origins.items()}


# Which files


def locate(source: Source) -> Located:
    """The files of a source that is not embedded. Raises `UserError` if there are none, or for a dangling link."""
    if source.files:
        return _locate_files(source)
    if is_on_hub(source):
        return _locate_on_hub(source)
    folder = local(str(source.hub))
    return _locate_saved(source, folder) or _locate_split(source, str(folder))


def is_on_hub(source: Source) -> bool:
    """Whether a dataset is on the Hub, and not a folder here. Raises `UserError` if its name is neither."""
    if local(str(source.hub)).is_dir():
        if source.revision is not None:
            raise UserError(f"dataset {source.hub} is a folder here, which has no revisions; leave out 'revision'")
        return False
    if local(str(source.hub)).exists():
        raise UserError(f"dataset {source.hub} cannot be loaded: it is a file; name it by 'files'")
    if not is_hub_id(str(source.hub)):
        raise UserError(f"dataset {source.hub} cannot be loaded: no such folder, and not a Hub id like ORG/NAME")
    return True


def _locate_files(source: Source) -> Located:
    pattern = str(local(str(source.files)))
    paths = [Path(pattern)] if Path(pattern).exists() or Path(pattern).is_symlink() else _glob(pattern)
    files: dict[Path, None] = {}
    others: list[str] = []
    for path in paths:
        if path.is_dir():
            saved = _locate_saved(source, path)
            inside = [Path(file) for file in saved.files] if saved else _files_below(path, others)
            if path == Path(pattern) and not inside:
                raise UserError(f"source {source.files}: the folder holds no {formats.KNOWN} file{_shown_some(others)}")
            files.update(dict.fromkeys(inside))
        elif formats.format_of(path.name) is None:
            raise UserError(f"source {shown(path)}: not a {formats.KNOWN} file")
        else:
            _check_file(path)
            files[path] = None
    if not files:
        raise UserError(f"source {source.files}: no such file or folder")
    return Located([str(path) for path in files], others)


def _glob(pattern: str) -> list[Path]:
    # `Path.glob` refuses absolute patterns.
    found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    if not found and "[" in pattern:  # names have brackets more often than patterns do
        found = sorted(glob.glob(re.sub(r"\[", "[[]", pattern), recursive=True))  # noqa: PTH207
    return [Path(path) for path in found]


def _files_below(folder: Path, others: list[str]) -> list[Path]:
    """Every file below a folder in a format that is read, sorted; the names of the rest go to `others`."""
    found: list[Path] = []
    for path in walk(folder):
        _check_file(path)
        if formats.format_of(path.name) is not None and path.name not in _METADATA:
            found.append(path)
        else:
            others.append(shown(path.name))
    # The card of a dataset is not one of its documents.
    if any(formats.format_of(path.name) != "text" for path in found):
        found = [path for path in found if path.name != "README.md"]
    return found


def _check_file(path: Path) -> None:
    """Raise `UserError` for a link that leads nowhere, or for what is no file (reading a pipe would never end)."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"source {shown(path)} is a dangling link to {shown(path.readlink())}; fix or remove it")
    if not path.is_file():
        raise UserError(f"source {shown(path)} is not a regular file; remove it")


def _shown_some(names: Sequence[str]) -> str:
    return f", but {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""


def _locate_saved(source: Source, folder: Path) -> Located | None:
    """The files of a folder that `save_to_disk` wrote (`datasets.Dataset`, or a `DatasetDict` of splits)."""
    splits = folder / "dataset_dict.json"
    if splits.exists():
        names = read_json(splits).get("splits", [])
        if source.split not in names:
            raise UserError(f"dataset {shown(folder)} has no split '{source.split}'; it has {', '.join(names)}")
        folder = folder / source.split
    state = folder / "state.json"
    if not state.exists() or "_data_files" not in read_json(state):
        return None
    if source.config is not None:
        raise UserError(f"dataset {shown(folder)} was saved by `save_to_disk`, without configs; leave out 'config'")
    return Located([str(folder / entry["filename"]) for entry in read_json(state)["_data_files"]], [])


def _locate_split(source: Source, path: str) -> Located:
    """The files that `datasets` finds for a split of a folder or of a repository on the Hub."""
    import datasets

    problem = f"dataset {shown(path)} cannot be loaded"
    with user_errors(problem):
        try:
            builder = datasets.load_dataset_builder(path, source.config, revision=source.revision)
        except RuntimeError as error:
            raise UserError(f"{problem}: {one_line(error)}; name its data files by 'files'") from None
    splits = {str(split): files for split, files in (builder.config.data_files or {}).items()}
    if source.split not in splits:
        raise UserError(
            f"dataset {shown(path)} has no split '{source.split}'; it has {', '.join(splits) or 'no files'}"
        )
    others = []
    if Path(path).is_dir() and source.config is None:
        # Of a folder with files in several formats it takes the ones that most have.
        used = {str(Path(file).resolve()) for files in splits.values() for file in files if "://" not in file}
        others = [shown(file.name) for file in _files_below(Path(path), []) if str(file.resolve()) not in used]
    files = [str(file) for file in splits[source.split]]
    for file in files:
        if formats.format_of(file) is None:
            raise UserError(f"dataset {shown(path)}: {shown(Path(file).name)} is not a {formats.KNOWN} file")
    return Located(files, others)


def _locate_on_hub(source: Source) -> Located:
    """The files of a split of a dataset on the Hub: `hf://` addresses when streaming, else in the Hub's cache here."""
    import huggingface_hub

    repo_id = str(source.hub)
    commit = resolve_commit(repo_id, source.revision, "dataset")
    # A commit does not change, so its files need no second look, and a second run needs no network.
    listed = huggingface_hub.cached_assets_path("nanophi", repo_id, commit) / f"{source.config}-{source.split}.json"
    if not listed.exists():
        located = _locate_split(source.model_copy(update={"revision": commit}), repo_id)
        start = f"hf://datasets/{repo_id}@{commit}/"
        write_json(listed, [file.removeprefix(start) for file in located.files])
    files = read_json(listed)
    if source.streaming:
        return Located([f"hf://datasets/{repo_id}@{commit}/{file}" for file in files], [])
    with user_errors(f"dataset {repo_id} cannot be downloaded"):
        download = huggingface_hub.hf_hub_download
        return Located([download(repo_id, file, repo_type="dataset", revision=commit) for file in files], [])


# The parts


def plan(source: Source, score: str | None) -> tuple[list[Part], list[str]]:
    """The parts of a source, and the names of files beside its own that are not read.

    A source with `max_documents` is one part, whose reading stops there.

    Args:
        source: the recipe's entry.
        score: the column that holds a quality score, if one is used.
    """
    if source.embedded:
        if score:
            raise UserError(f"the embedded corpus has no column '{score}'; use quality.scorer 'linear' or 'model:'")
        groups = installed_docs.groups()
        step = len(groups) if source.max_documents else 16
        return [("embedded", tuple(groups[start : start + step])) for start in range(0, len(groups), step)], []
    located = locate(source)
    parts: list[Part] = []
    texts: list[str] = []
    for file in located.files:
        kind = str(formats.format_of(file))
        if kind == "parquet":
            parts.extend(_plan_parquet(file, source, score))
        elif kind == "text" and not source.separator:
            texts.append(file)
            if sum(Path(text).stat().st_size for text in texts if not text.startswith("hf://")) >= PART_BYTES:
                parts.append(("text", tuple(texts)))
                texts = []
        else:
            parts.append((kind, (file,) if kind == "text" else file))
    if texts:
        parts.append(("text", tuple(texts)))
    plain = any(part[0] == "text" for part in parts)
    column = score or source.source_column
    if plain and column:
        raise UserError(f"source {name_of(source)}: text files have no column '{column}'")
    if source.separator and not plain:
        raise UserError(f"source {name_of(source)}: 'separator' is for text files (.txt, .md), and it has none")
    return [("all", tuple(parts))] if source.max_documents and parts else parts, located.others


def _plan_parquet(file: str, source: Source, score: str | None) -> list[Part]:
    with user_errors(f"{shown(file)} is not a whole parquet file"), pq.ParquetFile(open_file(file)) as table:
        formats.check_columns(shown(file), table.schema_arrow.names, source, score)
        sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]
    parts: list[Part] = []
    first, size = 0, 0
    for group, bytes_of_group in enumerate(sizes):
        size += bytes_of_group
        if size >= PART_BYTES or group == len(sizes) - 1:
            parts.append(("parquet", file, first, group + 1))
            first, size = group + 1, 0
    return parts


def fingerprint(source: Source, contents: Contents) -> Any:
    """JSON-able identity of what a source holds now: versions, a commit, or names and hashes of files."""
    if source.embedded:
        return installed_docs.inputs()
    if source.hub and is_on_hub(source):
        commit = resolve_commit(source.hub, source.revision, "dataset")
        return {"hub": source.hub, "config": source.config, "split": source.split, "commit": commit}
    return contents.files(Path(file) for file in locate(source).files)


# The documents


def read(source: Source, part: Part, score: str | None, tally: Tally) -> Iterator[Document]:
    """The usable documents of a part, in order; the others are counted in `tally`.

    Raises:
        UserError: naming the file, for whatever a library says of a damaged one.
    """
    column = TextColumn(source.text_column)
    default = _label(name_of(source))
    for number, (file, row) in enumerate(_rows(source, part, score)):
        if source.max_documents is not None and number >= source.max_documents:
            break
        label = default if row.label is None else _label(row.label) or default
        tally.read[label] += 1
        text = _clean(row.text)
        if isinstance(text, Unusable):
            tally.drop(label, row.where, text, column)
            continue
        tally.bytes[label] += len(text)
        yield Document(file, label, text, None if score is None else _score(row, score))


def _rows(source: Source, part: Part, score: str | None) -> Iterator[tuple[str, Row]]:
    """The rows of a part, each with its file's name."""
    kind, what = part[0], part[1]
    if kind == "all":
        for inner in what:
            yield from _rows(source, inner, score)
    elif kind == "embedded":
        for group in what:
            for number, (name, text) in enumerate(installed_docs.documents(group)):
                yield group, Row(f"{group}:{number}", text, name)
    else:
        for file in what if kind == "text" else (what,):
            last, shown_file = "its beginning", shown(file)
            try:
                for row in _rows_of_file(kind, file, part, source, score):
                    last = row.where
                    yield shown_file, row
            except UserError:
                raise
            except Exception as error:  # of a damaged file a decoder raises anything
                hint = "; compress it again without --long" if "requires too much memory" in str(error) else ""
                message = f"{shown_file} cannot be read after {last} ({one_line(error)}){hint}"
                raise UserError(message) from error


def _rows_of_file(kind: str, file: str, part: Part, source: Source, score: str | None) -> Iterator[Row]:
    if kind == "text":
        return formats.text_rows(file, source.separator)
    if kind == "parquet":
        return formats.parquet_rows(file, range(part[2], part[3]), source, score)
    rows = {"arrow": formats.arrow_rows, "lines": formats.line_rows, "json": formats.json_rows, "csv": formats.csv_rows}
    return rows[kind](file, source, score)


def _label(value: Any) -> str:
    """A source's name in one line of valid text."""
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    return printable(" ".join(text.split()))


def _clean(text: Any) -> bytes | Unusable:
    """A document as UTF-8: line ends are `\n`; NUL, byte-order marks and space around it are gone."""
    if isinstance(text, bytes):
        if len(text) > MAXIMUM_DOCUMENT_BYTES:
            return Unusable("oversize")
        try:
            text = text.decode()
        except UnicodeDecodeError:
            return Unusable("invalid_utf8")
    if isinstance(text, Unusable):
        return text
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").replace("\ufeff", "")
    try:
        encoded = text.strip().encode()
    except UnicodeEncodeError:  # lone surrogates, which JSON can spell
        return Unusable("invalid_utf8")
    if not encoded:
        return Unusable("empty")
    return Unusable("oversize") if len(encoded) > MAXIMUM_DOCUMENT_BYTES else encoded


def _score(row: Row, column: str) -> float:
    """A score as a number. Raises `UserError` that calls anything else what it is."""
    value = row.score
    try:
        if value is None:
            problem = "is null"
        elif isinstance(value, str):
            problem = f"holds text ({value[:40]!r})"
        elif isinstance(value, datetime.date | datetime.time | datetime.timedelta):
            problem = f"holds a time ({value})"
        elif isinstance(value, list | dict | bytes):
            problem = (
                f"holds {'an object' if isinstance(value, dict) else 'a list' if isinstance(value, list) else 'bytes'}"
            )
        elif math.isfinite(number := float(value)):
            return number
        else:
            problem = f"is {number}"
    except OverflowError:
        problem = "is too large for a score"
    except (TypeError, ValueError):
        problem = f"holds {type(value).__name__}"
    raise UserError(f"{row.where} has no quality score: column '{column}' {problem}; a score is a number")
