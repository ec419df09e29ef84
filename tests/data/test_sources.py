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
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanophi.core.errors import UserError
from nanophi.core.inputs import Contents
from nanophi.core.recipe import Data, Source
from nanophi.data import formats, gather, sources

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="names in bytes, links and pipes as Linux has them")
TEXTS = ["The first document.", 'A second one, with "quotes"; and\ncolumns', "Третий, naïve"]


def read(score=None, **fields):
    """The texts of a source, and what was counted."""
    source, tally = Source.model_validate(fields), sources.Tally()
    parts = sources.plan(source, score)
    return [document.text.decode() for part in parts for document in sources.read(source, part, score, tally)], tally


def zst(content):
    return bytes(pa.compress(content, "zstd", asbytes=True))


def csv_of(rows, delimiter=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
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
    found, tally = read(files=str(tmp_path / name), **separator)
    assert found == TEXTS
    assert tally.total()["read"] == 3 and not sources.dropped(tally.total())


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
    assert read(files=str(folder))[0] == TEXTS
    if kind in ("saved", "splits"):
        assert read(hub=str(folder))[0] == TEXTS
    with pytest.raises(UserError, match="is a folder here, which has no revisions; leave out 'revision'"):
        read(hub=str(folder), revision="v9")
    if kind == "splits":
        assert read(hub=str(folder), split="test")[0] == TEXTS[:1]
        with pytest.raises(UserError, match="has no split 'dev'; it has train, test"):
            read(hub=str(folder), split="dev")


def test_a_folder_stands_for_the_files_below_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "crawl [2024]" / "10:30"
    folder.mkdir(parents=True)
    (folder / "b.jsonl").write_text(LINES)
    (folder / "a.txt").write_text("Plain text.")
    (folder / "README.md").write_text("# The card of the dataset")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_text("not read")
    expected = ["Plain text.", *TEXTS]
    for pattern in (tmp_path / "crawl [2024]", folder, tmp_path / "crawl*", "~/crawl [2024]"):
        found, _ = read(files=str(pattern))
        assert sorted(found) == sorted(expected)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "x.png").touch()
    with pytest.raises(UserError, match=r"no \.parquet, .* file is there"):
        read(files=str(tmp_path / "pictures"))


@LINUX
def test_links_are_followed_and_pipes_are_not_read(tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.jsonl").write_text(LINES)
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)
    assert read(files=str(folder))[0] == TEXTS
    with pytest.raises(UserError, match="is no folder and no Hub id"):
        read(hub=str(elsewhere / "a.jsonl"))
    os.mkfifo(folder / "pipe.jsonl")
    (elsewhere / "x.jsonl").symlink_to("gone.jsonl")
    for files in (folder, folder / "pipe.jsonl", elsewhere / "x.jsonl"):
        with pytest.raises(UserError, match=r"(pipe|x)\.jsonl is a dangling link, or not a regular file"):
            read(files=str(files))


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_of_a_hub_folder_may_have_different_columns(tmp_path, streaming):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.jsonl").write_text(LINES)
    (tmp_path / "data" / "train-1.jsonl").write_text('{"text": "More.", "n": "a word", "extra": [1]}\n{"text": "cut o')
    (tmp_path / "data" / "test-0.jsonl").write_text('{"text": "Not this."}\n')
    found, tally = read(hub=str(tmp_path), streaming=streaming)
    assert (found, sources.dropped(tally.total())) == ([*TEXTS, "More."], {"not_json": 1})


