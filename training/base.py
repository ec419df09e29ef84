"""The model that a training begins with: its weights, and whether they are those of the recipe's model.

The recipe and records of a chat model's base are in `core/bases.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers.utils import CONFIG_NAME

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core.errors import UserError, user_errors
from nanophi.core.names import local, resolve
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.training.checkpoints import WEIGHTS

COMPUTED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "layer_norm_eps", "rope_parameters", "tie_word_embeddings", "qk_layernorm"),
)
"""Fields of the configuration that decide what is computed from the weights; dropout and context length may change."""
TOKENIZER_FILE = "tokenizer.json"


def base_file(base: str) -> Path:
    """The weights of a folder, of a run's final checkpoint, or of a Hub repository. Raises `UserError` if none."""
    named = resolve(base, "base")
    weights = named.model([CONFIG_NAME, TOKENIZER_FILE, WEIGHTS]) / WEIGHTS
    if not weights.is_file():
        raise named.error(f"holds no {WEIGHTS}")
    return weights


def check_base(base: str, config: NanoPhiConfig, tokenizer: Path | None) -> Path:
    """Check that `base` is a model of the recipe's configuration, whose differences may leave all shapes as they are.

    Without the run's tokenizer, which may still have to be made, neither it nor the size of its vocabulary is compared.
    Gives the weights' file, or raises `UserError` with the key that has another value, and both values.
    """
    weights = base_file(base)
    with user_errors(f"base: {base}: {CONFIG_NAME} cannot be read"):
        theirs = NanoPhiConfig.from_pretrained(weights.parent)
    for key in COMPUTED if tokenizer is None else (*COMPUTED, "vocab_size"):
        there, here = getattr(theirs, key), getattr(config, key)
        if there != here:
            raise UserError(f"base: {base} has {key} {there}, the recipe's model {here}; set model.{key} to its base's")
    file = weights.with_name(TOKENIZER_FILE)
    if tokenizer is not None and file.is_file():
        with user_errors(f"base: the tokenizers of {base} and of the run cannot be compared"):
            vocabularies = [Tokenizer.from_file(str(path)).get_vocab() for path in (file, tokenizer / TOKENIZER_FILE)]
        if vocabularies[0] != vocabularies[1]:
            remedy = f"set tokenizer.path: {weights.parent if local(base).is_dir() else base}"
            raise UserError(f"base: {base} has another tokenizer than the run; {remedy}")
    return weights


def base_model(base: str, config: NanoPhiConfig, tokenizer: Path | None = None) -> NanoPhiForCausalLM:
    """A model of this configuration with the weights of `base`, whose tokenizer must be the run's if one is given."""
    weights = check_base(base, config, tokenizer)
    with user_errors(f"base: {base} cannot be loaded"):
        loaded: Any = NanoPhiForCausalLM.from_pretrained(
            weights.parent, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, info = loaded
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    if wrong:
        raise UserError(f"base: {base} has other tensors than the recipe's model ({sorted(wrong)[0]} and the like)")
    assert isinstance(model, NanoPhiForCausalLM)
    return model
