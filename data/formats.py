"""Rows of one file, in every format that a source may have: Parquet, Arrow, JSON, JSON lines, CSV and plain text.

Every row of the file is handed on, also one without a text, so that the caller can count it.
"""

from __future__ import annotations

import codecs
import collections
import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.core.errors import UserError
from nanophi.core.names import shown
from nanophi.core.recipe import Source
from nanophi.data.compression import open_file, open_plain, suffixes

MAXIMUM_DOCUMENT_BYTES = 10_000_000
_FORMATS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".md": "text",
}
KNOWN = ".parquet, .arrow, .jsonl, .json, .csv, .tsv, .txt or .md, the last six also as .gz, .bz2, .xz or .zst"
_CHUNK = 1 << 20
_BATCH_ROWS = 256
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_END_OF_DOCUMENT = re.compile(rb"^[ \t]*(<\|\w{1,40}\|>|</s>|<eos>)[ \t]*\r?$", re.MULTILINE)


class Unusable(NamedTuple):
    """Stands for a document's text where the source holds none.

    `reason` is one of `no_text` (no such column, or null), `not_text` (another type), `not_json`, `malformed` (a row
    with more fields than columns), `invalid_utf8` and `oversize`; `found` is what was there instead.
    """

    reason: str
    found: Any = None


class Row(NamedTuple):
    """One document as the file has it.

    `where` names it; `text` is str, bytes, or `Unusable`; `label` is the value of the source's `source_column`;
    `score` that of the quality column.
    """

    where: str
    text: Any
    label: Any = None
    score: Any = None


def format_of(name: str) -> str | None:
    """Format of a file by its name: parquet, arrow, lines, json, csv or text; None for anything else."""
    suffix = suffixes(name)[0]
    return _FORMATS.get(suffix)


# Text


def encoding_of(start: bytes) -> tuple[str, int]:
    """Encoding that a text's first bytes say by their mark (UTF-8 without one), and the length of the mark."""
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding, len(mark)
    return "utf-8", 0


def decode(raw: bytes) -> str | Unusable:
    """Text of bytes, by their mark or as UTF-8."""
    encoding, mark = encoding_of(raw[:4])
    try:
        return raw[mark:].decode(encoding)
    except UnicodeDecodeError:
        return Unusable("invalid_utf8", raw[:40])


def text_rows(location: str, separator: str | None) -> Iterator[Row]:
    """The documents of a text file: the whole of it, or what lies between separators.

    Raises:
        UserError: if there is no separator and lines such as `<|endoftext|>` show that one is needed.
    """
    name = shown(location)
    with closing(open_plain(location)) as file:
        if separator:
            yield from _separated(name, file, separator)
            return
        # Characters of UTF-32 take four bytes.
        raw = file.read(4 * MAXIMUM_DOCUMENT_BYTES + 1)
    text = decode(raw)
    if separator is None:
        marks = _END_OF_DOCUMENT.findall(text.encode(errors="replace") if isinstance(text, str) else raw)
        if marks:
            mark, count = collections.Counter(marks).most_common(1)[0]
            if count > 1:
                raise UserError(
                    f"{name} holds many documents: {count} lines are {mark.decode()}; set the source's separator to "
                    f'"{mark.decode()}", or to "" if the file is one document'
                )
    yield Row(name, Unusable("oversize") if len(raw) > 4 * MAXIMUM_DOCUMENT_BYTES else text)


def _separated(name: str, file: Any, separator: str) -> Iterator[Row]:
    encoding, mark = encoding_of(file.peek(4)[:4])
    file.read(mark)
    # Bytes that are no text become lone surrogates, so that only the document that holds them is dropped.
    bytewise = codecs.getincrementaldecoder(encoding)(errors="surrogateescape" if encoding == "utf-8" else "replace")
    decoder = io.IncrementalNewlineDecoder(bytewise, translate=True)
    number, pending, oversize = 0, "", False
    while True:
        chunk = file.read(_CHUNK)
        *whole, pending = (pending + decoder.decode(chunk, final=not chunk)).split(separator)
        if not chunk:
            whole.append(pending)
        for text in whole:
            number += 1
            # What follows the last separator is a document only if there is something.
            if number == 1 or chunk or oversize or text.strip():
                yield Row(f"{name}:{number}", Unusable("oversize") if oversize else text)
            oversize = False
        if not chunk:
            return
        if len(pending) > MAXIMUM_DOCUMENT_BYTES:
            oversize, pending = True, pending[-len(separator) :]


# Tables


