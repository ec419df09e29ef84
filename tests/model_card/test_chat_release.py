"""A chat model's card and release: what it is based on, what it answers, and what alignment cost."""

import shutil
from pathlib import Path

import gguf as library
import pytest
from chat_run import on_finished
from forging import card_problems  # type: ignore[import-not-found]
from hub_client import push
from huggingface_hub import ModelCard

from nanophi.core import markup
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json
from nanophi.core.recipe import load_recipe
from nanophi.data.conversations import TEMPLATE
from nanophi.experiments import reproduce
from nanophi.model_card import checks, gguf
from nanophi.model_card.card import render
from nanophi.model_card.records import read_records
from nanophi.pipeline import compare_runs


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    run = on_finished(finished_run, tmp_path_factory.mktemp("chat"), "someone/base", lora={"rank": 2})
    compare_runs([run])
    run.make("release")
    return run


def test_the_card_says_what_a_chat_model_is(run):
    release = run.path / "release"
    assert card_problems(release) == []
    text = (release / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == ("someone/base", "finetune")
    assert data.widget == [{"messages": [{"role": "user", "content": "Tell me."}]}] and "sft" in data.tags
    answer = read_json(run.path / "sample.json")["text"]
    shown = ("after supervised fine-tuning on 8 conversations", "rank 2", "### A conversation", markup.fenced(answer))
    assert all(part in text for part in shown)
    assert "trained from scratch on" not in text


def test_a_release_on_a_chat_model_names_the_whole_chain(run, tmp_path):
    shutil.copytree(run.path / "release/records", tmp_path / "records")
    record = tmp_path / "records/conversations.json"
    known = read_json(record)
    base = {"name": "talker", "method": "sft", "base": "first", "repo_id": None, "train": 20, "heldout": 1}
    base |= {"sources": {"talks": {"read": 21, "train": 20, "heldout": 1}}, "hub": ["someone/talks", None]}
    write_json(record, known | {"base": "talker", "repo_id": None, "bases": [base]})
    records = read_records(tmp_path / "records")
    recipe = records["recipe.yaml"]
    recipe["data"]["sources"][0] |= {"hub": "someone/web", "embedded": None}
    recipe["conversations"] = [{"hub": f"someone/{part}", "heldout": part == "exam"} for part in ("chat", "exam")]
    text = render(records)
    assert ModelCard(text).data.datasets == ["someone/web", "someone/chat", "someone/talks"], "and none held out"
    assert "- **Base:** talker, a chat model itself\n- **talker:** first after supervised fine-tuning on 20 c" in text
    assert "- **first:** trained from scratch\n" in text and "| talks | 21 | 20 | 1 |" in text


def test_what_a_chat_run_has_not_is_not_published(run):
    with pytest.raises(UserError, match=r"has no scored documents.*chat model.*leave them out"):
        push(run.path / "release", "org/demo", dry_run=True, data="scores")


def test_what_alignment_cost_is_paired_with_the_base(run):
    comparison = read_json(run.path / "comparison.json")
    assert comparison["labels"] == ["chat", comparison["baseline"]]
    row = comparison["tasks"]["answers_bits_per_byte"]
    assert row["scores"]["chat"]["items"] == row["differences"]["chat"]["items"] == 1
    assert set(comparison["tasks"]["answers_ended"]["scores"]) == set(comparison["labels"])
    assert "| held-out answers (lower is better) |" in (run.path / "release/README.md").read_text()


def test_the_template_travels(run, tmp_path):
    assert read_json(run.path / "release/tokenizer_config.json")["chat_template"] == TEMPLATE
    release, records = run.path / "release", read_records(run.path / "release/records")
    assert checks.configuration(release, records) == []
    (tmp_path / "chat").mkdir()
    for file in filter(Path.is_file, release.iterdir()):
        shutil.copyfile(file, tmp_path / "chat" / file.name)
    settings = read_json(release / "tokenizer_config.json")
    write_json(tmp_path / "chat/tokenizer_config.json", settings | {"chat_template": TEMPLATE + "{{ 'Buy!' }}"})
    assert checks.configuration(tmp_path / "chat", records) == ["the chat template is not the one that nanophi ships"]
    gguf.write(run.path / "release", tmp_path / "x.gguf", "f32")
    field = library.GGUFReader(tmp_path / "x.gguf").get_field("tokenizer.chat_template")
    marks = "{% generation %}", "{% endgeneration %}"
    assert all(mark in TEMPLATE for mark in marks)
    assert field.contents() == TEMPLATE.replace(marks[0], "").replace(marks[1], "")


def test_a_reproduction_needs_its_base_and_conversations_and_says_so_at_once(run, tmp_path):
    lines = []
    path = reproduce.fetch_recipe(str(run.path / "release"), tmp_path / "again", report=lines.append)
    (line,) = [line for line in lines if "was not published" in line]
    assert "(base, chat.jsonl, chat-heldout.jsonl); name your copy with" in line
    assert line.endswith("--set base=someone/base --set 'conversations=[...]'")
    # A copy of the base says itself how it was made: there its sources lie elsewhere.
    base = run.path.parent / "base"
    sources = [{"files": str(run.path.parent / f"{name}.jsonl")} for name in ("chat", "chat-heldout")]
    recipe = load_recipe(path, [f"base={base}", f"conversations={sources}"])
    assert recipe.data == load_recipe(base / "recipe.yaml").data and recipe.name == "chat-reproduced"


def test_a_reproduction_is_compared_by_what_it_learned_from(run, tmp_path):
    same = reproduce.compare_with_published(run.path / "release", run.path, report=lambda line: None)
    assert {row.agrees for row in same} == {True}
    learned = ["base's weights", "conversations", "held-out conversations"]
    assert [row.name for row in same[:3]] == [f"{name}, SHA-256" for name in learned]
    other = tmp_path / "chat"
    shutil.copytree(run.path, other, ignore=shutil.ignore_patterns("release", "card"))
    (checkpoint,) = other.glob("checkpoints/*/checkpoint.json")
    facts = read_json(checkpoint)
    write_json(checkpoint, {**facts, "base_sha256": "9" * 64, "chat_train_sha256": "8" * 64})
    rows = reproduce.compare_with_published(run.path / "release", other, report=lambda line: None)
    assert [row.agrees for row in rows[:3]] == [False, False, True]
