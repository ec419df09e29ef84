"""Records that contradict each other are named: a card rendered from them would be a forgery that renders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from card_records import comparison, leaderboard_results  # type: ignore[import-not-found]

from nanophi.core.names import final_checkpoint
from nanophi.model_card import records as shipped
from nanophi.model_card.consistency import contradictions
from nanophi.model_card.records import ShippedRecords


@pytest.fixture(scope="module")
def records(finished_run: Path) -> ShippedRecords:
    return shipped.collect(finished_run, final_checkpoint(finished_run))


def test_a_comparison_of_other_results_fails(records: ShippedRecords) -> None:
    changed = copy.deepcopy(records)
    changed["comparison.json"] = comparison(records["recipe.yaml"]["name"])
    assert contradictions(changed) == []
    row = changed["comparison.json"]["tasks"]["heldout_continuation"]
    row["scores"][records["recipe.yaml"]["name"]]["value"] = 0.99
    assert "heldout_continuation value 0.99" in contradictions(changed)[0]


def in_results(record: Any, **line: Any) -> None:
    record["nanophi"]["headline"][1].update(line)


def in_heldout(record: Any, **figures: Any) -> None:
    record["nanophi"]["heldout"].update(figures)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: in_results(r, value=0.77), "heldout_continuation value 0.77, its results say 0.41"),
        (lambda r: in_results(r, stderr=0.001), "heldout_continuation stderr 0.001, its results say 0.031"),
        (lambda r: in_results(r, items=2000), "heldout_continuation items 2000, its results say 200"),
        (lambda r: in_results(r, higher_is_better=False), "higher_is_better False, its results say True"),
        (
            lambda r: in_results(r, answer_bits_per_byte={"value": 0.5, "stderr": 0.02}),
            "heldout_continuation answer_bits_per_byte value 0.5, its results say 1.9",
        ),
        (lambda r: in_heldout(r, bits_per_byte=1.0), "bits_per_byte 1.0 of the held-out text, its headline says 2.15"),
        (lambda r: in_heldout(r, documents=51), "documents 51 of the held-out text, its headline says 50"),
        (
            lambda r: r["nanophi"]["heldout"]["by_source"]["licences"].update(bits_per_byte=1.15),
            "of the held-out text, its sources say 1.75",
        ),
    ],
)
def test_a_headline_that_its_results_do_not_give_is_named(
    records: ShippedRecords, change: Callable[[Any], None], named: str
) -> None:
    changed = copy.deepcopy(records)
    change(changed["evals/heldout.json"])
    wrong = contradictions(changed)
    assert all(line.startswith("evals/heldout.json says ") for line in wrong)
    assert any(named in line for line in wrong), wrong


def test_an_average_that_is_not_its_tasks_is_named(records: ShippedRecords) -> None:
    changed = copy.deepcopy({**records, "evals/open-llm-v1.json": leaderboard_results()})
    board = changed["evals/open-llm-v1.json"]
    board["higher_is_better"] = {task: {} for task in board["results"]}
    for line in board["nanophi"]["headline"]:
        # As `nanophi eval` writes it: the mean over the tasks, with the error of a mean.
        errors = [error for leaf in line["tasks"] for key, error in board["results"][leaf].items() if "_stderr" in key]
        line["stderr"] = sum(error**2 for error in errors) ** 0.5 / len(line["tasks"]) if errors else None
        line["items"] = line["of"] = 100 * len(line["tasks"])
    lines = board["nanophi"]["headline"]
    board["nanophi"]["average"]["stderr"] = sum(line["stderr"] ** 2 for line in lines) ** 0.5 / 6
    assert contradictions(changed) == []
    board["nanophi"]["average"]["value"] = 0.6
    assert "an average value of 0.6, its tasks say 0.2416" in contradictions(changed)[0]


@pytest.mark.parametrize(
    ("table", "task", "change", "named"),
    [
        ("tasks", "heldout_bits_per_byte", {"value": 0.15}, "calls tiny better on heldout_bits_per_byte, its diff"),
        ("tasks", "heldout_continuation", {"verdict": "better"}, "0.01 with p 0.4 is within noise"),
        ("answers", "heldout_continuation", {"p_corrected": 0.05}, "-0.01 with p 0.05 is within noise"),
    ],
)
def test_a_verdict_that_its_difference_does_not_give_is_named(
    records: ShippedRecords, table: str, task: str, change: dict[str, Any], named: str
) -> None:
    changed = copy.deepcopy({**records, "comparison.json": comparison("tiny")})
    changed["comparison.json"][table][task]["differences"]["tiny"].update(change)
    (wrong,) = contradictions(changed)
    assert named in wrong


def test_a_comparison_turned_round_or_of_other_sources_is_named(records: ShippedRecords) -> None:
    changed = copy.deepcopy({**records, "comparison.json": comparison("tiny")})
    row = changed["comparison.json"]["tasks"]["heldout_bits_per_byte"]
    row["higher_is_better"], row["differences"]["tiny"]["verdict"] = True, "worse"
    changed["comparison.json"]["heldout"]["tiny"]["by_source"]["licences"]["bits_per_byte"] = 1.2
    wrong = contradictions(changed)
    assert [line.partition(", evals/")[0] for line in wrong] == [
        "comparison.json says heldout_bits_per_byte higher_is_better True",
        "comparison.json says 1.2 bits per byte of licences",
    ]
