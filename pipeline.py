"""A recipe's stages, in order: what each one depends on, what it writes, and the function that does it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from nanophi.files import UserError, read_json, remove, sha256_of_file, user_errors, write_json, write_text
from nanophi.inputs import WEIGHTS, is_hub_id, local
from nanophi.jobs import side_by_side
from nanophi.recipe import Data, Recipe
from nanophi.run import Inputs, RunDirectory, environment

PREPARE = ("documents", "scores", "quality", "tokenizer", "tokens")
STAGES = (*PREPARE, "training", "sample", "evaluation", "comparison", "report", "card", "release", "verification")

Build = Callable[[Path], dict[str, Any]]


def is_main_process() -> bool:
    """Whether this is the process that writes, among those that `accelerate launch` or `torchrun` started."""
    return int(os.environ.get("RANK", "0")) == 0


class Pipeline:
    """One recipe's run. A method is a stage: it sees to those before it, runs or is up to date, returns its summary.

    Args:
        recipe: the resolved recipe.
        runs: the folder that holds the run directories.
        build: stages that may run; the others must be up to date already.
        report: called with one line for each thing worth telling.
    """

    def __init__(
        self,
        recipe: Recipe,
        runs: Path,
        build: Collection[str] = STAGES,
        report: Callable[[str], None] = print,
    ) -> None:
        self.recipe = recipe
        self.run = RunDirectory(runs / recipe.name, report if is_main_process() else lambda line: None)
        self.path = self.run.path
        self.build = frozenset(build)
        self.report = self.run.report
        self.inputs = Inputs(self.run, write=is_main_process())
        self._done: dict[str, dict[str, Any]] = {}

    def _stage(
        self,
        name: str,
        inputs: dict[str, Any],
        outputs: Sequence[str],
        build: Build,
        kind: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Each stage once per process, so that no two callers check the same thing twice."""
        if name not in self._done:
            self.inputs.save()
            allowed = build if (kind or name) in self.build else None
            self._done[name] = self.run.stage(name, inputs, outputs, allowed, **kwargs)
        return self._done[name]

    def write_recipe(self) -> None:
        """`recipe.yaml`: the resolved recipe, every default written out."""
        write_text(self.path / "recipe.yaml", yaml.safe_dump(self.recipe.dump(), sort_keys=False, allow_unicode=True))

    # Data

    def _pinned_data(self) -> Data:
        """The recipe's section with the commit of each dataset on the Hub as its revision."""
        pinned = []
        for source in self.recipe.data.sources:
            if source.hub and is_hub_id(source.hub) and not local(source.hub).is_dir():
                commit = self.inputs.commit_of(source.hub, source.revision, "dataset")
                source = source.model_copy(update={"revision": commit})
            pinned.append(source)
        return self.recipe.data.model_copy(update={"sources": pinned})

    def _check_what_comes_later(self) -> None:
        """What would stop the run only after the documents are read is looked at first: the scorer, the tokenizer."""
        recipe = self.recipe
        if "documents" in self._done or "documents" not in self.build or "documents" in self.run.record["stages"]:
            return
        kind, _, name = recipe.quality.scorer.partition(":")
        if kind == "model":
            from nanophi.data import scorers

            commit = self.inputs.model(name).get("commit")
            scorers.find_scorer(
                recipe.quality.scorer, recipe.quality.label, recipe.quality.scale, commit
            ).check_choice()
        if recipe.tokenizer.path is not None:
            from nanophi.data import tokenizer

            commit = self.inputs.model(recipe.tokenizer.path, ignore=WEIGHTS).get("commit")
            tokenizer.load(recipe.tokenizer.path, commit)

    @user_errors("documents cannot be gathered; --debug shows where it stopped")
    def documents(self) -> dict[str, Any]:
        """Sources to clean, deduplicated documents, split into train and held-out."""
        from nanophi.data import gather, sources

        self._check_what_comes_later()
        data = self._pinned_data()
        kind, _, column = self.recipe.quality.scorer.partition(":")
        score = column if kind == "column" else None
        benchmarks = data.decontamination.benchmarks
        inputs = {
            "data": data.model_dump(mode="json", exclude={"engine", "workers", "max_tokens", "max_dropped"}),
            "sources": [sources.fingerprint(source, self.inputs.contents) for source in data.sources],
            "benchmarks": self.inputs.contents.of(benchmarks) if benchmarks else None,
            "score": score,
        }
        return self._stage(
            "documents",
            inputs,
            ["data/documents"],
            lambda work: gather.gather(data, work / "data/documents", score, self.report),
        )

    @user_errors("documents cannot be scored; --debug shows where it stopped")
    def scores(self) -> dict[str, Any]:
        """A quality score for every document."""
        from nanophi.data import quality

        self.documents()
        recipe, selection = self.recipe, {"threshold", "share", "select"}
        inputs: dict[str, Any] = {
            "documents": self.run.stage_key("documents"),
            "quality": recipe.quality.model_dump(mode="json", exclude=selection),
            "seed": recipe.seed,
        }
        kind, _, name = recipe.quality.scorer.partition(":")
        if kind == "model":
            inputs["scorer"] = self.inputs.model(name)
        return self._stage(
            "scores",
            inputs,
            ["data/scores"],
            lambda work: quality.score(
                self.path / "data/documents",
                recipe.quality,
                recipe.data,
                recipe.seed,
                work / "data/scores",
                revision=inputs.get("scorer", {}).get("commit"),
            ),
        )

    @user_errors("documents cannot be selected; --debug shows where it stopped")
    def quality(self) -> dict[str, Any]:
        """The documents that the filter keeps, and the report on it."""
        from nanophi.data import quality

        self.scores()
        recipe = self.recipe
        section, seed = recipe.quality, recipe.training_seed
        inputs: dict[str, Any] = {"scores": self.run.stage_key("scores"), "threshold": section.threshold}
        if section.share is not None:
            inputs |= {"share": section.share, "select": section.select, "seed": seed}
        return self._stage(
            "quality",
            inputs,
            ["data/quality"],
            lambda work: quality.select(
                self.path / "data/documents", self.path / "data/scores", section, work / "data/quality", seed
            ),
        )

    @user_errors("the tokenizer cannot be made; --debug shows where it stopped")
    def tokenizer(self) -> dict[str, Any]:
        """An existing tokenizer, or one trained on all documents, so that a filtered run and its control share it."""
        from nanophi.data import tokenizer

        self.documents()
        recipe = self.recipe
        inputs: dict[str, Any] = {"tokenizer": recipe.tokenizer.model_dump(mode="json"), "seed": recipe.seed}
        inputs["documents"] = self.run.stage_key("documents")
        if recipe.tokenizer.path is not None:
            # A tokenizer's folder may hold a model's weights too, which are large and play no part.
            inputs["files"] = self.inputs.model(recipe.tokenizer.path, ignore=WEIGHTS)
        return self._stage(
            "tokenizer",
            inputs,
            ["data/tokenizer"],
            lambda work: tokenizer.build(
                self.path / "data/documents",
                recipe.tokenizer,
                recipe.seed,
                work / "data/tokenizer",
                revision=inputs.get("files", {}).get("commit"),
                report=self.report,
            ),
        )

    @user_errors("documents cannot be tokenized; --debug shows where it stopped")
    def tokens(self) -> dict[str, Any]:
        """Kept documents as packed rows of tokens."""
        from nanophi.data import packing

        self.quality()
        self.tokenizer()
        recipe = self.recipe
        context_length = recipe.model_config_for().max_position_embeddings
        inputs = {
            "quality": self.run.stage_key("quality"),
            "tokenizer": self.run.stage_key("tokenizer"),
            "context_length": context_length,
            "max_tokens": recipe.data.max_tokens,
            "seed": recipe.training_seed,
        }
        return self._stage(
            "tokens",
            inputs,
            ["data/tokens"],
            lambda work: packing.pack(
                self.path / "data/documents",
                self.path / "data/quality",
                self.path / "data/tokenizer",
                context_length,
                recipe.data,
                recipe.training_seed,
                work / "data/tokens",
            ),
        )

    # Training

    def training(self) -> dict[str, Any]:
        """The model, with its checkpoints."""
        from transformers import AutoTokenizer

        from nanophi.model_card.release import sample_settings
        from nanophi.training import checkpoints, trainer

        self.tokens()
        if "training" in self.run.record.get("in_progress", {}):
            checkpoints.check_data(self.path)  # before a stage with other inputs would begin from scratch
        recipe = self.recipe
        # A prompt that is too long for the card's sample is refused before the training is paid for.
        context = recipe.model_config_for().max_position_embeddings
        sample_settings(self.path / "data/tokenizer", recipe.card.prompt, context)
        inputs = {
            "tokens": self.run.stage_key("tokens"),
            "tokenizer": self.run.stage_key("tokenizer"),
            "model": recipe.model,
            "training": recipe.training.model_dump(mode="json", exclude={*trainer.NOT_IN_WEIGHTS, "seed"}),
            "seed": recipe.training_seed,
        }

        def build(work: Path) -> dict[str, Any]:
            if is_main_process():
                self.run.update_record(environment=environment())
            tokenizer = AutoTokenizer.from_pretrained(self.path / "data/tokenizer")
            config = recipe.model_config_for(
                vocab_size=max(len(tokenizer), recipe.model.get("vocab_size", 0)),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            return trainer.train(
                self.path, recipe.training, config, recipe.training_seed, recipe.name, self.report, recipe.card.prompt
            )

        outputs = ["checkpoints", "training_state", "training.json"]
        # The others train along, but only if the main process does: it alone would not come to the rendezvous.
        if not is_main_process() and not self.run.up_to_date("training", inputs, outputs):
            return build(self.path)
        return self._stage("training", inputs, outputs, build, in_place=True)

    def checkpoint(self) -> Path:
        """The final checkpoint's folder."""
        return self.path / self.training()["checkpoint"]

    def sample(self) -> dict[str, Any]:
        """What the model writes after the recipe's prompt."""
        from nanophi.model_card import release

        checkpoint, prompt, dtype = self.checkpoint(), self.recipe.card.prompt, self.recipe.release.dtype
        inputs = {"training": self.run.stage_key("training"), "prompt": prompt, "dtype": dtype}
        return self._stage(
            "sample",
            inputs,
            ["sample.json"],
            lambda work: release.write_sample(checkpoint, prompt, work / "sample.json", dtype),
        )

    # Evaluation

    def evaluation(self) -> dict[str, dict[str, Any]]:
        """Every suite of the recipe on every kept checkpoint. Returns headline numbers by result file."""
        from nanophi.eval import evaluate
        from nanophi.eval.results import FORMAT, run_result_name

        self.training()
        section, recipe = self.recipe.evaluation, self.recipe
        results = {}
        for step in sorted({*recipe.training.keep_steps, recipe.training.steps}):
            model = f"step-{step:06d}"
            for suite in section.suites:
                file = f"evals/{run_result_name(model, suite)}"
                inputs = {
                    "format": FORMAT,
                    "training": self.run.stage_key("training"),
                    "step": step,
                    "suite": suite,
                    "limit": section.limit,
                    "data": self.inputs.contents.of(section.data) if section.data else None,
                    "documents": self.run.stage_key("documents"),
                }

                def build(work: Path, model: str = model, suite: str = suite, file: str = file) -> dict[str, Any]:
                    result = evaluate.evaluate(
                        self.path / "checkpoints" / model,
                        suite,
                        work / file,
                        data=local(section.data) if section.data else None,
                        heldout=self.path / "data/documents",
                        limit=section.limit,
                        batch_size=section.batch_size,
                        seed=recipe.seed,
                        report=self.report,
                    )
                    return {"results": result["results"]}

                results[file] = self._stage(f"{model}-{suite}", inputs, [file], build, kind="evaluation")
        return results

    def final_evaluations(self) -> list[Path]:
        """Result files of the final checkpoint."""
        from nanophi.eval.results import run_result_name

        self.evaluation()
        final = f"step-{self.recipe.training.steps:06d}"
        return [self.path / "evals" / run_result_name(final, suite) for suite in self.recipe.evaluation.suites]

    def comparison(self, runs: Sequence[Pipeline]) -> None:
        """Several runs, this one among them, side by side; the last is the baseline.

        Alone, an earlier comparison of these same evaluations stays, and one of other evaluations is removed.
        """
        from nanophi.eval import compare

        outputs = ["comparison.json", "comparison.md", "comparison.png"]
        files = {run.recipe.name: run.final_evaluations() for run in runs}
        hashes = {name: [sha256_of_file(file) for file in paths] for name, paths in files.items()}
        if len(runs) == 1:
            entry = self.run.record["stages"].get("comparison", {"inputs": {"evaluations": {}}})
            if entry["inputs"]["evaluations"].get(self.recipe.name) != hashes[self.recipe.name]:
                for output in outputs:
                    remove(self.path / output)
            return
        baseline = runs[-1].recipe.name
        inputs = {"evaluations": hashes, "baseline": baseline, "seed": self.recipe.seed}

        def build(work: Path) -> dict[str, Any]:
            compare.compare(files, work, baseline=baseline, seed=self.recipe.seed)
            return {"models": list(files), "baseline": baseline}

        self._stage("comparison", inputs, outputs, build)

    # Release

    def _records(self) -> dict[str, Any]:
        """What the report and the card are made from, as a stage's inputs."""
        from nanophi.model_card.shipped import LATER_STAGES

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


def run_recipes(recipes: Sequence[Recipe], runs: Path, report: Callable[[str], None] = print, jobs: int = 1) -> None:
    """Every stage of every recipe; several recipes end in one comparison, with the last as the baseline.

    Args:
        recipes: with different names.
        runs: the folder that holds the run directories.
        report: called with one line for each thing worth telling.
        jobs: how many recipes are trained and evaluated at once, each in a process of its own with one GPU or its
            share of the cores.
    """
    from nanophi.eval import render, suites

    for recipe in recipes:
        context = recipe.model_config_for().max_position_embeddings
        if problem := suites.context_problem(recipe.evaluation.suites, context):
            raise UserError(f"{recipe.name}: {problem}")
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise UserError(f"two recipes have the same name ({', '.join(names)}); each run needs its own directory")
    jobs = min(jobs, len(recipes))
    if jobs > 1:
        train_side_by_side([Pipeline(recipe, runs, report=report) for recipe in recipes], jobs)
    pipelines = [Pipeline(recipe, runs, report=report) for recipe in recipes]
    with contextlib.ExitStack() as locks:
        for pipeline in pipelines:
            locks.enter_context(pipeline.run.lock())
        for pipeline in pipelines:
            pipeline.write_recipe()
            pipeline.training()
            pipeline.sample()
            pipeline.evaluation()
        for pipeline in pipelines:
            pipeline.comparison(pipelines)
            pipeline.page()
            pipeline.verification()
    first = pipelines[0]
    if len(pipelines) > 1:
        report("\n" + render.to_text(read_json(first.path / "comparison.json")))
    for pipeline in pipelines:
        sample = read_json(pipeline.path / "sample.json")
        report(f"\n{pipeline.recipe.name} writes:\n{sample['text']}")
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
            pipeline.write_recipe()
            pipeline.tokens()
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
            *("--runs", str(pipeline.path.parent)),
        ]
        for pipeline in pipelines
    }
    side_by_side(commands, jobs, pipelines[0].report, finished)
