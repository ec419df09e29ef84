"""Weights are never lost: what a run does with what it finds, whatever was changed, moved, cut off or asked for."""

import contextlib
import functools
import math
import os
import random
import shutil
from pathlib import Path

import pytest
from tiny_run import CONFIG, TRAINING, VOCAB, add_decay, add_sources, ends_at, interrupt, make_run, terminate

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_file, sha256_of_tree, write_json
from nanophi.core.names import step_folders, step_of
from nanophi.core.recipe import Recipe
from nanophi.core.run import FORMATS, RunDirectory
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.pipeline import Pipeline
from nanophi.training import base as base_module
from nanophi.training import checkpoints, continuation

STEPS = 8
SECTION = {**TRAINING, "steps": STEPS, "batch_size": 4, "warmup_steps": 1, "save_steps": 2, "eval_steps": 4}
SECTION |= {"keep_steps": [], "schedule": "constant"}


def recipe(name="run", base=None, **training) -> Recipe:
    return Recipe(
        name=name,
        base=base,
        data={"sources": [{"files": "/nowhere/*.jsonl", "name": "mine"}]},
        quality={"scorer": "column:score", "threshold": 0.2},
        model={key: value for key, value in CONFIG.items() if not key.endswith("token_id")},
        training={**SECTION, **training},
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A run directory that was prepared elsewhere: its sources are not here."""
    return add_sources(make_run(tmp_path_factory.mktemp("prepared") / "run"))


@pytest.fixture
def runs(prepared, tmp_path) -> Path:
    shutil.copytree(prepared, tmp_path / "runs/run")
    return tmp_path / "runs"


@pytest.fixture
def stopped(runs) -> Path:
    """Runs of which one was killed in its sixth step."""
    with ends_at(5):
        train(runs)
    return runs


def pipeline(runs: Path, restart=False, lines=None, **changes) -> Pipeline:
    report = (lambda line: None) if lines is None else lines.append
    return Pipeline(recipe(**changes), runs, ("training",), report, restart)


def train(runs: Path, lines=None, restart=False, **changes) -> dict:
    pipe = pipeline(runs, restart, lines, **changes)
    return pipe.make("training")


def refused(runs: Path, **changes) -> str:
    """The one line with which the run is refused; nothing in its directory changes."""
    before = sha256_of_tree(runs)
    with pytest.raises(UserError) as error:
        train(runs, **changes)
    assert sha256_of_tree(runs) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def weights(runs: Path) -> dict[str, str]:
    """Hash -> file, of all weights below a folder."""
    return {sha256_of_file(path): str(path) for path in runs.rglob("model.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    """Summaries of runs that nothing disturbs, by schedule and number of steps."""

    @functools.cache
    def of(**changes) -> dict:
        runs = tmp_path_factory.mktemp("undisturbed")
        shutil.copytree(prepared, runs / "run")
        return train(runs, **changes)

    return of


@pytest.mark.parametrize("finished", [False, True], ids=["interrupted", "finished"])
def test_a_key_that_matters_is_named_with_both_values_and_nothing_is_lost(runs, monkeypatch, finished, undisturbed):
    with contextlib.nullcontext() if finished else ends_at(5):
        train(runs)
    line = refused(runs, learning_rate=1e-3, batch_size=8)
    assert "training.batch_size 4 -> 8" in line and "training.learning_rate 0.01 -> 0.001" in line
    assert "another name" in line and "--restart" in line
    assert "seed" in refused(runs, seed=2)
    allowed = {"save_steps": 3, "eval_steps": 3, "keep_steps": [6], "keep_states": 1, "logging_steps": 3}
    allowed |= {"spike_threshold": None, "dollars_per_hour": 1.0, "arguments": {"dataloader_num_workers": 1}}
    assert train(runs, **allowed)["weights_sha256"] == undisturbed()["weights_sha256"]
    assert train(runs, micro_batch_size=2)["weights_sha256"] == undisturbed()["weights_sha256"]


def test_restart_removes_the_weights_and_says_so(runs, undisturbed):
    train(runs)
    lines: list[str] = []
    other = train(runs, lines, restart=True, learning_rate=1e-3)
    assert any("removing" in line and "--restart" in line for line in lines)
    assert other["weights_sha256"] != undisturbed()["weights_sha256"]
    assert step_folders(runs / "run/checkpoints")[-1].name == "step-000008"
    lines.clear()
    train(runs, lines, restart=True, learning_rate=1e-3)  # nothing that could not be continued: nothing is removed
    assert not any("removing" in line for line in lines)


def test_other_tokens_are_other_data_and_the_same_tokens_the_same(stopped, undisturbed):
    tokens = stopped / "run/data/tokens/tokens.json"
    contents = read_json(tokens)
    write_json(tokens, {**contents, "train": {"sha256": "c3"}})
    pipe = pipeline(stopped)
    before = sha256_of_tree(stopped / "run/checkpoints")
    with pytest.raises(UserError, match=r"data.train_sha256 \w{12} -> c3"):
        pipe.make("training")
    assert sha256_of_tree(stopped / "run/checkpoints") == before
    write_json(tokens, {**contents, "made": "elsewhere"})
    os.utime(stopped / "run/data/tokens")
    assert train(stopped)["weights_sha256"] == undisturbed()["weights_sha256"]


def test_a_run_of_an_earlier_version_is_refused_in_one_line(stopped):
    """Its record has no formats: keys of stages came from the package's version."""
    record = read_json(stopped / "run/record.json")
    made = {"nanophi": "0.0.9", "commit": "c0ffee"}
    old = {**record, "in_progress": {"training": "0123abcd"}, "environment": made}
    write_json(stopped / "run/record.json", old)
    line = refused(stopped)
    assert "finish them with nanophi 0.0.9 at commit c0ffee, which began them, start from them with base: PATH" in line
    (stopped / "run/record.json").unlink()
    assert "record.json does not state" in refused(stopped)
    write_json(stopped / "run/record.json", record)
    assert train(stopped)["steps"] == STEPS


def test_states_and_history_of_a_finished_run_may_be_missing(runs):
    train(runs)
    history = read_json(runs / "run/training.json")
    (runs / "run/training.json").unlink()
    train(runs)
    assert read_json(runs / "run/training.json") == history
    shutil.rmtree(runs / "run/training_state")
    before, lines = sha256_of_tree(runs / "run/checkpoints"), []
    assert train(runs, lines)["precision"] == "fp32"  # that of the machine that trained
    assert any("up to date" in line for line in lines)
    assert sha256_of_tree(runs / "run/checkpoints") == before


def test_a_final_checkpoint_that_was_removed_comes_back_from_its_state(runs, undisturbed):
    train(runs)
    shutil.rmtree(runs / "run/checkpoints")
    assert train(runs)["weights_sha256"] == undisturbed()["weights_sha256"]
    NanoPhiForCausalLM.from_pretrained(runs / "run/checkpoints/step-000008")


@pytest.mark.parametrize(
    "damage", [shutil.rmtree, lambda states: [(s / "optimizer.pt").write_bytes(b"") for s in states.iterdir()]]
)
def test_an_interrupted_run_without_a_whole_state_keeps_its_weights(stopped, damage):
    damage(stopped / "run/training_state")
    line = refused(stopped)
    assert "training_state has no whole state" in line and "base: PATH" in line and "step-000004" in line


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
@pytest.mark.parametrize("finished", [False, True], ids=["interrupted", "finished"])
def test_more_steps_continue_as_if_they_had_been_asked_for_at_once(runs, monkeypatch, undisturbed, schedule, finished):
    changes = {"schedule": schedule, "decay_fraction": 0.5}
    with contextlib.nullcontext() if finished else ends_at(7, terminate):
        train(runs, **changes)
    held = weights(runs / "run/checkpoints")
    lines: list[str] = []
    longer = train(runs, lines, **changes, steps=14)
    said = next(line for line in lines if "14 steps in place of 8" in line)
    assert ("step-000004" if schedule == "wsd" else "step-000008") in said
    assert longer["weights_sha256"] == undisturbed(**changes, steps=14)["weights_sha256"]
    log = read_json(runs / "run/training.json")["log"]
    assert [entry["step"] for entry in log] == list(range(1, 15))
    if finished:
        aside = weights(runs / "run/checkpoints-of-8-steps")
        assert aside and set(aside) <= set(held) <= set(weights(runs))


DECAYING = {"schedule": "wsd", "decay_fraction": 0.5}  # from step 4 of 8


def branched(runs: Path, name: str, **changes) -> Pipeline:
    """A run that continues `run`, with another text while its rate decays, ready to train."""
    if not (runs / name).exists():
        shutil.copytree(runs / "run/data", runs / name / "data")
        add_decay(runs / name, seed=len(name))
    pipe = pipeline(runs, name=name, **{**DECAYING, **changes})
    inputs = pipe.inputs_of(pipe.stages["training"])
    continuation.branch(pipe.run, RunDirectory(runs / "run"), pipe.recipe.training, inputs)
    return pipe


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decays_of_one_trunk_are_what_the_same_run_in_one_piece_is(runs, prepared, tmp_path, optimizer):
    train(runs, **DECAYING, optimizer=optimizer)
    trunk = sha256_of_tree(runs / "run")
    for name in ("one", "three"):
        pipe = branched(runs, name, optimizer=optimizer)
        assert pipe.run.weights() == ["step-000004"]
        with ends_at(6):
            pipe.make("training")
        ended = branched(runs, name, optimizer=optimizer).make("training")
        alone = tmp_path / "alone" / name
        shutil.copytree(runs / name / "data", alone / "data")
        whole = pipeline(alone.parent, name=name, **DECAYING, optimizer=optimizer).make("training")
        assert ended["weights_sha256"] == whole["weights_sha256"]
        logs = [[entry["loss"] for entry in read_json(run / "training.json")["log"]] for run in (runs / name, alone)]
        assert logs[0] == logs[1] and len(logs[0]) == STEPS
        assert ended["weights_sha256"] not in weights(runs / "run")
    assert sha256_of_tree(runs / "run") == trunk


def test_a_run_that_differs_before_the_decay_is_no_branch(runs):
    train(runs, **DECAYING)
    for changes, named in (({"learning_rate": 1e-3}, "training.learning_rate 0.01 -> 0.001"), ({"steps": 10}, "steps")):
        with pytest.raises(UserError, match=f"one cannot continue run .*{named}"):
            branched(runs, "one", **changes)
        assert not (runs / "one/training_state").exists()
    shutil.rmtree(runs / "run/training_state")  # it is trained from the beginning then
    assert branched(runs, "one").run.weights() == []


def test_cosine_is_stretched_by_an_explicit_choice_only(runs):
    train(runs, schedule="cosine")
    line = refused(runs, schedule="cosine", steps=14)
    assert "training.steps 8 -> 14" in line and "training.stretch_cosine=true" in line
    train(runs, schedule="cosine", steps=14, stretch_cosine=True)
    rates = {entry["step"]: entry["learning_rate"] for entry in read_json(runs / "run/training.json")["log"]}
    expected = [0.5 * (1 + math.cos(math.pi * (step - 2) / 13)) * 1e-2 for step in (9, 14)]
    assert [rates[9], rates[14]] == pytest.approx(expected) and rates[8] < rates[9]


def test_training_starts_from_existing_weights(runs, tmp_path):
    train(runs)
    base = tmp_path / "base"
    shutil.copytree(runs / "run/checkpoints/step-000008", base)
    shutil.copytree(runs / "run/data", runs / "second/data")
    changes = {"name": "second", "base": str(base), "learning_rate": 1e-3}
    train(runs, **changes)
    first = read_json(runs / "second/training.json")["log"][0]["loss"]
    assert first < 0.8 * read_json(runs / "run/training.json")["log"][0]["loss"]
    line = refused(runs, **{**changes, "base": None})
    assert "base " in line and "-> None" in line
    weights = base / "model.safetensors"
    weights.unlink()
    with pytest.raises(UserError, match=r"base: .* holds no model.safetensors"):
        train(runs, **changes)
    weights.write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"base: .* cannot be loaded \(.*\)$"):
        base_module.base_model(str(base), NanoPhiConfig(**CONFIG))
    other = NanoPhiForCausalLM(NanoPhiConfig(**{**CONFIG, "intermediate_size": 32}))
    other.save_pretrained(base)
    shutil.copyfile(runs / "run/checkpoints/step-000008/config.json", base / "config.json")
    shutil.copytree(runs / "run/data", runs / "third/data")
    with pytest.raises(UserError, match=r"base: .* cannot be loaded"):
        train(runs, **{**changes, "name": "third"})


