"""A model small enough for any test, tokens for it, and how results are compared."""

import torch

from nanophi import NanoPhiConfig, NanoPhiForCausalLM

TOLERANCE = 1e-5
SHAPE = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SHAPE |= {"bos_token_id": 1, "eos_token_id": 2}


def make_model(**fields):
    torch.manual_seed(0)
    model = NanoPhiForCausalLM(NanoPhiConfig(**{**SHAPE, **fields}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def tokens(batch=2, length=21, seed=1):
    return torch.randint(3, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def difference(first, second):
    return (first - second).abs().max().item()


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same_gradients(first, second, tolerance=TOLERANCE):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert difference(gradient, second[name]) < tolerance, name
