"""NanoPhi's configuration: Phi's fields, NanoPhi's defaults, and one config.json for two loaders.

In memory `model_type` is "nanophi", so that the Auto classes can tell the two apart. config.json says
`model_type: phi` with an `auto_map` to this code: stock transformers loads a folder as Phi, and as NanoPhi with
`trust_remote_code=True`. Both compute the same function from the same tensors.
"""

import math
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


class NanoPhiConfig(PreTrainedConfig):
    """Shape and hyperparameters of a NanoPhi model; the defaults are nano-phi-115M (115,098,231 parameters).

    Args:
        vocab_size: rows of the embedding and of the LM head.
        hidden_size: width of the residual stream; a multiple of `num_attention_heads`.
        intermediate_size: width of the MLP's hidden layer.
        num_hidden_layers: number of parallel attention + MLP blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads (grouped query attention); divides `num_attention_heads`.
            None: as many as query heads.
        resid_pdrop, embd_pdrop, attention_dropout: dropout probabilities.
        hidden_act: the MLP's activation, a name that transformers' `ACT2FN` knows.
        max_position_embeddings: context length in tokens that the model is trained for.
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: epsilon of every LayerNorm.
        use_cache: keep keys and values for generation. config.json always says true, because `Trainer` switches it
            off in memory while it trains.
        tie_word_embeddings: the LM head shares the embedding's weight.
        rope_parameters: `{"rope_type": "default", "rope_theta": float, "partial_rotary_factor": float}`, or one of
            transformers' scaled types with its own keys. The older top-level keys `rope_theta` (default 10000.0) and
            `partial_rotary_factor` (default 0.5) are accepted too.
        qk_layernorm: LayerNorm on queries and keys before the rotation.
        bos_token_id, eos_token_id, pad_token_id: special tokens.

    Raises:
        ValueError: for a shape that cannot be built, in one line that names the fields.
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
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("resid_pdrop", "embd_pdrop", "attention_dropout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"{name} must be a probability in [0, 1), got {value!r}")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"tie_word_embeddings must be true or false, got {self.tie_word_embeddings!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}); the nearest smaller one is "
                f"{self.hidden_size // self.num_attention_heads * self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            allowed = [n for n in range(1, self.num_attention_heads + 1) if self.num_attention_heads % n == 0]
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}); use one of {', '.join(map(str, allowed))} key/value heads"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not known to transformers; try 'gelu_new'")

    def validate_rope(self) -> None:
        """Part of `validate`: the type, the rotated dimensions, and transformers' own checks of a type's keys."""
        rope = self.rope_parameters
        types = ("default", *ROPE_INIT_FUNCTIONS)
        if rope.get("rope_type") not in types:
            raise ValueError(f"rope_type {rope.get('rope_type')!r} is unknown; use one of {', '.join(types)}")
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
        unknown = sorted(set(rope) - known)
        if rope["rope_type"] == "default" and unknown:
            raise ValueError(f"rope_parameters has keys that rope_type 'default' does not use: {', '.join(unknown)}")
        theta, factor = rope.get("rope_theta"), rope.get("partial_rotary_factor")
        if not isinstance(theta, int | float) or theta <= 1:
            raise ValueError(f"rope_theta must be a number above 1, got {theta!r}")
        if not isinstance(factor, int | float) or not 0 < factor <= 1:
            raise ValueError(f"partial_rotary_factor must be in (0, 1], got {factor!r}")
        head_dim = self.hidden_size // self.num_attention_heads
        if self.rotary_ndims < 2 or self.rotary_ndims % 2:
            raise ValueError(
                f"partial_rotary_factor ({factor}) rotates {self.rotary_ndims} of {head_dim} head dimensions "
                "(hidden_size / num_attention_heads); it must give an even number, at least 2"
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
        output["model_type"] = STOCK_MODEL_TYPE
        names = output["architectures"] or ["PhiForCausalLM"]
        output["architectures"] = [name.replace("NanoPhi", "Phi") for name in names]
        output["auto_map"] = dict(AUTO_MAP)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: `to_dict` without the library's defaults, with the keys of older versions."""
        output = super().to_diff_dict()
        output["use_cache"] = True
        # transformers before 5 reads these at top level.
        output["rope_theta"] = self.rope_parameters["rope_theta"]
        output["partial_rotary_factor"] = self.rope_parameters["partial_rotary_factor"]
        if output.get("dtype") is not None:
            output["torch_dtype"] = output["dtype"]
        return output


# save_pretrained, and so every Trainer checkpoint, then copies this code into the folder.
NanoPhiConfig.register_for_auto_class()

__all__ = ["NanoPhiConfig"]
