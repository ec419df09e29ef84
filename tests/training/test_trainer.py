"""Training: what is learnt, validated, saved and logged; a killed run resumes bit for bit as if it had not been."""

import dataclasses
import errno
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from tiny_run import CONTEXT, EOS, TRAINING, VOCAB, add_decay, add_sources, ends_at, make_run, replace_rows, train
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiForCausalLM, TrainingArguments

from nanophi.core import sample
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_tree
from nanophi.core.names import step_of
from nanophi.core.recipe import Training
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.training import arguments as arguments_module
from nanophi.training import checkpoints, rows, stopping, trainer

TESTS = str(Path(__file__).parents[1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    run = make_run(tmp_path_factory.mktemp("runs") / "finished")
    return run, train(run)


@pytest.fixture
def stopped(tmp_path):
    """A run that died in its 13th step."""
    run = make_run(tmp_path / "run")
    with ends_at(12):
        train(run)
    return run


def test_learns_and_logs(finished):
    run, summary = finished
    history = read_json(run / "training.json")
    log, last = history["log"], history["evaluations"][-1]
    assert log[0]["loss"] == pytest.approx(np.log(VOCAB), abs=0.3)  # an untrained model knows nothing
    assert log[-1]["loss"] < 0.75 * log[0]["loss"]
    assert [entry["step"] for entry in log] == list(range(1, 25))
    assert [entry["step"] for entry in history["evaluations"]] == [12, 24]
    assert log[-1]["tokens_seen"] == 24 * 8 * CONTEXT == summary["tokens_seen"]
    assert last["bits_per_byte"] == pytest.approx(last["loss"] / np.log(2) / 2.0, abs=1e-4)
    assert history["summary"] == summary
    elapsed = [entry["elapsed_seconds"] for entry in log]
    assert elapsed == sorted(elapsed)
    assert log[-1]["learning_rate"] < log[10]["learning_rate"]


def test_checkpoints_load_by_themselves_through_both_doors(finished):
    run, _ = finished
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000010", "step-000024"]
    for checkpoint in (run / "checkpoints").iterdir():
        names = {path.name for path in checkpoint.iterdir()}
        assert not [name for name in names if name.endswith((".pt", ".pth", ".bin"))]  # no pickle, no optimizer state
        assert {"tokenizer.json", "modeling_nanophi.py", "checkpoint.json"} <= names
        stock = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert isinstance(stock, PhiForCausalLM)
        ours = NanoPhiForCausalLM.from_pretrained(checkpoint)
        tokens = torch.arange(20)[None]
        torch.testing.assert_close(stock(tokens).logits, ours(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_run_goes_on_bit_by_bit(tmp_path, optimizer):
    runs = [make_run(tmp_path / name) for name in ("whole", "killed")]
    whole = train(runs[0], optimizer=optimizer)
    for step in (3, 9, 21):
        with ends_at(step):
            train(runs[1], optimizer=optimizer)
    assert train(runs[1], optimizer=optimizer)["weights_sha256"] == whole["weights_sha256"]
    losses = [[entry["loss"] for entry in read_json(run / "training.json")["log"]] for run in runs]
    assert losses[0] == losses[1]


def test_sigkill_leaves_only_whole_checkpoints_and_sigterm_saves_first(tmp_path, finished):
    run = make_run(tmp_path / "run")
    script = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from pathlib import Path\nimport tiny_run\n"
        "tiny_run.train(Path(sys.argv[2]), steps=4000, save_steps=3, keep_steps=[])\n"
    )
    for number in (signal.SIGKILL, signal.SIGTERM):
        command = [sys.executable, "-c", script, TESTS, str(run)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            before = checkpoints.states(run)[-1:]
            deadline = time.monotonic() + 60
            while checkpoints.states(run)[-1:] in ([], before) and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(number)
            errors = process.communicate()[1]
        last = checkpoints.newest_valid_state(run)
        assert last is not None and last == checkpoints.states(run)[-1]
        load_file(run / "checkpoints" / last.name / "model.safetensors")
        assert torch.load(last / "optimizer.pt", weights_only=True)["state"]
        if number == signal.SIGTERM:
            assert f"stopped by SIGTERM after saving step {step_of(last)}" in errors


def test_no_disk_space_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    plain = trainer.NanoPhiTrainer._save_optimizer_and_scheduler

    def fail(self, output_dir):
        if self.state.global_step == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.NanoPhiTrainer, "_save_optimizer_and_scheduler", fail)
        with pytest.raises(UserError, match=r"no disk space left in .*run .*step 10.*from checkpoint step-000006"):
            train(run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000006"]
    assert [path.name for path in (run / "training_state").iterdir()] == ["step-000006"]
    assert train(run)["steps"] == 24


@pytest.mark.parametrize(("missing", "total"), [(1, 10**9), (0, 10**9), (1, 0)])
def test_room_for_a_checkpoint_is_checked_before_the_first_step(tmp_path, monkeypatch, finished, missing, total):
    run = make_run(tmp_path / "run")
    needed = 12 * finished[1]["parameters"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(total, 0, needed - missing))
    if missing and total:
        with pytest.raises(UserError, match=r"no disk space in .*run for a checkpoint .* needed, .* free\)"):
            train(run)
        assert not checkpoints.states(run) and not (run / "training.json").exists()
    else:
        assert train(run, steps=4, keep_steps=[])["steps"] == 4


def test_diverging_run_stops_at_the_last_good_checkpoint(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"the loss is nan at step \d+; nothing was saved since .* Lower training"):
        train(run, learning_rate=1e30, max_grad_norm=1e30)
    for checkpoint in (run / "checkpoints").glob("step-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_loss_spike_stops_at_the_last_good_checkpoint(tmp_path, logging_steps):
    run = make_run(tmp_path / "run", rows=480)
    order = trainer.PackedRows(run / "data/tokens/train", rows=480, seed=1)
    poisoned = {order.index(position) for position in range(50 * 8, 60 * 8)}
    replace_rows(run, lambda index, row: row[::-1] if index in poisoned else row)
    changes = {"steps": 60, "save_steps": 1, "keep_steps": [], "logging_steps": logging_steps}
    with pytest.raises(UserError) as error:
        train(run, **changes)
    words = r"the loss is [\d.]+, a spike above [\d.]+ at step 51; nothing was saved since checkpoint step-000050\. "
    assert re.match(words + r"To train through it, set training.spike_threshold=null", str(error.value))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000050"]
    train(run, **changes, spike_threshold=None)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000060"]


def test_spike_limit_is_robust():
    noise = np.random.default_rng(0).normal(3.0, 0.05, 200)
    losses, limit = noise.tolist(), stopping.spike_limit(noise.tolist(), 10)
    assert stopping.spike_limit(losses[:9], 10) is None
    assert limit == pytest.approx(3.6, abs=0.05)  # a fifth of the median, more than ten deviations of 0.05
    assert stopping.spike_limit(losses, 20) == pytest.approx(4.0, abs=0.2)
    assert stopping.spike_limit([*losses[:-4], 50.0, 60.0, 70.0, 80.0], 10) == pytest.approx(limit, abs=0.2)
    falling = (2 + 8 * np.exp(-np.arange(200) / 20) + noise - 3).tolist()
    assert all(falling[i] < (stopping.spike_limit(falling[:i], 10) or np.inf) for i in range(200))


def test_order_depends_on_position_and_seed_only(finished):
    def order(seed, positions):
        packed = rows.PackedRows(finished[0] / "data/tokens/train", rows=250, seed=seed)
        return [packed.index(position) for position in positions]

    whole = order(3, range(250))
    assert sorted(whole[:100]) == sorted(whole[100:200]) == list(range(100))
    assert whole[:100] != whole[100:200]
    assert order(3, (249, 0, 120)) == [whole[249], whole[0], whole[120]]
    assert order(4, range(100)) != whole[:100]


def test_while_the_rate_decays_another_text_is_read_and_a_kill_changes_nothing(tmp_path):
    runs = [add_decay(make_run(tmp_path / name), 1, rows=30) for name in ("whole", "killed")]
    whole = train(runs[0])
    assert (whole["epochs"], whole["decay_epochs"]) == (19 * 8 / 100, 5 * 8 / 30)  # of 24 steps, 5 decay
    for step in (9, 19, 22):
        with ends_at(step):
            train(runs[1])
    assert train(runs[1])["weights_sha256"] == whole["weights_sha256"]
    assert read_json(runs[0] / "checkpoints/step-000024/checkpoint.json")["decay_sha256"]
    losses = [[entry["loss"] for entry in read_json(run / "training.json")["log"]] for run in runs]
    assert losses[0] == losses[1] and losses[0][19] > 1.3 * losses[0][18]  # the other text is a surprise
    replace_rows(runs[0], lambda index, row: row)
    shutil.rmtree(runs[0] / "data/tokens/decay")
    shutil.copytree(runs[0] / "data/tokens/train", runs[0] / "data/tokens/decay")
    with pytest.raises(UserError, match=r"data/tokens/decay holds other tokens than tokens\.json records"):
        train(runs[0])


def test_each_phase_has_epochs_of_its_own_text(finished):
    folder = finished[0] / "data/tokens/train"
    phases = [rows.PackedRows(folder, count, seed=3) for count in (130, 70)]
    both, plain = rows.PhasedRows(phases), [phase[i]["input_ids"] for phase in phases for i in range(len(phase))]
    assert len(both) == 200
    for positions in ([0, 5], [128, 129, 130, 131], [199], list(range(200))):
        found = [row["input_ids"] for row in both.__getitems__(positions)]
        assert all(torch.equal(row, plain[position]) for row, position in zip(found, positions, strict=True))


def test_training_arguments_are_checked(tmp_path):
    def arguments(world_size=1, **changes):
        return arguments_module.training_arguments(Training(**{**TRAINING, **changes}), tmp_path, 0, world_size)

    made = arguments(micro_batch_size=2, world_size=2, arguments={"dataloader_num_workers": 1})
    assert made.per_device_train_batch_size == 2
    assert made.gradient_accumulation_steps == 2
    assert made.dataloader_num_workers == 1
    with pytest.raises(UserError, match=r"'dataloader_num_wokers' is unknown .* mean 'dataloader_num_workers'"):
        arguments(arguments={"dataloader_num_wokers": 1})
    for changes, line in (
        ({"arguments": {"learning_rate": 1.0}}, "'learning_rate' is unknown or untested; use training.learning_rate"),
        ({"arguments": {"push_to_hub": True}}, "'push_to_hub' is unknown or untested"),
        ({"arguments": {"dataloader_num_workers": -2}}, "dataloader_num_workers must be at least 0"),
        ({"arguments": {"log_level": "shout"}}, "training.arguments: log_level must be one of"),
        ({"arguments": {"gradient_checkpointing_kwargs": 7}}, "training.arguments: "),
        ({"world_size": 3}, "use a training.batch_size that 3 divides"),
        ({"micro_batch_size": 8, "world_size": 2}, "use a micro_batch_size that divides 4"),
        ({"arguments": {"torch_compile_mode": "default"}}, "_mode does nothing without training.compile=true"),
        ({"arguments": {"dataloader_persistent_workers": True}}, "at least 0, and 1 with dataloader_persistent_worke"),
    ):
        with pytest.raises(UserError, match=re.escape(line)):
            arguments(**changes)


@pytest.mark.parametrize(
    "fields",
    [
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2, "dataloader_persistent_workers": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"activation_checkpointing": True},
        {"dataloader_pin_memory": False, "torch_empty_cache_steps": 1, "log_level": "error", "run_name": "other"},
        {"ddp_bucket_cap_mb": 5, "ddp_broadcast_buffers": False, "ddp_timeout": 600, "project": "p"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_arguments_that_are_allowed_change_nothing_that_is_learned(tmp_path, fields):
    if not set(fields) <= {field.name for field in dataclasses.fields(TrainingArguments)}:
        pytest.skip("this version of transformers has no such argument")
    changes = {"steps": 4, "save_steps": 2, "keep_steps": [], "eval_steps": 4}
    arguments = {"plain": {}, "with": fields}
    trained = [train(make_run(tmp_path / name), arguments=given, **changes) for name, given in arguments.items()]
    assert trained[0]["weights_sha256"] == trained[1]["weights_sha256"]


def refusal(run, **changes) -> str:
    """The line with which training refuses; the checkpoints must be what they were."""
    folders = (run / "checkpoints", run / "training_state")
    before = [sha256_of_tree(folder) for folder in folders]
    with pytest.raises(UserError) as error:
        train(run, **changes)
    assert [sha256_of_tree(folder) for folder in folders] == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_vanished_or_cut_shard_is_one_line_and_training_resumes_once_it_is_back(stopped, finished):
    shard = next((stopped / "data/tokens/train").glob("*.arrow"))
    contents = shard.read_bytes()
    for damaged in (None, contents[: len(contents) // 2], b""):
        shard.unlink()
        if damaged is not None:
            shard.write_bytes(damaged)
        line = refusal(stopped)
        assert "data/tokens/train cannot be read" in line
        assert f"delete {stopped / 'data/tokens'} and run `nanophi prepare`" in line
        shard.write_bytes(contents)
    assert train(stopped)["weights_sha256"] == finished[1]["weights_sha256"]


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"]
)
def test_a_damaged_state_is_named_and_the_one_before_gives_the_same_weights(stopped, finished, capsys, name):
    assert [state.name for state in checkpoints.states(stopped)] == ["step-000010", "step-000012"]
    files = [stopped / folder / "step-000012/model.safetensors" for folder in ("checkpoints", "training_state")]
    assert files[0].samefile(files[1])
    file = stopped / "training_state/step-000012" / name
    contents = file.read_bytes()
    for damaged in (None, contents[:-9] + b"123456789", contents[: len(contents) // 2]):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        assert checkpoints.newest_valid_state(stopped).name == "step-000010"
        line = capsys.readouterr().out.strip()
        assert "training_state/step-000012 is damaged" in line and name in line and "\n" not in line
        if damaged is None:
            file.write_bytes(contents)
    assert train(stopped)["weights_sha256"] == finished[1]["weights_sha256"]


def test_as_many_states_are_kept_as_asked_for_and_the_one_before_the_decay(tmp_path):
    run = make_run(tmp_path / "run")
    train(run, keep_states=3, save_steps=4, keep_steps=[8], schedule="wsd", decay_fraction=0.75)
    names = [state.name for state in checkpoints.states(run)]
    assert names == ["step-000006", "step-000016", "step-000020", "step-000024"]  # the decay begins at step 6
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000008", "step-000024"]


def test_checkpoint_json_tells_tokens_and_losses(stopped):
    train(stopped)
    history = read_json(stopped / "training.json")
    losses, held = ({e["step"]: e["loss"] for e in history[part]} for part in ("log", "evaluations"))
    for folder, step, eval_step in (("step-000010", 10, None), ("step-000024", 24, 24)):
        facts = read_json(stopped / "checkpoints" / folder / "checkpoint.json")
        assert (facts["tokens_seen"], facts["train_loss"]) == (step * 8 * 64, losses[step])
        assert (facts["eval_step"], facts["eval_loss"]) == (eval_step, held.get(eval_step))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with sources and samples, and the same run without."""
    folder = tmp_path_factory.mktemp("runs")
    given, without = add_sources(make_run(folder / "with")), make_run(folder / "without")
    both = train(given, tiny_run.PROMPT, isolate_documents=False), train(without, isolate_documents=False)
    return given, *both, without


def reference(run) -> dict[str, float]:
    """Bits per byte by source, token by token, from the final checkpoint."""
    model = NanoPhiForCausalLM.from_pretrained(run / "checkpoints/step-000024").eval()
    names = np.array(tiny_run.DOCUMENTS["source"])
    source_of, nats = names.repeat(tiny_run.DOCUMENTS["tokens"]), {}
    held = rows.HeldoutRows(run / "data/tokens")
    for row in range(10):
        tokens = held[row]["input_ids"].long()
        with torch.no_grad():
            log_probabilities = model(tokens[None]).logits[0].log_softmax(-1)
        for position in range(1, CONTEXT):
            source = str(source_of[row * CONTEXT + position])
            nats.setdefault(source, []).append(-float(log_probabilities[position - 1, tokens[position]]))
    sizes, lengths = np.array(tiny_run.DOCUMENTS["bytes"]), np.array(tiny_run.DOCUMENTS["tokens"])
    per_token = {name: sizes[names == name].sum() / lengths[names == name].sum() for name in nats}
    return {name: np.mean(values) / math.log(2) / per_token[name] for name, values in nats.items()}


def test_bits_per_byte_by_source_are_those_of_each_token(runs):
    run = runs[0]
    evaluations = read_json(run / "training.json")["evaluations"]
    expected = reference(run)
    assert set(expected) == {"web", "code", "wiki"}  # no token of `rare` is in a row
    assert evaluations[-1]["by_source"] == pytest.approx(expected, rel=1e-4)
    assert evaluations[0]["by_source"] != evaluations[-1]["by_source"]


def test_every_heldout_row_counts(runs):
    """10 rows in batches of 8: the last two as well, each as much as the others."""
    run = runs[0]
    model = NanoPhiForCausalLM.from_pretrained(run / "checkpoints/step-000024").eval()
    held = rows.HeldoutRows(run / "data/tokens")
    batch = rows.PackedCollator(EOS, isolate_documents=False)([held[i] for i in range(10)])
    assert batch.pop("sources").shape == (10, CONTEXT)
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert read_json(run / "training.json")["evaluations"][-1]["loss"] == pytest.approx(loss, rel=1e-5)


def test_sources_and_samples_change_nothing_that_is_learnt(runs):
    run, summary, plain, without = runs
    assert summary["weights_sha256"] == plain["weights_sha256"]
    here, there = read_json(run / "training.json"), read_json(without / "training.json")
    assert [entry["loss"] for entry in here["log"]] == [entry["loss"] for entry in there["log"]]
    assert [e["loss"] for e in here["evaluations"]] == pytest.approx([e["loss"] for e in there["evaluations"]])
    assert "by_source" not in there["evaluations"][0]
    assert there["samples"] == []


def test_samples_are_what_the_checkpoint_writes(runs):
    run = runs[0]
    samples = read_json(run / "training.json")["samples"]
    assert [sample["step"] for sample in samples] == [12, 24]
    tokens = [int(word.removeprefix("w")) for word in samples[-1]["text"].split()]
    model = NanoPhiForCausalLM.from_pretrained(run / "checkpoints/step-000024").eval()
    expected = [7, 8]
    while len(expected) < 2 + sample.TRAINING_TOKENS and expected[-1] != EOS:
        with torch.no_grad():
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    assert tokens == [token for token in expected if token != EOS]


def test_a_sample_leaves_random_state_and_mode_alone(runs):
    model = NanoPhiForCausalLM.from_pretrained(runs[0] / "checkpoints/step-000024").train()
    before = torch.get_rng_state()
    tokenizer = AutoTokenizer.from_pretrained(runs[0] / "data/tokenizer")
    assert sample.continue_prompt(model, tokenizer, tiny_run.PROMPT).startswith(tiny_run.PROMPT)
    assert sample.continue_prompt(model, tokenizer, "") == sample.continue_prompt(model, tokenizer, "<eos>")
    assert model.training and torch.equal(torch.get_rng_state(), before)
