"""A run whose recipe had a prediction says in its report and card how it came out."""

import pytest
import yaml

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json
from nanophi.model_card import card, prediction, records, report


def predicted(run, low, high, when=None, **changes):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for section, values in changes.items():
        recipe[section] |= values
    found = {} if when is None else {"predicted": when}
    found |= {"recipe": recipe, "value": (low + high) / 2, "interval": [low, high], "ratio": 40.0}
    write_json(run / "prediction.json", found)


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0.5, 9.0, "inside the interval."), (0.5, 0.6, "outside the interval.")]
)
def test_predicted_and_measured(run_copy, low, high, words):
    run = run_copy
    predicted(run, low, high, "2020-02-29T00:00:00Z", training={"seed": 77, "save_steps": 3}, data={"workers": 5})
    card.build(run, run / "card")
    report.build(run, run / "report.html")
    text = (run / "card/README.md").read_text()
    assert "### Prediction" in text and words in text and "at 40 times the compute of the largest" in text
    assert read_json(run / "card/records/prediction.json")["interval"] == [low, high]
    assert words in (run / "report.html").read_text()


def test_a_prediction_of_another_recipe_is_not_compared(run_copy):
    predicted(run_copy, 0.5, 9.0, training={"steps": 77})
    card.build(run_copy, run_copy / "card")
    text = " ".join((run_copy / "card/README.md").read_text().split())
    assert "A prediction was made of another recipe (training.steps 77 -&gt; 30)" in text or "another recipe" in text
    assert "inside the interval" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"weight_decay": 0.9}}, "another recipe (training.weight_decay 0.9 -> "),
        ({"training": {"adam_beta2": 0.5}}, "another recipe (training.adam_beta2"),
        ({"data": {"sources": [{"embedded": "documentation"}]}}, "another recipe (data.sources"),
        ({"data": {"heldout_max_documents": 3}}, "another recipe (data.heldout_max_documents 3 -> "),
        ({"evaluation": {"limit": 3}}, "another recipe (evaluation.limit 3 -> "),
        ({"when": "2100-01-01T00:00:00Z"}, "only when this training had begun (2100-01-01T00:00:00Z)"),
    ],
)
def test_what_was_made_of_other_text_or_afterwards_is_no_prediction(run_copy, changes, words):
    predicted(run_copy, 0.5, 9.0, **changes)
    said = prediction.sentence(records.collect(run_copy, max((run_copy / "checkpoints").iterdir())))
    assert words in said and said.endswith("so it is not compared.")


@pytest.mark.parametrize(("content", "words"), [({}, "'interval'"), ({"recipe": 3}, "'interval'"), (None, "'zzz'")])
def test_a_file_that_no_ladder_wrote_is_named(run_copy, content, words):
    if content is None:
        predicted(run_copy, 0.5, 9.0, training={"zzz": 1})
    else:
        write_json(run_copy / "prediction.json", content)
    with pytest.raises(UserError, match=f"^prediction.json.*{words}"):
        prediction.sentence(records.collect(run_copy, max((run_copy / "checkpoints").iterdir())))


def test_nothing_is_said_without_a_prediction_or_of_an_earlier_checkpoint(run_copy):
    run = run_copy
    card.build(run, run / "card")
    assert "Prediction" not in (run / "card/README.md").read_text()
    predicted(run, 0.5, 9.0)
    earlier = min((run / "checkpoints").iterdir())
    assert "prediction.json" not in records.collect(run, earlier)