class TextColumn:
    """Where a row has its text: a column's name, or a path such as `meta.text` or `messages[].content`.

    `a.b` goes into an object, `a[]` through a list; the texts of a list's entries are joined by an empty line. A
    column whose own name is the path comes first.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.steps = [step for step in path.replace("[]", ".[]").split(".") if step]

    def root(self, names: Iterable[str]) -> str | None:
        """Which of a table's columns has to be read; None if it has no such column."""
        names = set(names)
        return self.path if self.path in names else self.steps[0] if self.steps[0] in names else None

    def of(self, row: dict[str, Any]) -> Any:
        """The text of a row: str, bytes, or `Unusable`."""
        value = row.get(self.path)
        if value is None and self.path not in row and len(self.steps) > 1:
            value = _walk(row, self.steps)
        if isinstance(value, str | bytes):
            return value
        return Unusable("no_text", row) if value is None else Unusable("not_text", value)

    def remedy(self, bad: Unusable) -> str:
        """What to do about a row without a text, in a few words; empty if there is nothing to say."""
        if bad.reason == "no_text" and isinstance(bad.found, dict):
            if self.path in bad.found:
                return f"its '{self.path}' is null"
            return f"it has no '{self.path}' but {_list_of(bad.found)}; set text_column, or raise data.max_dropped"
        if bad.reason == "not_text":
            inner = _path_to_text(bad.found)
            kind = (
                "an object"
                if isinstance(bad.found, dict)
                else "a list"
                if isinstance(bad.found, list)
                else "a value that is no text"
            )
            return f"'{self.path}' holds {kind}" + (f"; try text_column: {self.path}{inner}" if inner else "")
        if bad.reason == "invalid_utf8":
            encoding = "utf-16" if isinstance(bad.found, bytes) and b"\0" in bad.found else "latin1"
            return f"convert it to UTF-8, for example by iconv -f {encoding} -t utf-8"
        if bad.reason == "oversize":
            return f"a document has at most {MAXIMUM_DOCUMENT_BYTES // 10**6} MB; a text file is split by separator"
        return ""


def _list_of(names: Iterable[Any]) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:12]) + (", ..." if len(listed) > 12 else "")


def _walk(value: Any, steps: Sequence[str]) -> Any:
    for number, step in enumerate(steps):
        if step == "[]":
            if not isinstance(value, list):
                return value
            found = [_walk(entry, steps[number + 1 :]) for entry in value]
            texts = [entry for entry in found if entry is not None]
            if not texts:
                return None
            wrong = [entry for entry in texts if not isinstance(entry, str)]
            return wrong[0] if wrong else "\n\n".join(text for text in texts if text.strip())
        if not isinstance(value, dict):
            return value
        value = value.get(step)
    return value


def _path_to_text(value: Any) -> str:
    """A path below a value that leads to text: `[].content` of a list of messages; empty if none does."""
    if isinstance(value, list) and value:
        if isinstance(value[0], str):
            return "[]"
        inner = _path_to_text(value[0])
        return f"[]{inner}" if inner else ""
    if isinstance(value, dict):
        texts = [key for key, entry in value.items() if isinstance(entry, str)]
        for key in ("content", "text", "value"):
            if key in texts:
                return f".{key}"
        return f".{texts[-1]}" if texts else ""
    return ""


def check_columns(name: str, names: Sequence[str], source: Source, score: str | None) -> list[str]:
    """The columns of a table that have to be read. Raises `UserError` naming one that it lacks."""
    root = TextColumn(source.text_column).root(names)
    wanted = [root or source.text_column, source.source_column, score]
    for column in wanted:
        if column is not None and column not in names:
            raise UserError(f"{name} has no column '{column}'; it has {_list_of(names)}")
    return list(dict.fromkeys(column for column in wanted if column is not None))


def table_rows(
    name: str, batches: Iterable[pa.RecordBatch], source: Source, score: str | None, first: int | str
) -> Iterator[Row]:
    """The rows of an Arrow or Parquet table's batches, numbered after `first`."""
    text_column, number = TextColumn(source.text_column), 0
    for batch in batches:
        names = batch.schema.names
        root = text_column.root(names)
        assert root is not None  # by check_columns
        texts = _as_bytes(batch.column(root)).to_pylist()
        if root != source.text_column:
            texts = [text_column.of({root: value}) for value in texts]
        labels = _as_bytes(batch.column(source.source_column)).to_pylist() if source.source_column else None
        scores = batch.column(score).to_pylist() if score else None
        for row, text in enumerate(texts):
            if not isinstance(text, bytes | Unusable):
                text = text_column.of({source.text_column: text})
            yield Row(
                f"{name}:{first}:{number}", text, labels[row] if labels else None, scores[row] if scores else None
            )
            number += 1


