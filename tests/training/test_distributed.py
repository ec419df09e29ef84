"""Several processes take the same steps as one: replicated (DDP) and divided (FSDP2), gloo on processors."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import CONFIG as TINY
from tiny_run import PROMPT, TRAINING, add_sources, make_run
from transformers import AutoModelForCausalLM, PhiForCausalLM

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.files import UserError, read_json
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.recipe import Training
from nanophi.training import trainer

STEPS = 50
CHANGES = {**TRAINING, "steps": STEPS, "micro_batch_size": 4, "keep_steps": [], "save_steps": 20, "eval_steps": 25}
CONFIG = {**TINY, "resid_pdrop": 0.0}  # each process draws its own dropout
FSDP = {"arguments": {"fsdp": True, "fsdp_config": {"version": 2}}}

SCRIPT = """
import sys
from pathlib import Path
from nanophi.training import trainer
from nanophi.recipe import Training
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
    return step(self, *args, **kwargs)

def train():
    trainer.train(Path(RUN), Training(**CHANGES), NanoPhiConfig(**CONFIG), seed=1, label="test", prompt=PROMPT)

if DIE is not None:
    trainer.NanoPhiTrainer.training_step = dying_step
    try:
        train()
    except KeyboardInterrupt:
        assert [path.name for path in Path(RUN, "training_state").glob("step*")] == ["step-000020"]
    trainer.NanoPhiTrainer.training_step = step
train()
"""


def run_on_two(run: Path, changes: dict, die: int | None = None) -> subprocess.CompletedProcess[str]:
    script = run.parent / f"{run.name}.py"
    names = {
        "RUN": str(run),
        "CHANGES": changes,
        "CONFIG": CONFIG,
        "PROMPT": PROMPT,
        "DIE": die,
    }
    script.write_text("".join(f"{name} = {value!r}\n" for name, value in names.items()) + SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    runs = {}
    for optimizer in ("adamw", "muon"):
        run = add_sources(make_run(tmp_path_factory.mktemp("runs") / optimizer))
        section = Training(**{**CHANGES, "optimizer": optimizer})
        trainer.train(run, section, NanoPhiConfig(**CONFIG), seed=1, label="test", prompt=PROMPT)
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


def test_replicated_processes(one, tmp_path):
    run, optimizer = add_sources(make_run(tmp_path / "run")), "muon"
    done = run_on_two(run, {**CHANGES, "optimizer": optimizer})
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(losses(run), losses(one[optimizer]), rtol=1e-5)
    assert_same_evaluations(run, one[optimizer])
    NanoPhiForCausalLM.from_pretrained(run / f"checkpoints/step-{STEPS:06d}")


def test_divided_processes(one, tmp_path):
    """FSDP2: stopped after step 30, it goes on from step 20 as if it had not been."""
    run = add_sources(make_run(tmp_path / "run"))
    done = run_on_two(run, {**CHANGES, **FSDP}, die=30)
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(losses(run), losses(one["adamw"]), rtol=1e-5)
    assert_same_evaluations(run, one["adamw"])
    checkpoint = run / f"checkpoints/step-{STEPS:06d}"
    assert {path.name for path in checkpoint.iterdir()} == {
        path.name for path in (one["adamw"] / "checkpoints" / checkpoint.name).iterdir()
    }
    assert not list(run.rglob("pytorch_model_fsdp*"))
    stock, ours = AutoModelForCausalLM.from_pretrained(checkpoint), NanoPhiForCausalLM.from_pretrained(checkpoint)
    assert isinstance(stock, PhiForCausalLM)
    reference = NanoPhiForCausalLM.from_pretrained(one["adamw"] / "checkpoints" / checkpoint.name)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(stock(tokens).logits, ours(tokens).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(tokens).logits, reference(tokens).logits, atol=1e-2, rtol=1e-2)
    assert read_json(checkpoint / "config.json") == read_json(
        one["adamw"] / "checkpoints" / checkpoint.name / "config.json"
    )


def test_dividing_what_cannot_be_divided_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"training.arguments: fsdp divides a model among several accelerators"):
        trainer.train(
            make_run(tmp_path / "run"), Training(**{**CHANGES, **FSDP}), NanoPhiConfig(**CONFIG), seed=1, label="test"
        )
