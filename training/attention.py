"""Attention for packed rows on a CPU: each document by itself, where a mask would cost the full square of the row.

Importing this module registers `PACKED_DOCUMENTS` with transformers; `model.set_attn_implementation` selects it.
"""

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED_DOCUMENTS = "packed_documents"


def document_lengths(position_ids: torch.Tensor) -> list[int] | None:
    """Lengths of the documents that are packed into rows, row by row; None if every row is one document.

    A document begins wherever `position_ids` [batch, tokens] do not continue by one.
    """
    batch, tokens = position_ids.shape
    starts = nn.functional.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True).flatten().nonzero()[:, 0]
    if len(starts) == batch:
        return None
    return starts.diff(append=starts.new_tensor([batch * tokens])).tolist()


def packed_mask(
    *, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """No mask for whole rows without padding, which `packed_attention` divides; else that of "sdpa"."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document; rows of one document, and masked ones, go to "sdpa".

    query [batch, heads, tokens, head_dim], key and value [batch, key_value_heads, tokens, head_dim], position_ids
    [batch or 1, tokens] -> [batch, tokens, heads, head_dim], and None in place of the weights.
    """
    batch, heads, tokens, head_dim = query.shape
    lengths = None
    if attention_mask is None and position_ids is not None and key.shape[2] == tokens:
        lengths = document_lengths(position_ids.expand(batch, -1))
    if lengths is None:
        options = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # Tokens first: a document is then a slice of all three, and the gradient of a split is one concatenation.
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
    return torch.cat(outputs).view(batch, tokens, heads, head_dim).to(query.dtype), None


ALL_ATTENTION_FUNCTIONS.register(PACKED_DOCUMENTS, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED_DOCUMENTS, packed_mask)
