"""Recipes: what the built-in ones say, inheritance, overrides, and one clear line for every mistake."""

import pytest
import yaml

from nanophi.core.errors import UserError
from nanophi.core.recipe import Recipe, load_recipe
from nanophi.core.recipe_file import RECIPES, dump, override, own
from nanophi.training.budget import flops_per_token, parameter_count


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_built_in_recipes_load_and_survive_a_round_trip(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    text = dump(recipe.dump())
    assert Recipe(**yaml.safe_load(text)) == recipe
    assert text == yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True), "as runs made before have it"


def test_the_115m_recipe_is_the_published_run():
    recipe = load_recipe("nano-phi-115m")
    config = recipe.model_config_for()
    assert parameter_count(config) == 115_098_231
    assert flops_per_token(config, 1024) == pytest.approx(515e6, rel=0.001)
    assert recipe.training.steps * recipe.training.batch_size * config.max_position_embeddings == 7_340_032_000
    assert 6000 in recipe.training.keep_steps
    assert (recipe.quality.scorer, recipe.quality.threshold) == ("column:quality_score_v1", 0.5)
    assert len(recipe.data.sources) == 5
    assert all(source.hub.startswith("kenhktsui/") for source in recipe.data.sources)


@pytest.mark.parametrize("pair", [("demo", "demo-control"), ("nano-phi-115m", "nano-phi-115m-control")])
def test_controls_differ_by_the_filter_alone(pair):
    filtered, control = (load_recipe(name).dump() for name in pair)
    assert control["quality"].pop("threshold") is None
    assert filtered["quality"].pop("threshold") > 0
    for recipe in (filtered, control):
        del recipe["name"], recipe["card"]["title"]
    assert filtered == control


@pytest.fixture
def write(tmp_path):
    base = yaml.safe_load((RECIPES / "demo.yaml").read_text())

    def write(name="recipe.yaml", text=None, **changes):
        (tmp_path / name).write_text(yaml.safe_dump({**base, **changes}) if text is None else text)
        return tmp_path / name

    return write


def test_extends_merges_mapping_by_mapping(write):
    write("base.yaml")
    path = write("child.yaml", text="extends: base.yaml\nname: child\ntraining: {batch_size: 77}\n")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.training.batch_size) == ("child", 77)
    assert recipe.training.steps == load_recipe("demo").training.steps


