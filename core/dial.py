"""`model: {depth: N}`: one number in place of a shape, from which width, batch, rates and steps follow.

What a recipe states itself is kept; a shape beside the depth is refused. `recipe.yaml` holds what was derived, and
`nanophi estimate` shows it with the reasons. The rules are powers of the width and of the number of tokens, so they
also scale a recipe's own settings to a smaller model, as `nanophi ladder` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanophi.core.recipe_file import find_recipe, override, read

MAX_DEPTH = 96
TOKENS_PER_PARAMETER = 20
"""Of the parameters that multiply: Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556, table 3)."""
SHAPE = {
    "hidden_size": "64 per layer",
    "intermediate_size": "four times the width",
    "num_hidden_layers": "the depth",
    "num_attention_heads": "64 wide each",
    "num_key_value_heads": "a third of the heads, at most",
    "tie_word_embeddings": "a second table spends parameters that do not multiply",
}
SETTINGS = {
    "batch_size": "root of the tokens",
    "steps": f"{TOKENS_PER_PARAMETER} tokens per parameter (Hoffmann et al. 2022)",
    "warmup_steps": "a twentieth",
    "learning_rate": "one over the width",
    "muon_learning_rate": "one over the root of the width",
    "weight_decay": "as published",
}
"""Keys of `model` and of `training` that follow from the depth, and why they are as they are."""
WARMUP = 0.05


class Anchor(NamedTuple):
    """A training from whose settings those of another size follow: width, tokens read, tokens per batch, rates."""

    width: int
    tokens: float
    batch: float
    learning_rate: float
    muon_learning_rate: float = 0.02


PUBLISHED = {rate: Anchor(768, 14_000 * 512 * 1024, 512 * 1024, rate) for rate in (6e-3, 6e-4)}
"""AdamW's rate beside Muon, or alone -> the anchor of the dial: `nano-phi-115m-fast`, `nano-phi-115m`. Rates tuned at
128 wide are 0.04 and 0.032 to 0.064 (Muon) and 0.004 (AdamW, benchmarks/steps_to_loss.json); the rules give
0.049, 0.036 and 0.0036."""


Derived = tuple[str, Any, str]
"""A key that was filled in, its value, and why."""


def shape(layers: int, heads: int, head: int = 64, mlp: float = 4, sharing: float = 3) -> dict[str, int]:
    """Fields of `NanoPhiConfig`; `head`: width of one, `mlp`: over the width, `sharing`: heads per key/value head."""
    groups = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * sharing <= heads))
    return dict(zip(SHAPE, (heads * head, round(mlp * heads * head), layers, heads, groups), strict=False))


def multiplying(model: dict[str, Any], vocab_size: int) -> int:
    """Parameters that multiply: the matrices of the layers, and the output head."""
    width, sharing = model["hidden_size"], model["num_attention_heads"] / model["num_key_value_heads"]
    layer = 2 * width * width * (1 + 1 / sharing) + 2 * width * model["intermediate_size"]
    return round(model["num_hidden_layers"] * layer + vocab_size * width)


def smaller(model: dict[str, Any], vocab_size: int, parameters: float) -> dict[str, int]:
    """The shape nearest to so many parameters, of the heads, MLP and, as far as possible, the aspect of `model`."""
    layers, heads, width = model["num_hidden_layers"], model["num_attention_heads"], model["hidden_size"]
    alike = width // heads, model["intermediate_size"] / width, heads / model["num_key_value_heads"]
    shapes = [shape(deep, wide, *alike) for deep in range(1, layers + 1) for wide in range(1, heads + 1)]

    def distance(one: dict[str, int]) -> float:
        aspect = one["hidden_size"] / one["num_hidden_layers"] * layers / width
        return abs(math.log(multiplying(one, vocab_size) / parameters)) + 0.3 * abs(math.log(aspect))

    return min(shapes, key=distance)


def scaled(anchor: Anchor, width: int, tokens: float, context: int, unit: int = 1) -> dict[str, Any]:
    """The keys of `training` at another width and number of tokens, from those of `anchor`.

    The batch grows with the root of the tokens, in multiples of `unit` rows; a rate of AdamW falls with the width (Yang
    et al. 2022, https://arxiv.org/abs/2203.03466), Muon's with its root.
    """
    rows = anchor.batch / context * math.sqrt(tokens / anchor.tokens)
    unit = unit if rows < 16 * unit else 8 * unit  # many rows have a number that divides well
    batch = max(unit, unit * round(rows / unit))
    steps = max(1, round(tokens / (batch * context)))
    narrower = anchor.width / width
    rates = anchor.learning_rate * narrower, anchor.muon_learning_rate * math.sqrt(narrower)
    return dict(zip(SETTINGS, (batch, steps, int(WARMUP * steps), *(float(f"{r:.3g}") for r in rates)), strict=False))


def resolve(values: dict[str, Any]) -> list[Derived]:
    """Replace `model.depth` in a recipe's mapping by what follows from it, and say what that was.

    Null is not stated, for the depth and all that follows from it: so a recipe drops what the one it extends states.

    Raises:
        ValueError: for a depth beside a shape, or one that is none.
    """
    model = values.get("model")
    if not isinstance(model, dict) or "depth" not in model:
        return []
    model = values["model"] = dict(model)
    depth = model.pop("depth")
    if depth is None:
        return []
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"'model': depth must be a whole number from 1 to {MAX_DEPTH}, got {depth!r}")
    if both := [key for key in SHAPE if model.get(key) is not None]:
        remedy = f"leave out one of them, or set to null, if another recipe states it, depth or {', '.join(both)}"
        raise ValueError(f"'model': depth and {both[0]} exclude each other; {remedy}")
    section = values.get("tokenizer")
    tokenizer = section if isinstance(section, dict) else {}
    if tokenizer.get("path") and "vocab_size" not in model:
        raise ValueError("'model': depth with tokenizer.path needs vocab_size, the tokenizer's")
    made = {**shape(depth, depth), "tie_word_embeddings": True}
    model.update(made)
    derived: list[Derived] = [(f"model.{key}", made[key], reason) for key, reason in SHAPE.items()]
    training = values.setdefault("training", {})
    if values.get("conversations") or not isinstance(training, dict):
        return derived
    training = values["training"] = dict(training)
    muon, context = training.get("optimizer") == "muon", _whole(model, "max_position_embeddings", 1024)
    wanted = TOKENS_PER_PARAMETER * multiplying(model, _whole({**tokenizer, **model}, "vocab_size", 4096))
    anchor = PUBLISHED[6e-3 if muon else 6e-4]
    follows = scaled(anchor, 64 * depth, wanted, context, _whole(training, "micro_batch_size", 1))
    follows["weight_decay"] = 0.1
    follows["steps"] = max(1, round(wanted / (_whole(training, "batch_size", follows["batch_size"]) * context)))
    follows["warmup_steps"] = int(WARMUP * _whole(training, "steps", follows["steps"]))
    for key, reason in SETTINGS.items():
        if training.get(key) is None and (muon or key != "muon_learning_rate"):
            training[key] = follows[key]
            derived.append((f"training.{key}", follows[key], reason))
    return derived


def _whole(section: dict[str, Any], key: str, default: int) -> int:
    """A count that a recipe states; whatever else is there, the recipe's own check refuses."""
    value = section.get(key)
    return value if isinstance(value, int) and value > 0 else default


def explain(path: str | Path, overrides: Sequence[str] = ()) -> list[Derived]:
    """What `load_recipe` derives for a recipe that can be loaded; nothing for one that states a shape."""
    values = read(find_recipe(path))
    for assignment in overrides:
        override(values, assignment)
    return resolve(values)
