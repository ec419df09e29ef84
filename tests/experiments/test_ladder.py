"""The ladder on runs whose losses follow a known law, and (slow) on runs that are really trained."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml

from nanophi.core import dial
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_tree, write_json
from nanophi.core.recipe import load_recipe
from nanophi.core.run import RunDirectory
from nanophi.experiments import ladder, ladder_render, records
from nanophi.experiments.ladder import Ladder, entries_of, run_of
from nanophi.experiments.scaling import effective_tokens
from nanophi.pipeline import Pipeline
from nanophi.training import estimate, trainer

RECIPE = """
name: rungs
data:
  sources:
    - {files: "@/train.jsonl", name: text}
    - {files: "@/held.jsonl", name: held, heldout: true}
  deduplication: {near: false}
  workers: 1
quality: {scorer: none}
tokenizer: {vocab_size: 320}
model:
  hidden_size: 128
  intermediate_size: 512
  num_hidden_layers: 4
  num_attention_heads: 8
  num_key_value_heads: 4
  max_position_embeddings: 64
training:
  steps: 2000
  batch_size: 32
  optimizer: muon
  learning_rate: 0.02
  muon_learning_rate: 0.04
  schedule: wsd
  decay_fraction: 0.5
  precision: fp32
  dollars_per_hour: 2.0
