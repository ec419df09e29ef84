"""Readers: a class for each format that a source's files may have, which yields the file's rows.

`READERS`, at the end, maps the endings of file names to the classes. Texts are decoded, cleaned and checked here; a row
without a usable text is yielded as well, and counted in `sources.py`.
"""

import bz2
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.core.errors import UserError, printable, user_errors
from nanophi.core.names import shown
from nanophi.core.recipe import Source

MAXIMUM_DOCUMENT_BYTES = 10_000_000
PART_BYTES = 16 << 20
"""About how much one process reads at a time."""
_CHUNK = 1 << 20
_BATCH_ROWS = 256
_END_OF_DOCUMENT = re.compile(r"^[ \t]*(<\|\w{1,40}\|>|</s>|<eos>)[ \t]*$", re.MULTILINE | re.ASCII)
_DECOMPRESSED: dict[str, Any] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"), _CHUNK),
}


class Unusable(NamedTuple):
    """Stands for a document's text where the source holds none; `remedy`: what to do about it, in a few words.

    `reason`: `no_text`, `not_text`, `not_json`, `malformed` (too many fields), `invalid_utf8`, `empty`, `oversize`.
    """

    reason: str
    remedy: str = ""


_MOST = f"a document has at most {MAXIMUM_DOCUMENT_BYTES // 10**6} MB; a text file is split by separator"
OVERSIZE = Unusable("oversize", _MOST)


class Row(NamedTuple):
    """One document: where it is, its clean UTF-8 text, its value in the `source_column`, its quality score."""

    where: str
    text: bytes | Unusable
    label: Any = None
    score: float | None = None


def clean(text: Any) -> bytes | Unusable:
    r"""A document as UTF-8: line ends are `\n`; NUL, byte-order marks and space around it are gone."""
    if isinstance(text, Unusable):
        return text
    if isinstance(text, bytes):
        text = text.decode(errors="surrogateescape")
    cleaned = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").replace("\ufeff", "").strip()
    try:
        encoded = cleaned.encode()
    except UnicodeEncodeError:  # lone surrogates: bytes that are no UTF-8, or spelled out in JSON
        return Unusable("invalid_utf8", "convert it to UTF-8, for example by iconv -f latin1 -t utf-8")
    if not encoded:
        return Unusable("empty")
    return OVERSIZE if len(encoded) > MAXIMUM_DOCUMENT_BYTES else encoded


def open_file(location: str) -> Any:
    """A file on disk or, for `hf://...`, on the Hub, opened to read bytes."""
    if not location.startswith("hf://"):
        return Path(location).open("rb")
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(location, "rb")


def open_text(location: str, newline: str | None) -> io.TextIOWrapper:
    """A text file, decompressed; bytes that are no UTF-8 become lone surrogates."""
    file, suffix = open_file(location), Path(location.lower()).suffix
    if suffix in _DECOMPRESSED:
        file = _DECOMPRESSED[suffix](file)
    return io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=newline)


def _steps(path: str) -> list[str]:
    return [step for step in path.replace("[]", ".[]").split(".") if step]


def text_of(row: dict[str, Any], path: str) -> str | bytes | Unusable:
    """A row's text: the column that `path` names or, in objects (`a.b`) and lists (`a[]`), what it leads to.

    The texts of a list's entries are joined by an empty line.
    """
    found = [row[path]] if path in row else _leaves(row, _steps(path))
    found = [value for value in found if value is not None]
    if len(found) == 1 and isinstance(found[0], bytes):
        return found[0]
    if not found and path in row:
        return Unusable("no_text", f"its '{path}' is null")
    if not found:
        lacking = f"it has no '{path}' but {_listed(row)}; set text_column, or raise data.max_dropped"
        return Unusable("no_text", lacking)
    if not all(isinstance(value, str) for value in found):
        deeper = "text_column may be a path, as meta.text or messages[].content"
        return Unusable("not_text", f"'{path}' holds no text; {deeper}")
    return "\n\n".join(text for text in found if text.strip())


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(str, list(names)[:12]))


