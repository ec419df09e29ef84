"""The recipe's `training` section as `transformers.TrainingArguments`, and what this machine can run of it."""

import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import trainer_log_levels

from nanophi.core.errors import UserError, suggest
from nanophi.core.jobs import world_size
from nanophi.core.recipe import Training
from nanophi.training.optimizer import ADAM_EPS

PRECISION_VARIABLE = "ACCELERATE_MIXED_PRECISION"
NO_FSDP = (
    "training.arguments: fsdp divides a model among several accelerators; use `accelerate launch` on a machine with "
    "several, or remove fsdp"
)
ALLOWED = {
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    *("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_timeout", "fsdp", "fsdp_config"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "log_level", "project", "run_name", "tf32"),
    *("torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps"),
    *("trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"),
}
"""Fields that were tried: they change how a run is computed, not what it learns. All others are decided here."""
SAME_NAME = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "warmup_steps"),
    *("save_steps", "eval_steps", "logging_steps", "report_to"),
)
"""Keys of `training` that `TrainingArguments` calls the same."""
SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}


def check(training: Training, run: Path, seed: int) -> None:
    """Refuse early what could not be trained with on this machine. Raises `UserError`."""
    if world_size() == 1:
        training_arguments(training, run, seed)
    else:  # `TrainingArguments` would wait for the other processes, which may have nothing to do
        check_names(training)
        micro_batch_size(training, world_size())
        resolve_precision(training)


def check_names(training: Training) -> None:
    """Refuse a field of `training.arguments` that was not tried, and a compilation that cannot be. `UserError`."""
    for name in training.arguments:
        if name not in ALLOWED:
            remedy = f"use training.{name}" if name in Training.model_fields else suggest(name, ALLOWED)
            raise UserError(f"training.arguments: '{name}' is unknown or untested; {remedy}")
        if name.startswith("torch_compile") and not training.compile:
            raise UserError(f"training.arguments: {name} does nothing without training.compile=true")
    compilers = (os.environ.get("CC"), os.environ.get("CXX"), "cc", "gcc", "g++", "clang")
    generates = training.arguments.get("torch_compile_backend", "inductor") == "inductor"
    if training.compile and generates and not any(map(shutil.which, filter(None, compilers))):
        raise UserError("training.compile needs a C++ compiler, which is not found here; install g++, or leave it out")


def has_bf16() -> bool:
    """Whether this machine computes in bfloat16 by hardware (a GPU of Ampere or later, AVX512-BF16 or AMX)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_precision(training: Training) -> str:
    """ "fp32" or "bf16": what the recipe states, or for "auto" accelerate's environment, or the hardware.

    Raises `UserError` if the environment contradicts the recipe.
    """
    wanted = os.environ.get(PRECISION_VARIABLE, "no").lower()
    if wanted != "no" and wanted != (training.precision if training.precision != "auto" else "bf16"):
        raise UserError(
            f"the environment sets {PRECISION_VARIABLE}={wanted} (`accelerate launch --mixed_precision`), but "
            f"training.precision is {training.precision}; set training.precision=bf16 or fp32 and launch with 'no'"
        )
    if training.precision != "auto":
        return training.precision
    return "bf16" if wanted == "bf16" or has_bf16() else "fp32"


def decay_steps(training: Training) -> list[int]:
    """The step at which `wsd` decays, from which a run can be extended or branch off; none for other schedules."""
    return [training.decay_start] if training.schedule == "wsd" else []


def micro_batch_size(training: Training, devices: int) -> int:
    """Rows per device and forward pass. Raises `UserError` if the batch does not divide."""
    rows = training.micro_batch_size or max(1, training.batch_size // devices)
    if training.batch_size % (rows * devices) == 0:
        return rows
    share, left = divmod(training.batch_size, devices)
    remedy = f"a training.batch_size that {devices} divides" if left else f"a micro_batch_size that divides {share}"
    raise UserError(
        f"training.batch_size ({training.batch_size}) is not a multiple of micro_batch_size x devices "
        f"({rows} x {devices}); use {remedy}"
    )


def training_arguments(
    training: Training, run: Path, seed: int, devices: int = 1, kind: type = TrainingArguments, **more: Any
) -> Any:
    """The recipe's `training` section as `TrainingArguments`, or as a class derived from it with `more` fields."""
    check_names(training)
    given, rows = training.arguments, micro_batch_size(training, devices)
    decay = {"num_decay_steps": training.steps - training.decay_start, "decay_type": "linear"}
    ours: dict[str, Any] = {
        **{name: getattr(training, name) for name in SAME_NAME},
        "output_dir": str(run / "training_state"),
        "run_name": run.name,
        "max_steps": training.steps,
        **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), rows),
        "gradient_accumulation_steps": training.batch_size // (rows * devices),
        "adam_epsilon": ADAM_EPS,
        "lr_scheduler_type": SCHEDULES[training.schedule],
        "lr_scheduler_kwargs": decay if training.schedule == "wsd" else None,
        "bf16": resolve_precision(training) == "bf16",
        # Trainer refuses bf16 on a processor unless it is told that no device is meant.
        "use_cpu": not torch.accelerator.is_available(),
        "torch_compile": training.compile,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **dict.fromkeys(("save_strategy", "eval_strategy", "logging_strategy"), "steps"),
        **dict.fromkeys(("prediction_loss_only", "disable_tqdm"), True),
        **dict.fromkeys(("logging_nan_inf_filter", "remove_unused_columns", "ddp_find_unused_parameters"), False),
        **dict.fromkeys(("seed", "data_seed"), seed),
    }
    if given.get("fsdp") and devices == 1:
        raise UserError(NO_FSDP)
    what = "report_to"
    try:
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
        what = "arguments"
        with accelerate_precision(training):
            made = kind(**{**ours, **more, **given})
        if given.get("dataloader_num_workers", 0) < given.get("dataloader_persistent_workers", 0):
            raise ValueError("dataloader_num_workers must be at least 0, and 1 with dataloader_persistent_workers")
        if given.get("log_level", "passive") not in trainer_log_levels:
            raise ValueError(f"log_level must be one of {', '.join(trainer_log_levels)}")
        for name in given:
            if name.endswith("_kwargs") and not isinstance(getattr(made, name, None) or {}, dict):
                raise ValueError(f"{name} must be a mapping")
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"training.{what}: {' '.join(str(error).split())}") from None
    return made


def accelerate_precision(training: Training) -> AbstractContextManager[None]:
    """Let accelerate train in the recipe's precision within the body, whatever default its launcher has set."""
    precision = resolve_precision(training)
    return patch_environment(**{PRECISION_VARIABLE: "no" if precision == "fp32" else precision})
