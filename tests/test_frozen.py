"""Stage keys that must not move: a run made by an earlier version stays up to date under this one.

What the recipes name is replaced by fixed contents, and no stage is run. A key may move only if the outputs of its
stage do, and then by its number in `FORMATS`; `python tests/test_frozen.py` writes the fixture again.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from nanophi.core import inputs
from nanophi.core.files import write_json
from nanophi.core.recipe import load_recipe
from nanophi.data import installed_docs, sources
from nanophi.pipeline import Pipeline

FIXTURE = Path(__file__).with_name("frozen_keys.json")
RECIPES = ("demo", "demo-control", "nano-phi-115m", "nano-phi-115m-control", "nano-phi-115m-fast")
EOS = {"id": 0, "content": "<eos>", "special": True}
EOS |= dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False)
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [EOS],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": {"type": "WordLevel", "vocab": {"<eos>": 0}, "unk_token": "<eos>"},
}


def stages_of(name: str, runs: Path, patch: pytest.MonkeyPatch) -> dict[str, dict[str, object]]:
    """Name of each stage up to the evaluation -> its key and inputs, with fixed contents of all that is read."""
    patch.setattr(installed_docs, "inputs", lambda: {"python": "3.11", "packages": "a" * 64})
    for module in (inputs, sources):
        patch.setattr(module, "resolve_commit", lambda repo_id, revision, kind: "c" * 40)
    recipe = load_recipe(name, ["training.precision=fp32"])
    data = runs / name / "data"
    write_json(data / "tokens/tokens.json", {split: {"sha256": split[0] * 64} for split in ("train", "heldout")})
    write_json(data / "tokenizer/tokenizer.json", TOKENIZER)
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<eos>", "eos_token": "<eos>"}
    write_json(data / "tokenizer/tokenizer_config.json", special)
    pipeline = Pipeline(recipe, runs, report=str)
    stages: dict[str, dict[str, object]] = {}
    for stage in (*pipeline.chain("sample"), pipeline.stages["evaluation"]):
        for part in stage.parts(pipeline) if stage.parts else [stage]:
            values = json.loads(json.dumps(pipeline.inputs_of(part)))
            stages[part.name] = {"key": pipeline.run._key(part.name, values), "inputs": values}
            pipeline.run.update_record(stages=stages)
    return stages


@pytest.mark.parametrize("name", RECIPES)
def test_stage_keys_do_not_move(name, tmp_path, monkeypatch):
    frozen = json.loads(FIXTURE.read_text())
    found = stages_of(name, tmp_path, monkeypatch)
    if name in frozen["inputs"]:  # first, because they say what moved
        assert {stage: entry["inputs"] for stage, entry in found.items()} == frozen["inputs"][name]
    assert {stage: entry["key"] for stage, entry in found.items()} == frozen["keys"][name]


if __name__ == "__main__":
    content: dict[str, dict[str, object]] = {"keys": {}, "inputs": {}}
    for recipe_name in RECIPES:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkey:
            result = stages_of(recipe_name, Path(folder), monkey)
        content["keys"][recipe_name] = {stage: entry["key"] for stage, entry in result.items()}
        if recipe_name in ("demo", "nano-phi-115m-fast"):
            content["inputs"][recipe_name] = {stage: entry["inputs"] for stage, entry in result.items()}
    sys.exit(write_json(FIXTURE, content))