def _leaves(value: Any, steps: Sequence[str]) -> list[Any]:
    """What lies at the end of a path, or where it leads no further."""
    if steps and steps[0] == "[]" and isinstance(value, list):
        return [leaf for entry in value for leaf in _leaves(entry, steps[1:])]
    if steps and steps[0] != "[]" and isinstance(value, dict):
        return _leaves(value.get(steps[0]), steps[1:])
    return [value]


class Reader:
    """Reads one file of a source (a path or an `hf://` address); a subclass knows how its format holds records.

    `source`, the recipe's entry, names the columns; `score` is the one with a quality score, if one is used.
    """

    one_document: ClassVar[bool] = False  # whether a file is one document, unless the source has a separator

    def __init__(self, location: str, source: Source, score: str | None = None) -> None:
        self.location, self.source, self.score = location, source, score
        self.name = shown(location)

    def pieces(self) -> list[Any]:
        """Pieces that different processes may read, picklable. Raises `UserError` for a file that cannot be read."""
        return [None]

    def records(self, piece: Any) -> Iterator[tuple[str, Any]]:
        """Where each record is, and the record: columns by name, a text by itself, or `Unusable`."""
        raise NotImplementedError

    def rows(self, piece: Any = None) -> Iterator[Row]:
        """The rows of a piece. Raises `UserError` for one that is usable but has no score where one is used."""
        for where, record in self.records(piece):
            columns: dict[Any, Any] = record if isinstance(record, dict) else {}
            if isinstance(record, dict):
                text = clean(text_of(record, self.source.text_column))
            else:
                text = clean(record if isinstance(record, str | Unusable) else Unusable("not_json"))
            score = self._number(where, columns) if self.score and isinstance(text, bytes) else None
            yield Row(where, text, columns.get(self.source.source_column), score)

    def check_columns(self, names: Sequence[str]) -> list[str]:
        """The columns of a table that have to be read. Raises `UserError` naming one that it lacks."""
        path = self.source.text_column
        if not path:  # a conversation is a whole row
            return list(names)
        root = path if path in names else next(iter(_steps(path)), path)
        wanted = [column for column in dict.fromkeys((root, self.source.source_column, self.score)) if column]
        for column in wanted:
            if column not in names:
                lacking = path if column == root else column
                raise UserError(f"{self.name} has no column '{lacking}'; it has {_listed(names)}")
            if list(names).count(column) > 1:
                raise UserError(f"{self.name} has the column '{column}' twice; rename one of them")
        return wanted

    def _number(self, where: str, record: dict[Any, Any]) -> float:
        """A record's score. Raises `UserError` for anything that is no finite number."""
        try:
            number = float(record[self.score])
        except (KeyError, TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            found = printable(str(record.get(self.score)))[:40]
            raise UserError(f"{where} has no quality score: column '{self.score}' holds {found}; a score is a number")
        return number


class Parquet(Reader):
    def pieces(self) -> list[Any]:
        with user_errors(f"{self.name} is not a whole parquet file"), pq.ParquetFile(open_file(self.location)) as table:
            self.check_columns(table.schema_arrow.names)
            sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]
        ends = list(itertools.accumulate(sizes))
        whole = itertools.groupby(range(len(ends)), lambda group: ends[group] // PART_BYTES)
        return [list(groups) for _, groups in whole]

    def records(self, piece: Any) -> Iterator[tuple[str, Any]]:
        with contextlib.closing(open_file(self.location)) as raw, pq.ParquetFile(raw) as file:
            columns = self.check_columns(file.schema_arrow.names)
            batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=piece, columns=columns)
            yield from _numbered(f"{self.name}:{piece[0]}", batches)


class Arrow(Reader):
    """As `datasets` saves it (a stream), or with an index."""

    def records(self, piece: Any) -> Iterator[tuple[str, Any]]:
        with contextlib.closing(open_file(self.location)) as raw:
            indexed = raw.read(6) == b"ARROW1"
            raw.seek(0)
            file = pa.ipc.open_file(raw) if indexed else pa.ipc.open_stream(raw)
            columns = self.check_columns(file.schema.names)
            batches = map(file.get_batch, range(file.num_record_batches)) if indexed else file
            yield from _numbered(f"{self.name}:0", (batch.select(columns) for batch in batches))


