"""Checkpoints of a run: their folders, how one appears whole, and what data it was trained on.

`checkpoints/step-NNNNNN/` holds a model that loads by itself and `checkpoint.json`; `training_state/step-NNNNNN/` what
only a resumed run needs.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from nanophi.files import UserError, read_json, remove, sha256_of_tree, write_json

_STATE_FILES = ("optimizer", "scheduler", "rng_state", "scaler", "trainer_state")
_DATA = {
    "train_sha256": "training tokens (data/tokens)",
    "heldout_sha256": "held-out tokens (data/tokens)",
    "tokenizer_sha256": "tokenizer (data/tokenizer)",
}


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(checkpoint.name.removeprefix("step-"))


def last_checkpoint(run: Path) -> Path | None:
    """`training_state/step-NNNNNN` of the newest step whose weights and state are both there."""
    whole = [state for state in (run / "training_state").glob("step-*") if (run / "checkpoints" / state.name).is_dir()]
    return max(whole, key=step_of, default=None)


def data_hashes(run: Path) -> dict[str, str]:
    """SHA-256 of the run's token streams, as packing wrote them down, and of its tokenizer's files."""
    tokens = read_json(run / "data" / "tokens" / "tokens.json")
    hashes = {f"{split}_sha256": tokens[split]["sha256"] for split in ("train", "heldout")}
    return {**hashes, "tokenizer_sha256": sha256_of_tree(run / "data" / "tokenizer")}


def check_data(run: Path) -> None:
    """Refuse to go on from a checkpoint that was trained on other tokens or with another tokenizer.

    Raises:
        UserError: naming what differs; nothing is removed.
    """
    last = last_checkpoint(run)
    if last is None:
        return
    then, now = read_json(run / "checkpoints" / last.name / "checkpoint.json"), data_hashes(run)
    differ = [key for key in _DATA if key in then and then[key] != now[key]]
    if differ:
        shown = ", ".join(f"{_DATA[key]} {then[key][:12]} then, {now[key][:12]} now" for key in differ)
        raise UserError(
            f"{run}: checkpoint {last.name} was trained on other data: {shown}. Restore it (same sources, same "
            f"recipe) to go on; to train from scratch, use another name or delete {run / 'checkpoints'}"
        )


def publish(run: Path, saved: Path, facts: dict[str, Any], tokenizer: Path, kept: Collection[int]) -> None:
    """Divide what `Trainer` saved into the two folders of its step, and remove those that are not to be kept.

    Args:
        run: the run directory.
        saved: a private folder in it with everything that `Trainer` saved; it becomes the checkpoint.
        facts: `checkpoint.json`; `step` among them.
        tokenizer: folder whose files the checkpoint gets.
        kept: steps whose checkpoints stay, besides this one.
    """
    name = f"step-{facts['step']:06d}"
    state = saved / "training_state"
    state.mkdir()
    for file in list(saved.iterdir()):
        if file.name in ("training_args.bin", "pytorch_model_fsdp.bin"):
            file.unlink()  # pickles; the recipe and the weights say the same
        elif file.name.startswith(_STATE_FILES):
            file.rename(state / file.name)
    for file in sorted(tokenizer.iterdir()):
        shutil.copyfile(file, saved / file.name)
    for file in saved.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors lets nobody else read them
    write_json(saved / "checkpoint.json", facts)
    # The state first: a run goes on from the newest step that has both.
    for half, folder in ((state, "training_state"), (saved, "checkpoints")):
        target = run / folder / name
        remove(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        half.rename(target)
    names = {f"step-{step:06d}" for step in kept}
    for folder, keep in (("training_state", {name}), ("checkpoints", {name, *names})):
        for old in (run / folder).glob("step-*"):
            if old.name not in keep:
                remove(old)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
