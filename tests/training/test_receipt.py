"""What training receives and what it computes are checked before its first step."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import CONFIG, EOS, TRAINING, add_sources, ends_at, make_run, replace_rows, train

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_tree, write_json
from nanophi.core.recipe import Training
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.training import arguments, loss, receipt, rows, run_trainer, stopping
from nanophi.training.trainer import NanoPhiTrainer

SHORT = {"steps": 3, "save_steps": 3, "eval_steps": 3, "keep_steps": []}


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_other_tokens_than_recorded_are_refused_before_the_first_step(run, split):
    file = next((run / "data/tokens" / split).glob("*.arrow"))
    content = bytearray(file.read_bytes())
    place = content.find(np.array(rows.PackedRows(run / "data/tokens" / split)[0]["input_ids"], "<i4").tobytes())
    content[place] ^= 1  # one token
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match=rf"tokens/{split} holds other tokens than .*; delete .* run `nanophi prepare`"):
        train(run, **SHORT)
    assert not (run / "checkpoints").exists()


def test_another_tokenizer_than_the_tokens_were_made_with_is_refused_and_old_runs_name_none(run):
    tokens, files = run / "data/tokens/tokens.json", run / "data/tokenizer"
    write_json(tokens, {**read_json(tokens), "tokenizer_sha256": sha256_of_tree(files)})
    (files / "tokenizer.json").write_text("{ }")
    with pytest.raises(UserError, match=r"data/tokenizer is not the tokenizer that .*tokens was made with; delete"):
        train(run, **SHORT)
    assert not (run / "checkpoints").exists()
    (files / "tokenizer.json").write_text("{}")
    rows.check_tokens(run / "data/tokens")


def test_the_rest_that_filled_no_row_belongs_to_the_hash_and_old_runs_lack_it(run):
    folder, recorded = run / "data/tokens", read_json(run / "data/tokens/tokens.json")
    packed = rows.PackedRows(folder / "train")
    rest = np.arange(5, dtype="<i4").tobytes()
    counts = {**recorded["train"], "tail_tokens": 5, "rows": len(packed), "sha256": packed.sha256(rest)}
    write_json(folder / "tokens.json", {**recorded, "train": counts})
    with pytest.raises(UserError, match="holds other tokens"):  # its fingerprint is not the beginning of the hash
        rows.check_tokens(folder, train=packed)
    state = folder / "train/state.json"
    write_json(state, {**read_json(state), "_fingerprint": counts["sha256"][:16]})
    rows.check_tokens(folder, train=packed)
    (folder / "train-rest.bin").write_bytes(rest)
    rows.check_tokens(folder, train=packed)
    (folder / "train-rest.bin").write_bytes(rest[4:])
    with pytest.raises(UserError, match="holds other tokens"):
        rows.check_tokens(folder, train=packed)


def documents(run):
    """End-of-text in the middle of rows, so that there is something to isolate."""
    places = np.arange(9, 64, 11)
    replace_rows(run, lambda index, row: np.where(np.isin(np.arange(len(row)), places + index % 7), EOS, row))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("isolate", [True, False])
def test_the_receipt_agrees_and_leaves_no_trace(run, monkeypatch, precision, micro, isolate):
    documents(run)
    changes = {**SHORT, "precision": precision, "micro_batch_size": micro, "isolate_documents": isolate}
    seen = []
    check = receipt.check
    monkeypatch.setattr(run_trainer.receipt, "check", lambda *given: seen.append(given[4:6]) or check(*given))
    hashes = [train(run, **changes)["weights_sha256"]]
    assert [kind for _, kind in seen] == [precision]
    monkeypatch.setattr(NanoPhiTrainer, "document_starts", lambda self, inputs: None)
    other = make_run(run.parent / "other")
    documents(other)
    hashes.append(train(other, **changes)["weights_sha256"])
    assert len(seen) == 1  # not compared again
    assert hashes[0] == hashes[1]


def test_a_loss_gradient_or_mask_that_is_wrong_is_named(run, monkeypatch):
    documents(run)
    monkeypatch.setattr(NanoPhiTrainer, "_get_num_items_in_batch", lambda self, *_: torch.tensor(8.0 * 64))
    with pytest.raises(UserError, match=r"from stock Phi in float32 in the loss \(0.98438 of the reference's\)"):
        train(run, **SHORT)
    monkeypatch.undo()
    plain = loss.LinearCrossEntropy.backward

    def wrong(ctx, grad):
        hidden, weight, *rest = plain(ctx, grad)
        return (hidden * 0.99, weight, *rest)

    monkeypatch.setattr(loss.LinearCrossEntropy, "backward", staticmethod(wrong))
    with pytest.raises(UserError, match=r"in the gradients \(by 0.0\d+ of their norm, most in model\.\S+\)"):
        train(run, **SHORT)
    monkeypatch.undo()
    monkeypatch.setattr(rows, "restarting_positions", lambda ids, eos: torch.arange(ids.shape[1]).expand_as(ids))
    with pytest.raises(UserError, match=r"in the documents' mask \(it agrees with that of whole rows\)"):
        train(run, **SHORT)
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_the_reference_uses_the_models_own_weights(tied, norm):
    torch.manual_seed(0)
    config = NanoPhiConfig(**{**CONFIG, "resid_pdrop": 0.0, "tie_word_embeddings": tied, "qk_layernorm": norm})
    model = NanoPhiForCausalLM(config)
    ids = torch.randint(1, 61, (2, 40))
    plain, whole = receipt.reference(model), torch.zeros_like(ids, dtype=torch.bool)
    value = receipt.reference_loss(plain, {"input_ids": ids, "labels": ids}, whole, 2 * 39)
    ours = model(input_ids=ids, labels=ids).loss
    ours.backward()
    assert value == pytest.approx(ours.item(), rel=1e-6)
    assert receipt.gradient_difference(plain, model, False)[0] < 1e-5
    assert plain.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), r"a micro-batch of 8 .*; set training.micro_b"),
        (torch.OutOfMemoryError("CUDA out of memory."), r"micro_batch_size=4 and run the same .* the beginning"),
        (RuntimeError("DataLoader worker (pid 3) is killed"), r"data has died.*\(DataLoader worker "),
    ],
)
def test_a_machine_that_gives_up_is_one_line(run, monkeypatch, error, line):
    def fail(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(NanoPhiTrainer, "compute_loss", fail)
    with pytest.raises(UserError, match=line):
        train(run, **SHORT)
    error.args = ("no such thing",)
    with pytest.raises(RuntimeError, match="no such thing"):
        train(run, **SHORT)


def test_loaders_outlive_a_signal_to_the_group(run):
    """The save of an orderly stop needs them: a dead one raises in the middle of it."""
    changes = {"steps": 4, "keep_steps": [], "save_steps": 2, "eval_steps": 4}
    changes["arguments"] = {"dataloader_num_workers": 1}
    script = (
        "import os, signal, sys; sys.path[:0] = [sys.argv[1]]\n"
        "from pathlib import Path\nimport tiny_run\nfrom nanophi.training.trainer import NanoPhiTrainer as T\n"
        "plain = T._save_checkpoint\n"
        "def save(self, *given):\n    os.killpg(0, signal.SIGTERM)\n    __import__('time').sleep(0.5)\n"
        "    plain(self, *given)\n"
        f"T._save_checkpoint = save\ntiny_run.train(Path(sys.argv[2]), **{changes})\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parents[1]), str(run)]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=120, check=False)
    assert "stopped by SIGTERM after saving step 2" in done.stderr
    assert (run / "training_state/step-000002").is_dir()


def test_a_missing_compiler_is_refused_at_the_start(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"training.compile needs a C\+\+ compiler, .* install g\+\+"):
        arguments.check(Training(**TRAINING, compile=True), tmp_path, 0)
    arguments.check(Training(**TRAINING), tmp_path, 0)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_hangup_saves_unless_it_is_ignored(run, number):
    add_sources(run)
    with ends_at(2, lambda: os.kill(os.getpid(), number), match=f"stopped by {number.name} after saving step 3"):
        train(run, steps=6, keep_steps=[])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = stopping.SaveAndStop(Training(steps=2, batch_size=1, learning_rate=1e-3))
        state = type("State", (), {"compute_steps": lambda *given: None, "max_steps": 2})()
        stop.on_train_begin(None, state, None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        stop.release()
    finally:
        signal.signal(signal.SIGHUP, before)