def test_a_folder_with_a_script_and_a_name_that_is_nothing(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text("import datasets")
    (folder / "train.jsonl").write_text(LINES)
    with pytest.raises(UserError, match=r"files can be named by 'files' \(.*scripts are no longer supported"):
        read(hub=str(folder))
    (tmp_path / "file.jsonl").write_text("{}")
    for hub in ("../nowhere/at/all", str(tmp_path / "file.jsonl")):
        with pytest.raises(UserError, match="is no folder and no Hub id"):
            read(hub=hub)
        with pytest.raises(UserError, match="is no folder and no Hub id"):  # before the Hub is asked
            sources.fingerprint(Source(hub=hub), Contents())


def test_small_files_share_a_part_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 3 * len(LINES.encode()))
    for number in range(20):
        (tmp_path / f"{number:02}.jsonl").write_text(LINES.replace("document", f"document {number}"))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "x.parquet")
    parts = sources.plan(Source(files=str(tmp_path / "*.*")), None)
    assert len(parts) == 7 and parts[-1][-1][0] == str(tmp_path / "x.parquet")
    found, tally = read(files=str(tmp_path / "*.*"))
    first = [text for text in found if text.startswith("The first")]
    assert first[:20] == [f"The first document {number}." for number in range(20)]
    assert tally.total()["read"] == 63


# Text is what it is


def test_marks_are_removed_and_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffWith a mark\r\nand two lines\0".encode())
    (tmp_path / "b.txt").write_bytes("\ufeffInside \ufeffit".encode())
    (tmp_path / "c.txt").write_bytes("caf\xe9".encode("latin-1"))
    found, tally = read(files=str(tmp_path / "*.txt"))
    assert found == ["With a mark\nand two lines", "Inside it"]
    assert tally.refused == [
        {
            "document": str(tmp_path / "c.txt"),
            "reason": "invalid_utf8",
            "remedy": "convert it to UTF-8, for example by iconv -f latin1 -t utf-8",
        }
    ]


def test_a_separator_splits_in_pieces_of_any_size(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\n\r\ntwo \xff\r\n\r\n\r\nth\xc3\xa9ree\r\n\r\n\r\n\r\n\r\n\r\n")

    for chunk in (1, 2, 3, 7, 1 << 20):
        monkeypatch.setattr(formats, "_CHUNK", chunk)
        found, tally = read(files=str(tmp_path / "a.txt"), separator="\n\n\n")
        assert found == ["one", "thé" + "ree"]
        assert (tally.total()["read"], sources.dropped(tally.total())) == (4, Counter(invalid_utf8=1, empty=1))
    monkeypatch.setattr(formats, "MAXIMUM_DOCUMENT_BYTES", 5)
    monkeypatch.setattr(formats, "_CHUNK", 4)
    (tmp_path / "b.txt").write_text("ok|" + "long" * 20 + "|fine")
    found, tally = read(files=str(tmp_path / "b.txt"), separator="|")
    assert found == ["ok", "fine"] and sources.dropped(tally.total()) == {"oversize": 1}


@pytest.mark.parametrize("mark", ["<|endoftext|>", "</s>"])
def test_a_text_file_that_holds_many_documents_says_so(tmp_path, mark):
    path = tmp_path / "stories.txt"
    path.write_text(f"\n{mark}\n".join(TEXTS))
    with pytest.raises(UserError, match=rf"stories\.txt holds many documents: 2 lines are like {re.escape(mark)};"):
        read(files=str(path))
    assert read(files=str(path), separator=mark)[0] == TEXTS
    assert len(read(files=str(path), separator="")[0]) == 1
    path.write_text(f"Only a mention of {mark} in a sentence, twice: {mark}.")
    assert len(read(files=str(path))[0]) == 1
    (tmp_path / "x.jsonl").write_text(LINES)
    with pytest.raises(UserError, match="'separator' is for text files"):
        read(files=str(tmp_path / "x.jsonl"), separator="x")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "json"])
def test_text_may_lie_deeper_than_a_column(tmp_path, suffix):
    rows = [
        {
            "meta": {"text": "Inner.", "id": 1},
            "turns": [{"by": "user", "content": "Hi."}, {"by": "bot", "content": None}, {"by": "me", "content": "Yo."}],
            "parts": ["x", "y"],
        },
        {"meta": {"text": None, "id": 2}, "turns": [], "parts": []},
    ]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    for column, expected in (("meta.text", "Inner."), ("turns[].content", "Hi.\n\nYo."), ("parts[]", "x\n\ny")):
        found, tally = read(files=str(path), text_column=column)
        assert found == [expected] and sources.dropped(tally.total()) == {"no_text": 1}
    _, tally = read(files=str(path), text_column="turns")
    assert sources.dropped(tally.total()) == {"not_text": 2}
    assert tally.refused[0]["remedy"].startswith("'turns' holds no text; text_column may be a path, as meta.text")