"""
SMALLEST = 8000
OPTIONS = {"sizes": 4, "tokens_per_parameter": 4.0, "seeds": [0, 1, 2], "tasks": []}
OPTIONS |= {"smallest": SMALLEST}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rungs")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(40)]
    for name, count in (("train", 300), ("held", 40)):
        rows = [{"text": " ".join(rng.choice(words, 80))} for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rungs.yaml").write_text(RECIPE.replace("@", str(folder)))
    return load_recipe(folder / "rungs.yaml")


class Invented:
    """Runs that are not trained: their losses follow a law."""

    def __init__(self, patch, gain=1.0):
        self.made, self.gain, self.broken = [], gain, {}
        patch.setattr(estimate, "measured_speed", lambda recipe, report: 1e5)
        patch.setattr(records, "run_missing", self.run_missing)
        patch.setattr(records, "write_record", self.write_record)

    def run_missing(self, pipelines, output, jobs, finished, report):
        for pipeline in pipelines:
            if not records.record_path(output, pipeline.recipe.name).exists():
                made = next(pipeline.path.parent.glob("*/data/tokens/tokens.json"))  # with the plan
                write_json(pipeline.path / "data/tokens/tokens.json", read_json(made))
                self.made.append((output.name, pipeline.recipe.name))
                finished(pipeline.recipe.name)

    def write_record(self, pipeline, tasks, output, **fields):
        recipe = pipeline.recipe
        config = recipe.model_config_for()
        tokens, name = records.tokens_seen(recipe), recipe.name
        text = effective_tokens(tokens, fields["unique_tokens"])
        size = dial.multiplying(vars(config), 320)
        rng = np.random.default_rng([fields["seed"], size, recipe.training.steps])
        loss = self.gain * (0.6 + 20 / size**0.4 + 20 / text**0.35) * math.exp(0.004 * rng.normal())
        loss = self.broken.get(name, loss)
        lengths = np.random.default_rng(0).integers(200, 800, 40).tolist()
        items = [[-round(loss * length * math.log(2), 4), length] for length in lengths]
        heldout = {"numbers": list(range(40)), "sha256": "0", "values": items}
        known = {"run": name, **fields, "tokens_seen": tokens, "weights_sha256": f"{loss}"}
        answers = {task: self.answers(task, loss, fields["rung"]) for task in tasks}
        write_json(records.record_path(output, name), {**known, "items": {records.HELDOUT: heldout, **answers}})

    @staticmethod
    def answers(task, loss, rung):
        """Of ARC-Easy a share of `loss / 4` is wrong; Winogrande is guessed by the smallest size."""
        wrong = np.arange(4000) < 4000 * loss / 4
        correct = (~wrong).astype(int).tolist()
        return {"values": [loss] * 4000, "correct": correct, "above_chance": task == "arc_easy" or rung > 0}


def make(recipe, folder, lines=None, **changes):
    options = {**OPTIONS, **changes}
    report = lines.append if lines is not None else str
    return Ladder(recipe, folder / "runs", folder / "out" / recipe.name, options, report=report)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("ladder"), []
    with pytest.MonkeyPatch.context() as patch:
        invented = Invented(patch)
        one = make(recipe, folder, lines)
        plan = one.plan()
        assert not invented.made and [path.name for path in one.output.iterdir()] == ["plan.json"]
        one.run(plan)
    return folder, plan, ladder_render.write_answer(folder / "out", [recipe.name]), lines, invented.made


def test_sizes_double_and_keep_the_recipes_shape(finished, recipe):
    _, plan, _, _, _ = finished
    sizes = [rung["parameters"] for rung in plan["rungs"]]
    assert len(sizes) == 5 and sizes[0] == pytest.approx(SMALLEST, rel=0.2)
    for below, above in itertools.pairwise(sizes):
        assert 1.4 < above / below < 3
    flops = [rung["parameters"] * rung["tokens"] for rung in plan["rungs"]]
    assert flops[4] >= 3.9 * flops[3]
    for rung in plan["rungs"]:
        assert rung["model"]["hidden_size"] == 16 * rung["model"]["num_attention_heads"]
        assert rung["model"]["intermediate_size"] == 4 * rung["model"]["hidden_size"]
        assert rung["tokens"] == pytest.approx(4 * rung["parameters"], rel=0.05)
        assert rung["training"]["learning_rate"] == pytest.approx(0.02 * 128 / rung["model"]["hidden_size"], rel=0.01)


def test_the_plan_says_what_it_takes(finished):
    _, plan, _, lines, _ = finished
    price = plan["estimate"]
    assert price["runs"] == 25 and len(entries_of(plan)) == 25
    assert price["dollars"] == pytest.approx(2 * price["hours"], abs=0.01) and price["flops"] > 0
    said = next(line for line in lines if "25 runs" in line)
    assert "FLOP, about" in said and "$" in said and "(the last size hidden)" in said
    assert "Hoffmann" in plan["method"] and "one seed" in plan["refusals"]


def test_one_run_gives_both_lengths(finished, recipe):
    _, plan, _, _, _ = finished
    half, full, rate = (run_of(recipe, plan, (part, 0, 0, f)) for part, f in (("half", 1), ("full", 1), ("rates", 1.5)))
    assert len({half.name, full.name, rate.name}) == 3
    early = {key: value for key, value in plan.items() if key != "name"}  # which had one directory for both
    assert run_of(recipe, early, ("half", 0, 0, 1)).name == run_of(recipe, early, ("full", 0, 0, 1)).name
    assert run_of(recipe, early, ("half", 0, 0, 1)).name == "rungs-8.19k-seed-0"
    assert half.training.steps == round(full.training.steps / 2)
    same = ("batch_size", "learning_rate", "muon_learning_rate", "warmup_steps", "schedule", "decay_fraction")
    assert all(getattr(half.training, key) == getattr(full.training, key) for key in same)
    assert rate.training.learning_rate == pytest.approx(1.5 * half.training.learning_rate)
    cosine = load_recipe_with(recipe, schedule="cosine")
    assert run_of(cosine, plan, ("half", 0, 0, 1)).name != run_of(cosine, plan, ("full", 0, 0, 1)).name


def load_recipe_with(recipe, **training):
    values = recipe.dump()
    values["training"] |= training
    return type(recipe)(**values)


def test_the_hidden_size_is_trained_after_the_prediction_and_tests_it(finished):
    folder, plan, answer, _, made = finished
    assert [part for part, _ in made] == ["half"] * 10 + ["full"] * 10 + ["rates"] * 4 + ["hidden"]
    found = answer["recipes"]["rungs"]["targets"]["heldout"]
    low, high = found["hidden"]["interval"]
    assert low < found["measured"] < high and found["inside"]
    assert 3.9 < found["hidden_ratio"] < 8
    assert found["ratio"] > found["hidden_ratio"] and not found["confirmed"]
    prediction = read_json(folder / "out/rungs/prediction.json")
    assert "measured" not in prediction["targets"]["heldout"]
    assert prediction["targets"]["heldout"]["hidden"]["interval"] == [low, high]
    own = read_json(folder / "runs/rungs/prediction.json")
    assert own["value"] == prediction["targets"]["heldout"]["recipe"]["value"] and own["recipe"] == plan["recipe"]
    assert own["predicted"] == prediction["predicted"]
    rates = [(one["rung"], round(one["factor"], 2)) for one in prediction["rates"]]
    assert rates == [(0, 0.67), (0, 1.5), (2, 0.67), (2, 1.5)]


def test_the_answer_for_the_eye(finished):
    folder, _, answer, _, _ = finished
    page = (folder / "out/ladder.md").read_text()
    assert "inside the interval (a straight line through the last two sizes: " in answer["paragraph"]
    assert answer["paragraph"].endswith("(not confirmed at this scale).")
    assert page.startswith(f"# Predicted from smaller runs\n\n{answer['paragraph']}\n\n![Loss")
    assert "Muennighoff et al. 2023" in page and "before the hidden size" in page
    assert (folder / "out/ladder.png").read_bytes().startswith(b"\x89PNG")


def test_it_resumes_and_gives_the_same_answer(finished, recipe, tmp_path, monkeypatch):
    folder, _, answer, _, _ = finished
    invented = Invented(monkeypatch)
    lost = min((folder / "out/rungs/full/records").iterdir())
    lost.unlink()
    one = make(recipe, folder)
    one.run(one.plan())
    assert [part for part, _ in invented.made] == ["full"]
    assert ladder_render.write_answer(folder / "out", ["rungs"]) == answer
    begun = RunDirectory(tmp_path / "rungs")
    begun.begin("training", {})
    dataclasses.replace(one, runs=tmp_path).run(one.plan())
    assert not (begun.path / "prediction.json").exists()


def test_another_question_and_other_records_are_refused(finished, recipe, monkeypatch):
    folder, _, _, _, _ = finished
    invented = Invented(monkeypatch)
    before = sha256_of_tree(folder / "out")
    for changes, what in (({"sizes": 5}, "sizes"), ({"seeds": [0, 1]}, "seeds"), ({"smallest": 9000}, "smallest")):
        with pytest.raises(UserError, match=rf"planned otherwise \({what}.*; name another --output"):
            make(recipe, folder, **changes).plan()
    with pytest.raises(UserError, match=r"planned otherwise \(recipe\.training\.learning_rate"):
        make(load_recipe_with(recipe, learning_rate=0.03), folder).plan()
    lost, path = min((folder / "out/rungs/half/records").iterdir()), folder / "out/rungs/plan.json"
    kept, planned, one = lost.read_text(), path.read_text(), make(recipe, folder)
    lost.unlink()
    invented.broken[lost.stem] = 1.45
    with pytest.raises(UserError, match=r"prediction\.json was made from other records than is there now"):
        one.run(one.plan())
    lost.write_text(kept)
    path.write_text(planned.replace("a significant scatter", "any scatter"))
    with pytest.raises(UserError, match=r"prediction\.json was made from another plan than is there now"):
        one.run(one.plan())
    path.write_text(planned)
    assert sha256_of_tree(folder / "out") == before


def damaged(finished, tmp_path, file, change):
    """A copy of the finished ladder's output, in which a file is removed, or its JSON changed."""
    shutil.copytree(finished[0] / "out", tmp_path / "out")
    path = min((tmp_path / "out/rungs").glob(file))
    if change is None:
        path.unlink()
    else:
        write_json(path, change(read_json(path)))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("plan.json", None, r"plan\.json is missing, but its runs have records; put it back"),
        ("plan.json", lambda plan: [], r"plan\.json has format None, this version reads 1"),
        ("plan.json", lambda plan: plan | {"recipe": plan["recipe"] | {"zzz": 1}}, r"plan\.json: unknown key 'zzz'"),
        ("prediction.json", None, r"prediction\.json is missing, but the hidden size is measured; put it back"),
        ("prediction.json", lambda found: {}, r"prediction\.json is not what nanophi ladder wrote"),
        ("half/records/*-8.19k-*.json", lambda run: {}, "seed-0-half.* is not a record of a planned run; move it"),
        ("half/records/*-8.19k-*.json", lambda run: run | {"seed": 7}, "seed-0-half.* is not a record of a pl"),
        ("full/records/*.json", lambda run: run | {"seed": 1}, "is not a record of a planned run"),
    ],
)
def test_what_was_lost_or_changed_after_the_result_is_not_made_again(
    finished, recipe, tmp_path, monkeypatch, file, change, message
):
    invented = Invented(monkeypatch)
    damaged(finished, tmp_path, file, change)
    before, one = sha256_of_tree(tmp_path / "out"), make(recipe, tmp_path)
    with pytest.raises(UserError, match=message):
        one.run(one.plan())
    assert not invented.made and sha256_of_tree(tmp_path / "out") == before


