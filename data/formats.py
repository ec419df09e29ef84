"""Readers: a class for each format that a source's files may have, which yields the file's rows.

`READERS`, at the end, maps the endings of file names to the classes: a new format is a class here and a line there.
Texts are decoded, cleaned and checked here and nowhere else. A row without a usable text is yielded as well: what is
read, kept and dropped is counted in `sources.py`, which also chooses the files.
"""

from __future__ import annotations

import bz2
import collections
import contextlib
import csv
import decimal
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
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh91AY": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}
_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_END_OF_DOCUMENT = re.compile(r"^[ \t]*(<\|\w{1,40}\|>|</s>|<eos>)[ \t]*$", re.MULTILINE | re.ASCII)


class Unusable(NamedTuple):
    """Stands for a document's text where the source holds none; `found` is what was there instead.

    `reason`: `no_text` (no such column, or null), `not_text` (another type), `not_json`, `malformed` (a row with more
    fields than columns), `invalid_utf8`, `empty`, `oversize`.
    """

    reason: str
    found: Any = None


class Row(NamedTuple):
    """One document: where it is, its clean UTF-8 text, its value in the `source_column`, its quality score."""

    where: str
    text: bytes | Unusable
    label: Any = None
    score: float | None = None


def clean(text: Any) -> bytes | Unusable:
    r"""A document as UTF-8: line ends are `\n`; NUL, byte-order marks and space around it are gone."""
    if isinstance(text, bytes):
        if len(text) > MAXIMUM_DOCUMENT_BYTES:
            return Unusable("oversize")
        text = text.decode(errors="surrogateescape")
    if isinstance(text, Unusable):
        return text
    cleaned = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").replace("\ufeff", "").strip()
    try:
        encoded = cleaned.encode()
    except UnicodeEncodeError:  # lone surrogates: bytes that are no UTF-8, or spelled out in JSON
        return Unusable("invalid_utf8", text)
    if not encoded:
        return Unusable("empty")
    return Unusable("oversize") if len(encoded) > MAXIMUM_DOCUMENT_BYTES else encoded


# Files


def open_file(location: str) -> Any:
    """A file on disk or, for `hf://...`, on the Hub, opened to read bytes."""
    if not location.startswith("hf://"):
        return Path(location).open("rb")
    from huggingface_hub import HfFileSystem

    return io.BufferedReader(HfFileSystem().open(location, "rb"), _CHUNK)


def open_text(location: str, newline: str | None) -> io.TextIOWrapper:
    """A text file, decompressed and decoded by its byte-order mark; bytes that are no UTF-8 become lone surrogates.

    Raises:
        UserError: if the file is compressed, or a table, and its name does not show it.
    """
    file: Any = open_file(location)
    suffix = Path(location.lower()).suffix
    if suffix in _DECOMPRESSED:
        file = _DECOMPRESSED[suffix](file)
    else:
        for magic in (magic for magic in _MAGIC if file.peek(8).startswith(magic)):
            raise UserError(f"{shown(location)} is {_MAGIC[magic]} data; rename it to end in {_MAGIC[magic]}")
    start = file.peek(4)
    encoding = next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), "utf-8-sig")
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    return io.TextIOWrapper(file, encoding, errors=errors, newline=newline)


class _Streams(io.RawIOBase):
    """All streams of a .bz2 or .xz file: Python's own readers take a damaged later one for the end of the file."""

    def __init__(self, file: Any, new_stream: Any) -> None:
        self.chunks, self.pending = self._decompress(file, new_stream), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.pending = self.pending or next(filter(None, self.chunks), b"")
        data, self.pending = self.pending[: len(buffer)], self.pending[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)

    @staticmethod
    def _decompress(file: Any, new_stream: Any) -> Iterator[bytes]:
        stream = None
        while raw := file.read(_CHUNK):
            while raw := raw if stream else raw.lstrip(b"\0"):  # streams may be padded
                stream = stream or new_stream()
                yield stream.decompress(raw)
                raw, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
        if stream is not None:
            raise EOFError("the file ends before its end-of-stream mark")


_DECOMPRESSED = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": lambda file: io.BufferedReader(_Streams(file, bz2.BZ2Decompressor), _CHUNK),
    ".xz": lambda file: io.BufferedReader(_Streams(file, lzma.LZMADecompressor), _CHUNK),
    ".zst": lambda file: io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"), _CHUNK),
}


# Columns


