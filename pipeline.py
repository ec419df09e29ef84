"""A recipe's stages, in order: what each one depends on, what it writes, and the function that does it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nanophi import preflight
from nanophi.core import bases
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, remove, sha256_of_file, write_json, write_text
from nanophi.core.jobs import side_by_side
from nanophi.core.names import local, step_name, step_of
from nanophi.core.recipe import Recipe
from nanophi.core.run import RunDirectory, environment
from nanophi.data.chat_stages import ChatStages
from nanophi.data.stages import PREPARE

if TYPE_CHECKING:
    from nanophi.configuration_nanophi import NanoPhiConfig

STAGES = (*PREPARE, "training", "sample", "evaluation", "comparison", "report", "card", "release", "verification")


def is_main_process() -> bool:
    """Whether this is the process that writes, among those that `accelerate launch` or `torchrun` started."""
    return int(os.environ.get("RANK", "0")) == 0


class Pipeline(ChatStages):
    """One recipe's run. A method is a stage: it runs those before it, then itself unless it is up to date.

    Args:
        recipe: the resolved recipe.
        runs: the folder that holds the run directories.
        build: stages that may run; the others must be up to date already.
        report: called with one line for each thing worth telling.
        restart: weights that the recipe cannot continue from may be removed.
    """

    def __init__(
        self,
        recipe: Recipe,
        runs: Path,
        build: Collection[str] = STAGES,
        report: Callable[[str], None] = print,
        restart: bool = False,
    ) -> None:
        run = RunDirectory(runs / recipe.name, report if is_main_process() else lambda line: None)
        super().__init__(recipe, run, build, write=is_main_process(), restart=restart)

    def write_recipe(self) -> None:
        """`recipe.yaml`: the resolved recipe, every default written out."""
        write_text(self.path / "recipe.yaml", yaml.safe_dump(self.recipe.dump(), sort_keys=False, allow_unicode=True))

    # Training

    def training(self) -> dict[str, Any]:
        """The model, with its checkpoints."""
        from nanophi.model_card.release import sample_settings
        from nanophi.training import chat, continuation, trainer

        # On another machine than that which prepared the tokens, what they were made from need not be there.
        self.tokens() if "tokens" in self.build else self.require_tokens()
        recipe = self.recipe
        if "training" in self._done:
            return self._done["training"]
        config = self._model_config()
        if not recipe.conversations:
            # A prompt that is too long for the card's sample is refused before the training is paid for.
            sample_settings(self.path / "data/tokenizer", recipe.card.prompt, config.max_position_embeddings)
        recorded = self.run.inputs_of("training")
        inputs = continuation.inputs(self.path, recipe, config, recorded)
        outputs = [f"checkpoints/{step_name(recipe.training.steps)}"]
        plan = continuation.Continuation()
        if "training" in self.build and is_main_process() and not self.run.up_to_date("training", inputs, outputs):
            if "evaluation" in self.build:
                from nanophi.eval import suites

                documents, tokenizer = self.path / "data/documents", self.path / "data/tokenizer"
                suites.check_heldout(self.suites(), documents, tokenizer, config.max_position_embeddings)
            if self.restart:
                if recipe.base and not recipe.conversations:  # nothing is removed for a training that cannot begin
                    continuation.base_model(recipe.base, config, self.path / "data/tokenizer")
                self._remove_training()
                recorded = None
            plan = continuation.plan(self.path, recipe.training, recorded, inputs, self.report)

        def build(work: Path) -> dict[str, Any]:
            if is_main_process():
                self.run.update_record(environment=environment())
                continuation.carry_out(self.path, plan, recorded, self.report)
            if recipe.conversations:
                return chat.train(self.path, recipe, config, self.report, plan.resume)
            return trainer.train(
                self.path,
                recipe.training,
                config,
                recipe.training_seed,
                recipe.name,
                self.report,
                recipe.card.prompt,
                resume=plan.resume,
                base=recipe.base,
            )

        # The others train along, but only if the main process does: it alone would not come to the rendezvous.
        if not is_main_process() and not self.run.up_to_date("training", inputs, outputs):
            return build(self.path)
        summary = self._stage("training", inputs, outputs, build, in_place=True)
        continuation.restore_history(self.path, summary)
        return summary

    def _model_config(self) -> NanoPhiConfig:
        """The model's configuration, with the token ids of the run's tokenizer; a chat model has its base's."""
        from transformers import AutoTokenizer

        if self.recipe.conversations:
            from nanophi.configuration_nanophi import NanoPhiConfig

            return NanoPhiConfig.from_pretrained(self.path / "data/base")
        tokenizer = AutoTokenizer.from_pretrained(self.path / "data/tokenizer")
        return self.recipe.model_config_for(
            vocab_size=max(len(tokenizer), self.recipe.model.get("vocab_size", 0)),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    def check(self) -> None:
        """Refuse, before anything is made or replaced, what would stop this run later. Raises `UserError`."""
        preflight.check(
            self.recipe,
            self.run,
            evaluates="evaluation" in self.build,
            restart=self.restart,
            model_config=self._model_config,
        )

    def _remove_training(self) -> None:
        """What `--restart` allows: the weights, the states and the history of this run."""
        self.run.forget("training")
        for name in ("checkpoints", "training_state", "training.json"):
            if (self.path / name).exists():
                self.report(f"{self.recipe.name}: removing {self.path / name} (--restart)")
                remove(self.path / name)

    def checkpoint(self) -> Path:
        """The final checkpoint's folder."""
        return self.path / self.training()["checkpoint"]

    def sample(self) -> dict[str, Any]:
        """What the model writes after the recipe's prompt, or answers to held-out questions."""
        from nanophi.data import conversations
        from nanophi.model_card import release

        checkpoint, dtype = self.checkpoint(), self.recipe.release.dtype
        prompt: Any = self.recipe.card.prompt
        if self.recipe.conversations:
            prompt = conversations.heldout(self.path)
        inputs = {"training": self.run.stage_key("training"), "prompt": prompt, "dtype": dtype}
        return self._stage(
            "sample",
            inputs,
            ["sample.json"],
            lambda work: release.write_sample(checkpoint, prompt, work / "sample.json", dtype),
        )

    # Evaluation

    def evaluation(self) -> dict[str, dict[str, Any]]:
        """Every suite of the recipe on every kept checkpoint, and of a chat model on its base and held-out answers too.

        Returns:
            headline numbers by result file.
        """
        from nanophi.eval.measure import Options, measure
        from nanophi.eval.results import PROTOCOL, run_result_name

        self.training()
        section, recipe = self.recipe.evaluation, self.recipe
        results = {}
        kept = {step for step in recipe.training.keep_steps if (self.path / "checkpoints" / step_name(step)).is_dir()}
        models = {
            step_name(step): self.path / "checkpoints" / step_name(step) for step in {*kept, recipe.training.steps}
        }
        if recipe.conversations:
            models["base"] = self.path / "data/base"
        for model, folder in sorted(models.items()):
            for suite in self.suites():
                file = f"evals/{run_result_name(model, suite)}"
                inputs = {
                    "format": PROTOCOL,
                    "training": self.run.stage_key("training"),
                    "step": model if model == "base" else step_of(model),
                    "suite": suite,
                    "limit": section.limit,
                    "data": self.inputs.contents.of(section.data) if section.data else None,
                    "documents": self.run.stage_key("conversations" if recipe.conversations else "documents"),
                }

                def build(work: Path, folder: Path = folder, suite: str = suite, file: str = file) -> dict[str, Any]:
                    options = Options(
                        data=local(section.data) if section.data else None,
                        heldout=self.path / "data/documents",
                        limit=section.limit,
                        batch_size=section.batch_size,
                    )
                    result = measure(folder, suite, work / file, options, self.report)
                    return {"results": result["results"]}

                results[file] = self._stage(f"{model}-{suite}", inputs, [file], build, kind="evaluation")
        return results

    def suites(self) -> list[str]:
        """The recipe's suites. A chat model has one more, and none on held-out text that its base does not bring."""
        suites = self.recipe.evaluation.suites
        if not self.recipe.conversations:
            return suites
        text = list((self.path / "data/documents").glob("heldout-*.parquet"))
        return ["answers", *(suite for suite in suites if text or "heldout" not in suite)]

    def final_evaluations(self, model: str | None = None) -> list[Path]:
        """Result files of the final checkpoint, or of `base`."""
        from nanophi.eval.results import run_result_name

        self.evaluation()
        model = model or step_name(self.recipe.training.steps)
        return [self.path / "evals" / run_result_name(model, suite) for suite in self.suites()]

    def comparison(self, runs: Sequence[Pipeline]) -> None:
        """Several runs, this one among them, side by side; the last is the baseline. A chat model's is its base.

        Alone, an earlier comparison of these same evaluations stays, and one of other evaluations is removed.
        """
        from nanophi.eval.comparison import compare_models

        outputs = ["comparison.json", "comparison.md", "comparison.png"]
        files = {run.recipe.name: run.final_evaluations() for run in runs}
        if len(runs) == 1 and self.recipe.conversations:
            files[bases.find(str(self.recipe.base)).recipe["name"]] = self.final_evaluations("base")
        hashes = {name: [sha256_of_file(file) for file in paths] for name, paths in files.items()}
        if len(files) == 1:
            entry = self.run.record["stages"].get("comparison", {"inputs": {"evaluations": {}}})
            if entry["inputs"]["evaluations"].get(self.recipe.name) != hashes[self.recipe.name]:
                for output in outputs:
                    remove(self.path / output)
            return
        baseline = list(files)[-1]
        inputs = {"evaluations": hashes, "baseline": baseline, "seed": self.recipe.seed}

        def build(work: Path) -> dict[str, Any]:
            compare_models(files, work, baseline=baseline, seed=self.recipe.seed)
            return {"models": list(files), "baseline": baseline}

        self._stage("comparison", inputs, outputs, build)

    # Release

    def _records(self) -> dict[str, Any]:
        """What the report and the card are made from, as a stage's inputs."""
        from nanophi.model_card.records import LATER_STAGES

        self.sample()
        self.evaluation()
        self.write_recipe()  # The card is made from it; every stage before is up to date with this recipe.
        stages, comparison = self.run.record["stages"], self.path / "comparison.json"
        return {
            "stages": {name: stages[name]["key"] for name in sorted(stages) if name not in LATER_STAGES},
            "comparison": sha256_of_file(comparison) if comparison.exists() else None,
            "recipe": self.recipe.dump(),
        }

    def page(self) -> dict[str, Any]:
        """`report.html`: the run to look at."""
        from nanophi.model_card import report

        ablation = self.path / "ablation.json"
        inputs = self._records() | ({"ablation": sha256_of_file(ablation)} if ablation.exists() else {})
        return self._stage(
            "report", inputs, ["report.html"], lambda work: report.build(self.path, work / "report.html"), shared=False
        )

    def card(self) -> dict[str, Any]:
        """The model card, from records only."""
        from nanophi.model_card import card

        inputs = self._records()
        return self._stage("card", inputs, ["card"], lambda work: card.build(self.path, work / "card"), shared=False)

    def release(self) -> dict[str, Any]:
        """The release folder: exactly what gets pushed."""
        from nanophi.model_card import release

        self.card()
        dtype = self.recipe.release.dtype
        inputs = {"card": self.run.stage_key("card"), "dtype": dtype}
        return self._stage(
            "release",
            inputs,
            ["release"],
            lambda work: release.build(self.path, self.checkpoint(), self.path / "card", work / "release", dtype),
            shared=False,
        )

    def verification(self) -> dict[str, Any]:
        """The release, loaded by both loaders in fresh processes and checked against its manifest."""
        from nanophi.model_card import verify

        self.release()

        def build(work: Path) -> dict[str, Any]:
            checks = verify.verify(str(self.path / "release"), echo=self.report)
            failed = [check["name"] for check in checks if not check["passed"]]
            if failed:
                raise UserError(f"{self.path / 'release'} does not verify: {', '.join(failed)}")
            write_json(work / "verification.json", checks)
            return {"checks": len(checks)}

        inputs = {"release": self.run.stage_key("release")}
        return self._stage("verification", inputs, ["verification.json"], build, shared=False)


def run_recipes(
    recipes: Sequence[Recipe],
    runs: Path,
    report: Callable[[str], None] = print,
    jobs: int = 1,
    restart: bool = False,
) -> None:
    """Every stage of every recipe; several recipes end in one comparison, with the last as the baseline.

    Args:
        recipes: with different names.
        runs: the folder that holds the run directories.
        report: called with one line for each thing worth telling.
        jobs: how many recipes are trained and evaluated at once, each in a process of its own with one GPU or its
            share of the cores.
        restart: weights that a recipe cannot continue from may be removed.

    Raises:
        UserError: before anything runs, if a recipe cannot be run to its end here.
    """
    from nanophi.eval import render

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "only `nanophi train` runs on several processes: use `nanophi prepare`, then `accelerate launch -m nanophi "
            "train` (or torchrun), then `nanophi run`, each on the recipe"
        )

    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise UserError(f"two recipes have the same name ({', '.join(names)}); each run needs its own directory")
    pipelines = [Pipeline(recipe, runs, report=report, restart=restart) for recipe in recipes]
    for pipeline in pipelines:
        pipeline.check()
    jobs = min(jobs, len(recipes))
    if jobs > 1:
        train_side_by_side(pipelines, jobs)
        pipelines = [Pipeline(recipe, runs, report=report) for recipe in recipes]
    with contextlib.ExitStack() as locks:
        for pipeline in pipelines:
            locks.enter_context(pipeline.run.lock())
        for pipeline in pipelines:
            pipeline.tokens()
            pipeline.write_recipe()  # once nothing can refuse it any more
            pipeline.training()
            pipeline.sample()
            pipeline.evaluation()
        for pipeline in pipelines:
            pipeline.comparison(pipelines)
            pipeline.page()
            pipeline.verification()
    first = pipelines[0]
    if len(pipelines) > 1 or first.recipe.conversations:
        report("\n" + render.to_text(read_json(first.path / "comparison.json")))
    for pipeline in pipelines:
        sample = read_json(pipeline.path / "sample.json")
        asked = "" if isinstance(sample["prompt"], str) else sample["prompt"][-1]["content"] + "\n"
        report(f"\n{pipeline.recipe.name} writes:\n{asked}{sample['text']}")
    report(f"\nreport:  {first.path / 'report.html'}\nrelease: {first.path / 'release'}")


