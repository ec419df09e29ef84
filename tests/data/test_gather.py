"""Sources in every format, what is dropped and named, held-out documents, determinism, and resuming."""

import gzip
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from killed import run_killed

from nanophi.core.errors import UserError
from nanophi.core.inputs import Contents
from nanophi.core.recipe import Data
from nanophi.data import gather, installed_docs, sources
from nanophi.data.documents import shards


def text(number, words=120):
    generator = np.random.default_rng(number)
    return " ".join(f"word{value}" for value in generator.integers(0, 50_000, words))


@pytest.fixture(autouse=True)
def each_file_is_a_part():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART_BYTES", 1)
        yield


def data(*sources, **fields):
    fields = {"deduplication": {"similarity": 0.5}, "heldout_fraction": 0.1, "workers": 1, **fields}
    return Data.model_validate({"sources": list(sources), **fields})


def write_parquet(path, texts, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, **columns}), path, row_group_size=50)
    return path


def documents(output, split="train"):
    return pa.concat_tables([pq.read_table(path) for path in shards(output, split)])


def tree_digest(folder):
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"files": "none*.parquet"}, "file is there"),
        ({"files": "notes.pdf"}, "notes.pdf: not a .parquet"),
        ({"files": "a.parquet", "text_column": "body"}, "no column 'body'; it has text"),
        ({"files": "empty.parquet"}, "none of 2 documents can be used: empty 2"),
        ({"hub": "nodata"}, "cannot be loaded"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_in_one_line(tmp_path, source, message):
    write_parquet(tmp_path / "a.parquet", ["x"])
    write_parquet(tmp_path / "empty.parquet", ["", "  "])
    (tmp_path / "notes.pdf").write_text("x")
    (tmp_path / "nodata").mkdir()
    place = next(iter(source))
    with pytest.raises(UserError) as caught:
        gather.gather(data({**source, place: str(tmp_path / source[place])}), tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_repeats_are_dropped_and_listed(tmp_path):
    originals = [text(number) for number in range(30)]
    words = originals[3].split()
    words[10] = words[60] = "changed"
    write_parquet(tmp_path / "a.parquet", originals)
    write_parquet(tmp_path / "b.parquet", [originals[5], " ".join(words), text(99), f"  {originals[6]}\r\n"])
    sources = [{"files": str(tmp_path / f"{name}.parquet"), "name": name} for name in "ab"]
    summary = gather.gather(data(*sources), tmp_path / "out")
    assert summary["sources"]["a"]["dropped"] == {}
    assert summary["sources"]["b"]["dropped"] == {"exact_duplicate": 2, "near_duplicate": 1}
    assert summary["duplicates"] == {"clusters": 3, "largest": 2}
    listed = pq.read_table(tmp_path / "out" / "duplicates.parquet").to_pylist()
    kept = {hashlib.sha256(originals[number].encode()).hexdigest()[:16] for number in (3, 5, 6)}
    assert {row["kept"] for row in listed} == kept
    assert sorted(row["reason"] for row in listed) == ["exact", "exact", "near"]


def test_a_source_can_be_held_out_as_a_whole(tmp_path):
    validation = [text(number) for number in range(10)]
    write_parquet(tmp_path / "train.parquet", [text(number) for number in range(100, 150)] + validation[:2])
    write_parquet(tmp_path / "validation.parquet", validation)
    sources = {"files": str(tmp_path / "train.parquet")}, {"files": str(tmp_path / "validation.parquet")}
    summary = gather.gather(data(sources[0], {**sources[1], "heldout": True}), tmp_path / "out")
    # What the training source already has cannot serve as held-out text.
    assert (summary["train"], summary["heldout"]) == (52, 8)
    assert set(documents(tmp_path / "out", "heldout")["text"].to_pylist()) == set(validation[2:])
    with pytest.raises(ValueError, match="every source is held out"):
        data({**sources[1], "heldout": True})
    write_parquet(tmp_path / "validation.parquet", validation[:2])
    with pytest.raises(UserError, match="the documents of the held-out sources repeat the other sources"):
        gather.gather(data(sources[0], {**sources[1], "heldout": True}), tmp_path / "again")


def test_heldout_documents_have_no_near_duplicate_among_those_trained_on(tmp_path):
    texts = []
    for number in range(100):
        words = text(number).split()
        texts.append(" ".join(words))
        words[7] = "different"
        texts.append(" ".join(words))
    write_parquet(tmp_path / "a.parquet", texts)
    sources = {"files": str(tmp_path / "a.parquet")}
    summary = gather.gather(
        data(sources, deduplication={"near": False, "similarity": 0.5}, heldout_fraction=0.2), tmp_path / "out"
    )
    assert summary["dropped"]["heldout_near_train"] > 0
    held = {" ".join(row.split()[20:]) for row in documents(tmp_path / "out", "heldout")["text"].to_pylist()}
    trained = {" ".join(row.split()[20:]) for row in documents(tmp_path / "out")["text"].to_pylist()}
    assert held and not held & trained


def test_contaminated_documents_are_dropped_and_listed(tmp_path):
    question = "Which force keeps the planets of the solar system on their paths around the sun, year after year?"
    folder = tmp_path / "benchmarks" / "quiz"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"question": [question]}), folder / "test.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: test.parquet\n---\n"
    )
    texts = [text(number) for number in range(20)]
    texts[4] += " " + question.lower().replace(",", " -")
    write_parquet(tmp_path / "a.parquet", texts)
    settings = data(
        {"files": str(tmp_path / "a.parquet")}, decontamination={"benchmarks": str(tmp_path / "benchmarks")}
    )
    summary = gather.gather(settings, tmp_path / "out")
    assert summary["dropped"] == {"contaminated": 1}
    assert summary["contamination"] == {"quiz": {"items": 1, "too_short": 0, "items_found": 1, "documents": 1}}
    report = json.loads((tmp_path / "out" / "contamination.json").read_text())
    assert report["quiz"]["examples"][0]["document"] == hashlib.sha256(texts[4].encode()).hexdigest()[:16]


