"""The stages together, on a small run: what changes what, and a run that dies at every durable moment."""

import inspect
import json
import pydoc_data.topics
import textwrap

import pytest
import yaml
from hub_client import is_whole, push

from nanophi import pipeline
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_tree
from nanophi.core.recipe import load_recipe
from nanophi.core.run import RunDirectory
from nanophi.training import trainer

RECIPE = """
name: small
data:
  sources:
    - {files: "@/good.jsonl", name: good}
    - {files: "@/poor.jsonl", name: poor}
  heldout_fraction: 0.2
  workers: 1
quality: {scorer: linear, high: [good], low: [poor], threshold: 0.5}
tokenizer: {vocab_size: 400}
model:
  {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1,
   max_position_embeddings: 256}
training:
  {steps: 8, batch_size: 4, learning_rate: 0.01, save_steps: 4, keep_steps: [4], eval_steps: 8, logging_steps: 2}
evaluation: {suites: [heldout], limit: 8}
card: {prompt: "The "}
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The language reference as good text; its indexes and code samples as poor."""
    folder = tmp_path_factory.mktemp("sources")
    documents: dict[str, list[str]] = {"good": [], "poor": []}
    for text in pydoc_data.topics.topics.values():
        documents["good"] += [prose[:3000] for part in text.split("\n\n\n") if len(prose := part.strip()) > 400]
    for module in (inspect, json, textwrap, yaml, pytest, pipeline):
        source = inspect.getsource(module)
        documents["poor"] += [source[start : start + 1500] for start in range(0, len(source), 1500)]
    for name, texts in documents.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def recipe(sources):
    path = sources / "small.yaml"
    path.write_text(RECIPE.replace("@", str(sources)))
    return path


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    lines: list[str] = []
    pipeline.run_recipes([load_recipe(recipe)], runs, lines.append)
    return runs, lines


def ran(lines):
    return [line.split()[1] for line in lines if " done in " in line]


def test_every_stage_runs_and_then_is_up_to_date(finished, recipe):
    runs, lines = finished
    first = ran(lines)
    assert first[:5] == ["documents", "scores", "quality", "tokenizer", "tokens"]
    assert first[-3:] == ["card", "release", "verification"]
    again: list[str] = []
    pipeline.run_recipes([load_recipe(recipe)], runs, again.append)
    assert ran(again) == []
    assert [line.split()[1] for line in again if line.endswith("up to date")] == first


def test_a_change_runs_again_what_depends_on_it(finished, recipe):
    runs, _ = finished

    def stages(*overrides):
        lines: list[str] = []
        pipe = pipeline.Pipeline(load_recipe(recipe, ["name=changing", *overrides]), runs, report=lines.append)
        pipe.tokens()
        return ran(lines)

    assert stages() == []  # all of it is shared with the finished run
    before = read_json(runs / "changing/data/tokens/tokens.json")
    assert stages("quality.threshold=null") == ["quality", "tokens"]
    everything = read_json(runs / "changing/data/tokens/tokens.json")
    assert everything["train"]["documents"] > before["train"]["documents"]
    assert everything["heldout"] == before["heldout"]  # the filter never touches what models are measured on
    assert stages("model.max_position_embeddings=128", "quality.threshold=null") == ["tokens"]
    assert stages() == []
    assert read_json(runs / "changing/data/tokens/tokens.json") == before


