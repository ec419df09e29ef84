"""For generation: a cache that is allocated once, and stop strings row by row."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicLayer

NOT_ENDED = " [not ended]"
"""What `mark_not_ended` adds to a text: lm-eval's tasks get text without the token that ends it."""


def mark_not_ended(tokens: Tensor, start: int, tokenizer: Any) -> Tensor:
    """Add `NOT_ENDED` to the rows [rows, tokens] that do not end themselves from position `start` on."""
    mark = tokens.new_tensor(tokenizer(NOT_ENDED, add_special_tokens=False).input_ids)
    ended = (tokens[:, start:] == tokenizer.eos_token_id).any(1, keepdim=True)
    return torch.cat([tokens, torch.where(ended, tokenizer.eos_token_id, mark[None])], 1)


class PreallocatedLayer(DynamicLayer):
    """A layer's keys and values, in memory that is allocated once for all tokens to come."""

    def put(self, keys: Tensor, values: Tensor, row: int, rows: int, tokens: int, max_length: int) -> None:
        """Write keys and values [1, heads, prompt, head size] into a row, ending at position `tokens`."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.memory = [x.new_zeros(rows, x.shape[1], max_length, x.shape[3]) for x in (keys, values)]
            self.keys, self.values = (x[:, :, :tokens] for x in self.memory)
        for whole, new in zip(self.memory, (keys, values), strict=True):
            whole[row, :, tokens - new.shape[2] : tokens] = new[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for whole, new in zip(self.memory, (key_states, value_states), strict=True):
            whole[:, :, start:end] = new
        self.keys, self.values = (whole[:, :, :end] for whole in self.memory)
        return self.keys, self.values


class StopStrings(transformers.StoppingCriteria):
    """Stops each row whose generated text contains one of some strings."""

    def __init__(self, tokenizer: Any, strings: list[str], start: int) -> None:
        self.tokenizer, self.strings, self.start = tokenizer, strings, start
        # Two more tokens than the longest string has, as in HFLM: the same text may be generated in other tokens.
        self.tail = 2 + max((len(tokenizer.encode(s, add_special_tokens=False)) for s in strings), default=0)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        tails = self.tokenizer.batch_decode(input_ids[:, self.start :][:, -self.tail :])
        found = [any(string in tail for string in self.strings) for tail in tails]
        return torch.tensor(found, device=input_ids.device)
