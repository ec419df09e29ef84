"""The loss that `nanophi ladder` predicted for a recipe before it was run, beside what the run measured."""

from __future__ import annotations

from nanophi.core.run import differences
from nanophi.eval import catalogue
from nanophi.model_card import records
from nanophi.model_card.records import ShippedRecords

SAME = {
    "quality": None,
    "tokenizer": None,
    "model": None,
    "training": ("steps", "batch_size", "optimizer", "learning_rate", "muon_learning_rate", "schedule"),
}
"""Section of the recipe -> keys (None: all) in which a run that was predicted is the one that was made."""


def sentence(shipped: ShippedRecords) -> str | None:
    """Predicted, measured, inside the interval or not; None without a prediction or held-out text."""
    found, recipe = shipped.get("prediction.json"), shipped["recipe.yaml"]
    measured = [score.value for score in records.leading_scores(shipped) if score.task == catalogue.HELDOUT_BITS]
    if found is None or not measured:
        return None
    then, now = (
        {s: {k: each[s][k] for k in keys or each[s]} for s, keys in SAME.items()} for each in (found["recipe"], recipe)
    )
    if changed := differences(then, now):
        return f"A prediction was made of another recipe ({changed[0]}), so it is not compared."
    low, high = found["interval"]
    verdict = "inside" if low <= measured[0] <= high else "outside"
    return (
        f"Before this run, smaller ones predicted {found['value']:.3f} bits per byte of held-out text [{low:.3f}, "
        f"{high:.3f}], at {found['ratio']:.3g} times the compute of the largest of them; measured: {measured[0]:.3f}, "
        f"{verdict} the interval."
    )
