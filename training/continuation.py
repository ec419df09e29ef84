"""What a run may do with the weights that it finds: nothing, resume, train longer, or refuse. No checkpoint is lost."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core.errors import UserError
from nanophi.core.files import copy_tree, read_json, remove, sha256_of_file, sha256_of_tree
from nanophi.core.names import step_folders, step_name, step_of
from nanophi.core.recipe import MAY_CHANGE, Recipe, Training
from nanophi.core.run import RunDirectory, differences
from nanophi.data.stages import token_hashes
from nanophi.training.arguments import resolve_precision
from nanophi.training.base import base_file
from nanophi.training.checkpoints import WEIGHTS, newest_valid_state, states

FROM_THEM = "start from them with base: PATH"


def data_hashes(run: Path) -> dict[str, str]:
    """SHA-256 of the run's token streams, as packing wrote them down, and of its tokenizer's files."""
    tokens = read_json(run / "data" / "tokens" / "tokens.json")
    return {**token_hashes(tokens), "tokenizer_sha256": sha256_of_tree(run / "data" / "tokenizer")}


def inputs(run: Path, recipe: Recipe, config: NanoPhiConfig, recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    """Everything that the weights depend on, as JSON. Data are their contents, whatever path or recipe they came from.

    `recorded`: those of the training that is there already. Once finished, `precision: auto` stays what it was there.
    """
    training = recipe.training.model_dump(mode="json", exclude=MAY_CHANGE)
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
        "base": None if base is None else sha256_of_file(base_file(base)),
    }


def plan(
    run: RunDirectory,
    training: Training,
    recorded: Mapping[str, Any] | None,
    now: Mapping[str, Any],
    report: Callable[[str], None] = print,
) -> Path | None:
    """The state to resume from (None: the beginning), or `UserError`; nothing is changed.

    `recorded`, `now`: `inputs` of the training that is there already (None: unknown), and of the recipe as it is.
    """
    if not run.weights():
        return None
    if recorded is None:
        made = run.record.get("environment", {})
        old = f"finish them with nanophi {made.get('nanophi')} at commit {made.get('commit')}, which began them, "
        problem = "record.json does not state what its weights were trained with (as of an earlier version of nanophi)"
        raise run.keeps_weights(problem, (old if made else "") + FROM_THEM)
    if changed := [line for line in differences(recorded, now) if not line.startswith("training.steps ")]:
        raise run.keeps_weights(f"the recipe has changed ({'; '.join(changed)})")
    before, steps = recorded["training"]["steps"], training.steps
    limit = steps if before == steps else shared_steps(training, before)
    resume = newest_valid_state(run.path, limit, report)
    if resume is None:
        change = f" (training.steps {before} -> {steps})" if before != steps else ""
        stretches = before != steps and training.schedule == "cosine" and not training.stretch_cosine
        remedy = "set training.stretch_cosine=true to continue all the same" if stretches else FROM_THEM
        raise run.keeps_weights(f"training_state has no whole state up to step {limit} to resume from{change}", remedy)
    if before != steps:
        jump = ", where the learning rate jumps to the longer curve" if training.schedule == "cosine" else ""
        report(
            f"{run.path.name}: {steps} steps in place of {before}; the {training.schedule} schedule continues from "
            f"{resume.name}{jump}"
        )
    return resume


def shared_steps(training: Training, before: int) -> int:
    """The last step up to which schedules of `before` and `training.steps` steps have the same learning rates."""
    if training.schedule == "constant":
        return training.steps
    if training.schedule == "wsd":
        return min(training.model_copy(update={"steps": before}).decay_start, training.decay_start)
    return training.steps if training.stretch_cosine and training.steps > before else 0


def branch(run: RunDirectory, trunk: RunDirectory, training: Training, now: Mapping[str, Any]) -> None:
    """Give a run without weights another's state from before `wsd` decays, for `plan` to resume from; if there is one.

    `now`: the run's `inputs`. Raises `UserError` if the other's differ in more than the decay's text.
    """
    recorded = trunk.inputs_of("training")
    if run.weights() or recorded is None:
        return
    if changed := [line for line in differences(recorded, now) if not line.startswith("data.decay_sha256 ")]:
        raise UserError(f"{run.path.name} cannot continue {trunk.path.name} ({'; '.join(changed)})")
    if (state := newest_valid_state(trunk.path, training.decay_start, run.report)) is not None:
        run.begin("training", dict(now))
        partial = run.path / "training_state" / f".{state.name}"
        remove(partial)
        copy_tree(state, partial)
        partial.rename(partial.with_name(state.name))


def set_aside(run: RunDirectory, training: Training, recorded: Mapping[str, Any] | None, resume: Path | None) -> None:
    """Before training with a new number of steps from `resume`, keep the weights of the earlier schedule in a folder.

    Checkpoints beyond that step move there; the schedule's last one is copied if the run passes it. States beyond it
    are removed: nothing resumes from them.
    """
    if resume is None or recorded is None or (before := recorded["training"]["steps"]) == training.steps:
        return
    kept = run.path / f"checkpoints-of-{before}-steps"
    for old in step_folders(run.path / "checkpoints"):
        place, number = kept / old.name, 1
        while place.exists():
            place, number = kept / f"{old.name}.{number}", number + 1
        if step_of(old) > step_of(resume):
            kept.mkdir(exist_ok=True)
            old.rename(place)
        elif step_of(old) == before:
            copy_tree(old, place)
    for old in states(run.path):
        if step_of(old) > step_of(resume):
            remove(old)
    if kept.exists():
        run.report(f"{run.path.name}: the weights of the {before} steps are kept in {kept}")
