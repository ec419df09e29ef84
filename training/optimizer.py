"""The optimizers of `core/registry.py`, each a function of the model and the recipe's `training` section.

The log calls the rate of a parameter group with a `kind` `<kind>_learning_rate`, that of all others `learning_rate`.
"""

import re
from typing import Any

import torch
from torch import nn

from nanophi.core.recipe import Training

ADAM_EPS = 1e-8


def adamw(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """Fused AdamW; weight decay acts on matrices only."""
    return _adamw([parameter for parameter in model.parameters() if parameter.requires_grad], training)


def _adamw(parameters: list[Any], training: Training) -> torch.optim.AdamW:
    decayed = {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay}
    others = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    betas = (training.adam_beta1, training.adam_beta2)
    return torch.optim.AdamW([decayed, others], lr=training.learning_rate, betas=betas, eps=ADAM_EPS, fused=True)


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for the matrices between hidden layers, `torch.optim.AdamW` for the rest, as one optimizer.

    Muon (https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of a matrix. Learning-rate schedulers,
    accelerate and checkpoints expect one object with one `param_groups` and one `state`.
    """

    def __init__(self, model: nn.Module, training: Training) -> None:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        inner = {name for name, p in trained if p.ndim >= 2 and not re.search("embed_tokens|lm_head", name)}
        matrices, rate = [parameter for name, parameter in trained if name in inner], training.muon_learning_rate
        self._muon = torch.optim.Muon(matrices, lr=rate, weight_decay=training.weight_decay, momentum=0.95)
        self._adamw = _adamw([parameter for name, parameter in trained if name not in inner], training)
        kinds = (("muon", self._muon), ("adamw", self._adamw))
        super().__init__([{**group, "kind": kind} for kind, of in kinds for group in of.param_groups], defaults={})
        self._share()

    def _share(self) -> None:
        """Let the two inner optimizers work on this object's groups and state."""
        for optimizer, kind in ((self._muon, "muon"), (self._adamw, "adamw")):
            optimizer.param_groups = [group for group in self.param_groups if group["kind"] == kind]
            optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `Trainer` gives no closure."""
        self._muon.step()
        self._adamw.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state, in both inner optimizers too."""
        super().load_state_dict(state_dict)
        self._share()


def rate_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """What the log calls the learning rate of each parameter group."""
    kinds = [group.get("kind", "adamw") for group in optimizer.param_groups]
    return ["learning_rate" if kind == "adamw" else f"{kind}_learning_rate" for kind in kinds]