@pytest.fixture
def base(prepared, tmp_path) -> Path:
    """A model with the configuration and tokenizer of `prepared`."""
    NanoPhiForCausalLM(NanoPhiConfig(**CONFIG)).save_pretrained(tmp_path / "base")
    shutil.copytree(prepared / "data/tokenizer", tmp_path / "base", dirs_exist_ok=True)
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("num_attention_heads", 2, "num_attention_heads 2, the recipe's model 4"),
        ("layer_norm_eps", 1e-3, "layer_norm_eps 0.001, the recipe's model 1e-05"),
        ("hidden_act", "relu", "hidden_act relu, the recipe's model gelu_new"),
        ("rope_parameters", {"rope_theta": 500.0}, r"rope_parameters \{.*500.0.*\}, the recipe's model \{.*10000.0"),
        ("tie_word_embeddings", True, "tie_word_embeddings True, the recipe's model False"),
        ("vocab_size", VOCAB + 3, f"vocab_size {VOCAB + 3}, the recipe's model {VOCAB}"),
    ],
)
def test_a_base_that_computes_something_else_is_refused_though_its_tensors_fit(prepared, base, key, value, shown):
    config, tokenizer = NanoPhiConfig(**CONFIG), prepared / "data/tokenizer"
    assert base_module.check_base(str(base), config, tokenizer) == base / "model.safetensors"
    NanoPhiConfig(**{**CONFIG, key: value}).save_pretrained(base)
    with pytest.raises(UserError, match=f"^base: .* has {shown}.*; set model.{key} to its base's$"):
        base_module.base_model(str(base), config, tokenizer)
    if key == "vocab_size":  # which the tokenizer decides
        base_module.check_base(str(base), config, None)
    else:
        with pytest.raises(UserError, match=f"has {key} "):
            base_module.check_base(str(base), config, None)


