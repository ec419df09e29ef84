"""The recipe's `training` section as `transformers.TrainingArguments`, and what this machine can run of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from nanophi.core.errors import UserError, suggest
from nanophi.core.recipe import Training
from nanophi.training.optimizer import ADAM_EPS

NO_FSDP = (
    "training.arguments: fsdp divides a model among several accelerators; use `accelerate launch` on a machine with "
    "several, or remove fsdp"
)

ALLOWED = frozenset(
    (
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "ddp_backend",
        "ddp_broadcast_buffers",
        "ddp_bucket_cap_mb",
        "ddp_timeout",
        "fsdp",
        "fsdp_config",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "log_level",
        "project",
        "run_name",
        "tf32",
        "torch_compile_backend",
        "torch_compile_mode",
        "torch_empty_cache_steps",
        "trackio_space_id",
    )
)
"""Fields of `transformers.TrainingArguments` that were tried here: they change how a run is computed, not what it
learns, and it resumes with them."""
INSTEAD = {
    "training.steps": "max_steps num_train_epochs",
    "training.batch_size and training.micro_batch_size": "per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps auto_find_batch_size",
    "training.optimizer": "optim optim_args optim_target_modules",
    "training.schedule": "lr_scheduler_type lr_scheduler_kwargs",
    "training.precision": "bf16 fp16 bf16_full_eval fp16_full_eval",
    "training.compile": "torch_compile",
    "training.save_steps": "save_strategy save_only_model",
    "training.keep_steps and training.keep_states": "save_total_limit",
    "training.keep_steps (every kept checkpoint is evaluated)": "load_best_model_at_end metric_for_best_model "
    "greater_is_better",
    "training.eval_steps": "eval_strategy eval_delay eval_on_start do_eval",
    "training.logging_steps": "logging_strategy logging_first_step logging_nan_inf_filter",
    "the same command, which resumes by itself": "resume_from_checkpoint ignore_data_skip",
    "seed": "data_seed full_determinism",
    "`nanophi push`": "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_revision hub_always_push",
    "training.arguments.fsdp": "deepspeed",
    "the run directory's name": "output_dir",
}
"""Key of the recipe -> the fields that it stands for."""


def check(training: Training, run: Path, seed: int) -> None:
    """Refuse early what could not be trained with on this machine. Raises `UserError`."""
    if world_size() == 1:
        training_arguments(training, run, seed)
    else:  # `TrainingArguments` would wait for the other processes, which may have nothing to do
        check_names(training)
        micro_batch_size(training, world_size())
        resolve_precision(training)


def check_names(training: Training) -> None:
    """Refuse a field of `training.arguments` that was not tried, or that another key stands for. Raises `UserError`."""
    given = training.arguments
    for name in given:
        if name in ALLOWED:
            continue
        instead = [key for key, names in INSTEAD.items() if name in names.split()]
        if name in Training.model_fields:
            instead = [f"training.{name}"]
        if instead:
            raise UserError(f"training.arguments: '{name}' is not allowed there; use {instead[0]}")
        raise UserError(f"training.arguments: '{name}' is unknown or untested; {suggest(name, ALLOWED)}")
    if given.get("dataloader_persistent_workers") and not given.get("dataloader_num_workers"):
        raise UserError("training.arguments: dataloader_persistent_workers needs dataloader_num_workers")
    compiling = sorted({"torch_compile_backend", "torch_compile_mode"} & set(given))
    if compiling and not training.compile:
        raise UserError(f"training.arguments: {compiling[0]} does nothing without training.compile=true")


def has_bf16() -> bool:
    """Whether this machine computes in bfloat16 by hardware (a GPU of Ampere or later, AVX512-BF16 or AMX)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_precision(training: Training) -> str:
    """ "fp32" or "bf16": what the recipe says, or for "auto" accelerate's environment, or the hardware.

    Raises:
        UserError: if the environment (`accelerate launch --mixed_precision`) contradicts the recipe.
    """
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if wanted != "no" and wanted != (training.precision if training.precision != "auto" else "bf16"):
        raise UserError(
            f"the environment sets ACCELERATE_MIXED_PRECISION={wanted} (`accelerate launch --mixed_precision`), but "
            f"training.precision is {training.precision}; set training.precision=bf16 or fp32 and launch with 'no'"
        )
    if training.precision != "auto":
        return training.precision
    return "bf16" if wanted == "bf16" or has_bf16() else "fp32"