def test_a_filter_of_the_decay_is_told_wherever_the_text_is(finished, recipe):
    runs, lines = finished[0], []
    decay = ["quality.phase=decay", "training.schedule=wsd", "training.decay_fraction=0.5"]
    run = [load_recipe(recipe, ["name=later", *decay])]
    pipeline.run_recipes(run, runs, lines.append)
    made = [line.split()[1] for line in lines if "shared with" in line]
    assert made == ["documents", "scores", "tokenizer"], "a phase changes neither the documents nor their scores"
    tokens, summary = (read_json(runs / "later" / name) for name in ("data/tokens/tokens.json", "training.json"))
    kept = read_json(runs / "small/data/tokens/tokens.json")["train"]
    assert tokens["decay"]["documents"] == kept["documents"] < tokens["train"]["documents"]
    summary = summary["summary"]
    assert summary["decay_epochs"] == 4 * 4 / tokens["decay"]["rows"]
    assert any("4.1k tokens until the learning rate decays; 4.1k tokens while it decays" in line for line in lines)
    card = (runs / "later/release/README.md").read_text()
    assert "Documents are kept by this rule: `score > 0.5 while the learning rate decays`" in card
    assert f"{summary['epochs']:.2f}; {summary['decay_epochs']:.2f} of the decay's text |" in card
    assert f"; while the learning rate decays {tokens['decay']['documents']} documents" in card
    assert "of text that was filtered for quality while the learning rate decayed" in " ".join(card.split())
    assert "score > 0.5 while the learning rate decays" in (runs / "later/data/quality/quality.md").read_text()
    manifest = read_json(runs / "later/release/MANIFEST.json")
    assert manifest["provenance"]["data_sha256"]["decay"] == tokens["decay"]["sha256"]
    for change, what in (("quality.threshold=0.9", "training"), ("data.max_decay_tokens=9000", "the decay's")):
        with pytest.raises(UserError, match=rf"the recipe gives other data \({what} tokens"):
            changed = load_recipe(recipe, ["name=later", *decay, change])
            pipeline.Pipeline(changed, runs, report=str).tokens()


def test_what_changed_in_the_card_section_reaches_the_release(finished, recipe):
    runs, _ = finished

    def released(*overrides):
        lines: list[str] = []
        build = ("sample", "evaluation", "card", "release")
        pipeline.Pipeline(load_recipe(recipe, overrides), runs, build, lines.append).make("release")
        folder = runs / "small/release"
        return ran(lines), (folder / "README.md").read_text(), read_json(folder / "records/run.json")["tag"]

    stages, text, tag = released("card.title=Another title", "card.version=v0.2", "card.notes=Read this first.")
    assert stages == ["card", "release"] and tag == "v0.2"
    assert "# Another title\n" in text and "Read this first." in text
    stages, text, tag = released()
    assert stages == ["card", "release"] and tag == "v0.1" and "# small\n" in text


def test_a_run_without_a_filter_is_released_and_pushed(finished, recipe, tmp_path, hub):
    values = yaml.safe_load(recipe.read_text())
    del values["quality"]
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump(values | {"name": "plain"}))
    lines: list[str] = []
    pipeline.run_recipes([load_recipe(path)], finished[0], lines.append)
    push(finished[0] / "plain/release", "org/plain")
    commit = hub.repositories["model", "org/plain"].branches["main"]
    with pytest.raises(UserError, match="no scored documents"):
        push(finished[0] / "plain/release", "org/plain", scorer=True, dry_run=True)
    assert is_whole(commit) and ran(lines)[-1] == "verification"
    text = commit.files["README.md"].data.decode()
    assert "No filter: no document was scored, and all of the " in text and "of unfiltered text." in text
    assert "quality filter adds" not in text and "figures/quality.png" not in text
    assert "figures/quality.png" not in commit.files


def test_a_prompt_longer_than_the_context_is_refused_before_training(finished, recipe, tmp_path):
    long = "card.prompt=" + "long " * 300
    with pytest.raises(UserError, match=r"card\.prompt has \d+ tokens, the model's context is 256"):
        changed = load_recipe(recipe, ["name=talkative", long])
        pipeline.Pipeline(changed, finished[0], report=lambda line: None).make("training")
    assert not (finished[0] / "talkative/checkpoints").exists()