def _numbered(where: str, batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, Any]]:
    rows = (row for batch in batches for row in batch.to_pylist())
    return ((f"{where}:{number}", row) for number, row in enumerate(rows))


class Csv(Reader):
    """With a header."""

    delimiter = ","

    def records(self, piece: Any) -> Iterator[tuple[str, Any]]:
        csv.field_size_limit((1 << 31) - 1)
        with open_text(self.location, "") as lines:
            # A field that is opened and never closed would swallow the rest of the file.
            reader = csv.DictReader(lines, delimiter=self.delimiter, strict=True)
            if reader.fieldnames is not None:
                self.check_columns(reader.fieldnames)
            for record in reader:
                # A comma too many is one that belongs to the text.
                yield f"{self.name}:{reader.line_num}", Unusable("malformed") if None in record else record


class Tsv(Csv):
    delimiter = "\t"


class JsonLines(Reader):
    """An object, or a text, on each line."""

    def records(self, piece: Any) -> Iterator[tuple[str, Any]]:
        with open_text(self.location, "\n") as lines:
            yield from self.records_of(lines)

    def records_of(self, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
        return ((f"{self.name}:{number}", _parse(line)) for number, line in enumerate(lines, 1) if line.strip())


class Json(JsonLines):
    """An array of objects or of texts, one object, or an object per line."""

    def records(self, piece: Any) -> Iterator[tuple[str, Any]]:
        with open_text(self.location, "\n") as file:
            text = file.read()
        value = _parse(text)
        if isinstance(value, dict | list):
            entries = value if isinstance(value, list) else [value]
            yield from ((f"{self.name}:{number}", entry) for number, entry in enumerate(entries, 1))
        else:
            yield from self.records_of(io.StringIO(text, newline="\n"))


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return Unusable("not_json")


class Text(Reader):
    """One document, or what lies between the source's separators."""

    one_document = True

    def records(self, piece: Any) -> Iterator[tuple[str, Any]]:
        with open_text(self.location, None) as file:
            if self.source.separator:
                yield from self._separated(file, self.source.separator)
                return
            text = file.read(4 * MAXIMUM_DOCUMENT_BYTES + 1)
        marks = _END_OF_DOCUMENT.findall(text) if self.source.separator is None else []
        if len(marks) > 1:
            many = f'{len(marks)} lines are like {marks[0]}; set the source\'s separator ("" for one document)'
            raise UserError(f"{self.name} holds many documents: {many}")
        yield self.name, text if len(text) <= 4 * MAXIMUM_DOCUMENT_BYTES else OVERSIZE

    def _separated(self, file: io.TextIOWrapper, separator: str) -> Iterator[tuple[str, Any]]:
        number, pending, oversize = 0, "", False
        while chunk := file.read(_CHUNK):
            *whole, pending = (pending + chunk).split(separator)
            for text in whole:
                number += 1
                yield f"{self.name}:{number}", OVERSIZE if oversize else text
                oversize = False
            if len(pending) > MAXIMUM_DOCUMENT_BYTES:
                oversize, pending = True, pending[-len(separator) :]
        # What follows the last separator is a document only if there is something.
        if oversize or pending.strip() or number == 0:
            yield f"{self.name}:{number + 1}", OVERSIZE if oversize else pending


READERS: dict[str, type[Reader]] = {
    ".parquet": Parquet,
    ".arrow": Arrow,
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": Json,
    ".csv": Csv,
    ".tsv": Tsv,
    ".txt": Text,
    ".md": Text,
}
KNOWN = f"{', '.join(READERS)} (all but tables also as {', '.join(_DECOMPRESSED)})"


def format_of(name: str) -> str:
    """The ending of a file's name without that of a compression: a key of `READERS`, if the file is read at all."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in _DECOMPRESSED else path.suffix