class TextColumn:
    """Where a row has its text: a column's name, or a path such as `meta.text` or `messages[].content`.

    `a.b` goes into an object, `a[]` through a list; the texts of a list's entries are joined by an empty line. A
    column whose own name is the path comes first.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.steps = [step for step in path.replace("[]", ".[]").split(".") if step]

    def root(self, names: Iterable[str]) -> str:
        """The column of a table that has to be read; it may not be there."""
        return self.path if self.path in names or not self.steps else self.steps[0]

    def of(self, row: dict[str, Any]) -> str | bytes | Unusable:
        """The text of a row."""
        found = [row[self.path]] if self.path in row else _leaves(row, self.steps)
        found = [value for value in found if value is not None]
        if len(found) == 1 and isinstance(found[0], bytes):
            return found[0]
        wrong = [value for value in found if not isinstance(value, str)]
        if wrong or not found:
            return Unusable("not_text", wrong[0]) if wrong else Unusable("no_text", row)
        return "\n\n".join(text for text in found if text.strip())

    def remedy(self, bad: Unusable) -> str:
        """What to do about a row without a text, in a few words; empty if there is nothing to do."""
        if bad.reason == "no_text":
            if self.path in bad.found:
                return f"its '{self.path}' is null"
            return f"it has no '{self.path}' but {_listed(bad.found)}; set text_column, or raise data.max_dropped"
        if bad.reason == "not_text":
            kind = "an object" if isinstance(bad.found, dict) else "a list" if isinstance(bad.found, list) else ""
            path = "; text_column may be a path, as meta.text or messages[].content" if kind else ""
            return f"'{self.path}' holds {kind or 'a value that is no text'}{path}"
        if bad.reason == "invalid_utf8":
            encoding = "utf-16" if "\0" in bad.found else "latin1"
            return f"convert it to UTF-8, for example by iconv -f {encoding} -t utf-8"
        if bad.reason == "oversize":
            return f"a document has at most {MAXIMUM_DOCUMENT_BYTES // 10**6} MB; a text file is split by separator"
        return ""


def _listed(names: Iterable[Any]) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:12]) + (", ..." if len(listed) > 12 else "")


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

    compressed: ClassVar[bool] = True
    """Whether the format is also read as .gz, .bz2, .xz or .zst."""
    one_document: ClassVar[bool] = False
    """Whether a file is one document, unless the source has a separator."""

    def __init__(self, location: str, source: Source, score: str | None = None) -> None:
        self.location, self.source, self.score = location, source, score
        self.name = shown(location)
        self.text = TextColumn(source.text_column)

    def pieces(self) -> list[Any]:
        """Pieces that different processes may read, picklable. Raises `UserError` for a file that cannot be read."""
        return [None]

    def records(self, piece: Any) -> Iterator[tuple[str, Any]]:
        """Where each record is, and the record: columns by name, a text by itself, or `Unusable`."""
        raise NotImplementedError

    def rows(self, piece: Any = None) -> Iterator[Row]:
        """The rows of a piece. Raises `UserError` if no record has the text's column, or one that is kept no score."""
        found, last, label_column = False, None, self.source.source_column
        for where, record in self.records(piece):
            columns = record if isinstance(record, dict) else {}
            if isinstance(record, dict):
                found, last = found or self.text.root(record) in record, record
                text = clean(self.text.of(record))
            else:
                found = found or isinstance(record, str)
                text = clean(record if isinstance(record, str | Unusable) else Unusable("not_json", record))
            wanted = self.score is not None and isinstance(text, bytes)
            score = self._number(where, columns or {self.score: None}) if wanted else None
            yield Row(where, text, columns.get(label_column) if label_column else None, score)
        if last is not None and not found:
            raise UserError(
                f"{self.name} has no row with a column '{self.source.text_column}'; the last has {_listed(last)}"
            )

    def check_columns(self, names: Sequence[str]) -> list[str]:
        """The columns of a table that have to be read. Raises `UserError` naming one that it lacks."""
        if not self.text.path:  # a conversation is a whole row
            return list(names)
        root = self.text.root(names)
        wanted = [column for column in dict.fromkeys((root, self.source.source_column, self.score)) if column]
        for column in wanted:
            if column not in names:
                lacking = self.source.text_column if column == root else column
                raise UserError(f"{self.name} has no column '{lacking}'; it has {_listed(names)}")
            if list(names).count(column) > 1:
                raise UserError(f"{self.name} has the column '{column}' twice; rename one of them")
        return wanted

    def _number(self, where: str, record: dict[str, Any]) -> float:
        """A record's score. Raises `UserError` for anything that is no finite number."""
        if self.score not in record:
            raise UserError(f"{where} has no column '{self.score}'; it has {_listed(record)}")
        value = record[self.score]
        with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
            if isinstance(value, int | float | decimal.Decimal) and math.isfinite(value):
                return float(value)
        what = printable(json.dumps(value, default=str, ensure_ascii=False))[:40]
        raise UserError(f"{where} has no quality score: column '{self.score}' holds {what}; a score is a number")


# Tables


