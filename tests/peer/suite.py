"""transformers' own tests of a model and of a configuration, for NanoPhi and for stock Phi; run by tests/peer/run.py.

The tests come from transformers' source distribution, unpacked into a package `tests` on the path. It lacks three
modules that they import; the stand-ins below leave out the tests that those add.
"""

import sys
import types
import unittest

import torch
import transformers


def stand_in(name, **contents):
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module


for package in ("tests.exporters", "tests.generation", "tests.utils"):
    stand_in(package, __path__=[])
stand_in("tests.exporters.test_export", ExportTesterMixin=object)
stand_in("tests.generation.test_utils", GenerationTesterMixin=object)
stand_in("tests.utils.test_configuration_utils", config_common_kwargs={"return_dict": False, "num_labels": 7})

from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

import nanophi  # noqa: E402
from nanophi import modeling_nanophi  # noqa: E402

# The tests ask these tables what kind of model a class is; they know the library's own classes only.
for table, kind in (
    ("MODEL_MAPPING_NAMES", "Model"),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "ForCausalLM"),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "ForSequenceClassification"),
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "ForTokenClassification"),
):
    getattr(modeling_auto, table)["nanophi"] = f"NanoPhi{kind}"

FIELDS = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class SmallModel:
    """What the mixin asks of a model: a small configuration and inputs for it."""

    batch_size, seq_length, is_training = 3, 7, True
    num_hidden_layers, hidden_size, num_attention_heads, num_labels = 2, 32, 4, 2

    def __init__(self, config_class):
        self.config_class = config_class

    def get_config(self):
        return self.config_class(**FIELDS)

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], 99)
        mask = random_attention_mask([self.batch_size, self.seq_length])
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}


class Checks(ModelTesterMixin):
    """The mixin with the classes of one family."""

    def setUp(self):
        self.model_tester = SmallModel(self.config_class)
        shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        self.config_tester = ConfigTester(self, config_class=self.config_class, **shape)

    def test_config(self):
        self.config_tester.run_common_tests()


class TestPhi(Checks, unittest.TestCase):
    """Stock Phi."""

    config_class = transformers.PhiConfig
    all_model_classes = (
        transformers.PhiModel,
        transformers.PhiForCausalLM,
        transformers.PhiForSequenceClassification,
        transformers.PhiForTokenClassification,
    )


class TestNanoPhi(Checks, unittest.TestCase):
    """NanoPhi."""

    config_class = nanophi.NanoPhiConfig
    all_model_classes = (
        nanophi.NanoPhiModel,
        nanophi.NanoPhiForCausalLM,
        modeling_nanophi.NanoPhiForSequenceClassification,
        modeling_nanophi.NanoPhiForTokenClassification,
    )


torch.set_num_threads(1)
