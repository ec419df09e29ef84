"""FSDP: a model that is divided among accelerators is saved and loaded as a whole one is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import Trainer

from nanophi.core.errors import UserError
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.training.arguments import NO_FSDP
from nanophi.training.checkpoints import WEIGHTS


class DividedTrainer(Trainer):
    """`Trainer` whose checkpoints do not show whether the model was divided."""

    model: NanoPhiForCausalLM

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise UserError(NO_FSDP)  # accelerate would silently train without it

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.is_fsdp_enabled:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            assert output_dir is not None
            # FSDP gives the model a class of its own, whose source would be saved beside the weights.
            with torch.device("meta"):
                plain = NanoPhiForCausalLM(self.model.config)
            plain.save_pretrained(output_dir, state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # `Trainer` would read a pickle that it saved as well; every process reads the same weights, and keeps its part.
        weights: dict[str, Any] = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        set_model_state_dict(self.model, weights, options=StateDictOptions(full_state_dict=True))
