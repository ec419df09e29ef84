"""A base model trained on conversations or preferences by TRL's trainers, which `RunTrainer` gives a run directory.

TRL packs, masks and computes the loss; what is given to it is in `settings`, which a plain script may use as well.
"""

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core.errors import UserError
from nanophi.core.jobs import world_size
from nanophi.core.recipe import Recipe
from nanophi.data import conversations
from nanophi.data.stages import read_tokens
from nanophi.training.arguments import accelerate_precision, training_arguments
from nanophi.training.attention import PACKED_DOCUMENTS
from nanophi.training.base import base_model
from nanophi.training.checkpoints import WEIGHTS
from nanophi.training.run_trainer import RunTrainer


def trl() -> Any:
    """TRL. Raises `UserError` where it is not installed."""
    try:
        import trl
    except ImportError:
        raise UserError("conversations need TRL: pip install 'nanophi[chat]'") from None
    return trl


def trainer_class(method: str) -> type[RunTrainer]:
    """TRL's trainer of a method with a run directory."""
    kind: Any = trl().SFTTrainer if method == "sft" else trl().DPOTrainer

    class ChatTrainer(RunTrainer, kind):
        def document_starts(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
            whole = method == "sft" and not hasattr(self.model, "merge_and_unload")
            return inputs["position_ids"] == 0 if whole and "position_ids" in inputs else None

        def _send_telemetry(self) -> None:
            """Nothing is sent anywhere."""

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """The card is made from the run's records."""

        def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            """The model; with adapters the whole one, these merged, and beside it the adapters, to resume."""
            super()._save(output_dir, state_dict)
            if hasattr(self.model, "merge_and_unload") and self.args.should_save:
                whole: Any = copy.deepcopy(self.model)
                whole.merge_and_unload().save_pretrained(output_dir)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
            """Of a model with adapters these alone: the state's weights have them merged."""
            if not hasattr(self.model, "merge_and_unload"):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.model, load_peft_weights(resume_from_checkpoint))

    return ChatTrainer


def settings(recipe: Recipe, run: Path, context: int) -> Any:
    """TRL's configuration for a recipe: its `training` section, and what makes it the recipe's method."""
    more: dict[str, Any] = {"max_length": context, "eval_strategy": "no", "gradient_checkpointing": False}
    if recipe.method == "sft":  # packed rows are not padded, and have no mask that shows it
        more |= {"include_num_input_tokens_seen": "all", "packing": True, "packing_strategy": "bfd"}
    else:
        more |= {"include_num_input_tokens_seen": "non_padding", "beta": recipe.beta}
    kind = trl().SFTConfig if recipe.method == "sft" else trl().DPOConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL's name of gradient_checkpointing is the old one
        return training_arguments(recipe.training, run, recipe.training_seed, world_size(), kind, **more)


def train(
    run: Path, recipe: Recipe, config: NanoPhiConfig, report: Callable[[str], None] = print, resume: Path | None = None
) -> dict[str, Any]:
    """Train `data/base`, whose configuration is given, on `data/conversations`, from the state `resume`."""
    datasets.disable_progress_bars()
    disable_progress_bar()
    conversations.check(run, read_tokens(run / "data/tokens")["conversations"])
    training, arguments = recipe.training, settings(recipe, run, config.max_position_embeddings)
    tokenizer = AutoTokenizer.from_pretrained(run / "data/tokenizer")
    model = base_model(str(run / "data/base"), config)
    if arguments.device.type == "cpu" and recipe.method == "sft" and not training.compile:
        model.set_attn_implementation(PACKED_DOCUMENTS)
    extra: dict[str, Any] = {}
    if recipe.lora:
        from peft import LoraConfig

        size: Any = {"r": recipe.lora.rank, "lora_alpha": recipe.lora.alpha}
        extra["peft_config"] = LoraConfig(**size, target_modules="all-linear", task_type="CAUSAL_LM")
    elif recipe.method == "dpo":
        extra["ref_model"] = base_model(str(run / "data/base"), config)
    rows = datasets.Dataset.from_parquet(str(run / "data/conversations/train.parquet"), keep_in_memory=True)
    pad = config.pad_token_id
    with accelerate_precision(training):
        trainer: Any = trainer_class(recipe.method)(
            run=run,
            training=training,
            base=run / "data/base" / WEIGHTS,
            report=report,
            model=model,
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            **extra,
        )
    # TRL names a token to pad with, which the saved model must not have: it would never learn that token.
    trainer.model.config.pad_token_id = pad
    trainer.processing_class = None  # every checkpoint gets the run's tokenizer
    steps = math.ceil(len(trainer.train_dataset) / training.batch_size)  # of an epoch, which ends with what is left
    report(f"{recipe.name}: {recipe.method} on {len(rows):,} conversations")
    return trainer.fit(resume, epochs=training.steps / steps)
