"""Checkpoints and the data they were trained on: what is missing or has changed is named, and nothing is lost."""

import shutil

import pytest
from tiny_run import make_run, train

from nanophi.files import UserError, read_json, sha256_of_tree, write_json
from nanophi.training import trainer


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that died in its 13th step."""
    run = make_run(tmp_path / "run")
    step = trainer.NanoPhiTrainer.training_step

    def dying_step(self, *args, **kwargs):
        if self.state.global_step == 12:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.NanoPhiTrainer, "training_step", dying_step)
        train(run)
    return run


def refusal(run, **changes) -> str:
    """The line with which training refuses; the checkpoints must be what they were."""
    folders = (run / "checkpoints", run / "training_state")
    before = [sha256_of_tree(folder) for folder in folders]
    with pytest.raises(UserError) as error:
        train(run, **changes)
    assert [sha256_of_tree(folder) for folder in folders] == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_vanished_or_cut_shard_is_one_line_and_the_same_rows_go_on(stopped, tmp_path):
    whole = train(make_run(tmp_path / "whole"))
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
    assert train(stopped)["weights_sha256"] == whole["weights_sha256"]


def test_other_data_than_the_checkpoints_are_named(stopped):
    facts = read_json(stopped / "checkpoints/step-000012/checkpoint.json")
    assert facts["train_sha256"] == "a1"
    assert facts["heldout_sha256"] == "b2"
    assert facts["tokenizer_sha256"] == sha256_of_tree(stopped / "data/tokenizer")
    tokens = read_json(stopped / "data/tokens/tokens.json")
    write_json(stopped / "data/tokens/tokens.json", {**tokens, "train": {"sha256": "c3"}})
    line = refusal(stopped)
    assert "checkpoint step-000012 was trained on other data: training tokens (data/tokens) a1 then, c3 now" in line
    assert "tokenizer" not in line
    write_json(stopped / "data/tokens/tokens.json", tokens)
    shutil.copyfile(stopped / "data/tokenizer/tokenizer.json", stopped / "data/tokenizer/other.json")
    line = refusal(stopped)
    assert "tokenizer (data/tokenizer)" in line
    assert "data/tokens" not in line
    (stopped / "data/tokenizer/other.json").unlink()
    assert train(stopped)["steps"] == 24


def test_checkpoint_json_tells_tokens_and_losses(stopped):
    train(stopped)
    history = read_json(stopped / "training.json")
    losses = {entry["step"]: entry["loss"] for entry in history["log"]}
    held = {entry["step"]: entry["loss"] for entry in history["evaluations"]}
    for folder, step, eval_step in (("step-000010", 10, None), ("step-000024", 24, 24)):
        facts = read_json(stopped / "checkpoints" / folder / "checkpoint.json")
        assert facts["tokens_seen"] == step * 8 * 64
        assert facts["train_loss"] == losses[step]
        assert facts["eval_step"] == eval_step
        assert facts["eval_loss"] == held.get(eval_step)