def _as_bytes(column: pa.Array) -> pa.Array:
    """Texts as bytes: Arrow does not check UTF-8 when it reads, and one bad document must not fail a batch."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        return column.cast(pa.large_binary())
    return column


def parquet_rows(location: str, groups: Sequence[int], source: Source, score: str | None) -> Iterator[Row]:
    """The rows of some row groups of a Parquet file."""
    name = shown(location)
    with closing(open_file(location)) as raw, pq.ParquetFile(raw) as file:
        columns = check_columns(name, file.schema_arrow.names, source, score)
        batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=list(groups), columns=columns)
        yield from table_rows(name, batches, source, score, groups[0])


def arrow_rows(location: str, source: Source, score: str | None) -> Iterator[Row]:
    """The rows of an Arrow file, as `datasets` saves them (a stream) or with an index."""
    name = shown(location)
    with closing(open_file(location)) as raw:
        if raw.read(6) == b"ARROW1":
            file = pa.ipc.open_file(pa.PythonFile(raw, "r"))
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            raw.seek(0)
            batches = file = pa.ipc.open_stream(raw)
        columns = check_columns(name, file.schema.names, source, score)
        small = (batch.slice(start, _BATCH_ROWS) for batch in batches for start in range(0, len(batch), _BATCH_ROWS))
        yield from table_rows(name, (batch.select(columns) for batch in small), source, score, 0)


# JSON and CSV


def line_rows(location: str, source: Source, score: str | None) -> Iterator[Row]:
    """The rows of a file with one JSON object per line."""
    with closing(open_plain(location)) as file:
        yield from _lines(shown(location), file, source, score)


def _lines(name: str, file: Any, source: Source, score: str | None) -> Iterator[Row]:
    encoding, mark = encoding_of(file.peek(4)[:4])
    if encoding == "utf-8":
        file.read(mark)
    else:
        # Each line ends in the same character, but not in the same byte.
        file = io.TextIOWrapper(file, encoding.rpartition("-")[0], errors="replace", newline="\n")
    rows = ((f"{name}:{number}", _parse(line)) for number, line in enumerate(file, start=1) if line.strip())
    yield from _object_rows(name, rows, source, score)


def _parse(line: bytes | str) -> Any:
    """The value of a line, or `Unusable`."""
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return Unusable("invalid_utf8", line[:40])
    except (ValueError, RecursionError):
        try:
            # Python refuses integers of more than 4,300 digits, which is no reason to lose the text beside one.
            return json.loads(line, parse_int=float)
        except (ValueError, RecursionError):
            return Unusable("not_json", line[:40])


def json_rows(location: str, source: Source, score: str | None) -> Iterator[Row]:
    """The documents of a .json file: an array of objects or of texts, one object, or one object per line."""
    name = shown(location)
    with closing(open_plain(location)) as file:
        raw = file.read()
    text = decode(raw)
    value = text if isinstance(text, Unusable) else _parse(text)
    if isinstance(value, dict):
        lists = [
            key for key, entry in value.items() if isinstance(entry, list) and entry and isinstance(entry[0], dict)
        ]
        if len(lists) == 1 and TextColumn(source.text_column).root(value) is None:
            raise UserError(
                f"{name} is one object, not an array of documents; save the array under its key '{lists[0]}' by itself"
            )
        value = [value]
    if isinstance(value, list):
        rows = ((f"{name}:{number}", entry) for number, entry in enumerate(value, start=1))
        yield from _object_rows(name, rows, source, score)
    else:
        yield from _lines(name, io.BufferedReader(io.BytesIO(raw)), source, score)


def csv_rows(location: str, source: Source, score: str | None) -> Iterator[Row]:
    """The rows of a .csv or .tsv file with a header."""
    name = shown(location)
    csv.field_size_limit(sys.maxsize)
    with closing(open_plain(location)) as file:
        encoding, mark = encoding_of(file.peek(4)[:4])
        file.read(mark)
        errors = "surrogateescape" if encoding == "utf-8" else "replace"
        lines = io.TextIOWrapper(file, encoding, errors=errors, newline="")
        header, above = lines.readline(), 1
        while header and not header.strip():
            header, above = lines.readline(), above + 1
        present = [character for character in ("\t", ",", ";") if character in header]
        delimiter = "\t" if suffixes(location)[0] == ".tsv" or present == ["\t"] else ";" if present == [";"] else ","
        columns = next(csv.reader([header], delimiter=delimiter), [])
        if not columns:
            return
        # A field that was opened and never closed would swallow the rest of the file.
        reader = csv.DictReader(lines, columns, delimiter=delimiter, strict=True)
        check_columns(name, columns, source, score)
        # A comma too many is one that belongs to the text.
        rows = (
            (f"{name}:{reader.line_num + above}", Unusable("malformed", row[None]) if None in row else row)
            for row in reader
        )
        for row in _object_rows(name, rows, source, score):
            yield row._replace(score=_number(row.score))


def _number(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def _object_rows(name: str, rows: Iterable[tuple[str, Any]], source: Source, score: str | None) -> Iterator[Row]:
    text_column, seen, last = TextColumn(source.text_column), False, None
    for where, row in rows:
        last = row
        if isinstance(row, str):
            seen = True
            yield Row(where, row)
        elif isinstance(row, dict):
            if score is not None and score not in row:
                raise UserError(f"{where} has no column '{score}'; it has {_list_of(row)}")
            text = text_column.of(row)
            seen = seen or not (isinstance(text, Unusable) and text.reason == "no_text")
            label = row.get(source.source_column) if source.source_column else None
            yield Row(where, text, label, row[score] if score is not None else None)
        else:
            yield Row(where, row if isinstance(row, Unusable) else Unusable("not_json", row))
    if isinstance(last, dict) and not seen:
        raise UserError(f"{name} has no row with a column '{source.text_column}'; the last has {_list_of(last)}")