def test_a_suite_that_needs_more_context_is_refused_by_run_and_named_by_train(recipe, tmp_path):
    overrides = ["name=short", "model.max_position_embeddings=64", "evaluation.suites=[heldout, quick]"]
    changed = load_recipe(recipe, overrides)
    lines: list[str] = []
    pipeline.Pipeline(changed, tmp_path, ("training",), lines.append).check("training")
    assert any("its evaluation cannot run" in line and "context of 64 tokens" in line for line in lines)
    with pytest.raises(UserError, match=r"too many for a context of 64 tokens"):
        pipeline.Pipeline(changed, tmp_path).check("verification")
    with pytest.raises(UserError, match=r"too many for a context of 64 tokens"):
        pipeline.run_recipes([changed], tmp_path)
    assert not list(tmp_path.glob("short/*"))


def test_dying_at_every_durable_moment_changes_nothing(finished, recipe, tmp_path, monkeypatch):
    reference = finished[0] / "small"
    update, calls, deaths = RunDirectory.update_record, 0, 0

    def dying(self, **fields):
        nonlocal calls
        calls += 1
        if calls == 2 + deaths % 2:  # a stage may need two, so the third must come now and then
            raise KeyboardInterrupt
        update(self, **fields)

    monkeypatch.setattr(RunDirectory, "update_record", dying)
    while deaths < 60:
        calls = 0
        try:
            pipeline.run_recipes([load_recipe(recipe)], tmp_path, lambda line: None)
            break
        except KeyboardInterrupt:
            deaths += 1
    else:
        pytest.fail("the run never finished")
    assert deaths > 5
    survivor = tmp_path / "small"
    for part in ("data", "checkpoints", "sample.json"):
        assert sha256_of_tree(survivor / part) == sha256_of_tree(reference / part), part
    results = [read_json(run / "evals/step-000008-heldout.json")["results"] for run in (reference, survivor)]
    assert results[0] == results[1]


def test_two_recipes_side_by_side_come_to_the_same_and_one_that_fails_stops_no_other(finished, recipe, tmp_path):
    recipes = [load_recipe(recipe), load_recipe(recipe, ["name=hot", "training.learning_rate=1e30"])]
    lines: list[str] = []
    with pytest.raises(UserError) as failure:
        pipeline.run_recipes(recipes, tmp_path, lines.append, jobs=2)
    assert str(failure.value).startswith("hot failed, see above"), "\n".join(lines)
    assert "hot: tokens         shared with small" in lines
    assert any(line.startswith("hot: nanophi: the loss is") for line in lines)
    assert any(line.startswith("small: training       done in") for line in lines)
    for part in ("data", "checkpoints", "sample.json"):
        assert sha256_of_tree(tmp_path / "small" / part) == sha256_of_tree(finished[0] / "small" / part), part


def test_an_unfinished_training_does_not_begin_anew_on_other_data(finished, recipe, monkeypatch):
    runs, _ = finished
    step = trainer.NanoPhiTrainer.training_step

    def dying_step(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    def stopped(*overrides):
        overrides = ("name=stopped", *overrides)
        return pipeline.Pipeline(load_recipe(recipe, overrides), runs, report=lambda line: None)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.NanoPhiTrainer, "training_step", dying_step)
        stopped().make("training")
    kept = ("checkpoints", "training_state", "data/quality", "data/tokens")
    before = [sha256_of_tree(runs / "stopped" / name) for name in kept]
    with pytest.raises(UserError, match=r"gives other data \(training tokens\); the weights here \(step-000004\)"):
        stopped("quality.threshold=null").make("training")
    assert [sha256_of_tree(runs / "stopped" / name) for name in kept] == before
    shard = next((runs / "stopped/data/tokens/train").glob("*.arrow"))
    shard.unlink()
    summary = stopped("training.spike_threshold=null", "training.dollars_per_hour=1.0").make("training")
    assert summary["weights_sha256"] == read_json(runs / "small/training.json")["summary"]["weights_sha256"]


def test_a_stage_alone_wants_those_before_it(recipe, tmp_path):
    pipe = pipeline.Pipeline(load_recipe(recipe), tmp_path, build=("training",))
    with pytest.raises(UserError, match=r"data/token.* is missing; run `nanophi prepare`"):
        pipe.make("training")
