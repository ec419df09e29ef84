"""Which files a source has, what each format holds, and what is said of documents that cannot be used."""

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import os
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pyarrow as pa
import pytest
from gathered import data, write

from nanophi.core.errors import UserError
from nanophi.core.inputs import Contents
from nanophi.core.recipe import Source
from nanophi.data import formats, gather, sources

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="names in bytes, links and pipes as Linux has them")
TEXTS = ["The first document.", 'A second one, with "quotes"; and\ncolumns', "Третий, naïve"]


def read(files, **fields):
    """The texts of a source, and what was counted."""
    return texts_of(files=str(files), **fields)


def texts_of(**fields):
    source, tally = Source.model_validate(fields), sources.Tally()
    documents = (row for part in sources.plan(source, None) for row in sources.read(source, part, None, tally))
    found = [document.text.decode() for document in documents]
    counts = tally.total()
    return found, SimpleNamespace(read=counts["read"], dropped=sources.dropped(counts), refused=tally.refused)


def zst(content):
    return bytes(pa.compress(content, "zstd", asbytes=True))


def csv_of(rows, delimiter=","):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([rows[0], *(row.values() for row in rows)])
    return file.getvalue()


ROWS = [{"text": text, "n": number} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FILES = {
    "a.jsonl": LINES.encode(),
    "b.ndjson": LINES.encode("utf-8-sig"),
    "c.jsonl.bz2": bz2.compress(LINES.encode()),
    "d.JSONL.GZ": gzip.compress(LINES.encode("utf-8-sig")),
    "e.jsonl.xz": lzma.compress(LINES.encode()),
    "f.json": json.dumps(ROWS, indent=1).encode(),
    "g.json": LINES.encode(),
    "h.json": json.dumps(TEXTS).encode(),
    "i.csv": csv_of(ROWS).encode("utf-8-sig"),
    "j.csv.zst": zst(csv_of(ROWS).encode()),
    "k.tsv.gz": gzip.compress(csv_of(ROWS, "\t").encode()),
    "l.txt": "\n<|end|>\n".join(TEXTS).encode(),
    "m.md.bz2": bz2.compress("<|end|>".join([*TEXTS, ""]).encode("utf-8-sig")),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_and_encoding_gives_the_same_texts(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    separator = {"separator": "<|end|>"} if name[0] in "lm" else {}
    found, tally = read(tmp_path / name, **separator)
    assert found == TEXTS
    assert tally.read == 3 and not tally.dropped


@pytest.mark.parametrize("kind", ["stream", "file", "saved", "splits"])
def test_arrow_files_and_what_save_to_disk_wrote(tmp_path, kind):
    import datasets

    folder = tmp_path / "set"
    dataset = datasets.Dataset.from_list(ROWS)
    if kind == "saved":
        dataset.save_to_disk(str(folder), num_shards=2)
    elif kind == "splits":
        datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(str(folder))
    else:
        folder.mkdir()
        opened = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with opened(str(folder / "x.arrow"), dataset.data.table.schema) as writer:
            writer.write_table(dataset.data.table)
    assert read(folder)[0] == TEXTS
    if kind in ("saved", "splits"):
        assert texts_of(hub=str(folder))[0] == TEXTS
    with pytest.raises(UserError, match="is a folder here, which has no revisions; leave out 'revision'"):
        texts_of(hub=str(folder), revision="v9")
    if kind == "splits":
        assert texts_of(hub=str(folder), split="test")[0] == TEXTS[:1]
        with pytest.raises(UserError, match="has no split 'dev'; it has train, test"):
            texts_of(hub=str(folder), split="dev")


def test_a_folder_stands_for_the_files_below_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "crawl [2024]" / "10:30"
    folder.mkdir(parents=True)
    (folder / "b.jsonl").write_text(LINES)
    (folder / "a.txt").write_text("Plain text.")
    (folder / "README.md").write_text("# The card of the dataset")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_text("not read")
    for pattern in (tmp_path / "crawl [2024]", folder, tmp_path / "crawl*", "~/crawl [2024]"):
        assert read(pattern)[0] == ["Plain text.", *TEXTS]
    (tmp_path / "pictures").mkdir()
    (folder / "picture.png").rename(tmp_path / "pictures" / "x.png")
    for pattern in ("pictures", "none*.parquet"):
        with pytest.raises(UserError, match=r"no \.parquet, .* file is there"):
            read(tmp_path / pattern)
    with pytest.raises(UserError, match=r"x\.png: not a \.parquet"):
        read(tmp_path / "pictures" / "x.png")


@LINUX
def test_links_are_followed_and_pipes_are_not_read(tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.jsonl").write_text(LINES)
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)
    assert read(folder)[0] == TEXTS
    os.mkfifo(folder / "pipe.jsonl")
    (elsewhere / "x.jsonl").symlink_to("gone.jsonl")
    for files in (folder, folder / "pipe.jsonl", elsewhere / "x.jsonl"):
        with pytest.raises(UserError, match=r"(pipe|x)\.jsonl is a dangling link, or not a regular file"):
            read(files)


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_of_a_hub_folder_may_have_different_columns(tmp_path, streaming):
    other = '{"text": "More.", "n": "a word", "extra": [1]}\n{"text": "cut o'
    (tmp_path / "data").mkdir()
    for name, content in (("train-0", LINES), ("train-1", other), ("test-0", '{"text": "Not this."}\n')):
        (tmp_path / "data" / f"{name}.jsonl").write_text(content)
    found, tally = texts_of(hub=str(tmp_path), streaming=streaming)
    assert (found, tally.dropped) == ([*TEXTS, "More."], {"not_json": 1})


def test_a_folder_with_a_script_and_a_name_that_is_nothing(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text("import datasets")
    (folder / "train.jsonl").write_text(LINES)
    with pytest.raises(UserError, match=r"files can be named by 'files' \(.*scripts are no longer supported"):
        texts_of(hub=str(folder))
    (tmp_path / "file.jsonl").write_text("{}")
    for hub in ("../nowhere/at/all", str(tmp_path / "file.jsonl")):
        with pytest.raises(UserError, match="is no folder and no Hub id"):
            texts_of(hub=hub)
        with pytest.raises(UserError, match="is no folder and no Hub id"):  # before the Hub is asked
            sources.fingerprint(Source(hub=hub), Contents())


def test_small_files_share_a_part_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 3 * len(LINES.encode()))
    for number in range(20):
        (tmp_path / f"{number:02}.jsonl").write_text(LINES.replace("document", f"document {number}"))
    last = write(tmp_path / "x.parquet", TEXTS)
    parts = sources.plan(Source(files=str(tmp_path / "*.*")), None)
    assert len(parts) == 7 and parts[-1][-1][0] == str(last)
    found, tally = read(tmp_path / "*.*")
    first = [text for text in found if text.startswith("The first")]
    assert first[:20] == [f"The first document {number}." for number in range(20)]
    assert tally.read == 63


# Text is what it is


def test_marks_are_removed_and_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffWith a mark\r\nand two lines\0".encode())
    (tmp_path / "b.txt").write_bytes("\ufeffInside \ufeffit".encode())
    (tmp_path / "c.txt").write_bytes("caf\xe9".encode("latin-1"))
    found, tally = read(tmp_path / "*.txt")
    assert found == ["With a mark\nand two lines", "Inside it"]
    remedy = "convert it to UTF-8, for example by iconv -f latin1 -t utf-8"
    assert tally.refused == [{"document": str(tmp_path / "c.txt"), "reason": "invalid_utf8", "remedy": remedy}]


def test_a_separator_splits_in_pieces_of_any_size(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\n\r\ntwo \xff\r\n\r\n\r\nth\xc3\xa9ree\r\n\r\n\r\n\r\n\r\n\r\n")
    for chunk in (1, 2, 3, 7, 1 << 20):
        monkeypatch.setattr(formats, "_CHUNK", chunk)
        found, tally = read(tmp_path / "a.txt", separator="\n\n\n")
        assert found == ["one", "thé" + "ree"]
        assert (tally.read, tally.dropped) == (4, Counter(invalid_utf8=1, empty=1))
    monkeypatch.setattr(formats, "MAXIMUM_DOCUMENT_BYTES", 5)
    monkeypatch.setattr(formats, "_CHUNK", 4)
    (tmp_path / "b.txt").write_text("ok|" + "long" * 20 + "|fine")
    found, tally = read(tmp_path / "b.txt", separator="|")
    assert found == ["ok", "fine"] and tally.dropped == {"oversize": 1}


@pytest.mark.parametrize("mark", ["<|endoftext|>", "</s>"])
def test_a_text_file_that_holds_many_documents_says_so(tmp_path, mark):
    path = tmp_path / "stories.txt"
    path.write_text(f"\n{mark}\n".join(TEXTS))
    with pytest.raises(UserError, match=rf"stories\.txt holds many documents: 2 lines are like {re.escape(mark)};"):
        read(path)
    assert read(path, separator=mark)[0] == TEXTS
    assert len(read(path, separator="")[0]) == 1
    path.write_text(f"Only a mention of {mark} in a sentence, twice: {mark}.")
    assert len(read(path)[0]) == 1
    (tmp_path / "x.jsonl").write_text(LINES)
    with pytest.raises(UserError, match="'separator' is for text files"):
        read(tmp_path / "x.jsonl", separator="x")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "json"])
def test_text_may_lie_deeper_than_a_column(tmp_path, suffix):
    turns = [{"by": "user", "content": "Hi."}, {"by": "bot", "content": None}, {"by": "me", "content": "Yo."}]
    rows = [{"meta": {"text": "Inner.", "id": 1}, "turns": turns, "parts": ["x", "y"]}]
    rows.append({"meta": {"text": None, "id": 2}, "turns": [], "parts": []})
    path = write(tmp_path / f"a.{suffix}", rows)
    if suffix == "json":
        path.write_text(json.dumps(rows))
    for column, expected in (("meta.text", "Inner."), ("turns[].content", "Hi.\n\nYo."), ("parts[]", "x\n\ny")):
        found, tally = read(path, text_column=column)
        assert found == [expected] and tally.dropped == {"no_text": 1}
    _, tally = read(path, text_column="turns")
    assert tally.dropped == {"not_text": 2}
    assert tally.refused[0]["remedy"].startswith("'turns' holds no text; text_column may be a path, as meta.text")


# What a row may hold


def test_scores_of_tables(tmp_path):
    write(tmp_path / "a.parquet", [{"text": "x", "q": datetime.datetime(2024, 1, 1)}])
    (tmp_path / "a.csv").write_text("text,q\nx,0.25\n")

    def scores(name):
        source = Source(files=str(tmp_path / name))
        (part,) = sources.plan(source, "q")
        return [document.score for document in sources.read(source, part, "q", sources.Tally())]

    assert scores("a.csv") == [0.25]
    with pytest.raises(UserError, match="column 'q' holds 2024-01-01 00:00:00; a score is a number"):
        scores("a.parquet")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_all_streams_of_a_compressed_file_are_read(tmp_path, suffix, monkeypatch):
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zst, ".xz": lzma.compress}[suffix]
    monkeypatch.setattr(formats, "_CHUNK", 61)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(LINES.encode()) + compress(b"") + compress(LINES.encode()))
    assert read(tmp_path / f"a.jsonl{suffix}")[0] == TEXTS + TEXTS


