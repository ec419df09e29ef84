"""Every stop is a save: signals at any moment, evaluations that are cut off, numbers that no record can hold."""

import os
import signal

import pytest
from tiny_run import PROMPT, add_sources, ends_at, make_run, terminate, train
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.training import arguments, checkpoints, trainer

STEPS = 8
CHANGES = {"steps": STEPS, "save_steps": 3, "eval_steps": 4, "keep_steps": []}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    run = add_sources(make_run(tmp_path_factory.mktemp("undisturbed") / "run"))
    summary = train(run, PROMPT, **CHANGES)
    return {**read_json(run / "training.json"), "weights": summary["weights_sha256"]}


@pytest.fixture
def run(tmp_path):
    return add_sources(make_run(tmp_path / "run"))


def assert_resumes(run, undisturbed):
    resumed = train(run, PROMPT, **CHANGES)
    history = read_json(run / "training.json")
    assert resumed["weights_sha256"] == undisturbed["weights"]
    assert [entry["loss"] for entry in history["log"]] == [entry["loss"] for entry in undisturbed["log"]]
    for key in ("evaluations", "samples"):
        assert history[key] == undisturbed[key]
    facts = read_json(run / "checkpoints/step-000008/checkpoint.json")
    assert facts["eval_step"] == STEPS
    assert facts["precision"] == "fp32"


@pytest.mark.parametrize(
    ("method", "step", "saved"),
    [
        *[("training_step", 5, 6), ("training_step", STEPS - 1, STEPS)],
        *[("prediction_step", 4, 4), ("prediction_step", STEPS, STEPS)],
        *[("_save_checkpoint", 3, 3), ("_save_checkpoint", 4, 4)],  # the second one before an evaluation
    ],
)
def test_a_signal_is_one_save_and_the_next_run_resumes(run, undisturbed, method, step, saved):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with ends_at(step, terminate, method, f"stopped by SIGTERM after saving step {saved}; run the same command"):
        train(run, PROMPT, **CHANGES)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert checkpoints.states(run)[-1].name == f"step-{saved:06d}"
    assert_resumes(run, undisturbed)


@pytest.mark.parametrize("step", [4, STEPS])
def test_a_process_killed_in_an_evaluation_has_saved_before(run, undisturbed, step):
    with ends_at(step, method="prediction_step"):
        train(run, PROMPT, **CHANGES)
    assert checkpoints.newest_valid_state(run).name == f"step-{step:06d}"
    assert_resumes(run, undisturbed)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_an_interval_that_was_cut_off_is_logged_as_a_whole(run, tmp_path, step):
    """Stopped and resumed twice within one interval of four steps, too."""
    fields = {**CHANGES, "logging_steps": 4, "save_steps": 100, "eval_steps": 6}
    whole = add_sources(make_run(tmp_path / "whole"))
    train(whole, **fields)
    for at in (step, step + 1):
        with ends_at(at, terminate, match="stopped by SIGTERM"):
            train(run, **fields)
    train(run, **fields)
    entries = [[(e["step"], e["loss"]) for e in read_json(path / "training.json")["log"]] for path in (whole, run)]
    assert [entry[0] for entry in entries[0]] == [4, 8]
    assert entries[0] == entries[1]


def test_a_run_shorter_than_a_logging_interval_finishes(run):
    for _ in range(2):
        summary = train(run, steps=3, save_steps=100, eval_steps=100, keep_steps=[], logging_steps=10)
        assert summary["steps"] == 3
        assert [entry["step"] for entry in read_json(run / "training.json")["log"]] == [3]
        assert summary["final_loss"] > 0


@pytest.mark.parametrize("name", ["grad_norm", "eval_mean_loss"])
def test_a_number_that_no_record_can_hold_stops_with_the_last_good_checkpoint(run, monkeypatch, name):
    plain = trainer.NanoPhiTrainer.log

    def spoiled(self, logs, *args):
        if name in logs and self.state.global_step >= 4:
            logs[name] = float("nan")
        plain(self, logs, *args)

    monkeypatch.setattr(trainer.NanoPhiTrainer, "log", spoiled)
    with pytest.raises(UserError, match=r"(grad_norm|eval_loss) is nan at step 4; .* checkpoint step-00000[34]"):
        train(run, **CHANGES)


def test_precision_is_the_recipes_or_refused(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    fields = {**CHANGES, "steps": 2, "warmup_steps": 0, "eval_steps": 50}
    assert train(run, **fields)["precision"] == "fp32"
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"
    for wanted in ("bf16", "fp16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", wanted)
        with pytest.raises(UserError, match=rf"ACCELERATE_MIXED_PRECISION={wanted}.*training.precision is fp32"):
            train(run, **fields)
    fields["precision"] = "auto"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train(add_sources(make_run(run.parent / "other")), **fields)["precision"] == "bf16"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setattr(arguments, "has_bf16", lambda: False)
    assert train(make_run(run.parent / "third"), **fields)["precision"] == "fp32"  # nothing is left of the run before


def test_a_tracker_gets_the_log_and_is_continued_and_one_that_cannot_start_is_one_line(run, monkeypatch):
    class Tracker(TrainerCallback):
        broken, logs = True, []
        seen: list[str | None] = []

        def setup(self, args, state, model, **kwargs):
            if self.broken:
                raise RuntimeError("not logged in;\n run `tracker login`")
            self.seen.append(os.environ.get("WANDB_RUN_ID"))
            assert os.environ["WANDB_RESUME"] == "allow"

        def on_log(self, args, state, control, logs, **kwargs):
            self.logs.append(dict(logs))

    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    with pytest.raises(UserError, match=r"training.report_to: wandbb is not supported, only .*tensorboard.* are supp"):
        train(run, report_to=["wandbb"])
    fields = {**CHANGES, "report_to": ["tensorboard"]}
    with pytest.raises(UserError, match=r"report_to: Tracker cannot start: not logged in; run `tracker login`$"):
        train(run, **fields)
    assert not (run / "checkpoints").exists()
    Tracker.broken = False
    with ends_at(5, terminate):
        train(run, **fields)
    train(run, **fields)
    assert len(Tracker.seen) == 2 and len(set(Tracker.seen)) == 1 and Tracker.seen[0]
    assert "WANDB_RUN_ID" not in os.environ
    train(add_sources(make_run(run.parent / "other")), **fields)
    assert len(set(Tracker.seen)) == 2
    names = {name for entry in Tracker.logs for name in entry}
    assert {"loss", "tokens_seen", "tokens_per_second", "eval_loss", "bits_per_byte"} <= names
