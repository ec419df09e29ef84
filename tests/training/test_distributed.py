"""Several processes take the same steps as one: replicated (DDP) and divided (FSDP2), gloo on processors."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import CONFIG as TINY
from tiny_run import PROMPT, TRAINING, add_sources, make_run
from transformers import AutoModelForCausalLM, PhiForCausalLM

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.core.names import step_of
from nanophi.core.recipe import Training
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.training import checkpoints, trainer

STEPS = 50
CHANGES = {**TRAINING, "steps": STEPS, "micro_batch_size": 4, "keep_steps": [], "save_steps": 20, "eval_steps": 25}
CONFIG = {**TINY, "resid_pdrop": 0.0}  # each process draws its own dropout
FSDP = {"arguments": {"fsdp": True, "fsdp_config": {"version": 2}}}

SCRIPT = """
import os, signal, sys
from pathlib import Path
from nanophi.core.errors import UserError
from nanophi.training import checkpoints, trainer
from nanophi.core.recipe import Training
from nanophi.configuration_nanophi import NanoPhiConfig

if CHANGES.get("arguments"):
    # accelerate divides models among accelerators only; tell it that these processors are some.
    from accelerate import state
    plain = state.AcceleratorState.__init__

    def divided(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = state.DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = state.DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    state.AcceleratorState.__init__ = divided

step = trainer.NanoPhiTrainer.training_step
def dying_step(self, *args, **kwargs):
    if self.state.global_step == DIE:
        raise KeyboardInterrupt
    if self.state.global_step == SIGNAL and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    if self.state.global_step == TELL and os.environ["RANK"] == "0":
        Path(RUN, "there").touch()
    return step(self, *args, **kwargs)

def train():
    # Only the main process decides where to resume.
    resume = checkpoints.newest_valid_state(Path(RUN)) if os.environ["RANK"] == "0" else None
    settings = {"seed": 1, "prompt": PROMPT, "resume": resume}
    trainer.train(Path(RUN), Training(**CHANGES), NanoPhiConfig(**CONFIG), **settings)

trainer.NanoPhiTrainer.training_step = dying_step
# 25 was saved because it was evaluated.
for event, states in ((DIE, ["step-000020", "step-000025"]), (SIGNAL, ["step-000012"])):
    if event is not None:
        try:
            train()
        except (KeyboardInterrupt, UserError) as error:
            print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
            saved = sorted(path.name for path in Path(RUN, "training_state").glob("step*"))
            assert saved == states, saved
DIE = SIGNAL = None
try:
    train()
except UserError as error:
    sys.exit(f"rank {os.environ['RANK']}: {error}")
"""


def launch_on_two(run: Path, changes: dict, **events: int | None) -> subprocess.Popen[str]:
    script = run.parent / f"{run.name}.py"
    names = {"RUN": str(run), "CHANGES": changes, "CONFIG": CONFIG, "PROMPT": PROMPT}
    names |= {"DIE": None, "SIGNAL": None, "TELL": None, **events}
    script.write_text("".join(f"{name} = {value!r}\n" for name, value in names.items()) + SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Status and error output; no process is left."""
    errors = process.communicate(timeout=240)[1]
    return process.returncode, errors


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    runs = {}
    for optimizer in ("adamw", "muon"):
        run = add_sources(make_run(tmp_path_factory.mktemp("runs") / optimizer))
        section = Training(**{**CHANGES, "optimizer": optimizer})
        trainer.train(run, section, NanoPhiConfig(**CONFIG), seed=1, prompt=PROMPT)
        runs[optimizer] = run
    return runs


def losses(run: Path) -> np.ndarray:
    log = read_json(run / "training.json")["log"]
    assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    return np.array([entry["loss"] for entry in log])


def assert_same_evaluations(run: Path, reference: Path) -> None:
    here, there = (read_json(folder / "training.json") for folder in (run, reference))
    assert [entry["step"] for entry in here["evaluations"]] == [25, 50]
    for mine, other in zip(here["evaluations"], there["evaluations"], strict=True):
        # 10 rows do not divide by 2 processes times 4 rows: those that fill up the last batch must not count.
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert mine["by_source"] == pytest.approx(other["by_source"], rel=1e-4)
    assert [sample["step"] for sample in here["samples"]] == [25, 50]
    assert here["samples"][0]["text"].startswith(PROMPT)


@pytest.mark.slow
def test_replicated_processes_stop_together_whoever_gets_the_signal(one, tmp_path):
    """One process alone, then the launcher; each time all save the same step, and the next training resumes there."""
    run, optimizer = add_sources(make_run(tmp_path / "run")), "muon"
    changes = {**CHANGES, "optimizer": optimizer}
    process = launch_on_two(run, changes, SIGNAL=11, TELL=15)
    deadline = time.monotonic() + 120
    while not (run / "there").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    status, errors = finish(process)
    assert status != 0
    said = r"rank {}: stopped by (SIGTERM|a signal to another process) after saving step 12"
    assert all(re.search(said.format(rank), errors) for rank in (0, 1)), errors
    assert checkpoints.find_corruption(checkpoints.states(run)[-1]) is None
    assert 15 < step_of(checkpoints.states(run)[-1]) < STEPS, errors
    status, errors = finish(launch_on_two(run, changes))
    assert status == 0, errors[-3000:]
    np.testing.assert_allclose(losses(run), losses(one[optimizer]), rtol=1e-5)
    assert_same_evaluations(run, one[optimizer])
    NanoPhiForCausalLM.from_pretrained(run / f"checkpoints/step-{STEPS:06d}")


@pytest.mark.slow
def test_divided_processes(one, tmp_path):
    """FSDP2: killed after step 30, it resumes from step 25 as if it had not been."""
    run = add_sources(make_run(tmp_path / "run"))
    status, errors = finish(launch_on_two(run, {**CHANGES, **FSDP}, DIE=30))
    assert status == 0, errors[-3000:]
    np.testing.assert_allclose(losses(run), losses(one["adamw"]), rtol=1e-5)
    assert_same_evaluations(run, one["adamw"])
    checkpoint = run / f"checkpoints/step-{STEPS:06d}"
    alone = one["adamw"] / "checkpoints" / checkpoint.name
    assert {path.name for path in checkpoint.iterdir()} == {path.name for path in alone.iterdir()}
    assert not list(run.rglob("pytorch_model_fsdp*"))
    stock, ours = AutoModelForCausalLM.from_pretrained(checkpoint), NanoPhiForCausalLM.from_pretrained(checkpoint)
    assert isinstance(stock, PhiForCausalLM)
    reference = NanoPhiForCausalLM.from_pretrained(alone)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(stock(tokens).logits, ours(tokens).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(tokens).logits, reference(tokens).logits, atol=1e-2, rtol=1e-2)
    assert read_json(checkpoint / "config.json") == read_json(alone / "config.json")


def test_dividing_what_cannot_be_divided_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"training.arguments: fsdp divides a model among several accelerators"):
        trainer.train(make_run(tmp_path / "run"), Training(**{**CHANGES, **FSDP}), NanoPhiConfig(**CONFIG), seed=1)
