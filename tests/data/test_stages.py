"""A data stage depends on what the recipe's names hold, not on the names."""

import json
import os

import pytest

from nanophi.core.recipe import Recipe
from nanophi.core.run import RunDirectory
from nanophi.core.stages import Runner
from nanophi.data import scorers, tokenizer
from nanophi.data.stages import PREPARE, data_stages

STAGES = set(PREPARE) - {"conversations"}  # of a recipe that trains on documents


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("in/a.jsonl", "tok/tokenizer.json", "clf/config.json", "bench/quiz/test.parquet"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("1")
    (tmp_path / "tok" / "model.safetensors").write_text("1")
    monkeypatch.setattr(tokenizer, "load", lambda *args: None)
    monkeypatch.setattr(scorers, "output_values", lambda scorer: None)
    return tmp_path


def keys(tmp_path, **changes):
    """What each stage depends on, in a run of its own in which nothing is computed."""
    recipe = {
        "name": "run",
        "data": {"sources": [{"files": "in"}], "decontamination": {"benchmarks": "./bench"}},
        "quality": {"scorer": "model:clf", "label": "good"},
        "tokenizer": {"path": "~/tok"},
        "model": {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
        "training": {"steps": 1, "batch_size": 1, "learning_rate": 0.1},
    }
    found = {}
    run = RunDirectory(tmp_path / "runs" / "run", report=lambda line: None)

    def stage(name, inputs, *args, **kwargs):
        found[name] = json.dumps(inputs, sort_keys=True)
        return {}

    run.stage = stage
    run.key = lambda name: found[name]
    parsed = Recipe.model_validate(recipe | changes)
    Runner(parsed, run, data_stages(parsed), PREPARE).make("tokens")
    return found


@pytest.mark.parametrize(
    ("path", "changed"),
    [
        ("in/a.jsonl", STAGES),
        ("bench/quiz/test.parquet", STAGES),
        ("clf/config.json", {"scores", "quality", "tokens"}),
        ("tok/tokenizer.json", {"tokenizer", "tokens"}),
        ("tok/model.safetensors", set()),
    ],
)
def test_a_stage_runs_again_if_what_it_was_given_holds_something_else(folder, path, changed):
    before = keys(folder)
    assert set(before) == STAGES
    os.utime(folder / path, (1, 1))
    assert keys(folder) == before, "times say nothing"
    (folder / path).write_text("2")
    after = keys(folder)
    assert {name for name in STAGES if after[name] != before[name]} == changed
    (folder / path).write_text("1")
    assert keys(folder) == before


def test_limits_and_workers_are_not_what_documents_depend_on(folder):
    data = {"sources": [{"files": "in"}], "decontamination": {"benchmarks": "./bench"}}
    assert keys(folder, data={**data, "max_dropped": 0.5, "workers": 3})["documents"] == keys(folder)["documents"]
    assert keys(folder, data={**data, "heldout_fraction": 0.1})["documents"] != keys(folder)["documents"]
    before, after = keys(folder), keys(folder, data={**data, "sources": [{"files": "in", "weight": 2.0}]})
    assert {name for name in STAGES if after[name] != before[name]} == {"tokens"}, "a weight counts in the packing"


def test_a_dataset_on_the_hub_is_its_commit(folder, monkeypatch):
    commits = iter(["a" * 40, "b" * 40])
    monkeypatch.setattr("nanophi.core.inputs.resolve_commit", lambda *args: next(commits))
    data = {"sources": [{"hub": "org/set"}]}
    first = keys(folder, data=data)
    assert json.loads(first["documents"])["sources"][0]["commit"] == "a" * 40
    assert keys(folder, data=data) == first, "a run keeps the commit that it began with"
    (folder / "runs" / "run" / "record.json").unlink()
    assert keys(folder, data=data)["documents"] != first["documents"]
