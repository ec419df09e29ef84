"""Packed documents one by one, against attention with a mask over the whole row."""

import json

import pytest
import torch

from nanophi import NanoPhiConfig, NanoPhiForCausalLM
from nanophi.training.attention import PACKED_DOCUMENTS, document_lengths

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return NanoPhiForCausalLM(NanoPhiConfig(**SHAPE, attn_implementation="sdpa"))


def positions(*rows):
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def test_lengths_come_from_restarting_positions():
    assert document_lengths(positions((3, 2), (5,), (1, 4))) == [3, 2, 5, 1, 4]
    assert document_lengths(positions((5,), (5,))) is None
    assert document_lengths(torch.tensor([[7, 8, 9, 0, 1]])) == [3, 2]  # a row may begin inside a document


@pytest.mark.parametrize("rows", [[(7, 1, 13), (21,)], [(21,), (21,)], [(10, 11)]], ids=["packed", "whole", "shared"])
def test_the_output_and_gradients_are_those_of_a_mask(model, rows):
    ids = torch.randint(3, 61, (2, 21), generator=torch.Generator().manual_seed(1))
    outcomes = []
    for implementation in ("sdpa", PACKED_DOCUMENTS):
        model.set_attn_implementation(implementation)
        outputs = model.train()(ids, labels=ids, position_ids=positions(*rows), use_cache=False)
        outputs.loss.backward()
        outcomes.append([outputs.logits, *(parameter.grad.clone() for parameter in model.parameters())])
        model.zero_grad()
    for expected, actual in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_padding_and_a_cache_go_to_sdpa(model):
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    outcomes = []
    for implementation in ("sdpa", PACKED_DOCUMENTS):
        model.eval().set_attn_implementation(implementation)
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        outcomes.append((generated, model(ids, attention_mask=mask).logits[mask.bool()]))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1])


def test_a_saved_model_does_not_name_it(model, tmp_path):
    model.set_attn_implementation(PACKED_DOCUMENTS)
    model.save_pretrained(tmp_path)
    assert PACKED_DOCUMENTS not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert NanoPhiForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