def test_overrides_numbers_and_merged_keys(write):
    numbers = ["model.layer_norm_eps=1e-6", "training.learning_rate=2E-3", "training.keep_steps=[1, 2]"]
    source = "data.sources=[{hub: a/b, revision: 12e45}]"
    recipe = load_recipe(write(), [*numbers, source, "quality.threshold=0.25", "quality={scorer: 'column:q'}"])
    assert recipe.model["layer_norm_eps"] == 1e-6 and recipe.training.learning_rate == 2e-3
    assert (recipe.training.keep_steps, recipe.quality.scorer) == ([1, 2], "column:q")
    assert recipe.data.sources[0].revision == "12e45", "a short commit is no number"
    changes = ["training.learning_rate=1e3", "training.spike_threshold=12E45", "training.weight_decay=1"]
    training = load_recipe(write(), changes).training
    assert (training.learning_rate, training.spike_threshold, training.weight_decay) == (1000, 12e45, 1)
    merged = "extends: demo\nname: m\ntraining: {<<: {steps: 7, keep_steps: [], warmup_steps: 1}, batch_size: 2}"
    assert load_recipe(write(text=merged)).training.steps == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.learning_rate=.inf"], r"'training.learning_rate': .*finite number"),
        (["model.layer_norm_eps=-1"], "'model': layer_norm_eps must be a number of at least 0, got -1"),
        (["data.max_tokens=10"], r"'data': max_tokens \(10\) is less than one row of 256 tokens"),
        (["data.max_decay_tokens=255"], r"'data': max_decay_tokens \(255\) is less than one row of 256 tokens"),
        (["data.sources=[{files: a.txt, split: test}]"], r"'data.sources.0': 'split' is for 'hub'"),
        (["data.sources=[{embedded: documentation, streaming: true}]"], r"'data.sources.0': 'streaming' is for 'hub'"),
        (["training.step=5"], r"'training': unknown key 'step'; did you mean 'steps'\?"),
        (["trainig.steps=5"], r"unknown key 'trainig'; did you mean 'training'\?"),
        (["data.sources=[{embeded: x}]"], r"'data.sources.0': unknown key 'embeded'; did you mean 'embedded'\?"),
        (["model.hidden_sizes=5"], r"'model': unknown key 'hidden_sizes'; did you mean 'hidden_size'\?"),
        (["model.hidden_size=100"], r"'model'.*hidden_size.*100.*num_attention_heads"),
        (["model.num_key_value_heads=4"], r"'model'.*num_attention_heads.*num_key_value_heads"),
        (["training.steps=many"], r"'training.steps': .*integer.*got 'many'"),
        (["training.steps=0"], r"'training.steps': .*greater than 0"),
        (["training.optimizer=sgd"], r"'training': optimizer 'sgd': use adamw or muon"),
        (["training.warmup_steps=1000000"], r"warmup_steps \(1000000\) must be below steps"),
        (["training.keep_steps=[1000000]"], r"keep_steps \[1000000\] are not among the steps, 1 to"),
        (["training.micro_batch_size=3"], r"batch_size \(\d+\) must be a multiple of micro_batch_size \(3\)"),
        (["data.sources=[{hub: a, files: b}]"], r"exactly one of 'embedded', 'hub' or 'files'"),
        (["data.sources=[{files: ''}]"], r"exactly one of 'embedded', 'hub' or 'files'"),
        (["data.sources=[{files: x.txt}]"], r"'linear' needs quality.high and quality.low"),
        (["quality.scorer=magic"], r"'quality': 'magic' must be 'linear'"),
        (["name=a/b"], r"'name'"),
        *(
            (
                [text, *schedule],
                "'phase' needs a learning rate that is first stable and then decays; set training.schedule=wsd, and a "
                rf"decay_fraction with steps on both sides \(now: {start} of 600\)",
            )
            for text in ("quality.phase=decay", "data.max_decay_tokens=9000")
            for schedule, start in (
                (["training.schedule=cosine"], 600),
                (["training.schedule=constant"], 600),
                (["training.decay_fraction=0.0001"], 600),
                (["training.decay_fraction=1", "training.warmup_steps=0"], 0),
            )
        ),
        (["training.decay_fraction=0"], r"'training.decay_fraction': .*greater than 0"),
        (["data.sources=[{embedded: documentation, phase: stable}]"], "no source is read while the learning rate"),
        (["data.sources=[{embedded: documentation, phase: none}]"], "no source is read before the learning rate"),
        (["data.sources=[{files: a, phase: decay, heldout: true}]"], "a held-out source is read in no phase"),
        (["training.steps"], r"--set training.steps: expected section.key=value"),
        (["name.x=1"], r"'name' is not a section"),
    ],
)
def test_mistakes_are_named_in_one_line(write, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(write(), overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "a recipe is a mapping"),
        ("extends: lost.yaml", r"recipe .*lost\.yaml does not exist"),
        ("extends: recipe.yaml", "goes in a circle"),
        ("data: {sources: []}\nname: x\ndata: {}", r"not valid YAML \(key 'data' is there twice.* line 3"),
        ("name: 2024-13-45", "not valid YAML"),
        ("name: " + "[" * 3000, "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_broken_files_are_named(write, text, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write(text=text))


def test_a_missing_file_and_a_broken_override_are_named(write):
    with pytest.raises(UserError, match=r"recipe nowhere.yaml does not exist; built-in recipes: demo, demo-chat"):
        load_recipe("nowhere.yaml")
    with pytest.raises(UserError, match=r"--set card\.notes=2024-13-45: not valid YAML"):
        load_recipe(write(), ["card.notes=2024-13-45"])


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"license": "beerware"}, "license 'beerware' is not an identifier of the Hub; use 'other' with license_name"),
        ({"license": "Apache-2.0"}, r"did you mean 'apache-2\.0'\?"),
        ({"license": "MIT"}, "did you mean 'mit'?"),
        ({"license": "other"}, "license 'other' needs license_name and license_link"),
        ({"license": "other", "license_name": "mine"}, "license 'other' needs license_link"),
        ({"license": "mit", "license_link": "https://x.org"}, "may only be given with license 'other'"),
        ({"license": "other", "license_name": "mine", "license_link": "my licence"}, "license_link .*be a URL"),
        ({"title": "two\nlines"}, "title .*must be one line"),
        ({"title": ""}, "title .*must not be empty"),
        ({"developers": "a\u2028b"}, "developers .*must be one line"),
        ({"prompt": " \n"}, "prompt .*must not be empty"),
        ({"prompt": "a\x00b"}, "prompt .*must not have control characters"),
        ({"repo_id": "no-organization"}, "repo_id .*must be ORG/NAME"),
        ({"repo_id": "org/" + "n" * 97}, "repo_id .*must be ORG/NAME"),
        ({"repo_id": "org/a--b"}, "repo_id .*must be ORG/NAME"),
        ({"version": "v1..2"}, "version .*git tag"),
        ({"version": "v1.lock"}, "version .*git tag"),
    ],
)
def test_a_card_that_could_not_be_published_is_refused_when_the_recipe_loads(tmp_path, card, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"extends": "demo", "card": card}))
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_a_card_may_say_what_people_say(tmp_path):
    path = tmp_path / "recipe.yaml"
    card = {"title": "None of {{ this }} is a TODO", "prompt": "def f():\n\treturn None", "notes": "# TODO\n\nnan"}
    other = {"license": "other", "license_name": "Mine", "license_link": "https://example.org/licence"}
    path.write_text(yaml.safe_dump({"extends": "demo", "card": card | other | {"repo_id": "org/name.v1_x-2"}}))
    assert load_recipe(path).card.prompt == card["prompt"]


DECIMAL = [("0300", 300), ("1_000", 1000), ("-007", -7), ("1e-3", 0.001), (".5", 0.5), ("2.", 2.0)]
TEXT = [(text, text) for text in ("1:30", "0o17", "0x1F", "0b_", "12e45", "190:20:30.15")]


@pytest.mark.parametrize(("text", "value"), DECIMAL + TEXT)
def test_decimal_numbers_are_read_as_they_are_written_and_all_else_is_text(text, value):
    values: dict = {}
    override(values, f"a.b={text}")
    assert values == {"a": {"b": value}} and type(values["a"]["b"]) is type(value)


TEXTS = ["089", "1e-5", "+.5", "1.e+3", "-007", "1_0", "1:30", "0x1F", "yes", "2024-01-01", "~", "12e45", "#", "é 😀"]


@pytest.mark.parametrize("text", [*TEXTS, "a\x85b", "\u2028", "one\u2029\ntwo " * 20, "\ufeff\t", " 5 "], ids=ascii)
def test_what_is_written_is_read_as_it_was_by_both_versions_of_yaml(text, tmp_path):
    values = {"a": text, "b": [text, {text: text}], "c": [1e-5, 1e22, -7, 0.5, None, True]}
    for width in (80, 100):
        (tmp_path / "recipe.yaml").write_text(dump(values, width=width), encoding="utf-8")
        assert own(tmp_path / "recipe.yaml") == values == yaml.safe_load(dump(values, width=width))
