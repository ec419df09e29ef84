"""Records that contradict each other are named: a card rendered from them would be a forgery that renders."""

import copy
import re
from typing import Any

import pytest
from card_records import comparison, leaderboard_results  # type: ignore[import-not-found]

from nanophi.core.names import final_checkpoint
from nanophi.model_card import records as shipped
from nanophi.model_card.consistency import contradictions


@pytest.fixture(scope="module")
def records(finished_run):
    return shipped.collect(finished_run, final_checkpoint(finished_run))


@pytest.fixture
def changed(records):
    """Records that a test may change."""
    return copy.deepcopy(records)


def test_a_comparison_of_other_results_fails(changed, records):
    changed["comparison.json"] = comparison(records["recipe.yaml"]["name"])
    assert contradictions(changed) == []
    row = changed["comparison.json"]["tasks"]["heldout_continuation"]
    row["scores"][records["recipe.yaml"]["name"]]["value"] = 0.99
    assert "heldout_continuation value 0.99" in contradictions(changed)[0]


def in_headline(record: Any, **line: Any) -> None:
    """What a file of format 2 repeats of its results."""
    figures = {"value": 0.41, "stderr": 0.031, "items": 200, "of": 200, "higher_is_better": True, "chance": 0.25}
    answers = {"answer_bits_per_byte": {"value": 1.9, "stderr": 0.02}}
    lines = record["nanophi"].pop("lines")
    headline = [{"task": task, "tasks": entry["tasks"], "chance": entry["chance"]} for task, entry in lines.items()]
    headline[1] |= figures | answers | line
    record["nanophi"] |= {"format": 2, "headline": headline}


def in_heldout(record: Any, **figures: Any) -> None:
    record["nanophi"]["heldout"].update(figures)


def of_licences(record: Any) -> dict[str, Any]:
    return record["nanophi"]["heldout"]["by_source"]["licences"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: in_headline(r), None),
        (lambda r: in_headline(r, value=0.77), "heldout_continuation value 0.77, the results give 0.41"),
        (lambda r: in_headline(r, stderr=0.001), "heldout_continuation stderr 0.001, the results give 0.031"),
        (lambda r: in_headline(r, items=2000), "heldout_continuation items 2000, the results give 200"),
        (lambda r: in_headline(r, higher_is_better=False), "higher_is_better False, the results give True"),
        (
            lambda r: in_headline(r, answer_bits_per_byte={"value": 0.5}),
            "bits_per_byte value 0.5, the results give 1.9",
        ),
        (lambda r: in_heldout(r, bits_per_byte=1.0), "held-out bits per byte: value 1.0, the results give 2.15"),
        (lambda r: in_heldout(r, documents=51), "held-out bits per byte: items 51, the results give 50"),
        (lambda r: of_licences(r).update(bits_per_byte=1.15), "of the held-out text, its sources give 1.75"),
    ],
)
def test_figures_that_the_results_do_not_give_are_named(changed, change, named):
    change(changed["evals/heldout.json"])
    wrong = contradictions(changed)
    assert all(line.startswith("evals/heldout.json has ") for line in wrong)
    assert any(named in line for line in wrong) if named else wrong == []


def test_an_average_that_is_not_its_tasks_is_named(records):
    board = leaderboard_results()
    changed = {**records, "evals/open-llm-v1.json": board}
    assert contradictions(changed) == []
    board["nanophi"]["average"] = {"value": 0.6}  # as files of format 2 repeat it
    assert "an average value 0.6, the results give 0.2416" in contradictions(changed)[0]


@pytest.mark.parametrize(
    ("table", "task", "change", "named"),
    [
        ("tasks", "heldout_bits_per_byte", {"value": 0.15}, "calls tiny better on heldout_bits_per_byte, its diff"),
        ("tasks", "heldout_continuation", {"verdict": "better"}, "0.01 with p 0.4 is within noise"),
        ("answers", "heldout_continuation", {"p_corrected": 0.05}, "-0.01 with p 0.05 is within noise"),
    ],
)
def test_a_verdict_that_its_difference_does_not_give_is_named(records, table, task, change, named):
    changed = copy.deepcopy({**records, "comparison.json": comparison("tiny")})
    changed["comparison.json"][table][task]["differences"]["tiny"].update(change)
    *before, wrong = contradictions(changed)
    assert named in wrong
    # A difference that was changed is also not the one that the scores give.
    assert len(before) == ("value" in change and table == "tasks")
    assert all("its scores give" in line for line in before)


def test_a_comparison_turned_round_or_of_other_sources_is_named(records):
    changed = copy.deepcopy({**records, "comparison.json": comparison("tiny")})
    row = changed["comparison.json"]["tasks"]["heldout_bits_per_byte"]
    row["higher_is_better"], row["differences"]["tiny"]["verdict"] = True, "worse"
    changed["comparison.json"]["heldout"]["tiny"]["by_source"]["licences"]["bits_per_byte"] = 1.2
    wrong = contradictions(changed)
    assert [re.split(", (?:evals/|the results)", line)[0] for line in wrong] == [
        "comparison.json has heldout_bits_per_byte higher_is_better True",
        "comparison.json has 1.2 bits per byte of licences",
    ]