def test_a_row_with_a_comma_too_many_is_counted(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,"Hello, world."\n2,Hello, world.\n3,Short\n')
    found, tally = read(tmp_path / "a.csv")
    assert found == ["Hello, world.", "Short"]
    assert tally.dropped == {"malformed": 1}
    assert tally.refused[0]["document"].endswith("a.csv:3")
    (tmp_path / "b.tsv").write_text("text\nA tab\tinside\n")
    assert read(tmp_path / "b.tsv")[1].dropped == {"malformed": 1}
    (tmp_path / "c.csv").write_text("")
    assert read(tmp_path / "c.csv")[0] == []


MANY = LINES.encode() * 50
AFTER = "{0} cannot be read after "


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(MANY)[:-30], AFTER + r".*{0}:\d+ \("),
        ("a.jsonl.bz2", b"BZh9 this is not bzip2", AFTER + r"its beginning \("),
        ("a.jsonl.xz", b"\xfd7zXZ\0broken", AFTER + r"its beginning \("),
        ("a.jsonl.zst", b"(\xb5/\xfd broken", AFTER + r"its beginning \("),
        ("a.jsonl.zst", zst(MANY)[:-20], AFTER),
        ("a.parquet", b"PAR1 broken PAR1", r"{0} is not a whole parquet file \("),
        ("a.arrow", b"ARROW1\0\0 broken", AFTER + r"its beginning \("),
        ("a.csv", b'text,n\n"never closed,1\nx,2\n', AFTER + r"its beginning \(unexpected end of data"),
        ("a.csv", b"body,n\nx,1\n", "{0} has no column 'text'; it has body, n"),
        ("a.csv", b"text,n,text\nx,1,y\n", "{0} has the column 'text' twice; rename one of them"),
        ("a.csv", b"text;n\nx;1\n", "{0} has no column 'text'; it has text;n"),
    ],
)
def test_a_damaged_file_gives_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message.replace("{0}", re.escape(name))) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_that_may_not_be_entered_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "closed").mkdir()
    (tmp_path / "open/a.jsonl").write_text(LINES)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("closed") and access(path, mode))
    with pytest.raises(PermissionError, match="closed"):
        read(tmp_path / "*" / "*.jsonl")


