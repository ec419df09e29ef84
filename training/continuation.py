"""What a run may do with the weights that it finds: nothing, resume, train longer, or refuse.

Weights are never removed here. What has been learned so far depends on `inputs`; whatever else the recipe says may
change while a run is stopped or finished.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import read_json, sha256_of_file, sha256_of_tree, write_json
from nanophi.core.names import local, resolve, split_revision, step_folders, step_name, step_of
from nanophi.core.recipe import Recipe, Training
from nanophi.core.run import differences
from nanophi.data.stages import token_hashes
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.training import monitor
from nanophi.training.arguments import decay_start, resolve_precision
from nanophi.training.checkpoints import WEIGHTS, damage, last_whole, set_aside, states

MAY_CHANGE = frozenset(
    (
        "arguments",
        "compile",
        "country_iso_code",
        "dollars_per_hour",
        "eval_steps",
        "keep_states",
        "keep_steps",
        "logging_steps",
        "micro_batch_size",
        "report_to",
        "save_steps",
        "spike_threshold",
        "stretch_cosine",
        "track_energy",
    )
)
"""Keys of `training` that do not change what has been learned so far."""
COMPUTED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "layer_norm_eps", "rope_parameters", "tie_word_embeddings", "qk_layernorm"),
)
"""Fields of the configuration that say what is computed from the weights; dropout and context length may change."""
TOKENIZER_FILE = "tokenizer.json"
BASE_FILES = [CONFIG_NAME, TOKENIZER_FILE, WEIGHTS]
WAYS_OUT = "put it back, use another name, or start over with --restart, which removes the weights"


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What to do.

    Attributes:
        resume: the state to resume from; None: the beginning.
        aside: checkpoints beyond this step belong to an earlier, shorter schedule and are set aside first.
    """

    resume: Path | None = None
    aside: int | None = None


def data_hashes(run: Path) -> dict[str, str]:
    """SHA-256 of the run's token streams, as packing wrote them down, and of its tokenizer's files."""
    tokens = read_json(run / "data" / "tokens" / "tokens.json")
    return {**token_hashes(tokens), "tokenizer_sha256": sha256_of_tree(run / "data" / "tokenizer")}


def inputs(run: Path, recipe: Recipe, config: NanoPhiConfig, recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    """Everything that the weights depend on, as JSON.

    Data are their contents, whatever path or recipe they came from.

    Args:
        recorded: inputs of the training that is there already, if any. A finished run with `precision: auto` keeps
            the precision that it had, on whatever machine it is looked at.
    """
    training = recipe.training.model_dump(mode="json", exclude=set(MAY_CHANGE))
    finished = (run / "checkpoints" / step_name(recipe.training.steps) / WEIGHTS).is_file()
    if recorded is not None and finished and recipe.training.precision == "auto":
        training["precision"] = recorded["training"]["precision"]
    else:
        training["precision"] = resolve_precision(recipe.training)
    chat = {"method": recipe.method, "beta": recipe.beta, "lora": recipe.lora and recipe.lora.model_dump()}
    base = str(run / "data/base") if recipe.conversations else recipe.base
    return {
        **({"chat": chat} if recipe.conversations else {}),
        "data": data_hashes(run),
        "model": {name: getattr(config, name) for name in sorted(NanoPhiConfig.__annotations__)},
        "training": training,
        "seed": recipe.seed,
        "base": None if base is None else base_hash(base),
    }


def plan(
    run: Path,
    training: Training,
    recorded: Mapping[str, Any] | None,
    now: Mapping[str, Any],
    report: Callable[[str], None] = print,
) -> Continuation:
    """What to do with the weights and states in a run directory.

    Args:
        training: the recipe's section.
        recorded: inputs of the training that is there already; None: unknown.
        now: inputs of the recipe as it is.
        report: gets a line about what is damaged or continued.

    Raises:
        UserError: in one line, with the keys that changed and both values, or with what is missing; nothing is removed.
    """
    weights = step_folders(run / "checkpoints")
    if not weights and not states(run):
        return Continuation()
    if recorded is None:
        raise UserError(
            f"{run} holds weights ({(weights or states(run))[-1].name}), but record.json does not say what they were "
            "trained with; they may be from an earlier version of nanophi. They are kept: use another name, or start "
            "over with --restart, which removes them"
        )
    then_steps, steps = recorded["training"]["steps"], training.steps
    changed = [line for line in differences(recorded, now) if not line.startswith("training.steps ")]
    if changed:
        raise UserError(f"{run}: the weights ({weights_of(run)}) were trained with {'; '.join(changed)}; {WAYS_OUT}")
    limit = steps if then_steps == steps else shared_steps(training, then_steps)
    resume = last_whole(run, limit, report)
    if resume is None:
        raise UserError(_no_state(run, training, then_steps, limit))
    if then_steps == steps:
        return Continuation(resume=resume)
    report(
        f"{run.name}: {steps} steps in place of {then_steps}; the {training.schedule} schedule continues from "
        f"{resume.name}"
        + (", where the learning rate jumps to the longer curve" if training.schedule == "cosine" else "")
    )
    return Continuation(resume=resume, aside=step_of(resume))


def carry_out(
    run: Path, plan: Continuation, recorded: Mapping[str, Any] | None, report: Callable[[str], None] = print
) -> None:
    """Before training with a new number of steps, set aside the weights of the earlier schedule."""
    if plan.aside is None or recorded is None:
        return
    folder = set_aside(run, recorded["training"]["steps"], plan.aside)
    if folder is not None:
        report(f"{run.name}: the weights of the {recorded['training']['steps']} steps are kept in {folder}")


def restore_history(run: Path, summary: Mapping[str, Any]) -> None:
    """Write a missing `training.json` of a finished run again, from its last state."""
    if (run / "training.json").exists():
        return
    for state in reversed(states(run)):
        if step_of(state) == summary["steps"] and damage(state) is None:
            entries = read_json(state / TRAINER_STATE_NAME)["log_history"]
            write_json(run / "training.json", {**monitor.history(entries), "summary": dict(summary)})
            return


def shared_steps(training: Training, then_steps: int) -> int:
    """The last step up to which schedules of `then_steps` and `training.steps` steps have the same learning rates."""
    if training.schedule == "constant":
        return training.steps
    if training.schedule == "wsd":
        before = training.model_copy(update={"steps": then_steps})
        return min(decay_start(before), decay_start(training))
    return training.steps if training.stretch_cosine and training.steps > then_steps else 0


def _no_state(run: Path, training: Training, then_steps: int, limit: int) -> str:
    """The line for a run that has weights but no state to continue from."""
    there = f"{run} holds weights ({weights_of(run)})"
    kept = "They are kept: use another name, start from them with base: PATH, or start over with --restart"
    if not states(run):
        return f"{there}, but training_state, without which they cannot be resumed, is missing. {kept}"
    if then_steps == training.steps:
        last = states(run)[-1]
        damaged = f"training_state/{last.name} is damaged ({damage(last)})"
        return f"{there}, but {damaged} and no earlier state is whole, so they cannot be resumed. {kept}"
    change = f"training.steps {then_steps} -> {training.steps}"
    if training.schedule == "cosine" and not training.stretch_cosine:
        return (
            f"{there} of {then_steps} steps, and a cosine schedule of {training.steps} has other learning rates from "
            f"the start ({change}); set training.stretch_cosine=true to continue all the same, or use another name"
        )
    return (
        f"{there}, but no whole state up to step {limit}, from where a {training.schedule} schedule of "
        f"{training.steps} steps could continue ({change}). {kept}"
    )


def weights_of(run: Path) -> str:
    """The steps whose weights a run holds: `step-000010, step-000020`."""
    return ", ".join(path.name for path in step_folders(run / "checkpoints")) or "in training_state only"


def base_hash(base: str) -> str:
    """SHA-256 of the weights that `base` names."""
    return sha256_of_file(base_file(base))


def base_file(base: str) -> Path:
    """The weights of a folder, of a run's final checkpoint, or of a Hub repository. Raises `UserError` if none."""
    folder = resolve(base, "base").folder
    if folder is None:
        repo_id, revision = split_revision(base)
        from huggingface_hub import snapshot_download

        with user_errors(f"base: {base} cannot be read"):
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=BASE_FILES))
    named = resolve(base, "base")
    folder = named.model() if named.is_run else folder
    for name in (CONFIG_NAME, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"base: {base} holds no {name}")
    return folder / WEIGHTS