def world_size() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def decay_start(training: Training) -> int:
    """The step at which the learning rate of `wsd` begins to fall."""
    decay = min(round(training.steps * training.decay_fraction), training.steps - training.warmup_steps)
    return training.steps - decay


def micro_batch_size(training: Training, devices: int) -> int:
    """Rows per device and forward pass.

    Raises:
        UserError: if the batch does not divide among the devices, with sizes that do.
    """
    rows = training.micro_batch_size or max(1, training.batch_size // devices)
    if training.batch_size % (rows * devices) == 0:
        return rows
    if training.batch_size % devices == 0:
        share = training.batch_size // devices
        remedy = f"set training.micro_batch_size to a divisor of {share}, such as {_largest_divisor(share, rows)}"
    else:
        below = training.batch_size // devices * devices
        sizes = [str(size) for size in (below, below + devices) if size]
        remedy = f"use a training.batch_size that {devices} devices divide, such as {' or '.join(sizes)}"
    raise UserError(
        f"training.batch_size ({training.batch_size}) is not a multiple of micro_batch_size x devices "
        f"({rows} x {devices}); {remedy}"
    )


def _largest_divisor(number: int, limit: int) -> int:
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)


def training_arguments(
    training: Training, run: Path, seed: int, devices: int = 1, kind: type = TrainingArguments, **more: Any
) -> Any:
    """The recipe's `training` section as `TrainingArguments`.

    Args:
        run: the run directory; its name is the run's name for trackers.
        devices: number of processes.
        kind: a class derived from it.
        **more: fields of `kind`.

    Raises:
        UserError: for a batch that does not divide among the devices, a precision that the environment contradicts,
            a field in `arguments` with an impossible value, or a tracker that is unknown or not installed.
    """
    check_names(training)
    rows = micro_batch_size(training, devices)
    schedules: dict[str, dict[str, Any]] = {
        "cosine": {"lr_scheduler_type": "cosine"},
        "constant": {"lr_scheduler_type": "constant_with_warmup"},
        "wsd": {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {
                "num_decay_steps": training.steps - decay_start(training),
                "decay_type": "linear",
            },
        },
    }
    ours: dict[str, Any] = {
        "output_dir": str(run / "training_state"),
        "run_name": run.name,
        "max_steps": training.steps,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "gradient_accumulation_steps": training.batch_size // (rows * devices),
        "optim": "adamw_torch_fused",
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_epsilon": ADAM_EPS,
        "max_grad_norm": training.max_grad_norm,
        "warmup_steps": training.warmup_steps,
        **schedules[training.schedule],
        "bf16": resolve_precision(training) == "bf16",
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
    for tracker in training.report_to:
        try:
            for callback in get_reporting_integration_callbacks([tracker]):
                callback()
        except (ImportError, RuntimeError, ValueError) as error:
            raise UserError(f"training.report_to: {' '.join(str(error).split())}") from None
    if training.arguments.get("fsdp") and devices == 1:
        raise UserError(NO_FSDP)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    try:
        return kind(**{**ours, **more, **training.arguments})
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"training.arguments: {' '.join(str(error).split())}") from None
    finally:
        # It writes its precision there; the next run of this process may have another.
        _restore("ACCELERATE_MIXED_PRECISION", launched)


@contextlib.contextmanager
def accelerate_precision(training: Training) -> Iterator[str]:
    """Let accelerate train in the recipe's precision within the body, whatever default its launcher has set."""
    launched, precision = os.environ.get("ACCELERATE_MIXED_PRECISION"), resolve_precision(training)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no" if precision == "fp32" else precision
    try:
        yield precision
    finally:
        _restore("ACCELERATE_MIXED_PRECISION", launched)


def _restore(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value
