"""The loss that `nanophi ladder` predicted for a recipe before it was run, beside what the run measured."""

from __future__ import annotations

from nanophi.core.recipe import Recipe
from nanophi.core.run import differences
from nanophi.eval import catalogue
from nanophi.model_card import records
from nanophi.model_card.records import ShippedRecords

SAME = ("steps", "batch_size", "optimizer", "learning_rate", "muon_learning_rate", "schedule")
"""Keys of `training`, beside whole sections, in which the run that was predicted is the one that was made."""


def sentence(shipped: ShippedRecords) -> str | None:
    """Predicted, measured, inside the interval or not; None without a prediction or held-out text."""
    found, measured = shipped.get("prediction.json"), records.leading_scores(shipped)
    measured = [score for score in measured if score.task == catalogue.HELDOUT_BITS]
    if found is None or not measured:
        return None
    then, now = (
        {key: each[key] for key in ("quality", "tokenizer", "model")} | {key: each["training"][key] for key in SAME}
        for each in (Recipe(**given).dump() for given in (found["recipe"], shipped["recipe.yaml"]))
    )
    if changed := differences(then, now):
        return f"A prediction was made of another recipe ({changed[0]}), so it is not compared."
    (low, high), value = found["interval"], measured[0].value
    return (
        f"Before this run, smaller ones predicted {found['value']:.3f} bits per byte of held-out text [{low:.3f}, "
        f"{high:.3f}], at {found['ratio']:.3g} times the compute of the largest of them; measured: {value:.3f}, "
        f"{'inside' if low <= value <= high else 'outside'} the interval."
    )
