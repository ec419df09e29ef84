"""Records that contradict each other are named: a card rendered from them would be a forgery that renders."""

import re

import pytest
from card_records import comparison  # type: ignore[import-not-found]

from nanophi.model_card.consistency import contradictions


def test_a_comparison_of_other_results_fails(changed):
    changed["comparison.json"] = comparison("tiny")
    assert contradictions(changed) == []
    changed["comparison.json"]["tasks"]["heldout_continuation"]["scores"]["tiny"]["value"] = 0.99
    assert "heldout_continuation value 0.99" in contradictions(changed)[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda held: held.update(bits_per_byte=1.0), "held-out bits per byte: value 1.0, the results give 2.15"),
        (lambda held: held.update(documents=51), "held-out bits per byte: items 51, the results give 50"),
        (
            lambda held: held["by_source"]["licences"].update(bits_per_byte=1.15),
            "of the held-out text, its sources give 1.75",
        ),
    ],
)
def test_figures_that_the_results_do_not_give_are_named(changed, change, named):
    change(changed["evals/heldout.json"]["nanophi"]["heldout"])
    wrong = contradictions(changed)
    assert all(line.startswith("evals/heldout.json has ") for line in wrong)
    assert any(named in line for line in wrong)


@pytest.mark.parametrize(
    ("table", "task", "change", "named"),
    [
        ("tasks", "heldout_bits_per_byte", {"value": 0.15}, "calls tiny better on heldout_bits_per_byte, its diff"),
        ("tasks", "heldout_continuation", {"verdict": "better"}, "0.01 with p 0.4 is within noise"),
        ("answers", "heldout_continuation", {"p_corrected": 0.05}, "-0.01 with p 0.05 is within noise"),
    ],
)
def test_a_verdict_that_its_difference_does_not_give_is_named(changed, table, task, change, named):
    changed["comparison.json"] = comparison("tiny")
    changed["comparison.json"][table][task]["differences"]["tiny"].update(change)
    *before, wrong = contradictions(changed)
    assert named in wrong
    # A difference that was changed is also not the one that the scores give.
    assert len(before) == ("value" in change and table == "tasks")
    assert all("its scores give" in line for line in before)


def test_a_comparison_turned_round_or_of_other_sources_is_named(changed):
    changed["comparison.json"] = comparison("tiny")
    row = changed["comparison.json"]["tasks"]["heldout_bits_per_byte"]
    row["higher_is_better"], row["differences"]["tiny"]["verdict"] = True, "worse"
    changed["comparison.json"]["heldout"]["tiny"]["by_source"]["licences"]["bits_per_byte"] = 1.2
    wrong = contradictions(changed)
    assert [re.split(", (?:evals/|the results)", line)[0] for line in wrong] == [
        "comparison.json has heldout_bits_per_byte higher_is_better True",
        "comparison.json has 1.2 bits per byte of licences",
    ]