class Parquet(Reader):
    compressed = False

    def pieces(self) -> list[Any]:
        with user_errors(f"{self.name} is not a whole parquet file"), pq.ParquetFile(open_file(self.location)) as table:
            self.check_columns(table.schema_arrow.names)
            sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]
        pieces, first, size = [], 0, 0
        for group, bytes_of_group in enumerate(sizes):
            size += bytes_of_group
            if size >= PART_BYTES or group == len(sizes) - 1:
                pieces.append((first, group + 1))
                first, size = group + 1, 0
        return pieces

    def records(self, piece: Any) -> Iterator[tuple[str, Any]]:
        with contextlib.closing(open_file(self.location)) as raw, pq.ParquetFile(raw) as file:
            columns = self.check_columns(file.schema_arrow.names)
            batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=list(range(*piece)), columns=columns)
            yield from self.records_of(batches, columns, piece[0])

    def records_of(
        self, batches: Iterable[pa.RecordBatch], columns: Sequence[str], first: int
    ) -> Iterator[tuple[str, Any]]:
        """The records of a table's batches, numbered after `first`."""
        numbers = itertools.count()
        for batch in batches:
            values = [batch.column(name) if name == self.score else _as_bytes(batch.column(name)) for name in columns]
            for row in zip(*(value.to_pylist() for value in values), strict=True):
                yield f"{self.name}:{first}:{next(numbers)}", dict(zip(columns, row, strict=True))


class Arrow(Parquet):
    """As `datasets` saves it (a stream), or with an index."""

    def pieces(self) -> list[Any]:
        return [None]

    def records(self, piece: Any) -> Iterator[tuple[str, Any]]:
        with contextlib.closing(open_file(self.location)) as raw:
            if raw.read(6) == b"ARROW1":
                file = pa.ipc.open_file(pa.PythonFile(raw, "r"))
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            else:
                raw.seek(0)
                batches = file = pa.ipc.open_stream(raw)
            columns = self.check_columns(file.schema.names)
            small = (
                batch.slice(start, _BATCH_ROWS) for batch in batches for start in range(0, len(batch), _BATCH_ROWS)
            )
            yield from self.records_of((batch.select(columns) for batch in small), columns, 0)


def _as_bytes(column: pa.Array) -> pa.Array:
    """Texts as bytes: Arrow does not check UTF-8 when it reads, and one bad document must not fail a batch."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        return column.cast(pa.large_binary())
    return column


class Csv(Reader):
    """With a header."""

    delimiter = ","

    def records(self, piece: Any) -> Iterator[tuple[str, Any]]:
        csv.field_size_limit((1 << 31) - 1)
        with open_text(self.location, "") as lines:
            # A field that is opened and never closed would swallow the rest of the file.
            reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
            columns = next((fields for fields in reader if any(field.strip() for field in fields)), None)
            if columns is None:
                return
            self.check_columns(columns)
            for fields in filter(None, reader):
                record: Any = dict(zip(columns, fields, strict=False))
                if len(fields) > len(columns):  # a comma too many is one that belongs to the text
                    record = Unusable("malformed", fields)
                elif self.score in record:
                    with contextlib.suppress(ValueError):
                        record[self.score] = float(record[self.score])
                yield f"{self.name}:{reader.line_num}", record


class Tsv(Csv):
    delimiter = "\t"


# JSON and text


class JsonLines(Reader):
    """An object, or a text, on each line."""

    def records(self, piece: Any) -> Iterator[tuple[str, Any]]:
        with open_text(self.location, "\n") as lines:
            yield from self.records_of(lines)

    def records_of(self, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """The records of some lines, blank ones apart."""
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
        return Unusable("not_json", text[:40])


class Text(Reader):
    """One document, or what lies between the source's separators."""

    one_document = True

    def pieces(self) -> list[Any]:
        if column := self.score or self.source.source_column:
            raise UserError(f"{self.name} is a text file, which has no column '{column}'")
        return [None]

    def records(self, piece: Any) -> Iterator[tuple[str, Any]]:
        with open_text(self.location, None) as file:
            if self.source.separator:
                yield from self._separated(file, self.source.separator)
                return
            text = file.read(4 * MAXIMUM_DOCUMENT_BYTES + 1)
        marks = collections.Counter(_END_OF_DOCUMENT.findall(text) if self.source.separator is None else ())
        for mark, count in marks.most_common(1):
            if count > 1:
                raise UserError(
                    f"{self.name} holds many documents: {count} lines are {mark}; set the source's separator to "
                    f'"{mark}", or to "" if the file is one document'
                )
        yield self.name, text if len(text) <= 4 * MAXIMUM_DOCUMENT_BYTES else Unusable("oversize")

    def _separated(self, file: io.TextIOWrapper, separator: str) -> Iterator[tuple[str, Any]]:
        number, pending, oversize, chunk = 0, "", False, "begin"
        while chunk:
            chunk = file.read(_CHUNK)
            *whole, pending = (pending + chunk).split(separator)
            for text in whole if chunk else [*whole, pending]:
                number += 1
                # What follows the last separator is a document only if there is something.
                if number == 1 or chunk or oversize or text.strip():
                    yield f"{self.name}:{number}", Unusable("oversize") if oversize else text
                oversize = False
            if len(pending) > MAXIMUM_DOCUMENT_BYTES:
                oversize, pending = True, pending[-len(separator) :]


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


def reader_of(name: str) -> type[Reader] | None:
    """The class that reads a file, by its name; None for anything else."""
    path = Path(name.lower())
    compressed = path.suffix in _DECOMPRESSED
    reader = READERS.get(Path(path.stem).suffix if compressed else path.suffix)
    return None if reader is None or (compressed and not reader.compressed) else reader
