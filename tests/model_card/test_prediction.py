"""A run whose recipe had a prediction says in its report and card how it came out."""

import pytest
import yaml

from nanophi.core.files import read_json, write_json
from nanophi.model_card import card, records, report


def predicted(run, low, high, **changes):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["training"] |= changes
    found = {"recipe": recipe, "value": (low + high) / 2, "interval": [low, high], "ratio": 40.0}
    write_json(run / "prediction.json", found)


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0.5, 9.0, "inside the interval."), (0.5, 0.6, "outside the interval.")]
)
def test_predicted_and_measured(run_copy, low, high, words):
    run = run_copy
    predicted(run, low, high)
    card.build(run, run / "card")
    report.build(run, run / "report.html")
    text = (run / "card/README.md").read_text()
    assert "### Prediction" in text and words in text and "at 40 times the compute of the largest" in text
    assert read_json(run / "card/records/prediction.json")["interval"] == [low, high]
    assert words in (run / "report.html").read_text()


def test_a_prediction_of_another_recipe_is_not_compared(run_copy):
    predicted(run_copy, 0.5, 9.0, steps=77)
    card.build(run_copy, run_copy / "card")
    text = " ".join((run_copy / "card/README.md").read_text().split())
    assert "A prediction was made of another recipe (training.steps 77 -&gt; 30)" in text or "another recipe" in text
    assert "inside the interval" not in text


def test_nothing_is_said_without_a_prediction_or_of_an_earlier_checkpoint(run_copy):
    run = run_copy
    card.build(run, run / "card")
    assert "Prediction" not in (run / "card/README.md").read_text()
    predicted(run, 0.5, 9.0)
    earlier = min((run / "checkpoints").iterdir())
    assert "prediction.json" not in records.collect(run, earlier)
