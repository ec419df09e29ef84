"""The experiment end to end on a planted truth: half of the documents are shuffled, and the scorer knows."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from chat_run import write_rows

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_tree, write_json
from nanophi.core.recipe import Recipe, load_recipe
from nanophi.experiments.ablate import Ablation, arm_of, find_candidates, run_name
from nanophi.experiments.records import check_numbers
from nanophi.model_card import report
from nanophi.pipeline import Pipeline
from nanophi.training import trainer

RECIPE = """
name: planted
data:
  sources:
    - {files: "@/train.jsonl", name: text}
    - {files: "@/held.jsonl", name: held, heldout: true}
  deduplication: {near: false}
  workers: 1
quality: {scorer: "column:score", share: 0.4}
tokenizer: {vocab_size: 320}
model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1,
  max_position_embeddings: 64}
training: {steps: 40, batch_size: 8, learning_rate: 0.01, warmup_steps: 5, save_steps: 20, logging_steps: 10,
  precision: fp32}
evaluation: {limit: 40}
"""
WORDS = [f"{a}{b}" for a in ("ba", "de", "fi", "go", "ku") for b in ("la", "mon", "ris", "tup", "ve", "zed")]


def text(generator, shuffled):
    """Words of which each follows from the one before it; or the same words in any order."""
    start = generator.integers(len(WORDS))
    steps = np.where(generator.random(60) < 0.9, 1, generator.integers(2, 29, 60))
    words = [WORDS[i % len(WORDS)] for i in start + np.cumsum(steps)]
    return " ".join(generator.permutation(words) if shuffled else words)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    generator = np.random.default_rng(0)
    train = [(text(generator, i % 2), 0.2 + 0.6 * (i % 2 == 0) + 0.1 * generator.random()) for i in range(400)]
    held = [(text(generator, False), 0.9) for _ in range(60)]
    for name, rows in (("train", train), ("held", held)):
        write_rows(folder / f"{name}.jsonl", [{"text": words, "score": score} for words, score in rows])
    path = folder / "planted.yaml"
    path.write_text(RECIPE.replace("@", str(folder)))
    return load_recipe(path)


QUESTION = {"seeds": [0, 1], "learning_rates": [0.01, 0.004], "epochs_asked": 4, "tasks": [], "at": None}


def make(recipe, folder, lines=None, output="output", **changes):
    question = {**QUESTION, "candidates": None, **changes}
    report = str if lines is None else lines.append
    return Ablation(recipe, folder / "runs", folder / output, question, report=report)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    lines: list[str] = []
    experiment = make(recipe, folder, lines)
    plan = experiment.plan()
    assert {path.name for path in experiment.output.iterdir()} == {"plan.json", "items.json"}
    assert not list(experiment.runs.glob("*/checkpoints"))
    return folder, experiment.run(plan), lines


def test_the_planted_truth_is_found(finished):
    _, result, _ = finished
    target = result["targets"]["heldout"]
    assert target["primary"]
    for values in target["values"].values():
        assert values["best"] < values["random"] < values["worst"]
    quality, check = target["contrasts"]["quality"], target["check"]
    assert (quality["verdict"], check["verdict"]) == ("better", "better")
    for rate, one in quality["learning_rates"].items():
        values = target["values"][rate]
        assert one["value"] == pytest.approx(values["best"] - values["random"])
        assert one["interval"][0] < one["value"] < one["interval"][1] < 0
        # A fifth of the share is better text; the worst share has two fifths less of it than the random one.
        assert check["learning_rates"][rate]["value"] < one["value"]
    assert target["contrasts"]["net"]["learning_rates"]["0.01"]["value"] == pytest.approx(
        sum(target["contrasts"][name]["learning_rates"]["0.01"]["value"] for name in ("quality", "repetition"))
    )


def test_shares_are_equal_and_all_compute_is(finished):
    folder, result, _ = finished
    plan = result["plan"]
    assert plan["epochs"]["best"] == pytest.approx(4, rel=0.02)
    assert plan["epochs"]["all"] == pytest.approx(1.6, rel=0.03)
    by_arm = {}
    for run in result["runs"]:
        by_arm.setdefault(run["arm"], set()).add((run["unique_tokens"], run["tokens_seen"], round(run["epochs"], 6)))
    assert by_arm["best"] == by_arm["random"] == by_arm["worst"] and len(by_arm["best"]) == 1
    assert len({run["tokens_seen"] for run in result["runs"]}) == 1
    assert len({run["weights_sha256"] for run in result["runs"]}) == 16
    record = read_json(folder / "output/records/planted-best-seed-0-lr-0.01.json")
    assert len(record["items"]["heldout_bits_per_byte"]["values"]) >= 20


def test_what_all_share_is_made_once_and_it_says_what_it_will_take_and_what_is_left(finished):
    _, _, lines = finished
    for stage in ("documents", "scores", "tokenizer"):
        assert sum(f": {stage} " in line and " done in " in line for line in lines) == 1, stage
    plan = next(line for line in lines if line.startswith("filter: the best 40.0 % of the bytes (share 40.0 %)"))
    assert "16 runs of 20.5k tokens" in plan and "training takes about" in plan
    assert lines.index(plan) < next(i for i, line in enumerate(lines) if "training" in line and "done in" in line)
    assert [line for line in lines if line.startswith("15 of 16 runs done, about")]
    assert lines[-1] == "16 of 16 runs done"


def test_killed_it_resumes_and_another_question_is_refused(finished, recipe, monkeypatch):
    folder, result, _ = finished
    record = folder / "output/records/planted-worst-seed-1-lr-0.004.json"
    kept = record.read_text()
    record.unlink()
    lines: list[str] = []
    monkeypatch.setattr(trainer, "train", None)  # nothing is trained again
    write_json(folder / "runs/planted/record.json", {"stages": {}})  # the recipe's own run shows the answer
    experiment = make(recipe, folder, lines)
    again = experiment.run(experiment.plan())
    assert record.read_text() == kept and again == result
    assert "15 of 16 runs were done before" in lines
    shown = report._ablation(folder / "runs/planted/ablation.json")
    assert shown is not None and len(shown["rows"]) == 8 and shown["paragraph"] == result["paragraph"]
    assert shown["rows"][0][0] == "quality: best - random" and shown["rows"][0][3] == "better"
    before = sha256_of_tree(folder / "output")
    for change, message in (
        ({"epochs_asked": 5}, r"epochs_asked 4 -> 5"),
        ({"seeds": [0, 1, 2]}, r"seeds .*"),
        ({"learning_rates": [0.01]}, r"learning_rates .*"),
    ):
        with pytest.raises(UserError, match=rf"planned otherwise \({message}\); name another --output"):
            make(recipe, folder, **change).plan()
    other = load_recipe(folder / "runs/planted-all-seed-0-lr-0.01/recipe.yaml", ["quality.share=0.3", "name=planted"])
    with pytest.raises(UserError, match=r"planned otherwise \(recipe.\w+.* -> "):
        make(other, folder).plan()
    assert sha256_of_tree(folder / "output") == before


def test_another_output_uses_runs_that_are_the_same_and_leaves_others_alone(finished, recipe, tmp_path, monkeypatch):
    folder, result, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*-seed-*/[ct]*/*/*")}
    fewer = make(recipe, folder, output=tmp_path / "fewer", seeds=[0])
    plan = fewer.plan()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train", None)  # nothing is trained again
        again = fewer.run(plan)
    assert again["runs"] == [run for run in result["runs"] if run["seed"] == 0]
    for change in ({"epochs_asked": 5}, {"learning_rates": [0.004], "epochs_asked": 5}):
        other = make(recipe, folder, output=tmp_path / str(change), **change).plan()
        assert re.fullmatch("planted-[0-9a-f]{8}", other["name"])
        assert run_name(recipe, other, "all", 0, 0.004).startswith(f"{other['name']}-all-seed-0")
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("plan.json", None, r"plan\.json is missing, but its runs have records; put it back"),
        ("records/planted-all-seed-0*", {"seed": 7}, "planted-all-seed-0.* is not a record of a planned run"),
        (
            "records/planted-all-seed-0*",
            {"learning_rate": 0.5},
            "planted-all-seed-0.* is not a record of a planned run",
        ),
        ("records/planted-all-seed-0*", {"run": "copy"}, "planted-all-seed-0.* is not a record of a planned run"),
        ("items.json", {"heldout": []}, r"items\.json has fewer documents than planted-\S+ was measured on"),
    ],
)
def test_lost_plans_and_records_that_were_not_planned(finished, recipe, tmp_path, monkeypatch, file, change, message):
    output = tmp_path / "output"
    shutil.copytree(finished[0] / "output", output)
    path = min(output.glob(file))
    if change is None:
        path.unlink()
    else:
        write_json(path, read_json(path) | change)
    monkeypatch.setattr(trainer, "train", None)  # nothing is trained again
    experiment = make(recipe, finished[0], output=output)
    with pytest.raises(UserError, match=message):
        experiment.run(experiment.plan())


def test_the_answer_for_the_eye(finished):
    folder, _, _ = finished
    page = (folder / "output/ablation.md").read_text()
    assert page.split("\n")[2].startswith("The filter keeps 40.0 % of the training text")
    assert "the best share needs fewer bits than a random share of the same size" in page
    assert "## Held-out text, all (primary target)" in page
    assert (folder / "output/ablation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("overrides", "changes", "message"),
    [
        (["quality.share=null"], {}, "keeps everything; set quality.threshold or quality.share"),
        (["base=b", "conversations=[{files: a.jsonl}]"], {}, "trains on conversations, which no filter selects"),
        (["quality.select=worst"], {}, "quality.select must be 'best'"),
        (
            [],
            {"epochs_asked": 0.5},
            r"--epochs 0\.5 needs [\d,]+ different tokens in every share, but there are [\d,]+; ask",
        ),
        (["evaluation.data=/nowhere"], {"tasks": ["arc_easy"]}, "needs the dataset allenai/ai2_arc, which is not in"),
        ([], {"epochs_asked": 1e6}, "every share has less than one row of 64 tokens; ask for fewer --epochs"),
        (["training.arguments={nonsense: 1}"], {}, "training.arguments: 'nonsense' is unknown"),
    ],
)
def test_experiments_that_cannot_be_run(recipe, tmp_path, overrides, changes, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe.dump()))
    with pytest.raises(UserError, match=message):
        make(load_recipe(path, overrides), tmp_path, **changes).plan()
    assert not list(tmp_path.rglob("plan.json"))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (([1, 1], [], None), "--seed has one value twice"),
        (([0], [0.1, 0.1], None), "--learning-rate has one value twice"),
        (([0], [], 0), "--epochs 0 must be a number above 0"),
        (([0], [], math.nan), "--epochs nan must be a number above 0"),
        (([4294967296], [], None), "--seed 4294967296 must be from 0 to 4294967295"),
        (([0], [0.1, -1], None), "--learning-rate -1 must be a number above 0"),
        (([0], [], None, math.nan), "--smallest nan must be a number above 0"),
        (([0], [], None, 1e5, math.inf), "--tokens-per-parameter inf must be from 1 to 10,000"),
        (([0], [], None, None, 1e18), r"--tokens-per-parameter 1e\+18 must be from 1 to 10,000"),
    ],
)
def test_numbers_that_no_run_can_have(numbers, message):
    with pytest.raises(UserError, match=message):
        check_numbers(*numbers)


DECAY = """
data:
  sources:
    - {files: "@/train.jsonl", name: text}
    - {files: "@/own.jsonl", name: own, phase: none}
    - {files: "@/held.jsonl", name: held, heldout: true}
