"""NanoPhi: Phi's function under Phi's parameter names.

Each block computes attention and MLP in parallel from one LayerNorm; attention has biases, partial rotary
embeddings, grouped query heads and, optionally, LayerNorm on queries and keys. A checkpoint of
`PhiForCausalLM` loads here and vice versa.

The Hub's remote-code loader needs only this file and its configuration, which depend on torch and transformers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_nanophi import NanoPhiConfig


class NanoPhiRotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE (Su et al. 2021, RoFormer) for the leading `rotary_ndims` dimensions of a head.

    transformers recognises the class name and `original_inv_freq`: it fills both buffers again after
    `from_pretrained`, which creates modules without memory and restores only what the checkpoint holds. The
    scaled variants ("linear", "dynamic", "yarn" and so on) are transformers' own functions.
    """

    def __init__(self, config: NanoPhiConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        initialize: Callable[..., tuple[torch.Tensor, float]] = self.compute_default_rope_parameters
        if self.rope_type != "default":
            initialize = ROPE_INIT_FUNCTIONS[self.rope_type]
        self.inv_freq: torch.Tensor
        inv_freq, self.attention_scaling = initialize(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: NanoPhiConfig, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, float]:
        """Frequencies `theta ** (-2i / rotary_ndims)`, float32 of shape [rotary_ndims / 2], and a factor of 1."""
        exponents = torch.arange(0, config.rotary_ndims, 2, dtype=torch.float) / config.rotary_ndims
        return (1.0 / config.rope_parameters["rope_theta"] ** exponents).to(device), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [batch, tokens] -> cosines and sines [batch, tokens, rotary_ndims] in `x`'s dtype.

        They are computed in float32. The first half of the sines is negated: it multiplies the second half of what
        is rotated.
        """
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((-sin, sin), dim=-1).to(x.dtype)


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the leading dimensions of queries and keys [batch, heads, tokens, head_dim]; the others pass unchanged.

    `cos` and `sin` are the rotary module's. Dimension i is paired with i + rotary_ndims / 2 ("rotate half").
    """
    cos, sin, rotary_ndims = cos.unsqueeze(1), sin.unsqueeze(1), cos.shape[-1]
    states = torch.cat((query, key), dim=1)  # one pass over both: for a single token, calls cost more than copies
    rotated, passed = states[..., :rotary_ndims], states[..., rotary_ndims:]
    rotated = torch.addcmul(rotated * cos, rotated.roll(rotary_ndims // 2, -1), sin)
    states = torch.cat((rotated, passed), dim=-1)
    return states[:, : query.shape[1]], states[:, query.shape[1] :]


def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The hidden states [batch, tokens, hidden_size] for which `NanoPhiForCausalLM` computes logits."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None)]
    if logits_to_keep.ndim < 2:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention that also returns its weights.

    Args:
        query: [batch, heads, queries, head_dim]; key, value: [batch, key_value_heads, keys, head_dim].
        attention_mask: additive, broadcastable to [batch, heads, queries, keys].

    Returns:
        output [batch, queries, heads, head_dim] and weights [batch, heads, queries, keys].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class NanoPhiAttention(nn.Module):
    """Grouped query attention with biases and partial rotary embeddings."""

    def __init__(self, config: NanoPhiConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.dense = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size)
        self.qk_layernorm = config.qk_layernorm
        if config.qk_layernorm:
            self.q_layernorm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)
            self.k_layernorm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[batch, tokens, hidden_size] -> the same shape, and the attention weights if the backend gives them."""
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        if self.qk_layernorm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        query, key = apply_rotary(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.dense(output.reshape(*input_shape, -1)), weights


class NanoPhiMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: NanoPhiConfig) -> None:
        super().__init__()
        # transformers spells gelu_new out in Python, which keeps six intermediate tensors for the backward pass;
        # torch has the same formula (Hendrycks & Gimpel 2016, tanh form) as one kernel.
        name = "gelu_pytorch_tanh" if config.hidden_act == "gelu_new" else config.hidden_act
        self.activation_fn = ACT2FN[name]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same shape."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class NanoPhiDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP side by side, both from the same LayerNorm of the residual stream."""

    def __init__(self, config: NanoPhiConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = NanoPhiAttention(config, layer_idx)
        self.mlp = NanoPhiMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """[batch, tokens, hidden_size] -> the same shape; keyword arguments go to the attention."""
        normed = self.input_layernorm(hidden_states)
        if torch.is_autocast_enabled(normed.device.type):
            # Each of the four matrices that read it would convert, and keep, a copy of its own.
            normed = normed.to(torch.get_autocast_dtype(normed.device.type))
        attention, _ = self.self_attn(normed, **kwargs)
        return self.resid_dropout(attention) + self.resid_dropout(self.mlp(normed)) + hidden_states


class NanoPhiPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: NanoPhiConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoPhiDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": NanoPhiDecoderLayer,
        "attentions": NanoPhiAttention,
    }

    def __init__(self, config: NanoPhiConfig, *args: Any, **kwargs: Any) -> None:
        # Fields may have been assigned after the configuration was made.
        config.validate_shape()
        config.validate_rope()
        super().__init__(config, *args, **kwargs)


class NanoPhiModel(NanoPhiPreTrainedModel):
    """The decoder without its LM head."""

    def __init__(self, config: NanoPhiConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([NanoPhiDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.rotary_emb = NanoPhiRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: [batch, tokens], int64; or `inputs_embeds` [batch, tokens, hidden_size] in its place.
            attention_mask: [batch, keys], 1 for tokens and 0 for padding; None: no padding.
            position_ids: [batch, tokens] or [1, tokens], int64. Positions that restart at 0 within a row mark packed
                documents, which then do not attend to each other; `attention_mask` and `past_key_values` must be
                None for that.
            past_key_values: cache to read and extend; None with `use_cache`: a new one.

        Returns:
            last_hidden_state [batch, tokens, hidden_size], the cache, and hidden states and attentions on request.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + start).unsqueeze(0)
        # The mask is made before a new cache: with a cache, transformers does not look for packed documents.
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden_states = self.embed_dropout(inputs_embeds)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_states), past_key_values=past_key_values
        )


class NanoPhiForCausalLM(NanoPhiPreTrainedModel, GenerationMixin):
    """The decoder with its LM head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # as in transformers
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: NanoPhiConfig) -> None:
        super().__init__(config)
        self.model = NanoPhiModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model; the arguments are those of `NanoPhiModel.forward`, and:

        Args:
            labels: [batch, tokens], int64; usually the input ids themselves (they are shifted here), -100 where no
                loss is wanted.
            logits_to_keep: where to compute logits. An int: for that many last tokens, 0 for all. A tensor: int64
                positions [kept] or [batch, kept], or a boolean mask [batch, tokens], whose logits come as
                [kept, vocab_size].

        Returns:
            `loss` (float32 scalar) with labels, `logits` [batch, tokens, vocab_size], and what the decoder returns.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class NanoPhiForSequenceClassification(GenericForSequenceClassification, NanoPhiPreTrainedModel):
    """The decoder with a linear classifier on the last token of each row that is not padding."""

    def __init__(self, config: NanoPhiConfig) -> None:
        # The generic class builds its decoder through AutoModel, which would ask for trust in remote code again.
        NanoPhiPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 2
        self.model = NanoPhiModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class NanoPhiForTokenClassification(GenericForTokenClassification, NanoPhiPreTrainedModel):
    """The decoder with a linear classifier on every token."""

    def __init__(self, config: NanoPhiConfig) -> None:
        NanoPhiPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 2
        self.model = NanoPhiModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


NanoPhiModel.register_for_auto_class("AutoModel")
NanoPhiForCausalLM.register_for_auto_class("AutoModelForCausalLM")
NanoPhiForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
NanoPhiForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "NanoPhiForCausalLM",
    "NanoPhiForSequenceClassification",
    "NanoPhiForTokenClassification",
    "NanoPhiModel",
    "NanoPhiPreTrainedModel",
]
