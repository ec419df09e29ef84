"""NanoPhi's configuration: Phi's fields, NanoPhi's defaults, and one config.json for two loaders.

In memory `model_type` is "nanophi", so that the Auto classes can tell the two apart. config.json says
`model_type: phi` with an `auto_map` to this code: stock transformers loads a folder as Phi, and as NanoPhi with
`trust_remote_code=True`. Both compute the same function from the same tensors.
"""

import math
from collections.abc import Callable
from dataclasses import field
from typing import Any

import transformers
from packaging import version

if version.parse(transformers.__version__) < version.parse("5.4.0"):
    raise ImportError(
        f"NanoPhi's own code needs transformers 5.4.0 or later, found {transformers.__version__}: "
        "upgrade transformers, or load without trust_remote_code (stock Phi computes the same function)"
    )

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

STOCK_MODEL_TYPE = "phi"
AUTO_MAP = {
    "AutoConfig": "configuration_nanophi.NanoPhiConfig",
    "AutoModel": "modeling_nanophi.NanoPhiModel",
    "AutoModelForCausalLM": "modeling_nanophi.NanoPhiForCausalLM",
    "AutoModelForSequenceClassification": "modeling_nanophi.NanoPhiForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_nanophi.NanoPhiForTokenClassification",
}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


FIELD_CHECKS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("vocab_size hidden_size intermediate_size num_hidden_layers", _is_count, "a positive integer"),
    ("num_attention_heads num_key_value_heads max_position_embeddings", _is_count, "a positive integer"),
    ("resid_pdrop embd_pdrop attention_dropout", lambda one: _is_number(one) and one < 1, "a probability in [0, 1)"),
    ("initializer_range layer_norm_eps", _is_number, "a number of at least 0"),
    ("tie_word_embeddings", lambda one: isinstance(one, bool), "true or false"),
    ("hidden_act", lambda one: one in ACT2FN, "an activation of transformers, such as 'gelu_new'"),
)
"""Names of fields, what their values must be, and that in words."""


class NanoPhiConfig(PreTrainedConfig):
    """Shape and hyperparameters of a NanoPhi model; the defaults are nano-phi-115M (115,098,231 parameters).

    The fields are Phi's; `num_key_value_heads` None means as many as query heads, and the older top-level keys
    `rope_theta` (default 10000.0) and `partial_rotary_factor` (default 0.5) are accepted beside `rope_parameters`.
    config.json always has `use_cache` true, because `Trainer` switches it off in memory while it trains.

    A shape that cannot be built raises ValueError, in one line that names the fields.
    """

    model_type = "nanophi"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.dense": "rowwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "embed_dropout": (["inputs_embeds"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "final_layernorm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50295
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 6
    num_attention_heads: int = 24
    num_key_value_heads: int = 8
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attention_dropout: float = 0.0
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 1024
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    qk_layernorm: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.validate_shape()
        # The base class fills this dictionary in place; the caller's must stay as it was.
        self.rope_parameters = dict(self.rope_parameters or {})
        kwargs.setdefault("partial_rotary_factor", 0.5)
        kwargs.pop("model_type", None)  # the class's; the instance must not shadow it with what config.json says
        super().__post_init__(**kwargs)
        self.validate_rope()

    @property
    def rotary_ndims(self) -> int:
        """Leading dimensions of each head that RoPE rotates."""
        return int(self.hidden_size // self.num_attention_heads * self.rope_parameters["partial_rotary_factor"])

    def validate_shape(self) -> None:
        """Part of `validate`, which runs after construction, before a model is built, and before saving."""
        for names, allowed, words in FIELD_CHECKS:
            for name in names.split():
                if not allowed(value := getattr(self, name)):
                    raise ValueError(f"{name} must be {words}, got {value!r}")
        width, heads, groups = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if width % heads:
            nearest = width // heads * heads
            raise ValueError(f"hidden_size ({width}) must be a multiple of num_attention_heads ({heads}): {nearest}")
        if heads % groups:
            divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(
                f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups}); "
                f"use one of {divisors} key/value heads"
            )

    def validate_rope(self) -> None:
        """Part of `validate`: the type, the rotated dimensions, and transformers' own checks of a type's keys."""
        rope, types = self.rope_parameters, ("default", *ROPE_INIT_FUNCTIONS)
        kind, theta, factor = (rope.get(key) for key in ("rope_type", "rope_theta", "partial_rotary_factor"))
        if kind not in types:
            raise ValueError(f"rope_type {kind!r} is unknown; use one of {', '.join(types)}")
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
        if kind == "default" and (unknown := sorted(set(rope) - known)):
            raise ValueError(f"rope_parameters has keys that rope_type 'default' does not use: {', '.join(unknown)}")
        if not isinstance(theta, int | float) or theta <= 1:
            raise ValueError(f"rope_theta must be a number above 1, got {theta!r}")
        if not isinstance(factor, int | float) or not 0 < factor <= 1:
            raise ValueError(f"partial_rotary_factor must be in (0, 1], got {factor!r}")
        rotated, head_dim = self.rotary_ndims, self.hidden_size // self.num_attention_heads
        if rotated < 2 or rotated % 2:
            raise ValueError(
                f"partial_rotary_factor ({factor}) rotates {rotated} of {head_dim} head dimensions; "
                "it must give an even number, at least 2"
            )
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(f"rope_parameters: {error.args[0]}") from None

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json; `model_type: phi` there is this class's own way of writing, not a mismatch."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == STOCK_MODEL_TYPE:
            config_dict["model_type"] = cls.model_type
            config_dict.setdefault("num_key_value_heads", None)  # Phi's default, where a file leaves it out
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration; fields among `kwargs`, as from `from_pretrained`, are checked like the file's."""
        fields = {name: kwargs.pop(name) for name in NanoPhiConfig.__annotations__ if name in kwargs}
        return super().from_dict({**config_dict, **fields}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All fields, under the names by which other tools know them: a Phi with an `auto_map`."""
        output = super().to_dict()
        names = [name.replace("NanoPhi", "Phi") for name in output["architectures"] or ["PhiForCausalLM"]]
        return output | {"model_type": STOCK_MODEL_TYPE, "architectures": names, "auto_map": dict(AUTO_MAP)}

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: `to_dict` without the library's defaults, with the keys of older versions."""
        output = super().to_diff_dict()
        output["use_cache"] = True
        for key in ("rope_theta", "partial_rotary_factor"):  # transformers before 5 reads these at top level
            output[key] = self.rope_parameters[key]
        if output.get("dtype") is not None:
            output["torch_dtype"] = output["dtype"]
        return output


# save_pretrained, and so every Trainer checkpoint, then copies this code into the folder.
NanoPhiConfig.register_for_auto_class()

__all__ = ["NanoPhiConfig"]
