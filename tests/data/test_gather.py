"""What is dropped and named, held-out documents, determinism, and resuming."""

import gzip
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from gathered import data as data_of
from gathered import rows_of, write
from hub_server import HubServer
from killed import run_killed

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_tree
from nanophi.core.inputs import Contents
from nanophi.data import gather, installed_docs, sources


def text(number):
    generator = np.random.default_rng(number)
    return " ".join(f"word{value}" for value in generator.integers(0, 50_000, 120))


def texts(*range_of):
    return [text(number) for number in range(*range_of)]


def id_of(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.fixture(autouse=True)
def each_file_is_a_part(monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 1)


def data(*sources, **fields):
    return data_of(*sources, **{"deduplication": {"similarity": 0.5}, "heldout_fraction": 0.1, **fields})


def texts_of(output, split):
    return [row["text"] for row in rows_of(output, split)]


def test_repeats_are_dropped_and_listed(tmp_path):
    originals = texts(30)
    words = originals[3].split()
    words[10] = words[60] = "changed"
    repeats = [originals[5], " ".join(words), text(99), f"  {originals[6]}\r\n"]
    files = {"a": write(tmp_path / "a.parquet", originals), "b": write(tmp_path / "b.parquet", repeats)}
    summary = gather.gather(data(*({"files": str(f), "name": n} for n, f in files.items())), tmp_path / "out")
    assert summary["sources"]["a"]["dropped"] == {}
    assert summary["sources"]["b"]["dropped"] == {"exact_duplicate": 2, "near_duplicate": 1}
    assert summary["duplicates"] == {"clusters": 3, "largest": 2}
    listed = pq.read_table(tmp_path / "out" / "duplicates.parquet").to_pylist()
    assert {row["kept"] for row in listed} == {id_of(originals[number]) for number in (3, 5, 6)}
    assert sorted(row["reason"] for row in listed) == ["exact", "exact", "near"]


def test_a_source_can_be_held_out_as_a_whole(tmp_path):
    validation = texts(10)
    train = write(tmp_path / "train.parquet", [*texts(100, 150), *validation[:2]])
    held = {"files": str(write(tmp_path / "validation.parquet", validation)), "heldout": True}
    summary = gather.gather(data(train, held), tmp_path / "out")
    # What the training source already has cannot serve as held-out text.
    assert (summary["train"], summary["heldout"]) == (52, 8)
    assert {*texts_of(tmp_path / "out", "heldout")} == {*validation[2:]}
    with pytest.raises(ValueError, match="every source is held out"):
        data(held)
    write(tmp_path / "validation.parquet", validation[:2])
    with pytest.raises(UserError, match="the documents of the held-out sources repeat the other sources"):
        gather.gather(data(train, held), tmp_path / "again")


def test_heldout_documents_have_no_near_duplicate_among_those_trained_on(tmp_path):
    pairs = [(one, " ".join([*one.split()[:7], "different", *one.split()[8:]])) for one in texts(100)]
    settings = data(
        write(tmp_path / "a.parquet", [one for pair in pairs for one in pair]),
        deduplication={"near": False, "similarity": 0.5},
        heldout_fraction=0.2,
    )
    assert gather.gather(settings, tmp_path / "out")["dropped"]["heldout_near_train"] > 0
    held, trained = ({one.split()[20] for one in texts_of(tmp_path / "out", split)} for split in ("heldout", "train"))
    assert held and not held & trained


def test_contaminated_documents_are_dropped_and_listed(tmp_path):
    question = "Which force keeps the planets of the solar system on their paths around the sun, year after year?"
    folder = tmp_path / "benchmarks" / "quiz"
    write(folder / "test.parquet", [{"question": question}])
    card = "configs:\n- config_name: default\n  data_files:\n  - split: test\n    path: test.parquet"
    (folder / "README.md").write_text(f"---\n{card}\n---\n")
    documents = texts(20)
    documents[4] += " " + question.lower().replace(",", " -")
    file = write(tmp_path / "a.parquet", documents)
    settings = data(file, decontamination={"benchmarks": str(tmp_path / "benchmarks")})
    summary = gather.gather(settings, tmp_path / "out")
    assert summary["dropped"] == {"contaminated": 1}
    assert summary["contamination"] == {"quiz": {"items": 1, "too_short": 0, "items_found": 1, "documents": 1}}
    report = read_json(tmp_path / "out" / "contamination.json")
    assert report["quiz"]["examples"][0]["document"] == id_of(documents[4])


def test_columns_caps_and_source_columns(tmp_path):
    rows = [{"text": text(number), "score": number / 100, "origin": "xy"[number % 2]} for number in range(100)]
    file = write(tmp_path / "a.parquet", rows)
    source = {"files": str(file), "source_column": "origin", "max_documents": 60}
    summary = gather.gather(data(source), tmp_path / "out", "score")
    assert summary["read"] == 60
    assert {name: entry["read"] for name, entry in summary["sources"].items()} == {"x": 30, "y": 30}
    scores = {row["text"]: row["score"] for row in rows}
    assert all(row["score"] == scores[row["text"]] for row in rows_of(tmp_path / "out", "train"))
    with pytest.raises(UserError, match="has no column 'quality'"):
        gather.gather(data(source), tmp_path / "other", "quality")


GATHER = """
import json, sys
from pathlib import Path
from nanophi.data import gather
from nanophi.core.recipe import Data

print(json.dumps(gather.gather(Data.model_validate_json(sys.argv[1]), Path(sys.argv[2]))))
"""
CARD = b"""---
configs:
- config_name: small
  data_files: data/train-*.parquet
- config_name: lines
  data_files: lines/*.gz
- config_name: text
  data_files: lines/*.txt
---
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_on_the_hub(tmp_path, streaming):
    files = {"README.md": CARD, "lines/b.txt": "<|end|>".join(texts(80, 90)).encode()}
    for part in range(2):
        path = write(tmp_path / f"{part}.parquet", texts(25 * part, 25 * part + 25))
        files[f"data/train-0000{part}-of-00002.parquet"] = path.read_bytes()
    files["lines/a.jsonl.gz"] = gzip.compress(write(tmp_path / "a.jsonl", texts(50, 80)).read_bytes())
    source = {"hub": "someone/numbers", "config": "small", "streaming": streaming, "revision": "main"}
    with HubServer() as hub:
        hub.add_repository("dataset", "someone/numbers", files)
        environment = os.environ | hub.environment(tmp_path / "home")

        def gathered(output, **fields):
            arguments = [data({**source, **fields}).model_dump_json(), str(tmp_path / output)]
            command = [sys.executable, "-c", GATHER, *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            return json.loads(done.stdout) if done.returncode == 0 else done.stderr.splitlines()[-1]

        summary = gathered("out")
        assert summary["read"] == summary["train"] + summary["heldout"] == 50
        others = (("lines", {}, 30), ("text", {"separator": "<|end|>"}, 10))
        for config, fields, count in others if streaming else ():
            assert gathered(config, config=config, **fields)["read"] == count
        missing = gathered("none", hub="someone/nothing")
        assert "UserError: dataset someone/nothing does not exist on the Hub" in missing
    if not streaming:  # what was downloaded is found again without a network
        assert gathered("again") == summary


def many_files(folder):
    for part in range(6):
        write(folder / f"{part}.parquet", texts(part * 30, part * 30 + 40))
    return {"files": str(folder / "*.parquet"), "name": "numbers"}


def test_the_number_of_workers_changes_nothing_and_a_finished_folder_is_left_alone(tmp_path):
    source = many_files(tmp_path / "in")
    first, _ = (gather.gather(data(source, workers=workers), tmp_path / str(workers)) for workers in (1, 3))
    assert sha256_of_tree(tmp_path / "1") == (before := sha256_of_tree(tmp_path / "3"))
    assert gather.gather(data(source), tmp_path / "1") == first
    assert sha256_of_tree(tmp_path / "1") == before


KILLED = """
from nanophi.data import gather, sources
from nanophi.core.recipe import Data

settings, output = arguments
sources.PART_BYTES = 1
gather.gather(Data.model_validate_json(settings), Path(output))
"""


@pytest.mark.parametrize("survive", [3, 9])
def test_killed_and_started_again(tmp_path, survive, monkeypatch):
    settings, output = data(many_files(tmp_path / "in")), tmp_path / "out"
    run_killed(KILLED, settings.model_dump_json(), output, survive=survive)
    assert not (output / "documents.json").exists()
    assert len(list((output / ".parts").rglob("*.json"))) == survive
    run, ran = gather.run_parts, []

    def counting(function, parts, folder, *args, **fields):
        ran.extend(path for path in range(len(parts)) if not (folder / f"{path:05d}.json").exists())
        return run(function, parts, folder, *args, **fields)

    monkeypatch.setattr(gather, "run_parts", counting)
    gather.gather(settings, output)
    assert len(ran) == 12 - survive, "finished parts are not run again"
    gather.gather(settings, tmp_path / "whole")
    assert sha256_of_tree(output) == sha256_of_tree(tmp_path / "whole")
    run_killed(KILLED, settings.model_dump_json(), tmp_path / "otherwise", survive=survive)
    monkeypatch.setattr(sources, "PART_BYTES", 1 << 20)  # parts of another size: none of what was read is one of these
    assert gather.gather(settings, tmp_path / "otherwise")["read"] == 240


def test_fingerprint_follows_the_files(tmp_path):
    (source,) = data(many_files(tmp_path / "in")).sources
    before = sources.fingerprint(source, Contents())
    for path in (tmp_path / "in").iterdir():
        path.touch()
    assert sources.fingerprint(source, Contents()) == before, "contents count, not times"
    write(tmp_path / "in" / "5.parquet", [text(1)])
    assert sources.fingerprint(source, Contents()) != before


def test_sources_of_different_weight_need_different_names(tmp_path):
    source = many_files(tmp_path / "in")
    with pytest.raises(UserError, match="set their 'name'"):
        gather.gather(data(source, {**source, "weight": 2.0}), tmp_path / "out")


def test_embedded_documents_are_english_and_the_same_each_time():
    first = list(installed_docs.documents("packaging"))
    assert first == list(installed_docs.documents("packaging")) and "packaging" in installed_docs.groups()
    assert {"package-descriptions", "licences"} <= {source for source, _ in first}
    assert all(len(entry) >= 300 for _, entry in first)
    docs = [entry for source, entry in installed_docs.documents("python") if source == "python-docs"]
    assert sum(map(len, docs)) > 300_000
    assert any('The "try" statement' in entry for entry in docs)
