"""Reproduction: the recipe comes from the release, and differences are separated from noise."""

import shutil
from pathlib import Path

import pytest

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json, write_text
from nanophi.core.recipe import load_recipe
from nanophi.experiments import reproduce
from nanophi.model_card import card, release


def silent(line: str) -> None:
    pass


def test_prepare_writes_a_recipe_that_loads(built_release: Path, finished_run: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    path = reproduce.fetch_recipe(str(built_release), tmp_path / "again", report=lines.append)
    ours, theirs = load_recipe(path), load_recipe(finished_run / "recipe.yaml")
    assert ours.name == "tiny-reproduced"
    assert ours.model_copy(update={"name": theirs.name}) == theirs
    assert any(line.startswith("python: published with 3.11.9, here ") for line in lines)
    assert not any("was not published" in line for line in lines)


@pytest.mark.parametrize(
    ("old", "new", "listed", "line"),
    [
        ("seed: 7", "seed: 8", False, r"records/recipe\.yaml was changed"),
        ("name: tiny", "name: ../../tiny", True, "which no run can have"),
        ("seed: 7", "seed: 7 ", True, "published is in the way"),
    ],
)
def test_other_records_names_and_folders_are_refused(copied, tmp_path, old, new, listed, line) -> None:
    recipe, thesis = copied / "records/recipe.yaml", tmp_path / "again/published/thesis.tex"
    recipe.write_text(recipe.read_text().replace(old, new, 1))
    if listed:
        release.write_manifest(copied, read_json(copied / "MANIFEST.json")["provenance"])
    write_text(thesis, "mine")
    with pytest.raises(UserError, match=line):
        reproduce.fetch_recipe(str(copied), tmp_path / "again", report=silent)
    assert [path.name for path in (tmp_path / "again").rglob("*")] == ["published", "thesis.tex"]


def test_a_folder_that_cannot_be_written_is_not_the_records_fault(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"^{tmp_path}/file/runs cannot be written; choose another --runs \("):
        reproduce.fetch_recipe(str(copied), tmp_path / "file/runs", report=silent)


def test_prepare_says_which_data_is_private(copied: Path, tmp_path: Path) -> None:
    recipe = copied / "records" / "recipe.yaml"
    text = recipe.read_text().replace("embedded: documentation", "embedded: null")
    recipe.write_text(text.replace("files: null", "files: mine.parquet", 1))
    release.write_manifest(copied, read_json(copied / "MANIFEST.json")["provenance"])
    lines: list[str] = []
    reproduce.fetch_recipe(str(copied), tmp_path / "again", report=lines.append)
    assert any("mine.parquet" in line and "--set 'data.sources=[...]'" in line for line in lines)


def test_the_same_run_agrees_with_itself(built_release: Path, finished_run: Path) -> None:
    rows = reproduce.compare_with_published(built_release, finished_run, report=silent)
    assert {row.agrees for row in rows} == {True}
    assert {"train tokens, SHA-256", "weights, SHA-256", "heldout_continuation, acc_norm"} <= {row.name for row in rows}


def test_an_earlier_checkpoint_is_compared_with_that_step(finished_run: Path, tmp_path: Path) -> None:
    checkpoint = finished_run / "checkpoints" / "step-000010"
    card.build(finished_run, tmp_path / "card", checkpoint)
    release.build(finished_run, checkpoint, tmp_path / "card", tmp_path / "release")
    rows = reproduce.compare_with_published(tmp_path / "release", finished_run, report=silent)
    assert {row.agrees for row in rows} == {True}
    found = {row.name: row.here for row in rows}
    assert found["train loss"] == 5.2 and found["heldout_bits_per_byte, bits_per_byte"] == 2.65
    assert "weights, SHA-256" not in found  # The record has those of the last step.
    run = Path(
        shutil.copytree(finished_run, tmp_path / "tiny", ignore=shutil.ignore_patterns("step-000010", "release"))
    )
    with pytest.raises(UserError, match="step-000010 is missing"):
        reproduce.compare_with_published(tmp_path / "release", run, report=silent)


def test_differences_are_separated_from_noise(built_release: Path, finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "tiny", ignore=shutil.ignore_patterns("release", "card")))
    files = [run / name for name in ("data/tokens/tokens.json", "training.json", "evals/step-000030-heldout.json")]
    tokens, training, results = map(read_json, files)
    tokens["train"]["sha256"], training["summary"]["weights_sha256"] = "9" * 64, "8" * 64
    results["results"]["heldout_bits_per_byte"]["bits_per_byte,none"] += 0.5  # ten standard errors of 0.05
    results["results"]["heldout_continuation"]["acc_norm,none"] += 0.05  # of 0.031 each: within two combined
    for file, content in zip(files, (tokens, training, results), strict=True):
        write_json(file, content)
    lines: list[str] = []
    rows = reproduce.compare_with_published(built_release, run, report=lines.append)
    verdicts = {row.name: row.agrees for row in rows}
    assert [verdicts[f"{name}, SHA-256"] for name in ("train tokens", "heldout tokens", "weights")] == [
        False,
        True,
        None,
    ]
    assert verdicts["heldout_bits_per_byte, bits_per_byte"] is False
    assert verdicts["heldout_continuation, acc_norm"] is True
    assert sum("DIFFERS" in line for line in lines) == 2
