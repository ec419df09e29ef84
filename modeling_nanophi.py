"""NanoPhi: Phi's function under Phi's parameter names, with a loss that never holds the full logits.

Each block computes attention and MLP in parallel from one LayerNorm; attention has biases, partial rotary
embeddings, grouped query heads and, optionally, LayerNorm on queries and keys. A checkpoint of
`PhiForCausalLM` loads here and the other way round.

This file and its configuration are all that the Hub's remote-code loader needs: torch and transformers only.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_nanophi import NanoPhiConfig

LOSS_CHUNK = 1024  # rows of logits alive at a time
LOSS_BLOCKS = (16, 1024)  # rows and classes of them that a CPU's caches hold
ALIGNMENT = 64  # the loss pads the vocabulary to a multiple of this, which matrix kernels like better than 50,295
FEW_ROWS = 8  # up to so many rows, a product on a CPU is bound by reading the weight


class NanoPhiRotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE (Su et al. 2021, RoFormer) for the leading `rotary_ndims` dimensions of a head.

    The class name and `original_inv_freq` are what transformers looks for to fill the two buffers in again after
    `from_pretrained`, which creates modules without memory and restores only what the checkpoint holds.
    """

    def __init__(self, config: NanoPhiConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.inv_freq: torch.Tensor
        inv_freq, self.attention_scaling = self.compute_default_rope_parameters(config)
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
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [batch, tokens] -> cosines and sines [batch, 1, tokens, rotary_ndims], computed in float32.

        The first half of the sines is negated: it multiplies the second half of what is rotated.
        """
        angles = position_ids[:, None, :, None].float() * self.inv_freq.to(position_ids.device, torch.float)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the leading dimensions of queries and keys [batch, heads, tokens, head_dim]; the others pass unchanged.

    Dimension i is paired with i + rotary_ndims / 2 (the "rotate half" layout).
    """
    rotary_ndims = cos.shape[-1]
    states = torch.cat((query, key), dim=1)  # one pass over both: for a single token, calls cost more than copies
    rotated, passed = states[..., :rotary_ndims], states[..., rotary_ndims:]
    rotated = torch.addcmul(rotated * cos, rotated.roll(rotary_ndims // 2, -1), sin)
    states = torch.cat((rotated, passed), dim=-1)
    return states[:, : query.shape[1]], states[:, query.shape[1] :]


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


def document_lengths(position_ids: torch.Tensor) -> list[int] | None:
    """Lengths of the documents that are packed into rows, row by row; None if every row is one document.

    Args:
        position_ids: [batch, tokens]; where they do not count on, a document begins.
    """
    batch, tokens = position_ids.shape
    starts = nn.functional.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True).flatten().nonzero()[:, 0]
    if len(starts) == batch:
        return None
    return starts.diff(append=starts.new_tensor([batch * tokens])).tolist()


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Causal attention of each packed document by itself: the scores between documents are never computed.

    A mask over whole rows gives the same, but costs the full square of the row's length.

    Args:
        query: [batch, heads, tokens, head_dim]; key, value: [batch, key_value_heads, tokens, head_dim].
        lengths: of the documents in all rows, in order.

    Returns:
        [batch, tokens, heads * head_dim].
    """
    batch, _, tokens, _ = query.shape
    # Tokens first: a document is then a slice of all three, and the gradients of a split are one concatenation.
    # In float32: torch's bf16 kernel for a CPU takes twice as long for the gradients of short documents.
    parts = [states.transpose(1, 2).flatten(0, 1).float().split(lengths) for states in (query, key, value)]
    outputs = []
    with torch.autocast(query.device.type, enabled=False):
        for document in zip(*parts, strict=True):
            q, k, v = (states.transpose(0, 1)[None] for states in document)
            attended = nn.functional.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
            )
            outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs).view(batch, tokens, -1).to(query.dtype)


class NanoPhiLinear(nn.Linear):
    """A linear layer that reads its weight faster than torch's own when there are one or a few rows, on a CPU.

    Generation with a batch of one multiplies each weight by a single row, which is bound by memory. torch's float32
    path for that runs on one thread, and for a few rows it picks a kernel that is slower still: here a single row is
    a batched product over blocks of the weight, one per thread, and a few rows are a transposed product. Under
    torch.compile a single row becomes one fused loop. Measured in benchmarks/model_speed.py.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        weight = self.weight
        rows = input.numel() // self.in_features
        if rows > FEW_ROWS or torch.is_grad_enabled() or weight.device.type != "cpu" or weight.dtype != input.dtype:
            return nn.functional.linear(input, weight, self.bias)
        if torch.compiler.is_compiling():
            if rows > 1:
                return nn.functional.linear(input, weight, self.bias)
            # The compiler makes one loop of this, which reads the weight in order.
            products = weight.float() * input.reshape(1, self.in_features).float()
            output = (products.sum(dim=-1) + self.bias.float()).to(weight.dtype)
            return output.view(*input.shape[:-1], self.out_features)
        if weight.dtype != torch.float32:
            return nn.functional.linear(input, weight, self.bias)
        columns = input.reshape(rows, self.in_features).t()
        if rows > 1:
            output = torch.addmm(self.bias[:, None], weight, columns).t().contiguous()  # callers may view it
        else:
            blocks = torch.get_num_threads()
            whole = self.out_features - self.out_features % blocks
            output = torch.baddbmm(
                self.bias[:whole].view(blocks, -1, 1),
                weight[:whole].view(blocks, -1, self.in_features),
                columns.expand(blocks, -1, -1),
            )
            if whole < self.out_features:
                rest = torch.addmm(self.bias[whole:, None], weight[whole:], columns)
                output = torch.cat((output.view(-1, 1), rest))
        return output.view(*input.shape[:-1], self.out_features)


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
        self.q_proj = NanoPhiLinear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.k_proj = NanoPhiLinear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.v_proj = NanoPhiLinear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.dense = NanoPhiLinear(config.num_attention_heads * self.head_dim, config.hidden_size)
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
        lengths = kwargs.pop("document_lengths", None)
        if lengths is not None:
            dropout = self.attention_dropout if self.training else 0.0
            return self.dense(document_attention(query, key, value, lengths, self.scaling, dropout)), None
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
        self.fc1 = NanoPhiLinear(config.hidden_size, config.intermediate_size)
        self.fc2 = NanoPhiLinear(config.intermediate_size, config.hidden_size)

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
            position_ids: [batch, tokens] or [1, tokens]. Positions that start again at 0 within a row mark packed
                documents, which then do not attend to each other; this needs `attention_mask` and
                `past_key_values` to be None.
            past_key_values: cache to read and extend; None with `use_cache`: a new one.

        Returns:
            last_hidden_state [batch, tokens, hidden_size], the cache, and hidden states and attentions if asked for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # The mask comes before a new cache: with one, transformers no longer looks for packed documents.
        mask_position_ids = position_ids
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + start).unsqueeze(0)
        lengths = None
        if (
            mask_position_ids is not None
            and attention_mask is None
            and past_key_values is None
            and not use_cache
            and inputs_embeds.device.type == "cpu"
            and self.config._attn_implementation == "sdpa"
            and not torch.compiler.is_compiling()
        ):
            lengths = document_lengths(mask_position_ids.expand(len(inputs_embeds), -1))
        causal_mask = None
        if lengths is None:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=mask_position_ids,
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden_states = self.embed_dropout(inputs_embeds)
        position_embeddings = self.rotary_emb(position_ids, hidden_states.dtype)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                document_lengths=lengths,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_states), past_key_values=past_key_values
        )


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of a linear layer's logits, without holding more than `LOSS_CHUNK` rows of them.

    The gradients are computed in the forward pass, chunk by chunk, while the logits are there; nothing is computed
    twice (the idea of Liger-Kernel's fused linear cross entropy, Hsu et al. 2024).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        targets: torch.Tensor,
        ignore_index: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """hidden_states [rows, hidden_size], weight [vocab_size, hidden_size], targets [rows] -> float32 scalar.

        Matrix products run in `dtype`; softmax, loss and the weight's gradient in float32.
        """
        wanted = ctx.needs_input_grad[:3]
        device, vocab_size = hidden_states.device, len(weight)
        # On a CPU, all but the matrix products is done in blocks that stay in its caches, the bias too.
        on_cpu = device.type == "cpu"
        # There a padded copy of the weight costs more than it gives, unless it must be converted anyway.
        padding = 0 if on_cpu and dtype == weight.dtype else -vocab_size % ALIGNMENT
        matrix = nn.functional.pad(weight.to(dtype), (0, 0, 0, padding)) if padding else weight.to(dtype)
        row_block, class_block = LOSS_BLOCKS if on_cpu else (LOSS_CHUNK, len(matrix))
        # Padded classes have probability zero, in the loss and in every gradient.
        offset = nn.functional.pad(bias.to(torch.float32 if on_cpu else dtype), (0, padding), value=-torch.inf)
        keep = targets != ignore_index
        classes = targets.where(keep, 0)[:, None]
        loss = torch.zeros((), dtype=torch.float32, device=device)
        grad_hidden = torch.empty_like(hidden_states) if wanted[0] else None
        grad_weight = torch.zeros(matrix.shape, dtype=torch.float32, device=device) if wanted[1] else None
        grad_bias = torch.zeros(offset.shape, dtype=torch.float32, device=device) if wanted[2] else None
        for start in range(0, len(targets), LOSS_CHUNK):
            rows = slice(start, start + LOSS_CHUNK)
            chunk, kept = hidden_states[rows].to(dtype), keep[rows, None]
            logits = nn.functional.linear(chunk, matrix, None if on_cpu else offset)
            for block, block_kept, block_classes in zip(
                logits.split(row_block), kept.split(row_block), classes[rows].split(row_block), strict=True
            ):
                grad = nn.functional.log_softmax(block + offset if on_cpu else block, dim=-1, dtype=torch.float32)
                loss -= (grad.gather(1, block_classes) * block_kept).sum()
                if not any(wanted):
                    continue
                grad.exp_().scatter_add_(1, block_classes, -torch.ones_like(block_classes, dtype=torch.float32))
                # Rows that are ignored are left out by zeroing the small factor of each product, not the large one.
                if grad_bias is not None:
                    grad_bias += grad.t().mv(block_kept[:, 0].float())
                block.copy_(grad)  # the logits' gradient takes their place
            if grad_hidden is not None:
                grad_hidden[rows] = (logits @ matrix) * kept
            if grad_weight is not None:
                chunk = chunk * kept
                for part, columns in zip(grad_weight.split(class_block), logits.split(class_block, dim=1), strict=True):
                    if dtype == torch.float32:
                        part.addmm_(columns.t(), chunk)
                    else:
                        part += columns.t() @ chunk
            del logits
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.parameters = (weight.dtype, bias.dtype, vocab_size)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype, vocab_size = ctx.parameters
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight[:vocab_size] * grad_loss).to(weight_dtype)
        if grad_bias is not None:
            grad_bias = (grad_bias[:vocab_size] * grad_loss).to(bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def is_plain(linear: nn.Module) -> bool:
    """Whether a module is a linear layer that may be computed from its weights, with nothing hooked in between."""
    return type(linear) is NanoPhiLinear and not (
        linear._forward_hooks or linear._forward_pre_hooks or hasattr(linear, "_hf_hook")
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
        self.lm_head = NanoPhiLinear(config.hidden_size, config.vocab_size)
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
                loss is wanted. `shift_labels`, `ignore_index` and `num_items_in_batch` are understood as in
                transformers' `ForCausalLMLoss`. With labels no cache is made unless `use_cache=True`.
            logits_to_keep: compute logits for so many last tokens, or for the given positions; 0: all.

        Returns:
            `loss` if there are labels, and `logits` [batch, tokens, vocab_size]. In training mode with labels
            `logits` is None: they are never held as a whole, which saves most of the memory of a training step.
            Call `eval()` to have both.
        """
        if labels is not None and use_cache is None and past_key_values is None:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is not None and self.training and is_plain(self.lm_head):
            loss = self.fused_loss(hidden_states, labels, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def fused_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> torch.Tensor:
        """transformers' `ForCausalLMLoss` of the LM head's logits, which are never held as a whole.

        Args:
            hidden_states: [batch, tokens, hidden_size].
            labels: [batch, tokens]; or `shift_labels`, already shifted.
            num_items_in_batch: divide the summed loss by this; None: by the number of labels that count.

        Returns:
            float32 scalar.
        """
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.flatten().to(hidden_states.device)
        device_type = hidden_states.device.type
        dtype = self.lm_head.weight.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            total = LinearCrossEntropy.apply(
                hidden_states.flatten(0, -2), self.lm_head.weight, self.lm_head.bias, targets, ignore_index, dtype
            )
        if num_items_in_batch is None:
            num_items_in_batch = (targets != ignore_index).sum()
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch


NanoPhiModel.register_for_auto_class("AutoModel")
NanoPhiForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["NanoPhiForCausalLM", "NanoPhiModel", "NanoPhiPreTrainedModel"]
