"""Whatever rows, names and encodings a source has: no traceback, and documents read are documents kept and dropped."""

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import os
import re
import shutil
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gathered import data, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanophi.core.errors import UserError
from nanophi.core.recipe import Source
from nanophi.data import gather, sources

QUICK = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ANY_TEXT = st.text(st.characters(codec=None, categories=None), max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["text", "site", "q", "messages", "a.b", ""]), VALUES | ANY_TEXT, max_size=4)
    | VALUES,
    max_size=8,
)
NAMES = st.binary(min_size=1, max_size=12).filter(lambda name: not set(name) & set(b"/\0") and name[:1] != b".")
SUFFIXES = [".jsonl", ".json", ".csv", ".tsv", ".txt", ".md", ".parquet", ".arrow"]
COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def fresh(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def outcome(source, score=None):
    """What reading a source gives; None for a refusal, which must be one printable line."""
    tally = sources.Tally()
    try:
        parts = sources.plan(source, score)
        found = [document for part in parts for document in sources.read(source, part, score, tally)]
    except UserError as error:
        message = str(error)
        assert message and message.isprintable()
        message.encode()
        return None
    assert tally.total()["read"] == len(found) + sources.dropped(tally.total()).total()
    assert sum(len(document.text) for document in found) == tally.total()["bytes"]
    json.dumps(vars(tally), ensure_ascii=False, allow_nan=False).encode()
    for document in found:
        text = document.text.decode()
        assert text == text.strip() != "" and not set(text) & set("\r\0\ufeff")
        assert document.label == " ".join(document.label.split())
        document.label.encode()
        document.file.encode()
    return found, tally


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are no text")
@QUICK
@given(
    content=st.binary(max_size=200),
    name=NAMES,
    suffix=st.sampled_from(SUFFIXES),
    compression=st.sampled_from(["", ".gz", ".bz2", ".xz", ".zst"]),
    packed=st.booleans(),
    separator=st.none() | st.text(st.characters(codec="utf-8"), max_size=3),
)
def test_any_bytes_under_any_name(tmp_path, content, name, suffix, compression, packed, separator):
    folder = fresh(tmp_path / "in")
    content = COMPRESSIONS[compression](content) if packed and compression != ".zst" else content
    path = folder / os.fsdecode(name + (suffix + compression).encode())
    path.write_bytes(content)
    for files in (str(folder), str(path)):
        fields = {"separator": separator} if suffix in (".txt", ".md") else {}
        outcome(Source.model_construct(**{**Source(files=str(folder)).model_dump(), "files": files, **fields}))


@QUICK
@given(rows=ROWS, column=st.sampled_from(["text", "a.b", "messages[].content", "messages[]", "[]", "."]))
def test_any_rows_of_json(tmp_path, rows, column):
    folder = fresh(tmp_path / "in")
    lines(folder / "a.jsonl", rows)
    (folder / "b.json").write_text(json.dumps(rows))
    counts = {}
    for name in ("a.jsonl", "b.json"):
        for label in (None, "site"):
            found = outcome(Source(files=str(folder / name), text_column=column, source_column=label))
            if found is not None:
                documents, tally = found
                assert tally.total()["read"] == len(rows)
                counts[name, label] = [document.text for document in documents]
    assert len({tuple(texts) for texts in counts.values()}) <= 1
    if column == "text" and counts:
        expected = [row["text"] for row in rows if isinstance(row, dict) and isinstance(row.get("text"), str)]
        expected += [row for row in rows if isinstance(row, str)]
        usable = [text for text in expected if text.strip("\ufeff\0 ").strip() and _is_text(text)]
        assert len(next(iter(counts.values()))) <= len(usable)


def _is_text(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@QUICK
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=6),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]),
    compression=st.sampled_from(sorted(COMPRESSIONS)),
)
def test_text_comes_through_every_format_and_encoding(tmp_path, texts, encoding, suffix, compression):
    folder = fresh(tmp_path / "in")
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), folder / "a.parquet", row_group_size=2)
    else:
        file = io.StringIO(newline="")
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["text"], *([text] for text in texts)])
        rows = [{"text": text} for text in texts]
        content = {
            ".csv": file.getvalue(),
            ".json": json.dumps(rows, ensure_ascii=False),
            ".jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        }[suffix]
        (folder / f"a{suffix}{compression}").write_bytes(COMPRESSIONS[compression](content.encode(encoding)))
    found = outcome(Source(files=str(folder)))
    assert found is not None
    documents, tally = found
    cleaned = [re.sub("[\0\ufeff]", "", re.sub("\r\n?", "\n", text)).strip() for text in texts]
    assert [document.text.decode() for document in documents] == [text for text in cleaned if text]
    assert set(sources.dropped(tally.total())) <= {"empty"}
    assert tally.total()["read"] == len(texts)


@QUICK
@given(values=st.lists(VALUES, min_size=1, max_size=4))
def test_any_value_as_a_score(tmp_path, values):
    folder = fresh(tmp_path / "in")
    lines(folder / "a.jsonl", [{"text": "x", "q": value} for value in values])
    found = outcome(Source(files=str(folder)), "q")
    numbers = [_number(value) for value in values]
    assert (found is None) == any(map(math.isnan, numbers))
    assert found is None or [document.score for document in found[0]] == numbers


def _number(value):
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


@settings(QUICK, max_examples=25)
@given(rows=st.lists(st.fixed_dictionaries({"text": ANY_TEXT | VALUES, "site": st.none() | ANY_TEXT}), max_size=30))
def test_documents_are_read_kept_or_dropped_for_a_reason(tmp_path, rows):
    folder, output, told = fresh(tmp_path / "in"), tmp_path / "out", []
    rows = [*rows, *({"text": f"Document number {number} of those that are always there."} for number in range(5))]
    lines(folder / "a.jsonl", rows)
    source = {"files": str(folder), "source_column": "site"}
    shutil.rmtree(output, ignore_errors=True)
    summary = gather.gather(data(source, max_dropped=1.0, heldout_fraction=0.3), output, report=told.append)
    assert summary["read"] == len(rows)
    assert summary["read"] == summary["train"] + summary["heldout"] + sum(summary["dropped"].values())
    for entry in summary["sources"].values():
        assert entry["read"] == entry["train"] + entry["heldout"] + sum(entry["dropped"].values())
    assert all(len(rows_of(output, split)) == summary[split] for split in ("train", "heldout"))
    assert len(told) == 1 and f"{len(rows)} documents read" in told[0]
