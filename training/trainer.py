"""Pretraining with `transformers.Trainer` over memory-mapped packed tokens.

`NanoPhiTrainer` changes where `Trainer` saves, not how it trains: `checkpoints/step-NNNNNN/` holds a model that loads
by itself, `training_state/step-NNNNNN/` holds what only a resumed run needs. Both appear whole or not at all.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.files import UserError, read_json, remove, sha256_of_file, write_json
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.recipe import Training, suggestion
from nanophi.training.attention import PACKED_DOCUMENTS
from nanophi.training.callbacks import ProgressLine, SaveTimes
from nanophi.training.checkpoints import check_data, data_hashes, is_disk_full, last_checkpoint, publish, step_of
from nanophi.training.energy import ENERGY_SOURCE, EnergyMeter, open_meter
from nanophi.training.estimate import flops_per_token, peak_flops
from nanophi.training.loss import use_chunked_loss
from nanophi.training.optimizer import ADAM_EPS, MuonAdamW
from nanophi.training.rows import PackedCollator, PackedRows
from nanophi.training.validation import BY_SOURCE, HeldoutRows, SampleText

FREE_SPACE_FACTOR = 1.1
NO_FSDP = (
    "training.arguments: fsdp divides a model among several accelerators; start by `accelerate launch` where there are "
    "some, or leave fsdp out"
)
SPIKE_WINDOW, SPIKE_LOSSES = 50, 10
NOT_IN_WEIGHTS = {
    "report_to",
    "logging_steps",
    "spike_threshold",
    "dollars_per_hour",
    "track_energy",
    "country_iso_code",
}
"""Keys of the recipe's section that may change while a run is stopped: they do not change what is learnt."""


