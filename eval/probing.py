"""Whether a model computes the same when prefixes are shared, tried on a few random tokens.

`lm` is a `ScorerLM` throughout.
"""

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from nanophi.eval.prefix_tree import PackedRow, PrefixTree


@torch.inference_mode()
def logits_are_the_heads(network: Any) -> bool:
    """Whether a model returns what its LM head computes, with nothing done to it (a soft cap, for example)."""
    made: list[Tensor] = []
    head = network.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, __, output: made.append(output.float().clone()))
    try:
        logits = network(input_ids=torch.zeros(1, 2, dtype=torch.long, device=network.device)).logits
    finally:
        handle.remove()
    return len(made) == 1 and made[0].shape == logits.shape and torch.equal(made[0], logits.float())


@torch.inference_mode()
def why_not_shared(lm: Any) -> str:
    """Why prefixes cannot be shared, for a person; empty if the model computes the same with shared prefixes."""
    network: Any = lm.model
    if not lm.sparse_head:
        return "the model has no separate output layer"
    if window := _attention_window(network.config, lm.max_length):
        return f"its attention sees only {window} tokens back"
    if "position_ids" not in inspect.signature(network.forward).parameters:
        return "it takes no position_ids"
    try:
        cache = network(input_ids=torch.zeros(1, 2, dtype=torch.long, device=lm.device)).past_key_values
        if not isinstance(cache, DynamicCache) or {type(layer) for layer in cache.layers} != {DynamicLayer}:
            return "its state is not a plain cache of keys and values"
        if not same_logits(lm, shared=True):
            return "with a shared prefix it computes something else"
    except Exception as error:  # whatever a model of any kind does with masks that it does not expect
        return f"with a shared prefix it fails ({type(error).__name__})"
    return ""


@torch.inference_mode()
def same_logits(lm: Any, *, shared: bool) -> bool:
    """Whether scoring gives the logits of a plain forward pass, with or without shared prefixes."""
    ours = _probe(lm, shared=shared)
    rows = (torch.tensor([sequence], device=lm.device) for sequence in _sequences(lm))
    theirs = torch.cat([lm.model(input_ids=row).logits[0, -2:] for row in rows])
    tolerance = 1e-3 if lm.model.dtype == torch.float32 else 0.25
    return ours.shape == theirs.shape and bool((ours.float() - theirs.float()).abs().max() <= tolerance)


def _sequences(lm: Any) -> list[tuple[int, ...]]:
    tokens = np.random.default_rng(0).integers(0, lm.model.get_input_embeddings().num_embeddings, 24).tolist()
    return sorted(map(tuple, (tokens[:16], tokens[:12] + tokens[16:19], tokens[:8] + tokens[19:])))


def _probe(lm: Any, *, shared: bool) -> Tensor:
    """Logits of the last two positions of some sequences [6, vocabulary], the way they would be scored."""
    sequences = _sequences(lm)
    tree = PrefixTree([np.array(sequence) for sequence in sequences], [2] * len(sequences))
    if not shared:
        rows = [PackedRow(tree, [(i, i + 1)], 0) for i in range(3)]
        return lm.logits(torch.cat([lm.forward([row], None, [list(row.paths[i][-2:])]) for i, row in enumerate(rows)]))
    prefix = tree.prefix(0, 3)
    past = lm.extend(tree.sequences[0][: prefix - 3], 0, None)
    past = lm.extend(tree.sequences[0][prefix - 3 : prefix], prefix - 3, past)
    row = PackedRow(tree, [(0, 3)], prefix)
    return lm.logits(lm.forward([row], past, [[place for i in range(3) for place in row.paths[i][-2:].tolist()]]))


def _attention_window(config: Any, max_length: int) -> int | None:
    """How many tokens back some layer can look, if that is less than the context."""
    config = config.get_text_config(decoder=True)
    if getattr(config, "use_sliding_window", True) is False:
        return None
    windows = (getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_window"))
    return min((window for window in windows if isinstance(window, int) and window < max_length), default=None)
