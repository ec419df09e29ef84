"""`MuonAdamW` takes the steps that torch's two optimizers take, and is one optimizer to schedulers and checkpoints."""

import copy
import re
import sys
import types

import pytest
import torch
from tiny_run import CONFIG as TINY
from tiny_run import make_run, train
from transformers import Trainer, TrainingArguments

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core import registry
from nanophi.core.files import read_json
from nanophi.core.recipe import Training
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.training.optimizer import ADAM_EPS, MuonAdamW, adamw

CONFIG = NanoPhiConfig(**{**TINY, "resid_pdrop": 0.0})
TRAINING = Training(steps=1, batch_size=1, learning_rate=3e-3)


@pytest.fixture
def model() -> NanoPhiForCausalLM:
    torch.manual_seed(0)
    return NanoPhiForCausalLM(CONFIG).train()


def backward(model: NanoPhiForCausalLM, seed: int) -> None:
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()


def kinds(model: NanoPhiForCausalLM, optimizer: MuonAdamW) -> dict[str, tuple[str, float]]:
    """Which optimizer and weight decay each parameter has."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["kind"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_the_matrices_between_layers_are_muons(model):
    found = kinds(model, MuonAdamW(model, TRAINING))
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, kind in found.items():
        table, vector = re.match("model.embed_tokens|lm_head", name), name.endswith(".bias") or "layernorm" in name
        assert kind == ("adamw" if table or vector else "muon", 0.0 if vector else 0.1), name


def test_adamw_has_the_groups_of_trainers_own(model, tmp_path):
    """So that states of either are states of the other."""
    model = NanoPhiForCausalLM(NanoPhiConfig(**{**CONFIG.to_dict(), "qk_layernorm": True}))
    theirs = Trainer(model, TrainingArguments(tmp_path, weight_decay=0.1, learning_rate=3e-3)).create_optimizer()
    ours = adamw(model, TRAINING)
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert list(map(id, group["params"])) == list(map(id, other["params"]))
        assert {**group, "params": 0, "betas": 0} == {**other, "params": 0, "betas": 0}


def test_steps_are_those_of_torchs_two_optimizers(model):
    reference = copy.deepcopy(model)
    ours = MuonAdamW(model, TRAINING)
    kind = kinds(model, ours)
    parameters = dict(reference.named_parameters())
    of = {which: [name for name in parameters if kind[name][0] == which] for which in ("muon", "adamw")}
    muon = torch.optim.Muon([parameters[name] for name in of["muon"]], lr=0.02, weight_decay=0.1)
    groups = [{"params": [parameters[name]], "weight_decay": kind[name][1]} for name in of["adamw"]]
    adamw = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=ADAM_EPS)
    for seed in range(3):
        # The same gradients for both: Adam would blow up the rounding of those that are zero in exact arithmetic.
        backward(model, seed)
        for name, value in model.named_parameters():
            assert value.grad is not None
            parameters[name].grad = value.grad.clone()
        for optimizer in (ours, muon, adamw):
            optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, parameters[name], atol=1e-6, rtol=1e-5)


def test_an_optimizer_is_a_function_and_a_line_of_the_registry(tmp_path, monkeypatch):
    def sgd(model, training):
        return torch.optim.SGD([{"params": list(model.parameters()), "kind": "sgd"}], lr=2 * training.learning_rate)

    monkeypatch.setitem(sys.modules, "of_somebody_else", types.SimpleNamespace(sgd=sgd))
    monkeypatch.setitem(registry.OPTIMIZERS, "sgd", "of_somebody_else:sgd")
    train(make_run(tmp_path / "run"), optimizer="sgd", schedule="constant", steps=4, keep_steps=[], eval_steps=9)
    last = read_json(tmp_path / "run/training.json")["log"][-1]
    assert last["sgd_learning_rate"] == 2e-2
