"""The package itself: its classes are registered where they are asked for, and modules of 0.1 still import."""

import subprocess
import sys

import pytest

import nanophi

SCRIPT = """
import sys
import transformers

tiny = dict(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1, vocab_size=9)
for statement in ("from nanophi import NanoPhiConfig", "import nanophi; NanoPhiConfig = nanophi.NanoPhiConfig"):
    for name in [name for name in sys.modules if name.partition(".")[0] == "nanophi"]:
        del sys.modules[name]
    exec(statement)
    config = NanoPhiConfig(**tiny)
    assert type(transformers.AutoConfig.for_model("nanophi", **tiny)) is NanoPhiConfig, statement
    for auto, made in (("AutoModel", "NanoPhiModel"), ("AutoModelForCausalLM", "NanoPhiForCausalLM")):
        model = getattr(transformers, auto).from_config(config)
        assert type(model) is getattr(sys.modules["nanophi"], made), (statement, auto)
"""


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_auto_classes_know_nanophi_whatever_was_imported():
    run(SCRIPT)


def test_the_package_shows_its_names():
    assert nanophi.NanoPhiModel is nanophi.modeling_nanophi.NanoPhiModel
    with pytest.raises(AttributeError, match="module 'nanophi' has no attribute 'NanoPhy'"):
        nanophi.NanoPhy  # noqa: B018


def test_the_root_modules_of_earlier_versions_are_the_same_objects():
    run(
        "from nanophi.recipe import load_recipe; from nanophi.files import UserError; from nanophi import run\n"
        "import nanophi.core.errors as errors, nanophi.core.recipe as recipe, nanophi.core.run, sys\n"
        "assert load_recipe is recipe.load_recipe and UserError is errors.UserError and run is nanophi.core.run\n"
        "assert recipe.__spec__.name == 'nanophi.core.recipe' and 'torch' not in sys.modules"
    )
