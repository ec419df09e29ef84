"""The receipt of the computation: loss and gradients of the first micro-batch beside those of stock Phi in float32.

The reference runs each document by itself, without packing, mask, chunks, kernels of ours or `Trainer`'s scaling.
Nothing that training uses changes: the reference has gradients of its own, and draws nothing from the random state.
Preferences, adapters and a model that FSDP divides are not compared: TRL's losses and FSDP's shards have no such plain
form.
"""

from __future__ import annotations

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


class Reference:
    """Stock `PhiForCausalLM` on a model's own weights (not a copy), with gradients of its own."""

    def __init__(self, model: Any) -> None:
        known = model.config.to_dict()
        device = next(model.parameters()).device
        with torch.device("meta"):
            config = PhiConfig(**{key: known[key] for key in known if key not in ("auto_map", "model_type")})
            config._attn_implementation = "sdpa"
            self.model = PhiForCausalLM(config).eval()
        weights = {name: value.detach() for name, value in model.state_dict().items()}
        self.model.load_state_dict(weights, assign=True)
        self.model.tie_weights()
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config).to(device)
        self.model.requires_grad_(True)

    def loss(self, inputs: dict[str, torch.Tensor], starts: torch.Tensor, count: float) -> float:
        """Summed cross entropy of all labels, by `count`; its gradients are added up.

        `starts` (rows, length) is true where a document begins. Its last token predicts the first of the next one.
        """
        total = 0.0
        device = self.model.lm_head.weight.device
        for ids, labels, begins in zip(inputs["input_ids"], inputs["labels"], starts, strict=True):
            ids, targets = ids.to(device), nn.functional.pad(labels[1:], (0, 1), value=IGNORED).to(device)
            edges = [0, *(begins[1:].nonzero()[:, 0] + 1).tolist(), len(ids)]
            for first, end in itertools.pairwise(edges):
                logits = self.model(input_ids=ids[None, first:end], use_cache=False).logits[0].float()
                loss = (
                    nn.functional.cross_entropy(logits, targets[first:end], ignore_index=IGNORED, reduction="sum")
                    / count
                )
                loss.backward()
                total += loss.item()
        return total

    def gradient_difference(self, model: nn.Module, average: bool) -> tuple[float, str]:
        """Distance of `model`'s gradients from these by their norm, and the parameter that adds most to it.

        `average`: `model`'s are the mean over all processes.
        """
        norm, apart = 0.0, {}
        theirs = dict(self.model.named_parameters())
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
    model: Any,
    inputs: dict[str, torch.Tensor],
    starts: torch.Tensor,
    count: float,
    loss: float,
    kind: str,
    average: bool,
) -> None:
    """Compare `loss`, and the gradients in `model`, with the reference's. Raises `UserError` that names the part.

    `count` divides the summed loss; `kind` is the precision, a key of `TOLERANCE`; `average` as above.
    """
    device = next(model.parameters()).device.type
    with torch.autocast(device, enabled=False), torch.enable_grad():
        part = _difference(model, inputs, starts, count, loss, TOLERANCE[kind], average)
        if part is None:
            return
        whole = torch.zeros_like(starts)
        if starts.any() and not average and not _difference(model, inputs, whole, count, loss, TOLERANCE[kind], False):
            part = "the documents' mask (it agrees with that of whole rows)"
    raise UserError(
        f"the first micro-batch differs from stock Phi in float32 in {part}; nothing was trained; please report it "
        "with the versions of torch and transformers"
    )


def _difference(
    model: Any,
    inputs: dict[str, torch.Tensor],
    starts: torch.Tensor,
    count: float,
    loss: float,
    allowed: tuple[float, float],
    average: bool,
) -> str | None:
    """The part that differs by more than is allowed, and by how much; None: none does."""
    reference = Reference(model)
    expected = reference.loss(inputs, starts, count)
    if not abs(loss - expected) <= allowed[0] * abs(expected):
        return f"the loss ({loss / expected:.5f} of the reference's)"
    apart, worst = reference.gradient_difference(model, average)
    return None if apart <= allowed[1] else f"the gradients (by {apart:.2g} of their norm, most in {worst})"


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[bool]:
    """Switch dropout off within the body; gives whether there was any."""
    found = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name in ("p", "attention_dropout")
        if isinstance(getattr(module, name, None), float) and getattr(module, name) > 0
    ]
    for module, name, _ in found:
        setattr(module, name, 0.0)
    try:
        yield bool(found)
    finally:
        for module, name, value in found:
            setattr(module, name, value)