def test_a_base_with_another_tokenizer_is_refused(runs, base):
    tokenizer = base / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w7"', '"other"'))
    with pytest.raises(UserError, match=rf"has another tokenizer than the run; set tokenizer.path: {base}$"):
        train(runs, base=str(base))
    tokenizer.unlink()  # weights alone say nothing of tokens
    base_module.check_base(str(base), NanoPhiConfig(**CONFIG), runs / "run/data/tokenizer")


def test_a_run_is_a_base_once_it_is_finished(runs):
    shutil.copytree(runs / "run/data", runs / "second/data")
    stated = {"name": "second", "base": str(runs / "run"), "learning_rate": 1e-3}
    write_json(runs / "run/record.json", {"stages": {}})
    with pytest.raises(UserError, match=r"base: .*run is a run that has not finished"):
        train(runs, **stated)
    (runs / "run/record.json").unlink()
    train(runs)
    train(runs, **stated)
    recorded = read_json(runs / "second/record.json")["stages"]["training"]["inputs"]["base"]
    assert recorded == sha256_of_file(runs / "run/checkpoints/step-000008/model.safetensors")


def test_a_prepared_run_needs_tokens_not_sources(runs):
    stages = {"tokens": {"format": 1, "inputs": {"context_length": 64, "max_tokens": None, "seed": 0}}}
    stages["quality"] = {"format": 1, "inputs": {"threshold": 0.3}}
    write_json(runs / "run/record.json", {"stages": stages})
    with pytest.raises(UserError, match=r"prepared with another recipe \(quality: threshold 0.3 -> 0.2\)"):
        train(runs)
    write_json(runs / "run/record.json", {"stages": {}})
    shutil.rmtree(runs / "run/data/tokens")
    with pytest.raises(UserError, match=r"data/tokens is missing; run `nanophi prepare`"):
        train(runs)