def check_base(base: str, config: NanoPhiConfig, tokenizer: Path | None) -> Path:
    """Check that `base` is a model of this configuration; many a difference leaves the tensors' shapes as they are.

    Args:
        base: folder, run directory or Hub id.
        config: the recipe's.
        tokenizer: the run's; None where it is still to be made: neither it nor the size of its vocabulary is compared.

    Returns:
        the weights' file.

    Raises:
        UserError: naming the key that has another value, with both.
    """
    weights = base_file(base)
    with user_errors(f"base: {base}: {CONFIG_NAME} cannot be read"):
        theirs = NanoPhiConfig.from_pretrained(weights.parent)
    for key in COMPUTED if tokenizer is None else (*COMPUTED, "vocab_size"):
        there, here = getattr(theirs, key), getattr(config, key)
        if there != here:
            raise UserError(f"base: {base} has {key} {there}, the recipe's model {here}; set model.{key} to its base's")
    file = weights.with_name(TOKENIZER_FILE)
    if tokenizer is not None and file.is_file():
        with user_errors(f"base: the tokenizers of {base} and of the run cannot be compared"):
            vocabularies = [Tokenizer.from_file(str(path)).get_vocab() for path in (file, tokenizer / TOKENIZER_FILE)]
        if vocabularies[0] != vocabularies[1]:
            remedy = f"set tokenizer.path: {weights.parent if local(base).is_dir() else base}"
            raise UserError(f"base: {base} has another tokenizer than the run; {remedy}")
    return weights


def base_model(base: str, config: NanoPhiConfig, tokenizer: Path | None = None) -> NanoPhiForCausalLM:
    """A model of this configuration with the weights of `base`, whose tokenizer must be the run's if one is given.

    Raises:
        UserError: as `check_base`, or if tensors are missing, left over, or of another shape.
    """
    weights = check_base(base, config, tokenizer)
    with user_errors(f"base: {base} cannot be loaded"):
        loaded: Any = NanoPhiForCausalLM.from_pretrained(
            weights.parent,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, info = loaded
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    if wrong:
        raise UserError(f"base: {base} has other tensors than the recipe's model ({sorted(wrong)[0]} and the like)")
    assert isinstance(model, NanoPhiForCausalLM)
    return model
