"""Verification of what the files of a release say of each other, by a forger who makes the manifest fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forging import edit_json, failures, sign_again  # type: ignore[import-not-found]
from hub_client import push  # type: ignore[import-not-found]

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json
from nanophi.core.names import final_checkpoint
from nanophi.experiments import reproduce
from nanophi.model_card import card, checks, figures, loader
from nanophi.model_card import records as shipped
from nanophi.model_card.manifest import write_manifest


@pytest.fixture
def not_loaded(monkeypatch):
    """Loading takes seconds, and is tested elsewhere."""
    monkeypatch.setattr(loader, "load", lambda *_: ({"error": "not tried"}, {"error": "not tried"}))


def exchange_figures(folder: Path) -> None:
    loss, quality = (folder / "figures" / f"{name}.png" for name in ("loss", "quality"))
    content = loss.read_bytes()
    loss.write_bytes(quality.read_bytes())
    quality.write_bytes(content)


UNLIKE = "figures/loss.png does not show the records; figures/quality.png does not show the records"


@pytest.mark.usefixtures("not_loaded")
@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (exchange_figures, UNLIKE),
        (lambda folder: (folder / "figures/loss.png").write_text("<svg/>"), "figures/loss.png is not an image ("),
        (lambda folder: (folder / "figures/evaluation.png").unlink(), "figures/evaluation.png is missing"),
        (edit_json("config.json", max_position_embeddings=64), "config.json has max_position_embeddings 64, not 128"),
        (edit_json("config.json", eos_token_id=7), "config.json has eos_token_id 7, not 0"),
        (edit_json("config.json", torch_dtype="bfloat16"), "config.json has torch_dtype 'bfloat16', not 'float32'"),
        (edit_json("generation_config.json", suppress_tokens=[5]), "generation_config.json is not the one"),
        (edit_json("generation_config.json", do_sample=None), "generation_config.json is not the one"),
        (edit_json("generation_config.json", pad_token_id=9), "generation_config.json is not the one"),
        (lambda folder: (folder / "generation_config.json").unlink(), "generation_config.json is missing"),
        (lambda folder: (folder / "LICENSE").write_text("All rights reserved"), "LICENSE is not that of the recipe"),
        (lambda folder: (folder / "chat_template.jinja").write_text("Obey: {{ messages }}"), "the chat template is"),
        (edit_json("tokenizer_config.json", chat_template="Obey: {{ messages }}"), "the chat template is not the one"),
    ],
)
def test_a_configuration_or_figure_that_is_not_the_records_is_named(copied, tamper, named):
    tamper(copied)
    sign_again(copied)
    failed, check = failures(copied), "figures" if named.startswith("figures/") else "configuration"
    assert list(failed) == [check, "stock Phi", "remote code"] and named in failed[check]
    assert failed[check].count(";") == named.count(";")


def test_figures_of_another_version_are_only_counted(copied):
    exchange_figures(copied)
    records = shipped.read_records(copied / "records")
    assert figures.problems(records, copied / "figures")
    records["run.json"]["environment"]["packages"]["matplotlib"] = "3.0.0"
    assert figures.problems(records, copied / "figures") == []
    (copied / "figures/loss.png").unlink()
    assert figures.problems(records, copied / "figures") == ["figures/loss.png is missing"]


def test_a_tokenizer_from_elsewhere_may_bring_its_chat_template(copied):
    edit_json("tokenizer_config.json", chat_template="Yes? {{ messages }}")(copied)
    records = shipped.read_records(copied / "records")
    records["recipe.yaml"]["tokenizer"]["path"] = "org/tokenizer"
    assert checks.configuration(copied, records) == []


def edit_provenance(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: write_manifest(folder, {**read_json(folder / "MANIFEST.json")["provenance"], **fields})


def forge_weights_record(folder: Path) -> None:
    summary = read_json(folder / "records" / "training.json")["summary"]
    edit_json("records/training.json", summary={**summary, "weights_sha256": "8" * 64})(folder)


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (edit_provenance(data_sha256={"train": "7" * 64, "heldout": "4" * 64}), "tokens.json has other tokens"),
        (edit_provenance(weights_sha256="7" * 64), "model.safetensors has other weights than the manifest"),
        (forge_weights_record, "model.safetensors has other weights than records/training.json"),
        (lambda folder: write_json(folder / "revisions.json", []), "revisions.json differs from records/revisions"),
        (lambda folder: (folder / "revisions.json").unlink(), "revisions.json is missing"),
    ],
)
def test_what_manifest_records_and_files_say_differently_is_named(copied, tamper, named, monkeypatch):
    monkeypatch.setattr(checks, "computed", lambda *_: [])  # takes seconds, and is not reached
    tamper(copied)
    sign_again(copied)
    failed = failures(copied)
    assert list(failed) == ["provenance"] and named in failed["provenance"]


def test_a_sample_or_documents_that_were_taken_away_are_missed(copied):
    for name in ("sample.json", "heldout.json"):
        (copied / "records" / name).unlink()
    (copied / "README.md").write_text(card.render(shipped.read_records(copied / "records")))
    sign_again(copied)
    failed = failures(copied)
    assert list(failed) == ["sample", "evaluation"]
    assert failed["sample"] == "records/sample.json is missing"
    assert failed["evaluation"].startswith("records/heldout.json holds no document")


def test_held_out_documents_that_are_all_too_long_to_ship(finished_run, monkeypatch):
    monkeypatch.setattr(shipped, "HELDOUT_ITEM_BYTES", 10)
    records = shipped.collect(finished_run, final_checkpoint(finished_run))
    shortest = min(records["heldout.json"], key=lambda item: len(item["text"]))
    assert records["heldout.json"] == [shortest], "nobody could check a release that ships none"


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "records" / name).unlink()


def empty(name: str, content: Any) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / name, content)


def drop_key(name: str, dropped: str) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        record = read_json(folder / "records" / name)
        write_json(folder / "records" / name, {key: value for key, value in record.items() if key != dropped})

    return tamper


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (drop("checkpoint.json"), "checkpoint.json is missing"),
        (drop("model.json"), "model.json is missing"),
        (empty("records/run.json", []), "run.json has another form"),
        (empty("records/evals/heldout.json", []), "evals/heldout.json has another form"),
        (lambda folder: (folder / "records/run.json").write_text(""), "run.json is not valid JSON (Expecting value"),
        (drop_key("run.json", "environment"), "the records are not complete (KeyError: 'environment')"),
        (drop_key("training.json", "log"), "the records are not complete (KeyError: 'log')"),
        (drop_key("evals/heldout.json", "n-samples"), "the records are not complete (KeyError: 'n-samples')"),
        (empty("records/heldout.json", [1]), "the records are not complete ("),
    ],
)
def test_records_that_are_not_complete_are_one_line(copied, tamper, named):
    tamper(copied)
    sign_again(copied)
    failed = failures(copied)
    assert any(named in detail for detail in failed.values()), failed
    assert not any("run the stage again" in detail for detail in failed.values())
    if not named.endswith("complete ("):
        with pytest.raises(UserError, match=r"complete|records of a release|not valid JSON"):
            push(copied, "org/demo", dry_run=True)


def test_a_published_run_with_holes_is_not_reproduced(copied, finished_run, tmp_path):
    drop_key("run.json", "environment")(copied)
    drop_key("training.json", "summary")(copied)
    sign_again(copied)
    with pytest.raises(UserError, match=r"the records are not complete \(KeyError: 'environment'\)"):
        reproduce.fetch_recipe(str(copied), tmp_path / "again", report=lambda line: None)
    with pytest.raises(UserError, match=r"the records are not complete \(KeyError: 'summary'\)"):
        reproduce.compare_with_published(copied, finished_run, report=lambda line: None)


def test_an_emptied_config_is_somebody_elses(copied):
    (copied / "config.json").write_text("")
    write_json(copied / "tokenizer_config.json", {"auto_map": "tok.Tok"})
    sign_again(copied)
    wrong = failures(copied)["code references"]
    assert wrong == "config.json is not valid JSON; tokenizer_config.json: auto_map is not a mapping"
