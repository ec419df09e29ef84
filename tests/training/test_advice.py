"""Lines on how a recipe spends its compute: said of the published recipe, and not of one that spends it well."""

import json

import pytest
from command import nanophi

from nanophi.core.recipe import load_recipe
from nanophi.training.advice import advice


def test_the_published_recipe_is_told_all_three(tmp_path):
    recipe = load_recipe("nano-phi-115m")
    passes, embeddings, ratio = advice(recipe, tmp_path)
    assert passes.startswith("28 passes: repeated text beyond about 4 is worth little (Muennighoff et al. 2023")
    assert embeddings.startswith("67 % of the parameters are in embeddings: tie them")
    assert ratio.startswith("96 tokens per parameter: about 20 give the lowest loss for the FLOP, with a larger model")
    assert advice(load_recipe("nano-phi-115m-control"), tmp_path)[0].startswith("12 passes")


def test_where_the_number_of_different_tokens_comes_from(tmp_path):
    def passes(name, *overrides):
        return [line for line in advice(load_recipe(name, overrides), tmp_path) if "passes" in line]

    assert passes("nano-phi-115m-control") and not passes("nano-phi-115m", "quality.threshold=0.7")
    assert not passes("demo")
    assert passes("demo", "data.max_tokens=122880")[0].startswith("10 passes")
    (tmp_path / "data/tokens").mkdir(parents=True)
    (tmp_path / "data/tokens/tokens.json").write_text(json.dumps({"train": {"tokens": 14_000 * 1024}}))
    assert passes("nano-phi-115m-control")[0].startswith("512 passes")


def test_two_phases_are_counted_apart(tmp_path):
    recipe = load_recipe("demo", ["quality.phase=decay", "training.decay_fraction=0.2", "data.max_tokens=122880"])
    (first, *passes), tokens = advice(recipe, tmp_path)[:2], 600 * 8 * 256
    assert first == "983k tokens until the learning rate decays; 246k tokens while it decays"
    assert passes[0].startswith("8 passes until the learning rate decays: repeated text")
    (tmp_path / "data/tokens").mkdir(parents=True)
    counts = {"train": {"tokens": tokens}, "decay": {"tokens": tokens // 50}}
    (tmp_path / "data/tokens/tokens.json").write_text(json.dumps(counts))
    assert advice(recipe, tmp_path)[1].startswith("10 passes while it decays: repeated text")


@pytest.mark.parametrize("steps", [10, 100])
def test_few_tokens_per_parameter(steps, tmp_path):
    said = [f"training.steps={steps}", "training.keep_steps=[]", "training.warmup_steps=0"]
    lines = advice(load_recipe("demo", said), tmp_path)
    assert len(lines) == 1 and "tokens per parameter" in lines[0] and "with a smaller model" in lines[0]


def test_estimate_shows_what_was_derived_and_the_advice(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert not nanophi("estimate", "nano-phi-d12")
    lines = capsys.readouterr().out.splitlines()
    assert "model.hidden_size: 768 (64 per layer)" in lines
    assert "training.muon_learning_rate: 0.02 (one over the root of the width)" in lines
    assert any(line.startswith("20 passes: ") for line in lines)
    assert not any("in embeddings" in line for line in lines)
