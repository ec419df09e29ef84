"""The loss in chunks against transformers' own: value, gradients, memory."""

import pytest
import torch
from tiny_model import TOLERANCE, assert_same_gradients, difference, gradients, make_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from nanophi.training import loss as losses


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


def test_labels_that_are_all_ignored_give_what_transformers_gives():
    model = make_trained().train()
    ids = tokens()
    ignored = torch.full_like(ids, -100)
    assert model(ids, labels=ignored).loss.isnan()
    loss = model(ids, labels=ignored, num_items_in_batch=1).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_neither_training_nor_validation_holds_the_full_logits(monkeypatch):
    monkeypatch.setattr(losses, "LOSS_CHUNK", 8)
    model = make_trained(vocab_size=4096).train()
    ids = tokens(length=64)
    full = ids.numel() * 4096
    with LargestTensor() as largest:
        model(ids, labels=ids).loss.backward()
    assert largest.elements <= full / 2  # the head's weight and its gradient
    with LargestTensor() as largest:
        model.eval()(ids, labels=ids, reduction="none")
    assert largest.elements <= full / 2
    with LargestTensor() as largest:
        model(ids)
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