def has_bf16() -> bool:
    """Whether this machine computes in bfloat16 by hardware (a GPU of Ampere or later, AVX512-BF16 or AMX)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def training_arguments(training: Training, run: Path, seed: int, world_size: int = 1) -> TrainingArguments:
    """The recipe's `training` section as `TrainingArguments`.

    Raises:
        UserError: for an unknown field in `arguments`, one that the recipe sets by another key, a batch that does not
            divide among the devices, or a tracker in `report_to` that is unknown or not installed.
    """
    micro_batch_size = training.micro_batch_size or max(1, training.batch_size // world_size)
    if training.batch_size % (micro_batch_size * world_size):
        raise UserError(
            f"training.batch_size ({training.batch_size}) is no multiple of micro_batch_size x devices "
            f"({micro_batch_size} x {world_size}); change training.micro_batch_size"
        )
    schedules: dict[str, dict[str, Any]] = {
        "cosine": {"lr_scheduler_type": "cosine"},
        "constant": {"lr_scheduler_type": "constant_with_warmup"},
        "wsd": {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {
                "num_decay_steps": min(
                    round(training.steps * training.decay_fraction), training.steps - training.warmup_steps
                ),
                "decay_type": "linear",
            },
        },
    }
    bf16 = has_bf16() if training.precision == "auto" else training.precision == "bf16"
    ours: dict[str, Any] = {
        "output_dir": str(run / "training_state"),
        "max_steps": training.steps,
        "per_device_train_batch_size": micro_batch_size,
        "per_device_eval_batch_size": micro_batch_size,
        "gradient_accumulation_steps": training.batch_size // (micro_batch_size * world_size),
        "optim": "adamw_torch_fused",
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_epsilon": ADAM_EPS,
        "max_grad_norm": training.max_grad_norm,
        "warmup_steps": training.warmup_steps,
        **schedules[training.schedule],
        "bf16": bf16,
        # Trainer refuses bf16 on a processor unless it is told that no device is meant.
        "use_cpu": not torch.accelerator.is_available(),
        "torch_compile": training.compile,
        "save_strategy": "steps",
        "save_steps": training.save_steps,
        "eval_strategy": "steps",
        "eval_steps": training.eval_steps,
        "prediction_loss_only": True,
        "logging_strategy": "steps",
        "logging_steps": training.logging_steps,
        "logging_nan_inf_filter": False,
        "report_to": training.report_to,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "seed": seed,
        "data_seed": seed,
    }
    allowed = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in training.arguments:
        if name not in allowed:
            raise UserError(f"training.arguments: unknown key '{name}'{suggestion(name, allowed)}")
        if name in ours:
            raise UserError(f"training.arguments: '{name}' follows from the keys of `training`; set it there")
    for tracker in training.report_to:
        try:
            for callback in get_reporting_integration_callbacks([tracker]):
                callback()
        except (ImportError, RuntimeError, ValueError) as error:
            raise UserError(f"training.report_to: {' '.join(str(error).split())}") from None
    if training.arguments.get("fsdp") and world_size == 1:
        raise UserError(NO_FSDP)
    try:
        return TrainingArguments(**ours, **training.arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"training.arguments: {' '.join(str(error).split())}") from None


class NanoPhiTrainer(Trainer):
    """`Trainer` that saves into a run directory and logs tokens, speed and MFU.

    Args:
        run: the run directory.
        training: the recipe's section, for what `TrainingArguments` has no field for.
        tokenizer: folder whose files every checkpoint gets.
        bytes_per_token: of the validation text, to turn its loss into bits per byte.
        prompt: what the sample text at every evaluation begins with; None: no samples.
        meter: of this machine's energy, in one process per machine.
        **kwargs: `Trainer`'s own.
    """

    model: NanoPhiForCausalLM
    train_dataset: PackedRows
    eval_dataset: HeldoutRows

    def __init__(
        self,
        *,
        run: Path,
        training: Training,
        tokenizer: Path,
        bytes_per_token: float,
        prompt: str | None,
        meter: EnergyMeter | None,
        eval_dataset: HeldoutRows,
        **kwargs: Any,
    ) -> None:
        super().__init__(eval_dataset=eval_dataset, compute_metrics=eval_dataset.metrics, **kwargs)
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise UserError(NO_FSDP)  # accelerate would train without it, and not say so
        self.sampler = SampleText(tokenizer, prompt) if prompt is not None else None
        self.run = run
        self.training = training
        self.tokenizer_folder = tokenizer
        self.bytes_per_token = bytes_per_token
        self.data_hashes = data_hashes(run)
        config = self.model.config
        self.tokens_per_step = training.batch_size * config.max_position_embeddings
        self.flops_per_token = flops_per_token(config, config.max_position_embeddings)
        self.peak_flops = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self.meter = meter
        self._clock: tuple[float, float, int] | None = None
        self._before: dict[str, float] | None = None

    # Data: `PackedRows` is in order already.

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return SequentialSampler(self.train_dataset)

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

    # Logging

    def _check_loss(self, loss: float, steps: int) -> None:
        """Stop before anything is saved if the mean loss of the last `steps` steps is not finite, or a spike."""
        if not math.isfinite(loss):
            raise self._stopped(f"the loss is {loss}", "Lower training.learning_rate or lengthen training.warmup_steps")
        if self.training.spike_threshold is None:
            return
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        # A mean over fewer steps than a logging interval scatters more.
        limit = spike_limit(losses, self.training.spike_threshold * math.sqrt(max(1, self.args.logging_steps / steps)))
        if limit is not None and loss > limit:
            median = float(np.median(losses[-SPIKE_LOSSES:]))
            raise self._stopped(
                f"the loss is {loss:.3f}, a spike above {median:.3f}",
                "Start again with a lower training.learning_rate or training.max_grad_norm, or go on through it with "
                "training.spike_threshold=null",
            )

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add tokens seen, elapsed time, tokens/s and MFU to `Trainer`'s entry; write `training.json`."""
        step = self.state.global_step
        if "loss" in logs:
            self._check_loss(logs["loss"], int(self.args.logging_steps))
            now = time.monotonic()
            if self.training.dollars_per_hour is not None:
                hours = (now - self._train_began) / 3600 * self.args.world_size
                logs["cost_usd"] = self._total("cost_usd", hours * self.training.dollars_per_hour)
            if self._clock is None:
                # The first interval of a process holds compilation and warm-up; it has no speed of its own.
                start = self._train_began
                elapsed = self._total("elapsed_seconds", 0.0)
                begun_at = self._first_step
            else:
                start, elapsed, begun_at = self._clock
            seconds = now - start
            speed = (step - begun_at) * self.tokens_per_step / seconds
            logs["elapsed_seconds"] = round(elapsed + seconds, 3)
            logs["tokens_seen"] = step * self.tokens_per_step
            logs["tokens_per_second"] = round(speed, 1)
            if self.peak_flops is not None:
                logs["mfu"] = round(speed * self.flops_per_token / (self.peak_flops * self.args.world_size), 4)
            self._clock = (now, elapsed + seconds, step)
        if "eval_loss" in logs:
            logs["eval_loss"] = logs.pop("eval_mean_loss")
            logs["tokens_seen"] = step * self.tokens_per_step
            logs["bits_per_byte"] = round(logs["eval_loss"] / math.log(2) / self.bytes_per_token, 5)
        super().log(logs)
        if self.is_world_process_zero():
            write_json(self.run / "training.json", self.history())

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`Trainer.evaluate`, and a sample; the time does not count as training time."""
        began = time.monotonic()
        try:
            metrics = super().evaluate(*args, **kwargs)
            # A model that is divided among processes generates on all of them or not at all.
            if self.sampler is not None and (self.is_fsdp_enabled or self.is_world_process_zero()):
                sample: dict[str, Any] = {"step": self.state.global_step, "sample": self.sampler(self.model)}
                self.state.log_history.append(sample)
            return metrics
        finally:
            self._pause(time.monotonic() - began)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """`Trainer.prediction_step`; prediction and label are `HeldoutRows.sums`."""
        inputs = self._prepare_inputs(inputs)
        sources = inputs.pop("sources")
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = model(**inputs, reduction="none").loss
        return losses[:, :-1].mean(), *self.eval_dataset.sums(losses, sources)

    def _pause(self, seconds: float) -> None:
        if self._clock is not None:
            start, elapsed, step = self._clock
            self._clock = (start + seconds, elapsed, step)

    def _total(self, key: str, here: float) -> float:
        """`here`, counted in this process, and what those before it had up to the checkpoint that it went on from."""
        if self._before is None:
            self._before = {key: value for entry in self.state.log_history for key, value in entry.items()}
        return float(self._before.get(key, 0.0)) + here

    def _log_energy(self) -> None:
        """The energy of all machines so far, in the history that the checkpoint keeps."""
        reading = self.meter.read() if self.meter is not None else (0.0, 0.0)
        energy, grams = self.accelerator.reduce(torch.tensor(reading, device=self.args.device), "sum").tolist()
        entry: dict[str, Any] = {
            "step": self.state.global_step,
            "energy_kwh": self._total("energy_kwh", energy),
            "co2_grams": self._total("co2_grams", grams),
            "co2_source": ENERGY_SOURCE,
            "co2_region": self.training.country_iso_code,
        }
        self.state.log_history.append(entry)

    def history(self) -> dict[str, Any]:
        """`training.json`: `log` (one entry per logging interval), `evaluations` and `samples`."""
        log: list[dict[str, Any]] = []
        evaluations: list[dict[str, Any]] = []
        samples: list[dict[str, Any]] = []
        for entry in self.state.log_history:
            if "tokens_per_second" in entry:
                keys = ("loss", "learning_rate", "grad_norm", "tokens_seen", "tokens_per_second", "mfu")
                log.append({"step": entry["step"], **{key: entry.get(key) for key in keys}})
                log[-1]["elapsed_seconds"] = entry["elapsed_seconds"]
            elif "eval_loss" in entry:
                evaluations.append(
                    {
                        "step": entry["step"],
                        "tokens_seen": entry["tokens_seen"],
                        "loss": entry["eval_loss"],
                        "bits_per_byte": entry["bits_per_byte"],
                    }
                )
                prefix = f"eval_{BY_SOURCE}"
                by_source = {key.removeprefix(prefix): entry[key] for key in entry if key.startswith(prefix)}
                if by_source:
                    evaluations[-1]["by_source"] = by_source
            elif "sample" in entry:
                samples.append({"step": entry["step"], "text": entry["sample"]})
        return {"log": log, "evaluations": evaluations, "samples": samples}

    def spent(self) -> dict[str, Any]:
        """What the card says of energy, emissions and cost: the keys that were metered."""
        last = {key: value for entry in self.state.log_history for key, value in entry.items()}
        result: dict[str, Any] = {key: round(last[key], 4) for key in ("cost_usd",) if key in last}
        if last.get("energy_kwh"):
            result |= {"energy_kwh": last["energy_kwh"], "co2_grams": last["co2_grams"]}
            result |= {"co2_source": last["co2_source"], "co2_region": last["co2_region"]}
        return result

    # Checkpoints

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, with the clock and the meter started."""
        self._train_began = time.monotonic()
        resumed = kwargs.get("resume_from_checkpoint")
        self._first_step = step_of(Path(resumed)) if resumed else 0
        if self.meter is not None:
            self.meter.start()
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.meter is not None:
                self.meter.stop()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run / "training_state" / ".saving")

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save as `Trainer` does, in a private folder, then publish the two halves under their names."""
        steps = self.state.global_step - self._globalstep_last_logged
        if steps:
            self._check_loss(float(self.accelerator.reduce(self._tr_loss.clone(), "mean")) / steps, steps)
        began = time.monotonic()
        saving = Path(self._get_output_dir(trial))
        if self.args.should_save:
            remove(saving)
        self.accelerator.wait_for_everyone()
        try:
            self._check_free_space()
            if self.training.track_energy:
                self._log_energy()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                saved, kept = next(saving.glob("checkpoint-*")), self.training.keep_steps
                publish(self.run, saved, self._facts(), self.tokenizer_folder, kept)
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
        self._pause(time.monotonic() - began)

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
        checkpoint = self.run / "checkpoints" / Path(resume_from_checkpoint).name
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(str(checkpoint), model)
            return
        # `Trainer` would read a pickle that it saved as well; every process reads the same weights, and keeps its part.
        weights: dict[str, Any] = load_file(checkpoint / "model.safetensors")
        set_model_state_dict(self.model, weights, options=StateDictOptions(full_state_dict=True))

    def _facts(self) -> dict[str, Any]:
        """`checkpoint.json`: what is known of this step's weights."""
        history = self.history()
        log, evaluations = history["log"][-1:], history["evaluations"][-1:]
        return {
            "step": self.state.global_step,
            "tokens_seen": self.state.global_step * self.tokens_per_step,
            "train_loss": log[0]["loss"] if log else None,
            "eval_loss": evaluations[0]["loss"] if evaluations else None,
            "eval_step": evaluations[0]["step"] if evaluations else None,
            **self.data_hashes,
        }

    def _check_free_space(self) -> None:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        needed = int(FREE_SPACE_FACTOR * parameters * 4 * 3)  # float32 weights and two moments
        if shutil.disk_usage(self.run).free < needed:
            raise self._no_space(needed)

    def _no_space(self, needed: int | None = None) -> UserError:
        size = f" ({needed / 1e6:,.0f} MB needed)" if needed else ""
        return UserError(
            f"no disk space left in {self.run} for the checkpoint of step {self.state.global_step}{size}; "
            f"free some and run the same command: it goes on from {self._last_good()}"
        )

    def _stopped(self, what: str, remedy: str) -> UserError:
        return UserError(
            f"{what} at step {self.state.global_step}; nothing was saved since {self._last_good()}. {remedy}"
        )

    def _last_good(self) -> str:
        last = last_checkpoint(self.run)
        return f"checkpoint {last.name}" if last else "the beginning"