# What a row may hold


def test_scores_of_tables(tmp_path):
    pq.write_table(pa.table({"text": ["x"], "q": [datetime.datetime(2024, 1, 1)]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column 'q' holds 2024-01-01 00:00:00; a score is a number"):
        read("q", files=str(tmp_path / "a.parquet"))
    (tmp_path / "a.csv").write_text("text,q\nx,0.25\n")
    source, tally = Source(files=str(tmp_path / "a.csv")), sources.Tally()
    (part,) = sources.plan(source, "q")
    assert [document.score for document in sources.read(source, part, "q", tally)] == [0.25]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_all_streams_of_a_compressed_file_are_read(tmp_path, suffix, monkeypatch):
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zst, ".xz": lzma.compress}[suffix]
    monkeypatch.setattr(formats, "_CHUNK", 61)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(LINES.encode()) + compress(b"") + compress(LINES.encode()))
    assert read(files=str(tmp_path / f"a.jsonl{suffix}"))[0] == TEXTS + TEXTS


def test_a_row_with_a_comma_too_many_is_counted(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,"Hello, world."\n2,Hello, world.\n3,Short\n')
    found, tally = read(files=str(tmp_path / "a.csv"))
    assert found == ["Hello, world.", "Short"]
    assert sources.dropped(tally.total()) == {"malformed": 1}
    assert tally.refused[0]["document"].endswith("a.csv:3")
    (tmp_path / "b.tsv").write_text("text\nA tab\tinside\n")
    assert read(files=str(tmp_path / "b.tsv"))[1].total() == {"read": 1, "malformed": 1}
    (tmp_path / "c.csv").write_text("")
    assert read(files=str(tmp_path / "c.csv"))[0] == []


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
        read(files=str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_folder_that_may_not_be_entered_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "closed").mkdir()
    (tmp_path / "open/a.jsonl").write_text(LINES)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("closed") and access(path, mode))
    with pytest.raises(PermissionError, match="closed"):
        read(files=str(tmp_path / "*" / "*.jsonl"))


# A loss is said


def documents(folder, name, count, bad=0):
    lines = [json.dumps({"text": " ".join(f"{name}{number}x{word}" for word in range(30))}) for number in range(count)]
    lines[count - bad :] = [json.dumps({"body": "elsewhere"})] * bad
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return str(folder / f"{name}.jsonl")


def test_each_source_is_reported_and_a_loss_stops_the_run(tmp_path):
    files = [documents(tmp_path, "a", 20), documents(tmp_path, "b", 20, bad=4), documents(tmp_path, "c", 20, bad=5)]

    def run(*paths, output="out", **fields):
        lines = []
        entries = [{"files": path, "name": Path(path).stem} for path in paths]
        data = Data.model_validate({"sources": entries, "workers": 1, **fields})
        summary = gather.gather(data, tmp_path / output, report=lines.append)
        assert summary["read"] == summary["train"] + summary["heldout"] + sum(summary["dropped"].values())
        return lines

    assert run(*files[:2]) == ["a: 20 documents read, 20 kept", "b: 20 documents read, 16 kept, 4 dropped (no_text 4)"]
    with pytest.raises(UserError) as caught:
        run(files[0], files[2], output="stopped")
    assert str(caught.value) == (
        "source c: only 75.0 % of 20 documents can be used (data.max_dropped is 0.2): no_text 5; the first is "
        f"{files[2]}:16: it has no 'text' but body; set text_column, or raise data.max_dropped"
    )
    # The same folder resumes from what was read, with the limit raised.
    assert run(files[0], files[2], output="stopped", max_dropped=0.3)[1].startswith("c: 20 documents read, 15 kept")
    with pytest.raises(UserError, match=r"source again keeps nothing: exact_duplicate 20; leave it out"):
        (tmp_path / "again.jsonl").write_text((tmp_path / "a.jsonl").read_text())
        run(files[0], str(tmp_path / "again.jsonl"), output="repeated")
