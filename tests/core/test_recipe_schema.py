"""What editors and readers are told of a recipe is what the recipe's own check accepts, and is not stale."""

import json

import pytest
import recipe_schema  # type: ignore[import-not-found]
import yaml

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core.errors import UserError
from nanophi.core.recipe import SCHEMA, Section, load_recipe, print_recipe
from nanophi.core.recipe_file import RECIPES, own

STALE = "is stale; run `python tests/recipe_schema.py`"
BUILT_IN = sorted(RECIPES.glob("*.yaml"))


def test_both_files_are_those_of_the_schema():
    assert json.loads(SCHEMA.read_text()) == recipe_schema.schema(), f"recipes/schema.json {STALE}"
    assert recipe_schema.REFERENCE.read_text() == recipe_schema.reference(), f"docs/recipe.md {STALE}"


def test_every_key_has_a_type_a_default_and_a_meaning():
    schema = recipe_schema.schema()
    text = recipe_schema.REFERENCE.read_text()
    keys = {key for section in Section.__subclasses__() for key in section.model_fields}
    for section in (schema, *schema["$defs"].values()):
        for key, spec in section["properties"].items():
            assert len(spec["description"]) > 3, key
            assert {"$ref", "anyOf", "type", "enum"} & set(spec), key
            assert f"| `{key}`" in text
            keys.discard(key)
    assert not keys
    assert set(schema["$defs"]["Model"]["properties"]) == {"depth", *NanoPhiConfig.__annotations__}
    words = schema["$defs"]["Training"]["properties"]
    assert words["learning_rate"]["description"] == "peak learning rate of AdamW's parameters"
    assert words["seed"]["description"].startswith("Of initial weights and the documents' order;")
    assert schema["properties"]["data"]["description"].startswith("Documents: sources, held-out share")
    wanted = {"default": 0, "minimum": 0, "type": "integer", "title": "Warmup Steps"}
    assert words["warmup_steps"] == {**wanted, "description": "steps in which the learning rate rises from zero"}
    assert "| `warmup_steps`" in text and "| integer ≥ 0 " in text and "[Deduplication](#deduplication)" in text


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda path: path.stem)
def test_an_editor_accepts_the_built_in_recipes(path):
    first = path.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema.json"
    assert path.with_name(first.rpartition("=")[2]) == SCHEMA
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    assert not list(validator.iter_errors(own(path)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"training": {"stepz": 5}},
        {"training": {"steps": 0}},
        {"training": {"schedule": "linear"}},
        {"quality": {"threshold": "high"}},
        {"model": {"hidden_sice": 64}},
        {"model": {"hidden_size": "wide"}},
        {"model": {"depth": 0}},
        {"model": {"depth": 97}},
        {"model": {"vocab_size": -5}},
        {"model": {"num_hidden_layers": 0}},
        {"seed": "3"},
        {"training": {"learning_rate": True}},
        {"training": {"learning_rate": "0.1"}},
        {"training": {"compile": "off"}},
        {"training": {"keep_steps": [True]}},
        {"data": {"sources": [{"files": "a", "weight": "2"}]}},
        {"quality": {"scorer": "column:q", "threshold": 1, "scale": [0, "5"]}},
        {"data": {"sources": [{"file": "a.txt"}]}},
        {"trainig": {}},
    ],
    ids=str,
)
def test_an_editor_marks_what_the_command_refuses(wrong, tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    assert list(validator.iter_errors(wrong))
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({"extends": "demo", **wrong}))
    with pytest.raises(UserError):
        load_recipe(tmp_path / "wrong.yaml")


def test_a_recipe_is_printed_as_one_that_gives_the_same_run(tmp_path, capsys):
    changes = ["training.steps=7", "training.warmup_steps=1", "training.keep_steps=[]", "name='089'"]
    print_recipe("demo", changes)
    printed = capsys.readouterr().out
    assert printed.startswith(f"# yaml-language-server: $schema={SCHEMA.as_uri()}\nname: '089'\n")
    (tmp_path / "again.yaml").write_text(printed)
    again = load_recipe(tmp_path / "again.yaml")
    assert again.training.steps == 7
    assert again == load_recipe("demo", changes)


def test_two_recipes_differ_in_what_is_printed(capsys):
    print_recipe("demo", diff="demo-control")
    lines = capsys.readouterr().out.splitlines()
    titles = "card.title nano-phi-demo -> nano-phi-demo-control"
    assert lines == ["name demo -> demo-control", "quality.threshold 0.1 -> None", titles]
    print_recipe("nano-phi-115m", ["training.seed=0", "card.notes=None"], diff="nano-phi-115m")
    assert capsys.readouterr().out.splitlines() == ["training.seed 0 -> None", "card.notes None -> "]
    print_recipe("demo", diff="demo")
    assert capsys.readouterr().out == "no difference\n"
