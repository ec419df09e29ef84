"""A `Trainer` that lives in a run directory: when it saves and logs, and how it resumes.

`RunTrainer` comes before a trainer of another library in a class's bases, and changes nothing about how that trains.
What it puts together has a module of its own: checkpoints, progress, receipt, stopping.
"""

import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from nanophi.core import mirror
from nanophi.core.errors import UserError, is_disk_full, one_line
from nanophi.core.files import remove, sha256_of_file, write_json
from nanophi.core.names import step_name
from nanophi.core.recipe import Training
from nanophi.core.registry import OPTIMIZERS, find
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.training import progress, receipt
from nanophi.training.arguments import NO_FSDP
from nanophi.training.budget import device_named, fitting_rows, flops_per_token, uses_tf32
from nanophi.training.checkpoints import WEIGHTS, check_space, last_saved, store
from nanophi.training.continuation import data_hashes
from nanophi.training.loss import IGNORED
from nanophi.training.optimizer import rate_names
from nanophi.training.stopping import SaveAndStop, ignore_in_worker, loss_anomaly

UNLOGGED = "unlogged"
"""Key of the state that a run resumes from, among the callbacks': the sum of the losses since the last log entry."""


class RunTrainer(Trainer):
    """`Trainer` that saves into a run directory; `base` is the file of weights that it begins with (None: random)."""

    model: NanoPhiForCausalLM
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR

    def __init__(
        self, *, run: Path, training: Training, base: Path | None, report: Callable[[str], None], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise UserError(NO_FSDP)  # accelerate would silently train without it
        self.run = run
        self.training = training
        self.report = report
        self.precision = "bf16" if self.args.bf16 else "fp32"
        self.hashes = data_hashes(run) | ({} if base is None else {"base_sha256": sha256_of_file(base)})
        self.stop = SaveAndStop(training)
        config, devices, price = self.model.config, self.args.world_size, training.dollars_per_hour
        device = device_named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        peak = device.peak(self.precision, uses_tf32(training)) * devices if device else None
        flops = flops_per_token(config, config.max_position_embeddings)
        self.clock = progress.Clock(flops, peak, price and price * devices)
        self.saved_step: int | None = None
        self.compared = bool(self.is_fsdp_enabled)  # see `receipt.py`
        self.remove_callback(PrinterCallback)
        for callback in (progress.ProgressLine(run.name), self.stop, _Begin(self)):
            self.add_callback(callback)

    def tokens_seen(self) -> int:
        """Tokens of all steps so far, those before a resumption among them."""
        return self.state.num_input_tokens_seen

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The one that the recipe names."""
        if self.optimizer is None:
            make = find(OPTIMIZERS, self.training.optimizer, "training.optimizer")
            self.optimizer = make(self.model if model is None else model, self.training)
        return self.optimizer

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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s; of the first batch it is counted how many tokens are predicted, in all processes."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        if not self.compared:
            labels = [batch["labels"][..., 1:] for batch in samples if "labels" in batch]
            count = torch.tensor(sum(int((part != IGNORED).sum()) for part in labels), device=self.args.device)
            self._predicted = int(self.accelerator.reduce(count, "sum"))
        return samples, items

    def document_starts(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Where in a batch documents begin, for the reference; None: it has no plain reference."""
        return None

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """`Trainer`'s; the first micro-batch of a process is compared with a plain reference."""
        starts = None if self.compared else self.document_starts(inputs)
        self.compared = True
        if starts is None:
            return super().training_step(model, inputs, num_items_in_batch)
        kind = "tf32" if self.precision == "fp32" and uses_tf32(self.training) else self.precision
        processes = self.args.world_size
        average = processes > 1 and self.accelerator.sync_gradients
        with receipt.without_dropout(self.model) as dropped, torch.random.fork_rng():
            loss = super().training_step(model, inputs, num_items_in_batch)
            receipt.check(self.model, inputs, starts, self._predicted / processes, float(loss), kind, average)
        if dropped:
            model.zero_grad()
            return super().training_step(model, inputs, num_items_in_batch)
        return loss

    def begin(self) -> None:
        """At the first step of this process: `Trainer` has loaded the state, if there is one."""
        self.clock.start(self.tokens_seen(), self.state.log_history)
        entries: Any = self.state.stateful_callbacks
        if unlogged := entries.get(UNLOGGED):  # which `Trainer` keeps out of the state that a run resumes from
            self._tr_loss += unlogged["loss"]
            self._total_loss_scalar -= unlogged["loss"]  # what `Trainer` logs at the end is of its own steps alone
            self._globalstep_last_logged = unlogged["since"]

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add tokens seen, time, tokens/s, MFU, cost and the last step's rates to an entry; keep `training.json`."""
        if "loss" in logs:
            self._check_loss(logs["loss"], self.training.logging_steps)
            rates = self._rates(max(0, self.state.global_step - 1))
            logs |= dict(zip(rate_names(self.optimizer), rates, strict=True))
            logs |= self.clock.lap(self.tokens_seen())
        for name, value in logs.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise self._stopped(f"{name} is {value}", "Lower training.learning_rate")
        super().log(logs)
        if self.is_world_process_zero():
            write_json(self.run / "training.json", progress.history(self.state.log_history))

    def _check_loss(self, loss: float, steps: int) -> None:
        """Stop before anything is saved if the mean loss of the last `steps` steps is not finite, or a spike."""
        # Another text has another loss, which is no spike.
        start = self.training.decay_start if "decay_sha256" in self.hashes else self.training.steps
        log = [entry for entry in self.state.log_history if self.state.global_step <= start or entry["step"] > start]
        if found := loss_anomaly(loss, steps, self.training, log):
            raise self._stopped(*found)

    def _stopped(self, what: str, remedy: str) -> UserError:
        step = self.state.global_step
        return UserError(f"{what} at step {step}; nothing was saved since {last_saved(self.run)}. {remedy}")

    def _lost(self, error: Exception) -> UserError | None:
        """What to do after a failure of the machine that can be put right; None: it is another one."""
        rows = self.args.per_device_train_batch_size
        if isinstance(error, UserError):
            return None
        if is_disk_full(error):
            what, remedy = f"no disk space left in {self.run} for step {self.state.global_step}", "free some"
        elif "DataLoader worker" in str(error):
            what = "a process that loads data has died"
            remedy = "set training.arguments.dataloader_num_workers to fewer"
        elif isinstance(error, MemoryError) or should_reduce_batch_size(error):
            less = max((size for size in range(1, rows) if rows % size == 0), default=1)
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if torch.cuda.is_available():
                memory = torch.cuda.get_device_properties(0).total_memory
            fits = fitting_rows(self.model.config, self.training, less, memory)
            what = f"out of memory with a micro-batch of {rows}"
            remedy = f"set training.micro_batch_size={fits or 1}" if rows > 1 else "free some"
        else:
            return None
        resume = f"run the same command to resume from {last_saved(self.run)}"
        return UserError(f"{what} ({one_line(error)}); {remedy} and {resume}")

    def get_train_dataloader(self) -> Any:
        """`Trainer`'s, with workers that a signal to the process group does not end in the middle of a save."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)
        if inner.num_workers:
            inner.worker_init_fn = functools.partial(ignore_in_worker, inner.worker_init_fn)
        return loader

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run / "training_state" / ".saving")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """`Trainer`'s. FSDP gives a model a class of its own, whose source would be saved beside the weights."""
        if not self.is_fsdp_enabled:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            assert output_dir is not None
            with torch.device("meta"):
                plain = NanoPhiForCausalLM(self.model.config)
            plain.save_pretrained(output_dir, state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """`Trainer`'s; of a model that is divided every process reads the whole weights, and keeps its part."""
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights: dict[str, Any] = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        set_model_state_dict(self.model, weights, options=StateDictOptions(full_state_dict=True))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save as `Trainer` does, in a private folder, then move the two halves to their names."""
        step, logged = self.state.global_step, self._globalstep_last_logged
        total = float(self.accelerator.reduce(self._tr_loss.clone(), "mean"))
        if step > logged:
            self._check_loss(total / (step - logged), step - logged)
        entries: Any = self.state.stateful_callbacks
        entries[UNLOGGED] = {"loss": total, "since": logged}
        began = time.monotonic()
        saving = Path(self._get_output_dir(trial))
        if self.args.should_save:
            remove(saving)
        self.accelerator.wait_for_everyone()
        try:
            if self.training.track_energy:  # of all machines
                reading = torch.tensor(self.energy(), device=self.args.device)
                here = zip(("energy_kwh", "co2_grams"), self.accelerator.reduce(reading, "sum").tolist(), strict=True)
                entry: dict[str, Any] = {key: self.clock.total(key, value) for key, value in here}
                entry |= {"co2_source": progress.ENERGY_SOURCE, "co2_region": self.training.country_iso_code}
                self.state.log_history.append({"step": step, **entry})
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                store(self.run, next(saving.glob("checkpoint-*")), self._facts(), self.training)
                mirror.saved(self.run)
        finally:
            if self.args.should_save:
                remove(saving)
        self.accelerator.wait_for_everyone()
        self.saved_step = step
        self.clock.pause(time.monotonic() - began)

    def _facts(self) -> dict[str, Any]:
        """`checkpoint.json`: what is known of this step's weights."""
        known = progress.history(self.state.log_history)
        log, evaluation = ((known[part] or [{}])[-1] for part in ("log", "evaluations"))
        return {
            "step": self.state.global_step,
            "tokens_seen": self.tokens_seen(),
            "train_loss": log.get("loss"),
            "eval_loss": evaluation.get("loss"),
            "eval_step": evaluation.get("step"),
            "precision": self.precision,
            **self.hashes,
        }

    def _add_to_checkpoint(self) -> None:
        """Write the evaluation into the state and the checkpoint that were saved before it."""
        name = step_name(self.state.global_step)
        if self.is_world_process_zero() and (self.run / "training_state" / name).is_dir():
            text = self.run / "training_state" / f".{TRAINER_STATE_NAME}"
            self.state.save_to_json(str(text))
            text.replace(self.run / "training_state" / name / TRAINER_STATE_NAME)
            write_json(self.run / "checkpoints" / name / "checkpoint.json", self._facts())
            mirror.saved(self.run)

    def fit(self, resume: Path | None, **epochs: float) -> dict[str, Any]:
        """Train to the last step, from the beginning or from the main process's `resume`; the summary that is kept.

        `epochs`: how often the data are read, and `decay_epochs` if the decay's are others. Raises `UserError` if a
        signal stopped it, after a save.
        """
        check_space(self.run, self.model)
        if resume := broadcast_object_list([resume])[0]:
            self.report(f"{self.run.name}: resuming from {resume.name}")
        with progress.trackers(self), progress.energy(self.training, self.report) as self.energy:
            try:
                self.train(resume_from_checkpoint=str(resume) if resume else None)
            except Exception as error:
                if lost := self._lost(error):
                    raise lost from error
                raise
            finally:
                self.stop.release()
        if self.stop.stopping:
            reason = self.stop.received.name if self.stop.received else "a signal to another process"
            step = self.state.global_step
            raise UserError(f"stopped by {reason} after saving step {step}; run the same command to resume")
        final = self.run / "checkpoints" / step_name(self.training.steps)
        if not (final / WEIGHTS).is_file():
            self._save_checkpoint(self.model, None)  # the state was there, but the checkpoint had been removed
        known = progress.history(self.state.log_history)
        log, evaluations = known["log"], known["evaluations"]
        # Adapters are merged into the checkpoints.
        sizes = [value.numel() for name, value in self.model.named_parameters() if ".lora_" not in name]
        summary = {
            "checkpoint": f"checkpoints/{final.name}",
            "steps": self.training.steps,
            "tokens_seen": self.tokens_seen(),
            **epochs,
            "parameters": sum(sizes),
            "precision": self.precision,
            "seconds": log[-1]["elapsed_seconds"],
            # The first interval includes warm-up.
            "tokens_per_second": float(np.median([entry["tokens_per_second"] for entry in log[1:] or log])),
            "flops_per_token": self.clock.flops_per_token,
            "final_loss": log[-1]["loss"],
            "final_bits_per_byte": evaluations[-1]["bits_per_byte"] if evaluations else None,
            "weights_sha256": sha256_of_file(final / WEIGHTS),
            **progress.cost_and_energy(self.state.log_history),
        }
        if self.is_world_process_zero():
            write_json(self.run / "training.json", {**known, "summary": summary})
        return summary


class _Begin(TrainerCallback):
    """Tells the trainer that `Trainer` has loaded the state, before the first step."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()