def test_columns_caps_and_source_columns(tmp_path):
    texts = [text(number) for number in range(100)]
    scores = [number / 100 for number in range(100)]
    write_parquet(tmp_path / "a.parquet", texts, score=scores, origin=["x", "y"] * 50)
    source = {"files": str(tmp_path / "a.parquet"), "source_column": "origin", "max_documents": 60}
    summary = gather.gather(data(source), tmp_path / "out", "score")
    assert summary["read"] == 60
    assert {name: entry["read"] for name, entry in summary["sources"].items()} == {"x": 30, "y": 30}
    rows = documents(tmp_path / "out").to_pylist()
    assert all(row["score"] == scores[texts.index(row["text"])] for row in rows)
    with pytest.raises(UserError, match="has no column 'quality'"):
        gather.gather(data(source), tmp_path / "other", "quality")


GATHER = """
import json, sys
from pathlib import Path
from nanophi.data import gather
from nanophi.core.recipe import Data

print(json.dumps(gather.gather(Data.model_validate_json(sys.argv[1]), Path(sys.argv[2]))))
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_on_the_hub(tmp_path, streaming):
    files = {}
    for part in range(2):
        path = write_parquet(
            tmp_path / f"{part}.parquet", [text(number) for number in range(25 * part, 25 * part + 25)]
        )
        files[f"data/train-0000{part}-of-00002.parquet"] = path.read_bytes()
    lines = "".join(json.dumps({"text": text(number)}) + "\n" for number in range(50, 80))
    files["lines/a.jsonl.gz"] = gzip.compress(lines.encode())
    files["lines/b.txt"] = "<|end|>".join(text(number) for number in range(80, 90)).encode()
    files["README.md"] = (
        b"---\nconfigs:\n- config_name: small\n  data_files: data/train-*.parquet\n"
        b"- config_name: lines\n  data_files: lines/*.gz\n- config_name: text\n  data_files: lines/*.txt\n---\n"
    )
    source = {"hub": "someone/numbers", "config": "small", "streaming": streaming, "revision": "main"}
    with HubServer() as hub:
        hub.add_repository("dataset", "someone/numbers", files)
        environment = os.environ | hub.environment(tmp_path / "home")

        def gather(output, **fields):
            arguments = [data({**source, **fields}).model_dump_json(), str(tmp_path / output)]
            command = [sys.executable, "-c", GATHER, *arguments]
            return subprocess.run(command, env=environment, capture_output=True, text=True)

        done = gather("out")
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        assert summary["read"] == 50
        assert summary["train"] + summary["heldout"] == 50
        others = (("lines", {}, 30), ("text", {"separator": "<|end|>"}, 10))
        for config, fields, count in others if streaming else ():
            done = gather(config, config=config, **fields)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["read"] == count
        missing = gather("none", hub="someone/nothing")
        assert "UserError: dataset someone/nothing does not exist on the Hub" in missing.stderr.splitlines()[-1]
    if not streaming:  # what was downloaded is found again without a network
        again = gather("again")
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout) == summary


def many_files(folder):
    for part in range(6):
        write_parquet(folder / f"{part}.parquet", [text(number) for number in range(part * 30, part * 30 + 40)])
    return {"files": str(folder / "*.parquet"), "name": "numbers"}


def test_the_number_of_workers_changes_nothing_and_a_finished_folder_is_left_alone(tmp_path):
    source = many_files(tmp_path / "in")
    first, _ = (gather.gather(data(source, workers=workers), tmp_path / str(workers)) for workers in (1, 3))
    assert tree_digest(tmp_path / "1") == (before := tree_digest(tmp_path / "3"))
    assert gather.gather(data(source), tmp_path / "1") == first
    assert tree_digest(tmp_path / "1") == before


KILLED = """
from nanophi.data import gather, sources
from nanophi.core.recipe import Data