def interval(prediction):
    prediction["targets"]["heldout"]["hidden"]["interval"][1] = 99.0
    return prediction


def halved(run):
    values = run["items"][records.HELDOUT]["values"]
    values[:] = [[nats * 0.9, size] for nats, size in values]
    return run


@pytest.mark.parametrize(("file", "change"), [("prediction.json", interval), ("full/records/*-64.5k-*.json", halved)])
def test_a_prediction_that_its_records_do_not_give_is_refused(finished, recipe, tmp_path, monkeypatch, file, change):
    Invented(monkeypatch)
    damaged(finished, tmp_path, file, change)
    one = make(recipe, tmp_path)
    with pytest.raises(UserError, match=r"prediction\.json has other figures than the records give now"):
        one.run(one.plan())


def test_the_longer_run_continues_the_shorter_and_another_question_leaves_both_alone(recipe, tmp_path, monkeypatch):
    """Two runs that are really trained: the longer is what it is in one piece, and both serve another output."""
    real = ladder.entries_of
    monkeypatch.setattr(estimate, "measured_speed", lambda recipe, report: 1e5)

    def trained(output, **changes):
        one = make(recipe, tmp_path, lines := [], tokens_per_parameter=2.0, **changes)
        one.output = tmp_path / output
        plan = one.plan()
        monkeypatch.setattr(ladder, "entries_of", lambda plan: [each for each in real(plan) if each[1:3] == (0, 0)])
        for part in ("half", "full"):
            one._make(plan, part)
        monkeypatch.setattr(ladder, "entries_of", real)
        return plan, lines, {part: read_json(records.recorded(one.output / part)[0]) for part in ("half", "full")}

    plan, lines, made = trained("first")
    assert any(line.startswith(f"{made['full']['run']}: ") and "continues from step-" in line for line in lines)
    alone = Pipeline(run_of(recipe, plan, ("full", 0, 0, 1.0)), tmp_path / "alone", report=str)
    assert alone.make("training")["weights_sha256"] == made["full"]["weights_sha256"]
    records.recorded(tmp_path / "first/half")[0].unlink()
    monkeypatch.setattr(trainer, "train", None)  # nothing is trained again
    assert trained("first")[2] == trained("second")[2] == made
    other = make(recipe, tmp_path / "other", tokens_per_parameter=3.0)
    other.runs = tmp_path / "runs"
    assert re.fullmatch("rungs-[0-9a-f]{8}", other.plan()["name"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": 3}, "a prediction needs 4 sizes, there are 3"),
        ({"seeds": [0]}, "every size has one seed"),
        ({"smallest": 100_000}, r"rungs has \d+k parameters that multiply, too few for 4 sizes and a hidden one"),
        ({"smallest": 100_000}, "hidden one above the smallest; name a smaller --smallest$"),
        (
            {"tokens_per_parameter": 200.0},
            r"rungs costs \S+ FLOP, less than the hidden size .*: train it itself, or lower",
        ),
    ],
)
def test_ladders_that_cannot_be_planned(recipe, tmp_path, monkeypatch, changes, message):
    Invented(monkeypatch)
    with pytest.raises(UserError, match=message):
        make(recipe, tmp_path, **changes).plan()
    assert not list(tmp_path.rglob("plan.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"steps": 20}}, r"rungs costs \S+ FLOP, less than the hidden size"),
        (
            {"tokenizer": {"vocab_size": 60_000}},
            "; its vocabulary of 60000 sets that size: use a smaller one, or a larger recipe",
        ),
        ({"tokenizer": {"vocab_size": 900}}, r"its tokenizer has \d+ tokens, not 900; set model.vocab_size=\d+$"),
    ],
)
def test_recipes_that_no_ladder_predicts(recipe, tmp_path, monkeypatch, changes, message):
    Invented(monkeypatch)
    values = recipe.dump()
    for section, changed in changes.items():
        values[section] |= changed
    with pytest.raises(UserError, match=message):
        make(type(recipe)(**values), tmp_path, smallest=None if "tokenizer" in changes else SMALLEST).plan()
    assert not list(tmp_path.rglob("plan.json"))


