"""Optimizers: AdamW as `Trainer` makes it, or Muon for the hidden matrices with AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

ADAM_EPS = 1e-8


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` behind one optimizer interface.

    Muon (https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of a matrix. It suits the weights
    between hidden layers; embeddings, the output head, biases and norms train with AdamW. Learning-rate schedulers,
    accelerate and checkpoints expect one object with one `param_groups` and one `state`.

    Args:
        model: the model; its parameters are assigned by name and shape.
        muon_lr: peak learning rate of the matrices.
        lr, betas, weight_decay: AdamW's; weight decay acts on matrices only.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        muon_lr: float,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        matrices, tables, vectors = [], [], []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.ndim < 2:
                vectors.append(parameter)
            elif "embed_tokens" in name or "lm_head" in name or parameter.ndim > 2:
                tables.append(parameter)
            else:
                matrices.append(parameter)
        muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, momentum=0.95)
        adamw = torch.optim.AdamW(
            [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=lr,
            betas=betas,
            eps=ADAM_EPS,
            fused=True,
        )
        groups = [{**group, "kind": "muon"} for group in muon.param_groups]
        groups += [{**group, "kind": "adamw"} for group in adamw.param_groups]
        super().__init__(groups, defaults={})
        self._muon, self._adamw = muon, adamw
        self._share()

    def _share(self) -> None:
        """Let the two inner optimizers work on this object's groups and state."""
        for optimizer, kind in ((self._muon, "muon"), (self._adamw, "adamw")):
            optimizer.param_groups = [group for group in self.param_groups if group["kind"] == kind]
            optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()
        self._adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state, in both inner optimizers too."""
        super().load_state_dict(state_dict)
        self._share()
