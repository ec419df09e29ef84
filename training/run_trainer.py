"""A `Trainer` that lives in a run directory: where it saves, what it logs, how it stops and resumes.

`RunTrainer` comes before a trainer of another library in a class's bases, and changes nothing about how that trains.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PrinterCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME

from nanophi.core import formatting
from nanophi.core.errors import UserError, is_disk_full
from nanophi.core.files import remove, sha256_of_file, write_json
from nanophi.core.names import step_name, step_of
from nanophi.core.recipe import Training
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.training import monitor
from nanophi.training.arguments import NO_FSDP, decay_start
from nanophi.training.budget import flops_per_token, peak_flops, uses_tf32
from nanophi.training.callbacks import ResumedRun, SaveAndStop, trackers
from nanophi.training.checkpoints import WEIGHTS, free_space_needed, states, store
from nanophi.training.continuation import data_hashes
from nanophi.training.energy import EnergyMeter
from nanophi.training.optimizer import MuonAdamW

UNLOGGED = "unlogged"
"""Key of the state that a run resumes from, among the callbacks': the sum of the losses since the last log entry."""


class RunTrainer(Trainer):
    """`Trainer` that saves into a run directory and logs tokens, speed and MFU.

    Args:
        run: the run directory.
        training: the recipe's section, for what `TrainingArguments` has no field for.
        base: the weights' file that training began with; None: random ones.
        tokens_per_step: of the whole batch; None: steps differ in tokens, and `Trainer` counts them.
        meter: of this machine's energy, in one process per machine.
        stop: the callback that knows of signals.
        **kwargs: the next class's own.
    """

    model: NanoPhiForCausalLM
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR

    def __init__(
        self,
        *,
        run: Path,
        training: Training,
        base: Path | None,
        tokens_per_step: int | None,
        meter: EnergyMeter | None,
        stop: SaveAndStop,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise UserError(NO_FSDP)  # accelerate would train without it, and not say so
        precision = {"no": "fp32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision)
        if precision != ("bf16" if self.args.bf16 else "fp32"):
            raise UserError(f"accelerate would train in {precision}, but training.precision is {training.precision}")
        self.run = run
        self.training = training
        self.hashes = data_hashes(run) | ({} if base is None else {"base_sha256": sha256_of_file(base)})
        self.tokens_per_step = tokens_per_step
        self.meter = meter
        self.stop = stop
        config, devices = self.model.config, self.args.world_size
        peak = None
        if torch.cuda.is_available():
            peak = peak_flops(torch.cuda.get_device_name(), precision, uses_tf32(training))
        price = training.dollars_per_hour
        self.clock = monitor.Clock(
            flops_per_token=flops_per_token(config, config.max_position_embeddings),
            peak_flops=None if peak is None else peak * devices,
            dollars_per_hour=None if price is None else price * devices,
        )
        self._saved_step: int | None = None

    def tokens_seen(self) -> int:
        """Tokens of all steps so far, those before a resumption among them."""
        if self.tokens_per_step is None:
            return self.state.num_input_tokens_seen
        return self.state.global_step * self.tokens_per_step

    def evaluate_if_missing(self) -> None:
        """What `ResumedRun` asks for at the resumed step; nothing, where training does not evaluate."""

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW is `Trainer`'s own; Muon is made here."""
        if self.training.optimizer == "muon" and self.optimizer is None:
            self.optimizer = MuonAdamW(
                self.model if model is None else model,
                muon_lr=self.training.muon_learning_rate,
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                weight_decay=self.args.weight_decay,
            )
        return super().create_optimizer(model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """`Trainer`'s; then the rates of this run's schedule, which may be longer than that of the saved state."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.lr_scheduler._last_lr = list(self._rates(self.lr_scheduler.last_epoch))
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler._last_lr, strict=True):
                group["lr"] = rate

    def _rates(self, step: int) -> Iterator[float]:
        """Learning rate of each parameter group in the step after `step` steps."""
        for base, factor in zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True):
            yield float(base * factor(step))

    # Logging

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add tokens seen, time, tokens/s, MFU and cost to `Trainer`'s entry; write `training.json`."""
        if "loss" in logs:
            self._check_loss(logs["loss"], self.training.logging_steps)
            logs |= self._learning_rates()
            logs |= self.clock.lap(self.tokens_seen())
        if bad := monitor.not_finite(logs):
            raise self._stopped(f"{bad} is {logs[bad]}", "Lower training.learning_rate")
        super().log(logs)
        if self.is_world_process_zero():
            write_json(self.run / "training.json", self.history())

    def _learning_rates(self) -> dict[str, float]:
        """The rates of the step that was taken last, by optimizer: AdamW's is the recipe's `learning_rate`."""
        names = [
            "muon_learning_rate" if group.get("kind") == "muon" else "learning_rate"
            for group in self.optimizer.param_groups
        ]
        return dict(zip(names, self._rates(max(0, self.state.global_step - 1)), strict=True))

    def _check_loss(self, loss: float, steps: int) -> None:
        """Stop before anything is saved if the mean loss of the last `steps` steps is not finite, or a spike."""
        bad = monitor.bad_loss(loss, steps, self.training, self.state.log_history)
        if bad is not None:
            raise self._stopped(*bad)

    def restore_unlogged(self) -> None:
        """The losses since the last log entry, which `Trainer` keeps out of the state that a run resumes from."""
        entries: Any = self.state.stateful_callbacks
        if unlogged := entries.get(UNLOGGED):
            self._tr_loss += unlogged["loss"]
            self._total_loss_scalar -= unlogged["loss"]  # what `Trainer` says at the end is of its own steps alone
            self._globalstep_last_logged = unlogged["since"]

    def history(self) -> dict[str, Any]:
        """The contents of `training.json`."""
        return monitor.history(self.state.log_history)

    # Checkpoints

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, with the clock and the meter started."""
        self.clock.start(0, [])
        if self.meter is not None:
            self.meter.start()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.stop.release()
            if self.meter is not None:
                self.meter.stop()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run / "training_state" / ".saving")

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save as `Trainer` does, in a private folder, then move the two halves to their names."""
        total, logged = float(self.accelerator.reduce(self._tr_loss.clone(), "mean")), self._globalstep_last_logged
        if steps := self.state.global_step - logged:
            self._check_loss(total / steps, steps)
        entries: Any = self.state.stateful_callbacks
        entries[UNLOGGED] = {"loss": total, "since": logged}
        began = time.monotonic()
        saving = Path(self._get_output_dir(trial))
        if self.args.should_save:
            remove(saving)
        self.accelerator.wait_for_everyone()
        try:
            needed = free_space_needed(sum(parameter.numel() for parameter in self.model.parameters()))
            if shutil.disk_usage(self.run).free < needed:
                raise self._no_space(needed)
            if self.training.track_energy:
                self._log_energy()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                saved, kept = next(saving.glob("checkpoint-*")), self.training.keep_steps
                store(self.run, saved, self._facts(), self.run / "data" / "tokenizer", kept, self._kept_states())
        except UserError:
            raise
        except Exception as error:
            # safetensors and torch.save wrap the operating system's error in their own.
            if is_disk_full(error):
                raise self._no_space() from error
            raise
        finally:
            if self.args.should_save:
                remove(saving)
        self.accelerator.wait_for_everyone()
        self._saved_step = self.state.global_step
        self.clock.pause(time.monotonic() - began)

    def _kept_states(self) -> set[int]:
        """Steps whose states stay: the last ones, and the one before `wsd` decays, from which a run can be extended."""
        step = self.state.global_step
        earlier = [number for number in map(step_of, states(self.run)) if number < step]
        kept = set(earlier[len(earlier) - self.training.keep_states + 1 :])
        if self.training.schedule == "wsd":
            kept.add(decay_start(self.training))
        return kept

    def _add_to_checkpoint(self) -> None:
        """Write the evaluation into the state and the checkpoint that were saved before it."""
        name = step_name(self.state.global_step)
        if self.is_world_process_zero() and (self.run / "training_state" / name).is_dir():
            text = self.run / "training_state" / f".{TRAINER_STATE_NAME}"
            self.state.save_to_json(str(text))
            text.replace(self.run / "training_state" / name / TRAINER_STATE_NAME)
            write_json(self.run / "checkpoints" / name / "checkpoint.json", self._facts())

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

    def _facts(self) -> dict[str, Any]:
        """`checkpoint.json`: what is known of this step's weights."""
        history = self.history()
        log, evaluations = history["log"][-1:], history["evaluations"][-1:]
        return {
            "step": self.state.global_step,
            "tokens_seen": self.tokens_seen(),
            "train_loss": log[0]["loss"] if log else None,
            "eval_loss": evaluations[0]["loss"] if evaluations else None,
            "eval_step": evaluations[0]["step"] if evaluations else None,
            "precision": "bf16" if self.args.bf16 else "fp32",
            **self.hashes,
        }

    def _log_energy(self) -> None:
        """The energy of all machines so far, in the log that the state keeps."""
        reading = self.meter.read() if self.meter is not None else (0.0, 0.0)
        energy, grams = self.accelerator.reduce(torch.tensor(reading, device=self.args.device), "sum").tolist()
        totals = self.clock.total("energy_kwh", energy), self.clock.total("co2_grams", grams)
        entry = monitor.energy_entry(self.state.global_step, *totals, self.training.country_iso_code)
        self.state.log_history.append(entry)

    # Errors

    def _no_space(self, needed: int | None = None) -> UserError:
        size = f" ({formatting.file_size(needed)} needed)" if needed else ""
        return UserError(
            f"no disk space left in {self.run} for the checkpoint of step {self.state.global_step}{size}; "
            f"free some and run the same command to resume from {self._last_good()}"
        )

    def _stopped(self, what: str, remedy: str) -> UserError:
        return UserError(
            f"{what} at step {self.state.global_step}; nothing was saved since {self._last_good()}. {remedy}"
        )

    def _last_good(self) -> str:
        saved = states(self.run)
        return f"checkpoint {saved[-1].name}" if saved else "the beginning"


def agree(resume: Path | None) -> Path | None:
    """The main process's decision, in every process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return resume
    decision = [None if resume is None else str(resume)]
    torch.distributed.broadcast_object_list(decision, src=0)
    return None if decision[0] is None else Path(decision[0])


def fit(
    trainer: RunTrainer, label: str, epochs: float, report: Callable[[str], None], resume: Path | None
) -> dict[str, Any]:
    """Train to the recipe's last step, from the beginning or from a saved state.

    Args:
        trainer: with `stop` among its callbacks.
        label: what lines begin with.
        epochs: how often the training data are read, for the summary.
        report: gets one line where something is worth telling.
        resume: the state to resume from; None: the beginning.

    Returns:
        JSON-able summary: steps, tokens, seconds, tokens/s, losses, parameter count, hash of the final weights.

    Raises:
        UserError: if a signal stopped it, after a save.
    """
    run, training, stop = trainer.run, trainer.training, trainer.stop
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ResumedRun(trainer))
    resume = agree(resume)
    if resume is not None:
        report(f"{label}: resuming from {resume.name}")
    with trackers(trainer):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if stop.stopping:
        reason = stop.received.name if stop.received else "a signal to another process"
        raise UserError(
            f"stopped by {reason} after saving step {trainer.state.global_step}; run the same command to resume"
        )
    final = run / "checkpoints" / step_name(training.steps)
    if not (final / WEIGHTS).is_file():
        trainer._save_checkpoint(trainer.model, None)  # the state was there, but the checkpoint had been removed
    history = trainer.history()
    steady = [entry["tokens_per_second"] for entry in history["log"][1:]] or [history["log"][0]["tokens_per_second"]]
    # Adapters are merged into the checkpoints.
    sizes = [value.numel() for name, value in trainer.model.named_parameters() if ".lora_" not in name]
    summary = {
        "checkpoint": f"checkpoints/{final.name}",
        "steps": training.steps,
        "tokens_seen": trainer.tokens_seen(),
        "epochs": epochs,
        "parameters": sum(sizes),
        "precision": "bf16" if trainer.args.bf16 else "fp32",
        "seconds": history["log"][-1]["elapsed_seconds"],
        "tokens_per_second": float(np.median(steady)),
        "flops_per_token": trainer.clock.flops_per_token,
        "final_loss": history["log"][-1]["loss"],
        "final_bits_per_byte": history["evaluations"][-1]["bits_per_byte"] if history["evaluations"] else None,
        "weights_sha256": sha256_of_file(final / WEIGHTS),
        **monitor.spent(trainer.state.log_history),
    }
    if trainer.is_world_process_zero():
        write_json(run / "training.json", {**history, "summary": summary})
    return summary
