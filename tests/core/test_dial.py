"""One number in place of a shape: what follows from it, what a recipe keeps, and what is refused."""

from __future__ import annotations

import pytest
import yaml
from transformers import PhiConfig, PhiForCausalLM

from nanophi.core import dial
from nanophi.core.errors import UserError
from nanophi.core.recipe import Recipe, load_recipe
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.training import budget


@pytest.fixture
def load(tmp_path):
    def load(model, training=None, *overrides):
        path = tmp_path / "recipe.yaml"
        values = {"name": "own", "data": {"sources": [{"files": "text.jsonl"}]}, "quality": {"scorer": "none"}}
        values |= {"model": model, "training": {"optimizer": "muon"} if training is None else training}
        path.write_text(yaml.safe_dump(values))
        return load_recipe(path, overrides)

    return load


@pytest.mark.parametrize("depth", range(1, 13))
def test_every_depth_is_a_model_that_both_loaders_build(load, depth):
    recipe = load({"depth": depth, "max_position_embeddings": 64, "vocab_size": 300})
    config = recipe.model_config_for(eos_token_id=0, bos_token_id=0)
    assert config.num_hidden_layers == depth and config.hidden_size == 64 * config.num_attention_heads == 64 * depth
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.num_attention_heads / config.num_key_value_heads >= min(depth, 3)
    assert config.tie_word_embeddings
    if depth <= 3:
        stock = PhiForCausalLM(PhiConfig(**{key: getattr(config, key) for key in recipe.model}))
        ours = {name: value.shape for name, value in NanoPhiForCausalLM(config).state_dict().items()}
        assert {name: value.shape for name, value in stock.state_dict().items()} == ours
    assert dial.multiplying(recipe.model, 300) == pytest.approx(budget.multiplying_parameters(config), rel=0.02)


def test_the_recipe_holds_what_was_derived(load):
    recipe = load({"depth": 4, "max_position_embeddings": 256})
    assert "depth" not in recipe.model and Recipe(**recipe.dump()) == recipe
    training, parameters = recipe.training, dial.multiplying(recipe.model, 4096)
    assert training.steps * training.batch_size * 256 == pytest.approx(20 * parameters, rel=0.01)
    assert training.warmup_steps == training.steps // 20
    assert training.weight_decay == 0.1
    # Three times as narrow as the published model.
    assert training.learning_rate == pytest.approx(3 * 6e-3)
    assert training.muon_learning_rate == pytest.approx(3**0.5 * 0.02, rel=0.01)
    assert load({"depth": 4}, {}).training.learning_rate == pytest.approx(3 * 6e-4)


def test_what_the_recipe_states_is_kept(load):
    said = {"optimizer": "muon", "batch_size": 16, "learning_rate": 0.5, "weight_decay": 0.0}
    training = load({"depth": 2, "max_position_embeddings": 256}, said).training
    assert training.model_dump().items() >= said.items()
    tokens = training.steps * 16 * 256
    assert tokens == pytest.approx(20 * dial.multiplying(load({"depth": 2}).model, 4096), rel=0.01)
    assert load({"depth": 2}, {**said, "steps": 40}).training.warmup_steps == 2
    assert load({"depth": 2}, {"micro_batch_size": 3}).training.batch_size % 3 == 0


def test_settings_scale_as_the_dial_does(load):
    """A recipe made by the dial, scaled to another depth, is the one that the dial makes there."""
    made = {depth: load({"depth": depth, "max_position_embeddings": 256}) for depth in (3, 6)}
    six = made[6].training
    tokens = six.steps * six.batch_size * 256
    anchor = dial.Anchor(384, tokens, six.batch_size * 256, six.learning_rate, six.muon_learning_rate)
    three = made[3].training
    scaled = dial.scaled(anchor, 192, three.steps * three.batch_size * 256, 256)
    assert scaled.pop("batch_size") == pytest.approx(three.batch_size, rel=0.06)
    assert scaled.pop("steps") == pytest.approx(three.steps, rel=0.06)
    assert scaled.pop("warmup_steps") == pytest.approx(three.warmup_steps, rel=0.1)
    for key, value in scaled.items():
        assert value == pytest.approx(getattr(three, key), rel=0.01)


