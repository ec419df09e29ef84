"""The loss that `nanophi ladder` predicted for a recipe before it was run, beside what the run measured."""

from __future__ import annotations

import datetime
from typing import Any

from nanophi.core.errors import user_errors
from nanophi.core.recipe import MAY_CHANGE, checked
from nanophi.core.run import differences
from nanophi.eval import catalogue
from nanophi.model_card import records
from nanophi.model_card.records import ShippedRecords


def sentence(shipped: ShippedRecords) -> str | None:
    """Predicted, measured, inside the interval or not; None without a prediction or held-out text.

    Raises `UserError` for a `prediction.json` that no ladder wrote.
    """
    found, measured = shipped.get("prediction.json"), records.leading_scores(shipped)
    measured = [score for score in measured if score.task == catalogue.HELDOUT_BITS]
    if found is None or not measured:
        return None
    with user_errors("prediction.json is not what nanophi ladder writes; put that back, or remove it"):
        (low, high), predicted, ratio = found["interval"], found["value"], found["ratio"]
        then = _measured_from(found["recipe"], "prediction.json")
        late = "predicted" in found and datetime.datetime.fromisoformat(found["predicted"]) >= _began(shipped)
    if changed := differences(then, _measured_from(shipped["recipe.yaml"], "recipe.yaml")):
        return f"A prediction was made of another recipe ({changed[0]}), so it is not compared."
    if late:
        return f"A prediction was made only when this training had begun ({found['predicted']}), so it is not compared."
    value = measured[0].value
    return (
        f"Before this run, smaller ones predicted {predicted:.3f} bits per byte of held-out text [{low:.3f}, "
        f"{high:.3f}], at {ratio:.3g} times the compute of the largest of them; measured: {value:.3f}, "
        f"{'inside' if low <= value <= high else 'outside'} the interval."
    )


def _measured_from(values: Any, where: str) -> dict[str, Any]:
    """What a recipe's loss depends on, but for the seed of its training: the interval is one for any."""
    recipe = checked(values, where)
    return {
        **recipe.model_dump(mode="json", include={"seed", "quality", "tokenizer", "model", "base"}),
        "data": recipe.data.model_dump(mode="json", exclude={"workers", "engine"}),
        "training": recipe.training.model_dump(mode="json", exclude={*MAY_CHANGE, "seed"}),
        "evaluation": {"limit": recipe.evaluation.limit},
    }


def _began(shipped: ShippedRecords) -> datetime.datetime:
    """When the training began that gave the weights, or was last resumed."""
    run = shipped["run.json"]
    return datetime.datetime.fromisoformat(run["finished"]) - datetime.timedelta(seconds=run["seconds"]["training"])
