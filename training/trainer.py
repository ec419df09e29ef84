"""Pretraining with `transformers.Trainer` over memory-mapped packed tokens, and its evaluations.

How a run directory is written and resumed is in `run_trainer.py`.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import AutoTokenizer, set_seed

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.core.jobs import world_size
from nanophi.core.recipe import Training
from nanophi.core.sample import continue_prompt
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.training.arguments import accelerate_precision, training_arguments
from nanophi.training.attention import PACKED_DOCUMENTS
from nanophi.training.base import base_file, base_model
from nanophi.training.loss import use_chunked_loss
from nanophi.training.rows import HeldoutRows, PackedCollator, PackedRows, PhasedRows, check_tokens
from nanophi.training.run_trainer import RunTrainer
from nanophi.training.stopping import StopRequestedError


class NanoPhiTrainer(RunTrainer):
    """`RunTrainer` over packed rows, which evaluates on held-out rows, and writes a sample if there is a `prompt`."""

    train_dataset: PackedRows | PhasedRows
    eval_dataset: HeldoutRows

    def __init__(self, *, prompt: str | None, eval_dataset: HeldoutRows, **kwargs: Any) -> None:
        super().__init__(eval_dataset=eval_dataset, compute_metrics=eval_dataset.metrics, **kwargs)
        self.prompt = prompt
        self.tokenizer = None if prompt is None else AutoTokenizer.from_pretrained(self.run / "data/tokenizer")
        self.bytes_per_token = read_json(self.run / "data/tokens/tokens.json")["heldout"]["bytes_per_token"]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return SequentialSampler(self.train_dataset)  # it is in order already

    def tokens_seen(self) -> int:
        """Of whole rows: the same at every step."""
        return self.state.global_step * self.training.batch_size * self.model.config.max_position_embeddings

    def document_starts(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """From the tokens themselves."""
        ends = torch.eq(inputs["input_ids"], cast(int, self.model.config.eos_token_id))
        return ends if self.training.isolate_documents else torch.zeros_like(ends)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """Tokens that a whole batch predicts: all of a row but its first, whichever of them `Trainer` would count."""
        predicted = self.model.config.max_position_embeddings - 1
        return torch.tensor(float(self.training.batch_size * predicted), device=device)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """An evaluation's entry gets its loss per token and bits per byte."""
        if "eval_loss" in logs:
            logs["eval_loss"] = logs.pop("eval_mean_loss")
            logs["tokens_seen"] = self.tokens_seen()
            logs["bits_per_byte"] = round(logs["eval_loss"] / math.log(2) / self.bytes_per_token, 5)
        super().log(logs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Save, then evaluate and write a sample, without a trace in the random state or the training time."""
        if self.is_in_train and self.saved_step != self.state.global_step:
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.control.should_save = False
            if self.control.should_training_stop:
                return {}
        began = time.monotonic()
        try:
            with torch.random.fork_rng():
                metrics = super().evaluate(*args, **kwargs)
                # A model that is divided among processes generates on all of them or not at all.
                if self.prompt is not None and (self.is_fsdp_enabled or self.is_world_process_zero()):
                    text: Any = continue_prompt(self.model, self.tokenizer, self.prompt)
                    self.state.log_history.append({"step": self.state.global_step, "sample": text})
        except StopRequestedError:
            self.control.should_training_stop = True
            return {}
        finally:
            self.clock.pause(time.monotonic() - began)
        self._add_to_checkpoint()
        return metrics

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean loss of a batch, and `HeldoutRows.sums` as prediction and label; no logits are kept."""
        if self.is_in_train and self.stop.agreed():
            raise StopRequestedError
        inputs = self._prepare_inputs(inputs)
        sources = inputs.pop("sources")
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = model(**inputs, reduction="none").loss
        return losses[:, :-1].mean(), *self.eval_dataset.sums(losses, sources)

    def begin(self) -> None:
        """Evaluate the resumed step as well, if the process before was stopped between saving and evaluating."""
        super().begin()
        step = self.state.global_step
        evaluated = any("eval_loss" in entry and entry["step"] == step for entry in self.state.log_history)
        if step and step % self.training.eval_steps == 0 and not evaluated:
            self.saved_step = step
            self.evaluate()


def train(
    run: Path,
    training: Training,
    config: NanoPhiConfig,
    seed: int,
    report: Callable[[str], None] = print,
    prompt: str | None = None,
    resume: Path | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Train on `data/tokens` of a run directory, from the state `resume` or the weights `base` names, with samples."""
    arguments = training_arguments(training, run, seed, world_size())
    set_seed(seed)
    tokens = run / "data/tokens"
    steps = {"train": training.steps}
    if (tokens / "decay").is_dir():
        steps = {"train": training.decay_start, "decay": training.steps - training.decay_start}
    texts = {split: PackedRows(tokens / split, n * training.batch_size, seed) for split, n in steps.items()}
    heldout, rows = HeldoutRows(tokens), PhasedRows(texts.values()) if len(texts) > 1 else texts["train"]
    check_tokens(tokens, **texts, heldout=heldout)
    if not isinstance(config.eos_token_id, int):
        raise UserError(f"the tokenizer must have one end-of-text token, found {config.eos_token_id}")
    model = NanoPhiForCausalLM(config) if base is None else base_model(base, config, run / "data/tokenizer")
    use_chunked_loss(model)
    if arguments.device.type == "cpu" and not training.compile:
        model.set_attn_implementation(PACKED_DOCUMENTS)
    with accelerate_precision(training):
        trainer = NanoPhiTrainer(
            run=run,
            training=training,
            base=None if base is None else base_file(base),
            report=report,
            prompt=prompt,
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=heldout,
            data_collator=PackedCollator(config.eos_token_id, training.isolate_documents),
        )
    epochs = {split: len(text) / len(text.dataset) for split, text in texts.items()}
    return trainer.fit(resume, **{"decay_epochs" if split == "decay" else "epochs": n for split, n in epochs.items()})
