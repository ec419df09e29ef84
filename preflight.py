"""What would stop a run after hours is refused before it begins."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from nanophi.core import bases
from nanophi.core.errors import UserError
from nanophi.core.names import local, step_folders, step_name
from nanophi.core.recipe import Recipe
from nanophi.core.run import RunDirectory, differences

if TYPE_CHECKING:
    from nanophi.configuration_nanophi import NanoPhiConfig


def check(
    recipe: Recipe, run: RunDirectory, *, evaluates: bool, restart: bool, model_config: Callable[[], NanoPhiConfig]
) -> None:
    """Refuse, before anything is made or replaced, what would stop a recipe's training or what follows it.

    Args:
        recipe: the resolved recipe.
        run: its directory.
        evaluates: whether this call comes to the evaluation.
        restart: weights in the directory may be removed.
        model_config: gives the model's configuration once there is a tokenizer.

    Raises:
        UserError: for arguments that cannot be used here, suites that need a longer context or other data if this call
            evaluates (else they are only named: they may change after training), and weights in the run directory that
            the recipe cannot continue from.
    """
    from nanophi.training import arguments, chat
    from nanophi.training import base as base_model

    if recipe.conversations:
        chat.trl()
        base = bases.find(str(recipe.base))
        if base.documents is None and any("heldout" in suite for suite in recipe.evaluation.suites):
            run.report(f"{recipe.name}: suites on held-out text are left out, which only a run brings")
        if changed := differences(base.recipe["model"], recipe.model):
            raise UserError(f"{recipe.name}: 'model' is not its base's ({changed[0]}); leave it out")
    elif recipe.base:
        base_model.check_base(recipe.base, recipe.model_config_for(), None)
    # A machine that only trains may lack lm-eval.
    with contextlib.suppress(ImportError):
        if problem := _evaluation_problem(recipe):
            if evaluates:
                raise UserError(f"{recipe.name}: {problem}")
            run.report(f"{recipe.name}: its evaluation cannot run: {problem}")
    arguments.check(recipe.training, run.path, recipe.training_seed)
    if not restart:
        _check_weights(recipe, run, model_config)


def _evaluation_problem(recipe: Recipe) -> str:
    """Why the recipe's suites cannot be run on its model, in one line; empty if they can."""
    from nanophi.eval import suites

    section = recipe.evaluation
    if problem := suites.context_problem(section.suites, recipe.model_config_for().max_position_embeddings):
        return problem
    if section.data is None:
        return ""
    if not local(section.data).is_dir():
        return f"evaluation.data: folder {section.data} does not exist"
    for name in section.suites:
        suite = suites.find_suite(name)
        entries = [entry for entry in suite.entries if not entry.task.startswith(("heldout_", "answers_"))]
        try:
            suites.find_data(dataclasses.replace(suite, entries=tuple(entries)), data=local(section.data))
        except UserError as error:
            return f"evaluation.data: {error}"
    return ""


def _check_weights(recipe: Recipe, run: RunDirectory, model_config: Callable[[], NanoPhiConfig]) -> None:
    """Refuse to continue from weights in the run directory that are of another training."""
    from nanophi.training import continuation

    path, recorded = run.path, run.inputs_of("training")
    if not step_folders(path / "checkpoints") and not step_folders(path / "training_state"):
        return
    inputs = recorded
    if recorded is not None and (path / "data/tokens/tokens.json").exists():
        inputs = continuation.inputs(path, recipe, model_config(), recorded)
        inputs["data"] = recorded["data"]  # these are compared once they are made
        if run.up_to_date("training", inputs, [f"checkpoints/{step_name(recipe.training.steps)}"]):
            return
    continuation.plan(path, recipe.training, recorded, inputs or {}, lambda line: None)