quality: {phase: decay}
training: {schedule: wsd, decay_fraction: 0.5}
"""


@pytest.fixture(scope="module")
def decaying(recipe, tmp_path_factory):
    """The recipe, whose filter and a source of one's own play a part in the second half of the steps alone."""
    folder = tmp_path_factory.mktemp("decaying")
    files = Path(recipe.data.sources[0].files).parent
    generator = np.random.default_rng(1)
    write_rows(files / "own.jsonl", [{"text": text(generator, False), "score": 0.5} for _ in range(100)])
    path, throughout = folder / "planted.yaml", folder / "throughout.yaml"
    path.write_text(f"extends: {files / 'planted.yaml'}\n" + DECAY.replace("@", str(files)))
    throughout.write_text(f"extends: {path}\nname: throughout\nquality: {{phase: all}}\n")
    return path, throughout


@pytest.fixture(scope="module")
def decayed(decaying, tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("decays"), []
    recipe = load_recipe(decaying[0])
    candidates = find_candidates(recipe, ["own", str(decaying[1])], [])
    experiment = make(recipe, folder, lines, epochs_asked=2, at="decay", candidates=candidates)
    plan = experiment.plan()
    assert not list(folder.glob("runs/*/checkpoints"))
    return recipe, experiment, plan, experiment.run(plan), lines


def test_a_better_text_in_the_decay_is_found_with_its_sign(decayed):
    _, _, _, result, _ = decayed
    target = result["targets"]["heldout"]
    for values in target["values"].values():
        assert values["best"] < values["random"] < values["worst"]
        assert values["own"] < values["all"] and values["throughout"] < values["all"]
    found = target["contrasts"]
    assert (found["quality"]["verdict"], target["check"]["verdict"]) == ("better", "better")
    assert found["own"]["arms"] == ["own", "all"] and found["own"]["verdict"] == "better"
    assert all(one["interval"][1] < 0 for one in found["quality"]["learning_rates"].values())
    assert set(found) == {"quality", "repetition", "net", "own", "throughout", "decay or throughout"}
    assert all(0 < one["paired"] <= 1 for one in found["quality"]["learning_rates"].values())


def test_one_trunk_serves_all_decays_and_each_is_what_it_is_in_one_piece(decayed, tmp_path):
    recipe, experiment, plan, result, lines = decayed
    assert plan["branches"] == ["best", "random", "worst", "own"]
    resumed = [line for line in lines if line.endswith("resuming from step-000020")]
    assert len(resumed) == 4 * 4
    weights = {run["run"]: run["weights_sha256"] for run in result["runs"]}
    assert len({*weights.values()}) == len(weights) == 6 * 4
    name = run_name(recipe, plan, "best", 1, 0.004)
    assert name == "planted-best-decay-seed-1-lr-0.004"
    alone = Pipeline(arm_of(recipe, plan, "best", 1, 0.004), tmp_path, report=str)
    assert alone.make("training")["weights_sha256"] == weights[name]
    data = [read_json(experiment.runs / run / "data/tokens/tokens.json") for run in weights if "seed-0-lr-0.01" in run]
    assert len({one["train"]["sha256"] for one in data}) == 2  # one of the trunk, one of the filter throughout
    assert {one["decay"]["rows"] for one in data if "decay" in one} == {plan["tokens"]["best"] // 64}


def test_the_plan_of_decays_counts_what_they_cost_and_is_not_that_of_full_runs(decayed):
    recipe, experiment, plan, _, lines = decayed
    assert plan["estimate"]["tokens"] == 20 * 8 * 64 * (2 * 8 + 16)  # 8 runs in full, 16 in half
    told = "filter: the best 40.0 % of the bytes while the learning rate"
    assert " if no run continued another) at " in next(line for line in lines if line.startswith(told))
    epochs = plan["epochs"]
    assert [epochs[arm] for arm in ("best", "throughout")] == pytest.approx([2, 4], rel=0.02)
    page = (experiment.output / "ablation.md").read_text()
    assert "until the learning rate decays all the text, then a share of" in page
    assert "Comparing runs that continue one trunk takes out" in page
    with pytest.raises(UserError, match=r"planned otherwise \(candidates.* name another --output"):
        make(recipe, experiment.output.parent, epochs_asked=2, at="decay").plan()


def test_decays_that_were_killed_resume_from_their_records(decayed, monkeypatch):
    _, experiment, plan, result, _ = decayed
    record = experiment.output / "records/planted-random-decay-seed-0-lr-0.01.json"
    kept = record.read_text()
    record.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train", None)  # nothing is trained again
        assert experiment.run(plan) == result
    assert record.read_text() == kept


@pytest.mark.parametrize("name", ["quality", "net", "check", "文本"])
def test_a_candidate_cannot_have_the_name_of_a_contrast_or_none(decaying, name):
    values = load_recipe(decaying[0]).dump()
    values["data"]["sources"][1]["name"] = name
    with pytest.raises(UserError, match=rf"--candidate {name}: an arm cannot be called '({name})?'; give it another"):
        find_candidates(Recipe(**values), [name], [])


@pytest.mark.parametrize(
    ("overrides", "at", "names", "message"),
    [
        ([], None, [], "filters while the learning rate decays; add --at decay"),
        (["quality.phase=all", "training.schedule=cosine"], "decay", [], "--at decay needs training.schedule=wsd"),
        ([], "decay", ["lost"], "recipe lost does not exist"),
        ([], "decay", ["own", "own"], "there is an arm own"),
        ([], "decay", ["other.yaml"], r"may differ in quality and the decay's sources \(training.steps 40 -> 50\)"),
    ],
)
def test_decays_that_cannot_be_compared(decaying, tmp_path, monkeypatch, overrides, at, names, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text(f"extends: {decaying[0]}\nname: other\ntraining: {{steps: 50}}\n")
    recipe = load_recipe(decaying[0], overrides)
    with pytest.raises(UserError, match=message):
        make(recipe, tmp_path, at=at, candidates=find_candidates(recipe, names, []) or None).plan()