def test_a_diverged_run_is_named(recipe, tmp_path, monkeypatch):
    invented = Invented(monkeypatch)
    one = make(recipe, tmp_path)
    plan = one.plan()
    name = run_of(recipe, plan, ("full", 1, 2, 1.0)).name
    invented.broken[name] = 7.0
    with pytest.raises(UserError, match=rf"^{name} has diverged \(7\.000 bits per byte\)"):
        one.run(plan)
    assert not (one.output / "prediction.json").exists()


def test_two_recipes_are_compared(finished, recipe, monkeypatch):
    folder, _, _, _, _ = finished
    Invented(monkeypatch, gain=0.9)
    other = type(recipe)(**recipe.dump() | {"name": "better"})
    one = make(other, folder)
    one.run(one.plan())
    found = ladder_render.write_answer(folder / "out", ["rungs", "better"])["differences"]["better"]
    last = found["curve"][-1]
    assert not found["sign_changes"] and last["interval"][1] < 0
    fitted = max(ladder_render.Ladder(folder / "out/rungs").law("heldout").points, key=lambda point: point.flops)
    assert found["curve"][0]["flops"] == pytest.approx(fitted.flops)  # before it, no recipe's way has begun
    base = read_json(folder / "out/rungs/prediction.json")["targets"]["heldout"]["recipe"]["value"]
    assert last["value"] == pytest.approx(-0.1 * base, rel=0.3)
    assert "better - rungs at" in (folder / "out/ladder.md").read_text()
    short = read_json(one.output / "plan.json")
    short["target"]["tokens"] = 1000
    write_json(one.output / "plan.json", short)
    answer = ladder_render.write_answer(folder / "out", ["rungs", "better"])
    assert answer["differences"]["better"]["curve"] == [] and "better and rungs are not compared" in answer["paragraph"]