def train_side_by_side(
    pipelines: Sequence[Pipeline], jobs: int, finished: Callable[[str], None] = lambda name: None
) -> None:
    """Train and evaluate several runs of one folder, so many at once; what they share is made first, once.

    Args:
        pipelines: with different names, of one folder of runs.
        jobs: how many at once.
        finished: called with the name of each run that has been evaluated.

    Raises:
        UserError: naming the runs that failed, once the others are done (with one at a time, from the first that
            fails). All of them can be resumed.
    """
    if jobs > 1 and "RANK" in os.environ:
        raise UserError("--jobs starts processes of its own; leave out `accelerate launch` or `torchrun`")
    with contextlib.ExitStack() as locks:
        for pipeline in pipelines:
            locks.enter_context(pipeline.run.lock())
        for pipeline in pipelines:
            pipeline.tokens()
            pipeline.write_recipe()
    if jobs == 1:
        for pipeline in pipelines:
            with pipeline.run.lock():
                pipeline.sample()
                pipeline.evaluation()
            finished(pipeline.recipe.name)
        return
    commands = {
        pipeline.recipe.name: [
            *(sys.executable, "-m", "nanophi", "worker", str(pipeline.path / "recipe.yaml")),
            *("--runs", str(pipeline.path.parent), *(["--restart"] if pipeline.restart else [])),
        ]
        for pipeline in pipelines
    }
    side_by_side(commands, jobs, pipelines[0].report, finished)
