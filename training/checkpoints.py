"""Weights and states on disk: how they appear, which are kept, and whether they are whole.

    checkpoints/step-NNNNNN/      a model that loads by itself, and checkpoint.json
    training_state/step-NNNNNN/   all that a resumed run needs: optimizer, random state, log, and the same weights (a
                                  hard link where the file system has them), with the hashes of its files

Both appear whole or not at all. What may be done with weights that are there already is decided in `continuation.py`.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME

from nanophi.core import formatting
from nanophi.core.errors import UserError
from nanophi.core.files import link_or_copy, permit, read_json, remove, sha256_of_file, write_json
from nanophi.core.names import step_folders, step_name, step_of
from nanophi.core.recipe import Training
from nanophi.training.arguments import decay_steps

WEIGHTS = "model.safetensors"
_STATE_FILES = ("optimizer", "scheduler", "rng_state", "scaler", "trainer_state", "adapter_")
_PICKLES = ("training_args.bin", "pytorch_model_fsdp.bin")
_MANIFEST = "files.json"


def states(run: Path) -> list[Path]:
    """`training_state/step-NNNNNN` of every step that was saved, oldest first, damaged ones included."""
    return step_folders(run / "training_state")


def find_corruption(state: Path) -> str | None:
    """What is wrong with a saved state, in a few words; None if it is whole."""
    for name in (_MANIFEST, TRAINER_STATE_NAME):
        try:
            content = read_json(state / name)
            if name == TRAINER_STATE_NAME and content["global_step"] != step_of(state):
                return f"{name} is of step {content['global_step']}"
        except (UserError, OSError, KeyError, TypeError):
            return f"{name} is missing or cut short"
    for name, (size, sha256) in read_json(state / _MANIFEST).items():
        file = state / name
        if not file.is_file() or file.stat().st_size != size or sha256_of_file(file) != sha256:
            return f"{name} is missing or not as it was written"
    return None


def newest_valid_state(run: Path, limit: int | None = None, report: Callable[[str], None] = print) -> Path | None:
    """The newest state up to step `limit` that is whole; damaged ones are named to `report`. None if there is none."""
    for state in reversed(states(run)):
        if limit is None or step_of(state) <= limit:
            reason = find_corruption(state)
            if reason is None:
                return state
            report(f"{run.name}: training_state/{state.name} is damaged ({reason}); trying the one before")
    return None


def check_space(run: Path, model: torch.nn.Module) -> None:
    """Refuse a training without room for one checkpoint and its state: weights, and two moments of what is trained."""
    needed = 4 * sum(value.numel() * (3 if value.requires_grad else 1) for value in model.parameters())
    disk = shutil.disk_usage(run)
    if disk.total > 0 and disk.free < needed:  # some network file systems give zeros
        sizes = f"{formatting.file_size(needed)} needed, {formatting.file_size(disk.free)} free"
        raise UserError(f"no disk space in {run} for a checkpoint and its state ({sizes}); free some and run it again")


def store(run: Path, saved: Path, facts: dict[str, Any], training: Training) -> None:
    """Move what `Trainer` saved in a private folder into the two folders of its step, and remove what is not kept.

    `facts` is `checkpoint.json`. The state before `wsd` decays stays: a run can be extended from it.
    """
    step = facts["step"]
    state = saved / "training_state"
    state.mkdir()
    for file in list(saved.iterdir()):
        if file.name in _PICKLES:
            file.unlink()  # the recipe and the weights hold the same
        elif file.name.startswith(_STATE_FILES):
            file.rename(state / file.name)
    for file in sorted((run / "data/tokenizer").iterdir()):
        shutil.copyfile(file, saved / file.name)
    for file in saved.glob("*.safetensors"):
        permit(file)
    link_or_copy(str(saved / WEIGHTS), str(state / WEIGHTS))
    files = sorted(file for file in state.iterdir() if file.name != TRAINER_STATE_NAME)
    write_json(state / _MANIFEST, {file.name: [file.stat().st_size, sha256_of_file(file)] for file in files})
    write_json(saved / "checkpoint.json", facts)
    # The state first: whatever shows weights can then be resumed.
    for half, folder in ((state, "training_state"), (saved, "checkpoints")):
        target = run / folder / step_name(step)
        remove(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        half.rename(target)
    # What lies beyond this step belongs to a damaged or longer attempt, whose next save replaces it.
    before = training.keep_states - 1
    for folder, stay, newest in (
        ("training_state", decay_steps(training), before),
        ("checkpoints", training.keep_steps, 0),
    ):
        earlier = [path for path in step_folders(run / folder) if step_of(path) < step]
        for old in earlier[: max(0, len(earlier) - newest)]:
            if step_of(old) not in stay:
                remove(old)


def last_saved(run: Path) -> str:
    """Where a run that stops now would resume, in words."""
    saved = states(run)
    return f"checkpoint {saved[-1].name}" if saved else "the beginning"
