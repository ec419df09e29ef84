"""What published work says of how a recipe spends its compute: one line each, with the source."""

from __future__ import annotations

from pathlib import Path

from nanophi.core import formatting
from nanophi.core.dial import TOKENS_PER_PARAMETER
from nanophi.core.files import read_json
from nanophi.core.recipe import Recipe, load_recipe
from nanophi.training.budget import multiplying_parameters, parameter_count

PASSES, EMBEDDINGS, FAR = 4, 0.5, 4
"""From where on a line is said: passes over the text, share of the parameters, factor from the optimum."""
PUBLISHED_TOKENS = {0.5: 0.26e9, None: 0.6e9}
"""Threshold -> different tokens of the published sources, from https://huggingface.co/kenhktsui/nano-phi-115M-v0.1."""


def advice(recipe: Recipe, run: Path) -> list[str]:
    """Lines on a pretraining's recipe, with what is prepared in its run directory; none for a chat model."""
    if recipe.conversations:
        return []
    config, training, lines = recipe.model_config_for(), recipe.training, []
    tokens = training.steps * training.batch_size * config.max_position_embeddings
    prepared = run / "data/tokens/tokens.json"
    unique: float | None = recipe.data.max_tokens
    if known := read_json(prepared) if prepared.exists() else {}:
        unique = known["train"]["tokens"]
    elif unique is None and recipe.data.sources == load_recipe("nano-phi-115m").data.sources:
        unique = PUBLISHED_TOKENS.get(None if recipe.quality.phase == "decay" else recipe.quality.threshold)
    phases = [(tokens, unique, "")]
    if recipe.two_phases:
        last = tokens // training.steps * (training.steps - training.decay_start)
        own = known.get("decay", known["train"])["tokens"] if known else recipe.data.max_decay_tokens
        phases = [(tokens - last, unique, " until the learning rate decays"), (last, own, " while it decays")]
        lines.append("; ".join(f"{formatting.size(count)} tokens{when}" for count, _, when in phases))
    for count, different, when in phases:
        if different and count > PASSES * different:
            lines.append(
                f"{count / different:.0f} passes{when}: repeated text beyond about {PASSES} is worth little "
                "(Muennighoff et al. 2023, arXiv 2305.16264)"
            )
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    if (share := tables / parameter_count(config)) > EMBEDDINGS:
        remedy = "use" if config.tie_word_embeddings else "tie them, or use"
        lines.append(
            f"{formatting.percent(share, 0)} of the parameters are in embeddings: {remedy} a smaller vocabulary "
            "(Tao et al. 2024, arXiv 2407.13623)"
        )
    ratio = tokens / multiplying_parameters(config)
    if not 1 / FAR <= ratio / TOKENS_PER_PARAMETER <= FAR:
        lines.append(
            f"{formatting.figure(ratio)} tokens per parameter: about {TOKENS_PER_PARAMETER} give the lowest loss for "
            f"the FLOP, with a {'larger' if ratio > TOKENS_PER_PARAMETER else 'smaller'} model (Hoffmann et al. 2022, "
            "arXiv 2203.15556)"
        )
    return lines