def spike_limit(losses: list[float], threshold: float) -> float | None:
    """The loss above which a run is taken to have spiked, from the losses logged before.

    The median of the last `SPIKE_LOSSES` losses, plus the larger of `threshold` robust standard deviations and a fifth
    of that median (a smooth curve has deviations too small to go by). The deviation is taken from the differences of
    neighbours among the last `SPIKE_WINDOW` losses, so that a falling curve does not count as noise: 1.4826 times
    their median absolute value, over the square root of 2. None until `SPIKE_LOSSES` losses were logged.
    """
    if len(losses) < SPIKE_LOSSES:
        return None
    differences = np.diff(losses[-SPIKE_WINDOW:])
    deviation = 1.4826 * np.median(np.abs(differences)) / math.sqrt(2)
    median = np.median(losses[-SPIKE_LOSSES:])
    return float(median + max(threshold * deviation, 0.2 * median))


def train(
    run: Path,
    training: Training,
    config: NanoPhiConfig,
    seed: int,
    label: str,
    report: Callable[[str], None] = print,
    prompt: str | None = None,
) -> dict[str, Any]:
    """Train a model from scratch, or go on from the run's last checkpoint.

    Args:
        run: the run directory; reads `data/tokens` and `data/tokenizer`, writes `checkpoints`, `training_state` and
            `training.json`.
        training: the recipe's section.
        config: the model's configuration, token ids included.
        seed: of initialisation, dropout and data order.
        label: what progress lines begin with.
        report: gets one line where something is worth telling.
        prompt: what the sample text at every evaluation begins with; None: no samples.

    Returns:
        JSON-able summary: steps, tokens, seconds, tokens/s, losses, parameter count, hash of the final weights.
    """
    arguments = training_arguments(training, run, seed, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    check_data(run)
    set_seed(seed)
    eos_token_id = config.eos_token_id
    if not isinstance(eos_token_id, int):
        raise UserError(f"the tokenizer must have one end-of-text token, found {eos_token_id}")
    model = NanoPhiForCausalLM(config)
    use_chunked_loss(model)
    if arguments.device.type == "cpu" and not training.compile:
        model.set_attn_implementation(PACKED_DOCUMENTS)
    meter = None
    if training.track_energy and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        assert training.country_iso_code is not None
        meter = open_meter(training.country_iso_code, report)
    tokens = read_json(run / "data" / "tokens" / "tokens.json")
    times = SaveTimes(training.keep_steps)
    trainer = NanoPhiTrainer(
        run=run,
        training=training,
        tokenizer=run / "data" / "tokenizer",
        bytes_per_token=tokens["heldout"]["bytes_per_token"],
        model=model,
        args=arguments,
        train_dataset=PackedRows(run / "data/tokens/train", rows=training.steps * training.batch_size, seed=seed),
        eval_dataset=HeldoutRows(run / "data/tokens"),
        prompt=prompt,
        meter=meter,
        data_collator=PackedCollator(eos_token_id, training.isolate_documents),
        callbacks=[ProgressLine(label), times],
    )
    trainer.remove_callback(PrinterCallback)
    resume = last_checkpoint(run)
    if resume is not None and step_of(resume) == training.steps:
        trainer.state = TrainerState.load_from_json(str(resume / TRAINER_STATE_NAME))
    else:
        if resume is not None:
            report(f"{label}: going on from {resume.name}")
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if times.received is not None and trainer.state.global_step < training.steps:
        raise UserError(
            f"stopped by {times.received.name} after saving step {trainer.state.global_step}; "
            "run the same command to go on"
        )
    final = run / "checkpoints" / f"step-{training.steps:06d}"
    history = trainer.history()
    steady = [entry["tokens_per_second"] for entry in history["log"][1:]] or [history["log"][0]["tokens_per_second"]]
    summary = {
        "checkpoint": f"checkpoints/{final.name}",
        "steps": training.steps,
        "tokens_seen": training.steps * trainer.tokens_per_step,
        "epochs": training.steps * training.batch_size / len(trainer.train_dataset.dataset),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": "bf16" if arguments.bf16 else "fp32",
        "seconds": history["log"][-1]["elapsed_seconds"],
        "tokens_per_second": float(np.median(steady)),
        "flops_per_token": trainer.flops_per_token,
        "final_loss": history["log"][-1]["loss"],
        "final_bits_per_byte": history["evaluations"][-1]["bits_per_byte"] if history["evaluations"] else None,
        "weights_sha256": sha256_of_file(final / "model.safetensors"),
        **trainer.spent(),
    }
    if trainer.is_world_process_zero():
        write_json(run / "training.json", {**history, "summary": summary})
    return summary