source, output = arguments
settings = Data.model_validate({"sources": [{"files": source, "name": "numbers"}], "heldout_fraction": 0.1,
                                "deduplication": {"similarity": 0.5}, "workers": 1})
sources.PART_BYTES = 1
gather.gather(settings, Path(output))
"""


@pytest.mark.parametrize("survive", [3, 9])
def test_killed_and_started_again(tmp_path, survive, monkeypatch):
    source = many_files(tmp_path / "in")
    output = tmp_path / "out"
    run_killed(KILLED, source["files"], output, survive=survive)
    assert not (output / "documents.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in (output / ".parts").rglob("*.json")}
    assert len(finished) == survive
    run, ran = gather.run_parts, []

    def counting(function, parts, folder, *args, **fields):
        ran.extend(path for path in range(len(parts)) if not (folder / f"{path:05d}.json").exists())
        return run(function, parts, folder, *args, **fields)

    monkeypatch.setattr(gather, "run_parts", counting)
    gather.gather(data(source), output)
    assert len(ran) == 12 - survive, "finished parts are not run again"
    monkeypatch.undo()
    gather.gather(data(source), tmp_path / "whole")
    assert tree_digest(output) == tree_digest(tmp_path / "whole")
    run_killed(KILLED, source["files"], tmp_path / "otherwise", survive=survive)
    with monkeypatch.context() as patch:  # parts of another size: none of what was read is one of these
        patch.setattr(sources, "PART_BYTES", 1 << 20)
        assert gather.gather(data(source), tmp_path / "otherwise")["read"] == 240


def test_fingerprint_follows_the_files(tmp_path):
    (source,) = data(many_files(tmp_path / "in")).sources
    before = sources.fingerprint(source, Contents())
    for path in (tmp_path / "in").iterdir():
        path.touch()
    assert sources.fingerprint(source, Contents()) == before, "contents count, not times"
    write_parquet(tmp_path / "in" / "5.parquet", [text(1)])
    assert sources.fingerprint(source, Contents()) != before


def test_sources_of_different_weight_need_different_names(tmp_path):
    source = many_files(tmp_path / "in")
    with pytest.raises(UserError, match="set their 'name'"):
        gather.gather(data(source, {**source, "weight": 2.0}), tmp_path / "out")


def test_embedded_documents_are_english_and_the_same_each_time():
    group = next(name for name in installed_docs.groups() if name == "packaging")
    first = list(installed_docs.documents(group))
    assert first == list(installed_docs.documents(group))
    sources = {source for source, _ in first}
    assert {"package-descriptions", "licences"} <= sources
    assert all(len(entry) >= 300 for _, entry in first)
    docs = [entry for source, entry in installed_docs.documents("python") if source == "python-docs"]
    assert sum(map(len, docs)) > 300_000
    assert any('The "try" statement' in entry for entry in docs)
