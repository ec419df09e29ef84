"""Secrets and private paths: what counts as one, what does not, and that records are made without them."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from nanophi.core.names import final_checkpoint
from nanophi.model_card import card, release, secrets
from nanophi.model_card import records as shipped
from nanophi.model_card.manifest import list_files
from nanophi.model_card.push import problems

KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow"


def build(run: Path) -> None:
    """A release that is fit to publish."""
    card.build(run, run / "card")
    release.build(run, final_checkpoint(run), run / "card", run / "release")
    assert problems(run / "release") == []


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("DB_PASSWORD", "pa55word.of/the+database=", True),
        ("EOS_TOKEN", "<|endoftext|>", False),
        ("PAD_TOKEN", "[PAD_TO_LENGTH]", False),
        ("UNK_TOKEN", "unknown-token-here", False),
        ("SOME_TOKEN", "documentation", False),
        ("SOME_TOKEN", "123456789012", False),
        ("SOME_TOKEN", "none of your business", False),
        ("SOME_TOKEN", "short-1", False),
        ("SOME_NAME", "correct-horse-battery", False),
    ],
)
def test_an_environment_value_is_a_secret_only_if_it_can_be_one(monkeypatch, name, value, secret):
    for other in list(os.environ):
        if other.endswith(("TOKEN", "SECRET", "PASSWORD", "KEY")):
            monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    found = secrets.found_in(f"It says {value} somewhere.")
    assert ("a secret of this machine's environment" in found) is secret


def test_words_that_begin_like_a_secret_are_none():
    assert secrets.found_in("sk-toggleable__control-and-more, hf_transformers, the ASIA region, sk-learn") == []


def test_held_out_documents_with_secrets_are_left_out(run_copy):
    run = run_copy
    items = shipped.collect(run, final_checkpoint(run))["heldout.json"]
    shard = run / "data" / "documents" / "heldout-00000.parquet"
    documents = pd.read_parquet(shard)
    private = {items[0]["text"]: KEY, items[2]["text"]: f"{Path.home()}/notes.txt", items[3]["text"]: "AKIA" + "A1" * 8}
    # Of the same length, so that they count as the documents that were scored.
    changed = {text: (leak + " " * 200)[: len(text)] for text, leak in private.items()}
    documents["text"] = [changed.get(text, text) for text in documents["text"]]
    documents.to_parquet(shard)
    kept = [item["text"] for item in shipped.collect(run, final_checkpoint(run))["heldout.json"]]
    assert len(kept) == shipped.HELDOUT_ITEMS
    assert kept[:2] == [items[1]["text"], items[4]["text"]] and not any(secrets.found_in(text) for text in kept)


def test_ordinary_words_in_data_do_not_block_a_release(run_copy):
    run = run_copy
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["card"] |= {"prompt": "Return None if the key is", "notes": "TODO: nothing. {{ braces }} {% raw %} nan"}
    recipe["data"]["sources"][0]["name"] = "{{x}}, Undefined"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sample = json.loads((run / "sample.json").read_text())
    (run / "sample.json").write_text(json.dumps({**sample, "prompt": "Return None if the key is"}))
    build(run)


def test_no_path_of_the_machine_is_in_a_release(run_copy, tmp_path):
    home = tmp_path / "Jané's files (new) & 数据"
    run = Path(shutil.move(run_copy, home / "runs" / "tiny"))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    private = f"{home}/texts/*.txt"
    recipe["data"]["sources"] = [{**recipe["data"]["sources"][0], "embedded": None, "files": private, "name": None}]
    recipe["tokenizer"]["path"] = f"{home}/my tokenizer"
    recipe["quality"]["scorer"] = f"model:{home}/scorer"
    recipe["evaluation"]["data"] = "~/bench marks/all"
    recipe["training"]["arguments"] = {"logging": f"dir={home}/logs"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True))
    quality = json.loads((run / "data/quality/quality.json").read_text())
    quality["sources"] = {private: quality["sources"]["topics"]}
    (run / "data/quality/quality.json").write_text(json.dumps(quality))
    build(run)
    for name in list_files(run / "release"):
        content = (run / "release" / name).read_bytes()
        assert "Jané".encode() not in content and "数据".encode() not in content and b"bench marks" not in content, name
    assert "local files `*.txt`" in (run / "release" / "README.md").read_text()