@pytest.mark.parametrize("seed", range(4))
def test_no_sequence_of_events_loses_weights(runs, monkeypatch, undisturbed, seed):
    choice = random.Random(seed)
    steps, changes, finished = STEPS, {}, set()
    monkeypatch.setitem(FORMATS, "documents", 1)

    def last() -> int:
        return max(map(step_of, checkpoints.states(runs / "run")), default=0)

    for _ in range(6):
        event = choice.choice(["kill", "terminate", "train", "allowed", "move", "format", "longer", "refused"])
        held, before = last(), weights(runs)
        if event in ("kill", "terminate") and held < steps:
            how = interrupt if event == "kill" else terminate
            with ends_at(choice.randrange(held, steps), how):
                train(runs, steps=steps, **changes)
        elif event == "train":
            finished.add(train(runs, steps=steps, **changes)["weights_sha256"])
        elif event == "allowed":
            changes |= {key: choice.choice([1, 2, 3]) for key in ("save_steps", "keep_states")}
        elif event == "move":
            moved = runs.with_name(f"{runs.name}x")
            runs.rename(moved)
            runs = moved
        elif event == "format":
            FORMATS["documents"] += 1
        elif event == "longer":
            steps += choice.choice([1, 4])
        elif event == "refused" and before:
            name, value = choice.choice([("batch_size", 2), ("weight_decay", 0.5), ("optimizer", "muon")])
            assert f"training.{name} " in refused(runs, **{**changes, "steps": steps, name: value})
            assert weights(runs) == before
        assert last() >= held, event
        assert finished <= set(weights(runs)), event
        if before:
            assert weights(runs / "run/training_state"), event
    assert train(runs, steps=steps, **changes)["weights_sha256"] == undisturbed(steps=steps)["weights_sha256"]
    assert read_json(runs / "run/record.json")["stages"]["training"]["inputs"]["training"]["steps"] == steps
