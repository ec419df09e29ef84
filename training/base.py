"""The model that a training begins with: its weights, and whether they are those of the recipe's model."""

from pathlib import Path
from typing import Any, cast

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
    """The weights' file of `base`; `UserError` if it is not a model of the recipe's configuration.

    Without the run's tokenizer, which may still have to be made, neither it nor the size of its vocabulary is compared.
    """
    weights = base_file(base)
    file = weights.with_name(TOKENIZER_FILE)
    with user_errors(f"base: {base} cannot be compared with the recipe's model"):
        theirs = NanoPhiConfig.from_pretrained(weights.parent)
        for key in COMPUTED if tokenizer is None else (*COMPUTED, "vocab_size"):
            there, here = getattr(theirs, key), getattr(config, key)
            if there != here:
                shown = f"{key} {there}, the recipe's model {here}"
                raise UserError(f"base: {base} has {shown}; set model.{key} to its base's")
        if tokenizer is not None and file.is_file():
            there, here = (Tokenizer.from_file(str(path)).get_vocab() for path in (file, tokenizer / TOKENIZER_FILE))
            if there != here:
                remedy = f"set tokenizer.path: {weights.parent if local(base).is_dir() else base}"
                raise UserError(f"base: {base} has another tokenizer than the run; {remedy}")
    return weights


def base_model(base: str, config: NanoPhiConfig, tokenizer: Path | None = None) -> NanoPhiForCausalLM:
    """A model of this configuration with the weights of `base`, whose tokenizer must be the run's if one is given."""
    weights = check_base(base, config, tokenizer)
    options: Any = {"dtype": torch.float32, "output_loading_info": True}
    with user_errors(f"base: {base} cannot be loaded"):
        loaded: Any = NanoPhiForCausalLM.from_pretrained(weights.parent, config=config, **options)
    model, info = loaded
    if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise UserError(f"base: {base} has other tensors than the recipe's model ({sorted(wrong)[0]} and the like)")
    return cast(NanoPhiForCausalLM, model)