def test_the_built_in_recipe_costs_what_the_published_one_does():
    def flops(name):
        recipe = load_recipe(name)
        config = recipe.model_config_for()
        tokens = recipe.training.steps * recipe.training.batch_size * config.max_position_embeddings
        return tokens * budget.flops_per_token(config, config.max_position_embeddings)

    assert flops("nano-phi-d12") == pytest.approx(flops("nano-phi-115m"), rel=0.02)
    assert flops("nano-phi-d12-control") == flops("nano-phi-d12")
    assert load_recipe("nano-phi-d12-control").quality.threshold is None


def test_the_reasons_name_every_key(load, tmp_path):
    load({"depth": 3, "max_position_embeddings": 256})
    lines = dial.explain(tmp_path / "recipe.yaml", ["training.learning_rate=0.01"])
    keys = [key for key, _, _ in lines]
    assert keys[:6] == [f"model.{key}" for key in dial.SHAPE]
    assert "training.muon_learning_rate" in keys and "training.learning_rate" not in keys
    assert all(reason for _, _, reason in lines)
    assert dial.explain("demo") == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"depth": 12, "hidden_size": 64}, "'model': depth and hidden_size exclude each other"),
        ({"depth": 2, "tie_word_embeddings": False}, "'model': depth and tie_word_embeddings exclude each other"),
        ({"depth": 0}, "'model': depth must be a whole number from 1 to 96, got 0"),
        ({"depth": True}, "'model': depth must be a whole number"),
        ({"depth": "12"}, "'model': depth must be a whole number from 1 to 96, got '12'"),
        ({"depth": 2.5}, "'model': depth must be a whole number"),
    ],
)
def test_dials_that_are_refused(load, model, message):
    with pytest.raises(UserError, match=message):
        load(model)


@pytest.mark.parametrize(
    ("training", "message"),
    [({"batch_size": "many"}, "'training.batch_size'"), ({"steps": -1}, "'training.steps'"), (None, "'training'")],
)
def test_other_mistakes_keep_their_own_message(load, training, message):
    with pytest.raises(UserError, match=message):
        load({"depth": 2}, {}, f"training={yaml.safe_dump(training, default_flow_style=True).strip().splitlines()[0]}")


def test_null_takes_back_what_the_recipe_that_is_extended_states(load, tmp_path):
    deep = load({"depth": 2, "max_position_embeddings": 64})
    shape = {"hidden_size": 96, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 3}
    child = {"extends": "recipe.yaml", "model": {"depth": None, **shape, "num_key_value_heads": None}}
    child["training"] = {"steps": 5, "batch_size": 2, "learning_rate": 0.1}
    (tmp_path / "child.yaml").write_text(yaml.safe_dump(child))
    config = load_recipe(tmp_path / "child.yaml").model_config_for()
    assert {key: getattr(config, key) for key in shape} == shape and config.num_key_value_heads == 3
    nulls = dict.fromkeys(shape | {"num_key_value_heads": 0}, None) | {"depth": 2}
    again = {
        "extends": "child.yaml",
        "model": nulls,
        "training": {"steps": None, "batch_size": None, "learning_rate": 0.3},
    }
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(again))
    recipe = load_recipe(tmp_path / "again.yaml")
    assert recipe.model == deep.model and recipe.training == deep.training.model_copy(update={"learning_rate": 0.3})
    assert load_recipe("demo", ["model.depth=null"]) == load_recipe("demo")


def test_a_dial_on_top_of_a_shape_and_an_unknown_vocabulary():
    keys = "hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads"
    with pytest.raises(UserError, match=f"or set to null, if another recipe states it, depth or {keys}$"):
        load_recipe("demo", ["model.depth=3"])
    with pytest.raises(UserError, match=r"demo\.yaml: 'model': depth and hidden_size exclude each other; leave out"):
        load_recipe("demo", ["model.depth=3"])
    with pytest.raises(UserError, match=r"depth with tokenizer\.path needs vocab_size"):
        load_recipe("nano-phi-d12", ["tokenizer.path=somewhere"])
