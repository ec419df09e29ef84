"""Packed documents one by one, against attention with a mask over the whole row."""

import pytest
import torch
from tiny_model import make_model, tokens

from nanophi import NanoPhiForCausalLM
from nanophi.training.attention import PACKED_DOCUMENTS, document_lengths


@pytest.fixture
def model():
    return make_model(attn_implementation="sdpa")


def positions(*rows):
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def test_lengths_come_from_restarting_positions():
    assert document_lengths(positions((3, 2), (5,), (1, 4))) == [3, 2, 5, 1, 4]
    assert document_lengths(positions((5,), (5,))) is None
    assert document_lengths(torch.tensor([[7, 8, 9, 0, 1]])) == [3, 2]  # a row may begin inside a document


@pytest.mark.parametrize("rows", [[(7, 1, 13), (21,)], [(21,), (21,)], [(10, 11)]], ids=["packed", "whole", "shared"])
def test_the_output_and_gradients_are_those_of_a_mask(model, rows):
    ids = tokens()
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
    ids = tokens(length=9)
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
    assert PACKED_DOCUMENTS not in (tmp_path / "config.json").read_text()
    assert NanoPhiForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