# A loss is said


def test_each_source_is_reported_and_a_loss_stops_the_run(tmp_path):
    for name, bad in (("a", 0), ("b", 4), ("c", 5), ("none", 20)):
        texts = [" ".join(f"{name}{number}x{word}" for word in range(30)) for number in range(20 - bad)]
        write(tmp_path / f"{name}.jsonl", texts + [{"body": "elsewhere"}] * bad)

    def run(*names, output="out", **fields):
        lines = []
        entries = [{"files": str(tmp_path / f"{name}.jsonl"), "name": name} for name in names]
        summary = gather.gather(data(*entries, **fields), tmp_path / output, report=lines.append)
        assert summary["read"] == summary["train"] + summary["heldout"] + sum(summary["dropped"].values())
        return lines

    assert run("a", "b") == ["a: 20 documents read, 20 kept", "b: 20 documents read, 16 kept, 4 dropped (no_text 4)"]
    with pytest.raises(UserError) as caught:
        run("a", "c", output="stopped")
    assert str(caught.value) == (
        "source c: only 75.0 % of 20 documents can be used (data.max_dropped is 0.2): no_text 5; the first is "
        f"{tmp_path}/c.jsonl:16: it has no 'text' but body; set text_column, or raise data.max_dropped"
    )
    # The same folder resumes from what was read, with the limit raised.
    assert run("a", "c", output="stopped", max_dropped=0.3)[1].startswith("c: 20 documents read, 15 kept")
    with pytest.raises(UserError, match=r"source none: none of 20 documents can be used: no_text 20;"):
        run("none", output="unusable", max_dropped=1)
    (tmp_path / "again.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    with pytest.raises(UserError, match=r"source again keeps nothing: exact_duplicate 20; leave it out"):
        run("a", "again", output="repeated")
