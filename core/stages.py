"""What a stage is, and the runner that makes a recipe's stages in its run directory.

A stage is declared, in `data/stages.py` and `pipeline.py`: its key, its order, "up to date", what an outdated input
does and the refusal to replace weights follow from that. How one is built and renamed into place is in `run.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import write_text
from nanophi.core.inputs import Inputs
from nanophi.core.recipe import Recipe
from nanophi.core.recipe_file import dump
from nanophi.core.run import RunDirectory, differences

Summary = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a recipe: its name in `record.json` and on screen, and what follows from it."""

    name: str
    outputs: tuple[str, ...] = ()  # paths below the run directory
    build: Callable[[Runner, Path], Summary] | None = None  # writes outputs below a folder; returns a summary
    needs: tuple[str, ...] = ()  # stages that come first, and whose keys are part of this one's key, by their names
    after: tuple[str, ...] = ()  # stages that come first, and that `values` or `outside` account for
    values: dict[str, Any] = dataclasses.field(default_factory=dict)  # what of the recipe the outputs depend on
    outside: Callable[[Runner], dict[str, Any]] | None = None  # and what else, such as the user's files
    check: Callable[[Runner], None] | None = None  # refuses, before anything is made, what would stop the stage later
    changed: Callable[[RunDirectory, Path], list[str]] | None = None  # in new outputs, since weights were made
    parts: Callable[[Runner], Iterable[Stage]] | None = None  # stages that this one consists of, in place of `build`
    portable: bool = False  # if it may not run, `values` alone are compared with the record
    shared: bool = True  # take the outputs of a sibling run with the same key instead of building them again
    in_place: bool = False  # `build` writes in the run directory itself, as training does
    failure: str | None = None  # what a library's error means here


def is_main_process() -> bool:
    """Whether this is the process that writes, among those that `accelerate launch` or `torchrun` started."""
    return int(os.environ.get("RANK") or 0) == 0


class Runner:
    """A recipe's stages in its run directory. Each is made once per process, after those before it.

    Stages outside `build` must be up to date; `restart` permits to remove weights that the recipe cannot continue from.
    """

    def __init__(
        self, recipe: Recipe, run: RunDirectory, stages: Sequence[Stage], build: Collection[str], restart: bool = False
    ) -> None:
        self.recipe, self.run, self.path, self.report = recipe, run, run.path, run.report
        self.stages = {stage.name: stage for stage in stages}
        self.allowed, self.restart = frozenset(build), restart
        self.inputs = Inputs(run, write=is_main_process())
        self._done: dict[str, Summary] = {}
        self._checked = False

    def make(self, name: str) -> Summary:
        """A stage's summary; the stages before it and it itself run unless they are up to date."""
        self.check(name)
        for stage in self.chain(name):
            if stage.name not in self._done:
                self._done[stage.name] = self.make_stage(stage)
        return self._done[name]

    def check(self, name: str) -> None:
        """Refuse, before anything is made or replaced, what would stop the way to a stage. Raises `UserError`."""
        if not self._checked and is_main_process():
            self._checked = True
            for stage in self.chain(name):
                if stage.check is not None and stage.name in self.allowed:
                    stage.check(self)

    def chain(self, name: str) -> list[Stage]:
        """The stages that come before a stage, and it itself, in the order in which they run."""
        chain: dict[str, Stage] = {}
        stage = self.stages[name]
        for before in (*stage.after, *stage.needs):
            chain |= {other.name: other for other in self.chain(before)}
        return [*chain.values(), stage]

    def write_recipe(self) -> None:
        """`recipe.yaml`: the resolved recipe, every default written out."""
        write_text(self.path / "recipe.yaml", dump(self.recipe.dump()))

    def inputs_of(self, stage: Stage) -> dict[str, Any]:
        """Everything that a stage's outputs depend on, as JSON: its hash is the stage's key."""
        outside = stage.outside(self) if stage.outside else {}
        return {**stage.values, **{name: self.run.key(name) for name in stage.needs}, **outside}

    def make_stage(self, stage: Stage, allowed: bool | None = None) -> Summary:
        """A stage whose turn it is, or one that is not on the list, such as one that several runs share."""
        allowed = stage.name in self.allowed if allowed is None else allowed
        if stage.parts is not None:
            return {part.outputs[0]: self.make_stage(part, allowed) for part in stage.parts(self)}
        assert stage.build is not None
        build, changed = stage.build, stage.changed
        if not is_main_process():
            # The others train along, but only if the main process does: it alone would not come to the rendezvous.
            done = not stage.in_place or self.run.up_to_date(stage.name, self.inputs_of(stage), stage.outputs)
            return {} if done else build(self, self.path)
        if not allowed and stage.portable:
            return self._require(stage)

        def accept(work: Path) -> None:
            if changed is not None and not self.restart and (new := changed(self.run, work)):
                raise self.run.keeps_weights(f"the recipe gives other data ({', '.join(new)})")

        with user_errors(f"{stage.failure}; --debug shows where it stopped") if stage.failure else nullcontext():
            inputs = self.inputs_of(stage)
            self.inputs.contents.save()
            return self.run.stage(
                stage.name,
                inputs,
                stage.outputs,
                (lambda work: build(self, work)) if allowed else None,
                in_place=stage.in_place,
                shared=stage.shared,
                accept=accept,
            )

    def _require(self, stage: Stage) -> Summary:
        """The summary of a stage that may not run here. Raises `UserError` if its outputs are not the recipe's."""
        allowed = [self.stages[name] for name in self.allowed if name in self.stages]
        needed = any(stage.name in (*other.needs, *other.after) for other in allowed)
        for output in stage.outputs if needed else ():
            if not (self.path / output).exists():
                raise UserError(f"{self.path / output} is missing; run `nanophi prepare` on the recipe")
        then = self.run.inputs_of(stage.name)
        if then is None:
            return {}  # copied without its record; the rows' length is checked when they are read
        for line in differences({key: then.get(key) for key in stage.values}, stage.values):
            if ".path " not in line:  # on another machine the same file may have another name
                problem = f"{self.path / 'data'} was prepared with another recipe ({stage.name}: {line})"
                kept = self.run.weights()
                raise self.run.keeps_weights(problem) if kept else UserError(f"{problem}; run `nanophi prepare`")
        return self.run.record["stages"].get(stage.name, {}).get("summary", {})
