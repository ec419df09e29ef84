"""Validation while training: by source, with samples, and without a trace in what is learnt."""

import math

import numpy as np
import pytest
import torch
from tiny_run import CONTEXT, DOCUMENTS, EOS, PROMPT, add_sources, make_run, train
from transformers import AutoTokenizer

from nanophi.core import sample
from nanophi.core.files import read_json
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.training import rows as rows_module
from nanophi.training.rows import PackedCollator


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with sources and samples, and the same run without."""
    folder = tmp_path_factory.mktemp("runs")
    given, without = add_sources(make_run(folder / "with")), make_run(folder / "without")
    return given, train(given, PROMPT, isolate_documents=False), train(without, isolate_documents=False), without


def reference(run) -> dict[str, float]:
    """Bits per byte by source, token by token, from the final checkpoint."""
    model = NanoPhiForCausalLM.from_pretrained(run / "checkpoints/step-000024").eval()
    names = np.array(DOCUMENTS["source"])
    source_of, nats = names.repeat(DOCUMENTS["tokens"]), {}
    rows = rows_module.HeldoutRows(run / "data/tokens")
    for row in range(10):
        tokens = rows[row]["input_ids"].long()
        with torch.no_grad():
            log_probabilities = model(tokens[None]).logits[0].log_softmax(-1)
        for position in range(1, CONTEXT):
            source = str(source_of[row * CONTEXT + position])
            nats.setdefault(source, []).append(-float(log_probabilities[position - 1, tokens[position]]))
    sizes, lengths = np.array(DOCUMENTS["bytes"]), np.array(DOCUMENTS["tokens"])
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
    rows = rows_module.HeldoutRows(run / "data/tokens")
    batch = PackedCollator(EOS, isolate_documents=False)([rows[i] for i in range(10)])
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
    assert sample.continue_prompt(model, tokenizer, PROMPT).startswith(PROMPT)
    assert sample.continue_prompt(model, tokenizer, "") == sample.continue_prompt(model, tokenizer, "<eos>")
    assert model.training and torch.equal(torch.get_rng_state(), before)
