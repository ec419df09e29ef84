"""Keys and values of a prefix that many sequences share."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of a prefix, per layer, each [1, key-value heads, tokens, head size]."""


class Complete(Exception):  # noqa: N818  # not an error
    """Ends a forward pass once everything that is needed has been computed."""


class PrefixCache(DynamicCache):
    """Collects the keys and values of a prefix, and ends the pass there: the rest of the last layer is not needed."""

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
