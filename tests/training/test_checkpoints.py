"""Checkpoints and the data they were trained on: what is missing or has changed is named, and nothing is lost."""

import pytest
from tiny_run import ends_at, make_run, train

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_tree
from nanophi.training import checkpoints


@pytest.fixture
def stopped(tmp_path):
    """A run that died in its 13th step."""
    run = make_run(tmp_path / "run")
    with ends_at(12):
        train(run)
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> str:
    """Hash of the weights of a run that nothing disturbed."""
    return train(make_run(tmp_path_factory.mktemp("finished") / "run"))["weights_sha256"]


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
    assert train(stopped)["weights_sha256"] == finished


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
    assert train(stopped)["weights_sha256"] == finished


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