def test_accuracy_is_predicted_where_all_sizes_are_above_chance(recipe, tmp_path, monkeypatch):
    Invented(monkeypatch)
    monkeypatch.setattr(records, "check_tasks", lambda recipe, tasks: None)
    one = make(recipe, tmp_path, tasks=["arc_easy", "winogrande"])
    one.run(one.plan())
    answer = ladder_render.write_answer(tmp_path / "out", ["rungs"])
    found = answer["recipes"]["rungs"]["targets"]
    assert list(found) == ["heldout", "answers", "errors"] and found["errors"]["tasks"] == ["arc_easy"]
    assert found["errors"]["measured"] == pytest.approx(found["heldout"]["measured"] / 4, abs=3e-4)
    for size in ("hidden", "recipe"):
        assert found["errors"][size]["value"] == pytest.approx(found["heldout"][size]["value"] / 4, rel=0.01)
    page = (tmp_path / "out/ladder.md").read_text()
    assert "rungs, wrong answers: the hidden size" in page and "better than guessing does: arc_easy." in page
    answers = Invented.answers
    monkeypatch.setattr(Invented, "answers", staticmethod(lambda *given: answers(*given) | {"above_chance": False}))
    other = make(recipe, tmp_path / "other", tasks=["winogrande"])
    other.run(other.plan())
    answer = ladder_render.write_answer(tmp_path / "other/out", ["rungs"])
    assert list(answer["recipes"]["rungs"]["targets"]) == ["heldout", "answers"]
    assert "Accuracies of rungs are not predicted" in (tmp_path / "other/out/ladder.md").read_text()


@pytest.mark.slow
def test_really_trained_and_killed(recipe, tmp_path):
    """Killed at random moments and run again: the same records of losses and weights, the same answer."""
    lines: list[str] = []
    one = make(recipe, tmp_path, lines, tokens_per_parameter=2.0, seeds=[0, 1])
    one.run(one.plan())
    answer = ladder_render.write_answer(tmp_path / "out", ["rungs"])
    assert 0 < answer["recipes"]["rungs"]["targets"]["heldout"]["measured"] < 8
    assert any("continues from" in line for line in lines)
    assert ladder.LENGTHS.keys() == {path.name for path in (tmp_path / "out/rungs").iterdir() if path.is_dir()}

    (tmp_path / "rungs.yaml").write_text(yaml.safe_dump(recipe.dump()))
    command = [sys.executable, "-m", "nanophi", "ladder", str(tmp_path / "rungs.yaml"), "--smallest", str(SMALLEST)]
    command += ["--tokens-per-parameter", "2", "--seed", "0", "--seed", "1"]
    command += ["--runs", str(tmp_path / "again/runs"), "--output", str(tmp_path / "again/out")]
    rng = random.Random(0)
    for wait in [rng.uniform(5, 30) for _ in range(5)] + [None]:
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert process.wait(wait) == 0
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    again = ladder_render.write_answer(tmp_path / "again/out", ["rungs"])
    assert again["recipes"]["rungs"]["targets"] == answer["recipes"]["rungs"]["targets"]
    for part in ladder.LENGTHS:
        hashes = [
            {run["run"]: run["weights_sha256"] for run in map(read_json, records.recorded(folder / "out/rungs" / part))}
            for folder in (tmp_path, tmp_path / "again")
        ]
        assert hashes[0] == hashes[1]
