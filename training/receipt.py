"""The receipt of the computation: loss and gradients of the first micro-batch beside those of stock Phi in float32.

The reference runs each document by itself, without packing, mask, chunks, kernels of ours or `Trainer`'s scaling.
Preferences, adapters and a model that FSDP divides have no such plain form, and are not compared.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PhiConfig, PhiForCausalLM

from nanophi.core.errors import UserError
from nanophi.training.loss import IGNORED

TOLERANCE = {"fp32": (1e-4, 1e-3), "tf32": (1e-3, 2e-2), "bf16": (2e-3, 5e-2)}
"""Relative difference of the loss, and of all gradients as one vector (its norm by the reference's), per precision."""
LOGIT_ROWS = 128
"""Tokens whose logits are held at once, so that the comparison never needs more memory than training does."""


def reference(model: Any) -> PhiForCausalLM:
    """Stock `PhiForCausalLM` on a model's own weights (not a copy), with gradients of its own."""
    known = model.config.to_dict()
    with torch.device("meta"):
        config = PhiConfig(**{key: known[key] for key in known if key not in ("auto_map", "model_type")})
        config._attn_implementation = "sdpa"
        plain = PhiForCausalLM(config).eval()
    plain.load_state_dict({name: value.detach() for name, value in model.state_dict().items()}, assign=True)
    plain.tie_weights()
    plain.model.rotary_emb = type(plain.model.rotary_emb)(config).to(next(model.parameters()).device)
    return plain.requires_grad_(True)


def reference_loss(plain: PhiForCausalLM, inputs: dict[str, torch.Tensor], starts: torch.Tensor, count: float) -> float:
    """Summed cross entropy of all labels, by `count`; its gradients are added up.

    `starts` (rows, length) is true where a document begins. Its last token predicts the first of the next one.
    """
    total, device = 0.0, plain.lm_head.weight.device
    for ids, labels, begins in zip(inputs["input_ids"], inputs["labels"], starts, strict=True):
        ids, targets = ids.to(device), nn.functional.pad(labels[1:], (0, 1), value=IGNORED).to(device)
        edges = [0, *(begins[1:].nonzero()[:, 0] + 1).tolist(), len(ids)]
        for first, end in itertools.pairwise(edges):
            hidden = plain.model(input_ids=ids[None, first:end], use_cache=False).last_hidden_state[0]
            leaf = hidden.detach().requires_grad_()
            for few, following in zip(leaf.split(LOGIT_ROWS), targets[first:end].split(LOGIT_ROWS), strict=True):
                logits = plain.lm_head(few).float()
                loss = nn.functional.cross_entropy(logits, following, ignore_index=IGNORED, reduction="sum") / count
                loss.backward()
                total += loss.item()
            hidden.backward(leaf.grad)
    return total


def gradient_difference(plain: nn.Module, model: nn.Module, average: bool) -> tuple[float, str]:
    """Distance of `model`'s gradients from `plain`'s by the norm of these, and the parameter that adds most to it.

    `average`: `model`'s are the mean over all processes.
    """
    norm, apart = 0.0, {}
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = theirs[name].grad
        gradient = torch.zeros_like(theirs[name]) if gradient is None else gradient
        if average:
            torch.distributed.all_reduce(gradient)
            gradient /= torch.distributed.get_world_size()
        ours = 0.0 if parameter.grad is None else parameter.grad
        norm += float(gradient.square().sum())
        apart[name] = float((ours - gradient).square().sum())
    worst = max(apart, key=lambda name: apart[name])
    return (sum(apart.values()) / norm) ** 0.5 if norm else 0.0, worst


def check(
    model: Any, inputs: dict[str, Any], starts: torch.Tensor, count: float, loss: float, kind: str, average: bool
) -> None:
    """Compare `loss`, and the gradients in `model`, with the reference's. Raises `UserError` that names the part.

    `count` divides the summed loss; `kind` is the precision, a key of `TOLERANCE`; `average` as above.
    """
    loss_tolerance, gradient_tolerance = TOLERANCE[kind]

    def difference(starts: torch.Tensor) -> str | None:
        plain = reference(model)
        expected = reference_loss(plain, inputs, starts, count)
        if not abs(loss - expected) <= loss_tolerance * abs(expected):
            return f"the loss ({loss / expected:.5f} of the reference's)"
        apart, worst = gradient_difference(plain, model, average)
        return None if apart <= gradient_tolerance else f"the gradients (by {apart:.2g} of their norm, most in {worst})"

    with torch.autocast(next(model.parameters()).device.type, enabled=False), torch.enable_grad():
        part = difference(starts)
        if part and starts.any() and not average and not difference(torch.zeros_like(starts)):
            part = "the documents' mask (it agrees with that of whole rows)"
    if part:
        raise UserError(
            f"the first micro-batch differs from stock Phi in float32 in {part}; nothing was trained; please report it "
            "with the versions of torch and transformers"
        )


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[bool]:
    """Switch dropout off within the body; gives whether there was any."""
    names = ("p", "attention_dropout")
    pairs = [(module, name) for module in model.modules() for name in names]
    found = [(*pair, value) for pair in pairs if isinstance(value := getattr(*pair, None), float) and value > 0]
    for module, name, _ in found:
        setattr(module, name, 0.0)
    try:
        yield bool(found)
    finally:
        for module, name, value in found:
            setattr(module, name, value)
