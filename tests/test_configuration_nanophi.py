"""NanoPhiConfig: what it refuses, what it writes, and what it reads back."""

import copy
import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PhiConfig

import nanophi
from nanophi import NanoPhiConfig, NanoPhiForCausalLM
from nanophi.configuration_nanophi import AUTO_MAP

SMALL = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What transformers logs at WARNING and above."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog.records


def test_the_defaults_are_nano_phi_115m():
    config = NanoPhiConfig()
    with torch.device("meta"):
        model = NanoPhiForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 115_098_231
    assert config.max_position_embeddings == 1024
    assert config.bos_token_id == config.eos_token_id == 50256
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 65}, r"hidden_size \(65\) must be a multiple of num_attention_heads \(4\).*64"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\).*num_key_value_heads \(3\); use one of 1, 2, 4"),
        ({"vocab_size": 1.5}, "vocab_size must be a positive integer, got 1.5"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        ({"resid_pdrop": 1.0}, "resid_pdrop must be a probability"),
        ({"layer_norm_eps": "1e-5"}, "layer_norm_eps must be a number of at least 0, got '1e-5'"),
        ({"initializer_range": float("nan")}, "initializer_range must be a number of at least 0, got nan"),
        ({"tie_word_embeddings": "maybe"}, "tie_word_embeddings must be true or false, got 'maybe'"),
        ({"hidden_act": "gelu_newer"}, "hidden_act 'gelu_newer' is not known to transformers; try 'gelu_new'"),
        ({"partial_rotary_factor": 0.2}, r"partial_rotary_factor \(0.2\) rotates 3 of 16 head dimensions"),
        ({"partial_rotary_factor": 1.5}, r"must be in \(0, 1\], got 1.5"),
        ({"rope_theta": 0.5}, "rope_theta must be a number above 1"),
        ({"rope_parameters": {"rope_type": "lineal"}}, "rope_type 'lineal' is unknown; use one of default"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_parameters: .*factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_tehta": 1e5}}, "rope_type 'default' does not use: rope_tehta"),
    ],
)
def test_an_impossible_shape_is_refused_in_one_line_that_names_the_field(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        NanoPhiConfig(**{**SMALL, **fields})
    assert "\n" not in str(error.value)


def test_the_written_file_is_a_phi_with_an_auto_map_and_the_older_keys(tmp_path):
    config = NanoPhiConfig(**SMALL, rope_theta=5000.0, partial_rotary_factor=0.25, dtype="bfloat16", use_cache=False)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    expected = {
        **{"model_type": "phi", "architectures": ["PhiForCausalLM"], "auto_map": AUTO_MAP, "use_cache": True},
        **{"rope_theta": 5000.0, "partial_rotary_factor": 0.25, "torch_dtype": "bfloat16", "dtype": "bfloat16"},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
    }
    assert {key: written.get(key) for key in expected} == expected
    # Every field of Phi is written out: older versions had other defaults.
    assert set(PhiConfig().to_diff_dict()) <= set(written) | {"dtype"}


def test_a_saved_configuration_reads_back_equal_and_without_a_warning(tmp_path, warnings):
    config = NanoPhiConfig(**SMALL, qk_layernorm=True, partial_rotary_factor=1.0)
    config.save_pretrained(tmp_path)
    again = NanoPhiConfig.from_pretrained(tmp_path)
    assert again.model_type == "nanophi"
    assert again.to_dict() == config.to_dict()
    stock = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(stock) is PhiConfig
    assert stock.rope_parameters == config.rope_parameters
    assert warnings == []


def test_a_phi_folder_of_any_age_is_read(tmp_path, warnings):
    """The keys as phi-2's config.json has them, and as transformers 5 writes them."""
    old = {**SMALL, "model_type": "phi", "architectures": ["PhiForCausalLM"], "rope_scaling": None}
    del old["num_key_value_heads"]
    old |= {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, "torch_dtype": "float16", "layer_norm_eps": 1e-05}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = NanoPhiConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    assert config.dtype == torch.float16
    assert config.num_key_value_heads == config.num_attention_heads
    stock = PhiConfig(**SMALL, rope_parameters={"rope_theta": 1e5, "partial_rotary_factor": 0.75})
    stock.save_pretrained(tmp_path)
    assert NanoPhiConfig.from_pretrained(tmp_path).rope_parameters == stock.rope_parameters
    assert warnings == []


def test_dictionary_copy_and_update_round_trips():
    config = NanoPhiConfig(**SMALL, use_cache=False)
    for again in (NanoPhiConfig.from_dict(config.to_dict()), copy.deepcopy(config), NanoPhiConfig(**config.to_dict())):
        assert again.to_dict() == config.to_dict()
        assert again.use_cache is False
        assert (again.model_type, type(again).model_type) == ("nanophi", "nanophi")
    other = NanoPhiConfig()
    other.update(config.to_dict())
    assert other.hidden_size == 64
    assert other.to_dict() == config.to_dict()
    json.loads(config.to_json_string(use_diff=False))
    rope = {"rope_theta": 1e5}
    assert NanoPhiConfig(**SMALL, rope_parameters=rope).rope_parameters["partial_rotary_factor"] == 0.5
    assert rope == {"rope_theta": 1e5}, "the caller's stays as it was"


def test_a_transformers_that_is_too_old_is_told_the_version_needed(monkeypatch):
    # transformers replaces its module object while it is imported: the one that later imports see is in sys.modules.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")
    path = Path(nanophi.__file__).with_name("configuration_nanophi.py")
    spec = importlib.util.spec_from_file_location("configuration_nanophi_on_old_transformers", path)
    with pytest.raises(ImportError, match=r"needs transformers 5\.4\.0 or later, found 4\.57\.6"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
