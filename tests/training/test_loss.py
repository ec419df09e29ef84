"""What makes training fast against transformers' own: the loss in chunks, and packed documents one by one."""

import math

import pytest
import torch
from tiny_model import TOLERANCE, assert_same_gradients, difference, gradients, make_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from nanophi import NanoPhiForCausalLM
from nanophi.training import loss as losses
from nanophi.training.attention import PACKED_DOCUMENTS, document_lengths


def make_trained(**fields):
    model = make_model(**fields).train()
    losses.use_chunked_loss(model)
    return model


@pytest.mark.parametrize("chunk", [1, 8, 42, 512])
@pytest.mark.parametrize("items", [None, 17, torch.tensor(17)], ids=["mean", "int", "tensor"])
def test_the_chunked_loss_is_transformers_loss(monkeypatch, chunk, items):
    monkeypatch.setattr(losses, "LOSS_CHUNK", chunk)
    model = make_trained()
    ids = tokens()
    labels = ids.clone()
    labels[0, :4] = -100
    outputs = model(ids, labels=labels, num_items_in_batch=items)
    assert outputs.logits is None
    outputs.loss.backward()
    actual = gradients(model)
    loss = ForCausalLMLoss(model(ids).logits, labels, model.config.vocab_size, num_items_in_batch=items)
    loss.backward()
    assert difference(outputs.loss, loss) < TOLERANCE
    assert_same_gradients(gradients(model), actual)
    model.lm_head.requires_grad_(False)  # a frozen head gets none; accumulation scales what the others get
    (model(ids, labels=labels, num_items_in_batch=items).loss / 4).backward()
    assert model.lm_head.weight.grad is None
    name = "model.layers.0.mlp.fc1.weight"
    assert difference(4 * model.get_parameter(name).grad, actual[name]) < TOLERANCE


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [4, 1024])
def test_the_losses_of_single_tokens_are_those_of_the_logits(monkeypatch, chunk, bf16):
    monkeypatch.setattr(losses, "LOSS_CHUNK", chunk)
    model = make_trained().eval()
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        actual = model(ids, labels=ids, reduction="none").loss
        logits = model(ids).logits.float()
    assert not actual.requires_grad
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(actual[:, :-1].flatten(), expected, atol=1e-2 if bf16 else 1e-5, rtol=1e-5)
    assert not actual[:, -1].any()


def test_generation_works_as_before_and_nothing_is_saved(tmp_path):
    model, plain = make_trained().eval(), make_model().eval()
    ids = tokens(batch=1)
    arguments = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **arguments), plain.generate(ids, **arguments))
    for name, saved in (("trained", model), ("plain", plain)):
        saved.save_pretrained(tmp_path / name)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("trained", "plain")]
    assert files[0] == files[1]


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [tensor for tensor in torch.utils._pytree.tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.elements = max(self.elements, *(tensor.numel() for tensor in tensors), 0)
        return result


def test_neither_training_nor_validation_holds_the_full_logits(monkeypatch):
    monkeypatch.setattr(losses, "LOSS_CHUNK", 8)
    model, ids = make_trained(vocab_size=4096), tokens(length=64)
    full = ids.numel() * 4096
    for within, run in (
        (full / 2, lambda: model(ids, labels=ids).loss.backward()),  # the head's weight and its gradient
        (full / 2, lambda: model(ids, labels=ids, reduction="none")),
        (math.inf, lambda: model(ids)),
    ):
        with LargestTensor() as largest:
            run()
        assert largest.elements <= within
    assert largest.elements >= full


def test_compiled_in_one_graph_it_gives_the_same_gradients():
    model, ids = make_trained(), tokens()
    model(ids, labels=ids).loss.backward()
    plain = gradients(model)
    torch.compile(model, backend="aot_eager", fullgraph=True)(ids, labels=ids).loss.backward()
    assert_same_gradients(plain, gradients(model))


def test_under_bf16_autocast_the_loss_and_gradients_stay_close():
    model = make_trained().train()
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    exact = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.dtype == torch.float32
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).norm() < 0.05 * exact[name].norm() + 1e-3, name


@pytest.fixture
def packing():
    return make_model(attn_implementation="sdpa")


def positions(*rows):
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def test_lengths_come_from_restarting_positions():
    assert document_lengths(positions((3, 2), (5,), (1, 4))) == [3, 2, 5, 1, 4]
    assert document_lengths(positions((5,), (5,))) is None
    assert document_lengths(torch.tensor([[7, 8, 9, 0, 1]])) == [3, 2]  # a row may begin inside a document


@pytest.mark.parametrize("rows", [[(7, 1, 13), (21,)], [(21,), (21,)], [(10, 11)]], ids=["packed", "whole", "shared"])
def test_the_output_and_gradients_are_those_of_a_mask(packing, rows):
    ids = tokens()
    outcomes = []
    for implementation in ("sdpa", PACKED_DOCUMENTS):
        packing.set_attn_implementation(implementation)
        outputs = packing.train()(ids, labels=ids, position_ids=positions(*rows), use_cache=False)
        outputs.loss.backward()
        outcomes.append([outputs.logits, *(parameter.grad.clone() for parameter in packing.parameters())])
        packing.zero_grad()
    for expected, actual in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_padding_and_a_cache_go_to_sdpa(packing):
    ids = tokens(length=9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    outcomes = []
    for implementation in ("sdpa", PACKED_DOCUMENTS):
        packing.eval().set_attn_implementation(implementation)
        generated = packing.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        outcomes.append((generated, packing(ids, attention_mask=mask).logits[mask.bool()]))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1])


def test_a_saved_model_does_not_name_it(packing, tmp_path):
    packing.set_attn_implementation(PACKED_DOCUMENTS)
    packing.save_pretrained(tmp_path)
    assert PACKED_DOCUMENTS not in (tmp_path / "config.json").read_text()
    assert NanoPhiForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
