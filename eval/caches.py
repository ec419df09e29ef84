"""Keys and values of a prefix that many sequences share."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of a prefix, per layer, each [1, key-value heads, tokens, head size]."""


class Complete(Exception):  # noqa: N818  # it is none
    """Ends a forward pass when all that is wanted of it is known."""


class PrefixCache(DynamicCache):
    """Takes in a prefix's keys and values. What the last layer would do with them, a prefix does not need."""

    def __init__(self, past: Past | None, last_layer: int) -> None:
        super().__init__(past)
        self.last_layer = last_layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self.last_layer:
            raise Complete
        return result
