"""The list of stages, from text to a verified release, and the verbs that make them.

What each stage needs, which values it depends on and what it writes is declared here and in `data/stages.py`; how
stages are keyed, ordered and refused is in `core/stages.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nanophi.core import bases
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, remove, sha256_of_file, write_json
from nanophi.core.jobs import side_by_side, stop_with_parent, world_size
from nanophi.core.mirror import let_go, mirror_url, mirrored
from nanophi.core.names import local, step_name, step_of
from nanophi.core.options import Gguf, Jobs, Mirror, OneRecipe, Overrides, Recipes, Restart, Runs
from nanophi.core.recipe import Recipe, check_distinct, load_recipe
from nanophi.core.run import Report, RunDirectory, differences
from nanophi.core.sample import sample_settings, write_sample
from nanophi.core.stages import Runner, Stage, Summary, is_main_process
from nanophi.data.stages import PREPARE, data_stages
from nanophi.eval.catalogue import made_from, suite_made_from
from nanophi.eval.results import run_result_name

if TYPE_CHECKING:
    from nanophi.configuration_nanophi import NanoPhiConfig

STAGES = (*PREPARE, "training", "sample", "evaluation", "comparison", "report", "card", "release", "verification")


def stages_of(recipe: Recipe) -> list[Stage]:
    """Every stage of a recipe, in their order. A comparison has several recipes: see `compare_runs`."""
    data = data_stages(recipe)
    prepared = ("conversations",) if recipe.conversations else ("tokens", "tokenizer")
    measured, dtype = ("sample", "evaluation"), recipe.release.dtype
    weights = (f"checkpoints/{step_name(recipe.training.steps)}", "training.json")
    return [
        *data,
        Stage("training", weights, _training, (), prepared, {}, _training_inputs, _check_training, in_place=True),
        Stage("sample", ("sample.json",), _sample, needs=("training",), outside=_sample_inputs),
        Stage("evaluation", after=("training",), parts=_evaluations, check=_check_evaluation),
        Stage("report", ("report.html",), _report, after=measured, outside=_report_inputs, shared=False),
        Stage("card", ("card",), _card, after=measured, outside=_records, shared=False),
        Stage("release", ("release",), _release, needs=("card",), values={"dtype": dtype}, shared=False),
        Stage("verification", ("verification.json",), _verification, needs=("release",), shared=False),
    ]


class Pipeline(Runner):
    """One recipe's run in a folder of runs."""

    def __init__(
        self, recipe: Recipe, runs: Path, build: Collection[str] = STAGES, report: Report = print, restart: bool = False
    ) -> None:
        run = RunDirectory(runs / recipe.name, report if is_main_process() else lambda line: None)
        super().__init__(recipe, run, stages_of(recipe), build, restart)

    def tokens(self) -> Summary:
        """What a training reads, and `recipe.yaml` once nothing can refuse the recipe any more."""
        summary = self.make(data_stages(self.recipe)[-1].name)
        self.write_recipe()
        return summary


# Training


def _model_config(run: Runner) -> NanoPhiConfig:
    """The model's configuration, with the token ids of the run's tokenizer; a chat model has its base's."""
    from transformers import AutoTokenizer

    from nanophi.configuration_nanophi import NanoPhiConfig

    recipe = run.recipe
    if recipe.conversations:
        return NanoPhiConfig.from_pretrained(run.path / "data/base")
    tokenizer = AutoTokenizer.from_pretrained(run.path / "data/tokenizer")
    return recipe.model_config_for(
        vocab_size=max(*(number + 1 for number in tokenizer.get_vocab().values()), recipe.model.get("vocab_size", 0)),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _training_inputs(run: Runner) -> dict[str, Any]:
    from nanophi.training import continuation

    return continuation.inputs(run.path, run.recipe, _model_config(run), run.run.inputs_of("training"))


def _check_training(run: Runner) -> None:
    """Arguments that cannot be used here, a base of another shape, weights that the recipe cannot continue from."""
    from nanophi.training import arguments, chat, continuation
    from nanophi.training.base import check_base

    recipe = run.recipe
    if recipe.conversations:
        chat.trl()
        base = bases.find(str(recipe.base))
        if base.documents is None and any(suite_made_from(name, "documents") for name in recipe.evaluation.suites):
            run.report(f"{recipe.name}: suites on held-out text are left out, which only a run brings")
        if changed := differences(base.recipe["model"], recipe.model):
            raise UserError(f"{recipe.name}: 'model' is not its base's ({changed[0]}); leave it out")
    elif recipe.base:
        check_base(recipe.base, recipe.model_config_for(), None)
    # A machine that only trains may lack lm-eval; suites may change after the training.
    if "evaluation" not in run.allowed:
        try:
            _check_evaluation(run)
        except ImportError:
            pass
        except UserError as error:
            run.report(f"{error}; its evaluation cannot run")
    arguments.check(recipe.training, run.path, recipe.training_seed)
    if run.restart or not run.run.weights():
        return
    recorded = inputs = run.run.inputs_of("training")
    if recorded is not None and (run.path / "data/tokens/tokens.json").exists():
        inputs = _training_inputs(run) | {"data": recorded["data"]}  # data are compared once they are made
        if run.run.up_to_date("training", inputs, run.stages["training"].outputs):
            return
    continuation.plan(run.run, recipe.training, recorded, inputs or {}, lambda line: None)


def _training(run: Runner, work: Path) -> Summary:
    """The model, with its checkpoints, from the beginning or from the state that a killed training left."""
    from nanophi.training import chat, trainer

    recipe, config = run.recipe, _model_config(run)
    resume = _begin_training(run, config) if is_main_process() else None
    if recipe.conversations:
        return chat.train(run.path, recipe, config, run.report, resume)
    training, seed, prompt = recipe.training, recipe.training_seed, recipe.card.prompt
    return trainer.train(run.path, training, config, seed, run.report, prompt, resume=resume, base=recipe.base)


def _begin_training(run: Runner, config: NanoPhiConfig) -> Path | None:
    """The state to resume from. What would stop the card or the evaluation later is refused first."""
    from nanophi.training import continuation
    from nanophi.training.base import base_model

    recipe, tokenizer, inputs = run.recipe, run.path / "data/tokenizer", _training_inputs(run)
    recorded = run.run.inputs_of("training")
    if not recipe.conversations:
        sample_settings(tokenizer, recipe.card.prompt, config.max_position_embeddings)
    if "evaluation" in run.allowed:
        from nanophi.eval.suites import check_heldout

        check_heldout(suites(run), run.path / "data/documents", tokenizer, config.max_position_embeddings)
    if run.restart:
        if recipe.base and not recipe.conversations:  # nothing is removed for a training that cannot begin
            base_model(recipe.base, config, tokenizer)
        run.run.forget("training")
        for path in (run.path / name for name in ("checkpoints", "training_state", "training.json")):
            if path.exists():
                run.report(f"{recipe.name}: removing {path} (--restart)")
                remove(path)
    resume = continuation.plan(run.run, recipe.training, recorded, inputs, run.report)
    continuation.set_aside(run.run, recipe.training, recorded, resume)
    run.run.begin("training", inputs)
    return resume


def _prompt(run: Runner) -> Any:
    from nanophi.data import conversations

    return conversations.heldout(run.path) if run.recipe.conversations else run.recipe.card.prompt


def _sample_inputs(run: Runner) -> dict[str, Any]:
    return {"prompt": _prompt(run), "dtype": run.recipe.release.dtype}


def _sample(run: Runner, work: Path) -> Summary:
    """What the model writes after the recipe's prompt, or answers to held-out questions."""
    return write_sample(_checkpoint(run), _prompt(run), work / "sample.json", run.recipe.release.dtype)


def _checkpoint(run: Runner) -> Path:
    return run.path / "checkpoints" / step_name(run.recipe.training.steps)


# Evaluation


def suites(run: Runner) -> list[str]:
    """The recipe's suites. A chat model has one more, and none on held-out text that its base does not bring."""
    named = run.recipe.evaluation.suites
    if not run.recipe.conversations:
        return named
    text = list((run.path / "data/documents").glob("heldout-*.parquet"))
    missing = ["tokens"] if text else ["tokens", "documents"]  # which the base's run has
    return ["answers", *(suite for suite in named if not any(suite_made_from(suite, what) for what in missing))]


def _check_evaluation(run: Runner) -> None:
    """Suites that do not fit into the model's context, or whose benchmarks are not in the folder that is named."""
    from nanophi.eval.suites import context_problem, find_data, find_suite

    name, section = run.recipe.name, run.recipe.evaluation
    if problem := context_problem(section.suites, run.recipe.model_config_for().max_position_embeddings):
        raise UserError(f"{name}: {problem}")
    if section.data is None:
        return
    if not local(section.data).is_dir():
        raise UserError(f"{name}: evaluation.data: folder {section.data} does not exist")
    for suite in map(find_suite, section.suites):
        entries = tuple(entry for entry in suite.entries if not made_from(entry.task))
        try:
            find_data(dataclasses.replace(suite, entries=entries), data=local(section.data))
        except UserError as error:
            raise UserError(f"{name}: evaluation.data: {error}") from None


def _evaluations(run: Runner) -> Iterator[Stage]:
    """Every suite on every kept checkpoint, and on the base of a chat model."""
    training, folder = run.recipe.training, run.path / "checkpoints"
    kept = (step for step in training.keep_steps if (folder / step_name(step)).is_dir())
    models = {step_name(step): folder / step_name(step) for step in {training.steps, *kept}}
    if run.recipe.conversations:
        models["base"] = run.path / "data/base"
    for model, path in sorted(models.items()):
        for suite in suites(run):
            yield _evaluation(run, model, path, suite)


def _evaluation(run: Runner, model: str, path: Path, suite: str) -> Stage:
    section, file = run.recipe.evaluation, f"evals/{run_result_name(model, suite)}"
    data = local(section.data) if section.data else None

    def build(run: Runner, work: Path) -> Summary:
        from nanophi.eval.measure import Options, measure

        heldout = run.path / "data/documents"
        options = Options(data=data, heldout=heldout, limit=section.limit, batch_size=section.batch_size)
        return {"results": measure(path, suite, work / file, options, run.report)["results"]}

    values = {
        "format": 2,  # of the key: it stayed when the file's own format changed, so that nothing is evaluated again
        "step": model if model == "base" else step_of(model),
        "suite": suite,
        "limit": section.limit,
        "data": run.inputs.contents.of(data) if data else None,
        "documents": run.run.key("conversations" if run.recipe.conversations else "documents"),
    }
    return Stage(f"{model}-{suite}", (file,), build, needs=("training",), values=values)


def final_evaluations(run: Runner, model: str | None = None) -> list[Path]:
    """Result files of the final checkpoint, or of `base`."""
    run.make("evaluation")
    model = model or step_name(run.recipe.training.steps)
    return [run.path / "evals" / run_result_name(model, suite) for suite in suites(run)]


def compare_runs(runs: Sequence[Runner]) -> None:
    """A comparison in each of several runs; the last is the baseline. A chat model alone is compared with its base.

    In a run alone, an earlier comparison of these same evaluations stays, and one of other evaluations is removed.
    """
    files = {run.recipe.name: final_evaluations(run) for run in runs}
    if len(runs) == 1 and runs[0].recipe.conversations:
        files[bases.find(str(runs[0].recipe.base)).recipe["name"]] = final_evaluations(runs[0], "base")
    hashes = {name: [sha256_of_file(file) for file in paths] for name, paths in files.items()}
    outputs = ("comparison.json", "comparison.md", "comparison.png")
    if len(files) == 1:
        (run,) = runs
        entry = run.run.record["stages"].get("comparison", {"inputs": {"evaluations": {}}})
        if entry["inputs"]["evaluations"].get(run.recipe.name) != hashes[run.recipe.name]:
            for output in outputs:
                remove(run.path / output)
        return
    baseline = list(files)[-1]

    def build(run: Runner, work: Path) -> Summary:
        from nanophi.eval.compare import compare_models

        compare_models(files, work, baseline=baseline, seed=run.recipe.seed)
        return {"models": list(files), "baseline": baseline}

    for run in runs:
        values = {"evaluations": hashes, "baseline": baseline, "seed": run.recipe.seed}
        run.make_stage(Stage("comparison", outputs, build, values=values))


# Release


def _records(run: Runner) -> dict[str, Any]:
    """What the report and the card are made from."""
    from nanophi.model_card.records import LATER_STAGES

    run.write_recipe()  # the card is made from it
    stages, comparison = run.run.record["stages"], run.path / "comparison.json"
    prediction = run.path / "prediction.json"
    return {
        "stages": {name: stages[name]["key"] for name in sorted(stages) if name not in LATER_STAGES},
        "comparison": sha256_of_file(comparison) if comparison.exists() else None,
        "recipe": run.recipe.dump(),
        **({"prediction": sha256_of_file(prediction)} if prediction.exists() else {}),
    }


def _report_inputs(run: Runner) -> dict[str, Any]:
    ablation = run.path / "ablation.json"
    return _records(run) | ({"ablation": sha256_of_file(ablation)} if ablation.exists() else {})


def _report(run: Runner, work: Path) -> Summary:
    from nanophi.model_card import report

    return report.build(run.path, work / "report.html")


def _card(run: Runner, work: Path) -> Summary:
    from nanophi.model_card import card

    return card.build(run.path, work / "card")


def _release(run: Runner, work: Path) -> Summary:
    """The release folder: exactly what gets pushed."""
    from nanophi.model_card import release

    return release.build(run.path, _checkpoint(run), run.path / "card", work / "release", run.recipe.release.dtype)


def _verification(run: Runner, work: Path) -> Summary:
    """The release, loaded by both loaders in fresh processes and checked against its manifest."""
    from nanophi.model_card import verify

    checks = verify.check(str(run.path / "release"), report=run.report)
    verify.demand_all(run.path / "release", checks)
    write_json(work / "verification.json", checks)
    return {"checks": len(checks)}


# Verbs


def run(
    recipes: Recipes,
    jobs: Jobs = 1,
    restart: Restart = False,
    mirror: Mirror = None,
    runs: Runs = Path("runs"),
    overrides: Overrides = [],
) -> None:
    """Run every stage of a recipe, from text to release.

    Several recipes are compared at the end; the last one is the baseline.

    Example: nanophi run demo demo-control --jobs 2
    """
    with mirrored(mirror):
        run_recipes([load_recipe(recipe, overrides) for recipe in recipes], runs, jobs=jobs, restart=restart)


def prepare(
    recipe: OneRecipe,
    restart: Restart = False,
    mirror: Mirror = None,
    runs: Runs = Path("runs"),
    overrides: Overrides = [],
) -> None:
    """Prepare packed tokens: gather, deduplicate, score, filter, tokenize, pack.

    Example: nanophi prepare demo --set name=demo-06 --set quality.threshold=0.6
    """
    with mirrored(mirror), _open(recipe, runs, overrides, PREPARE, restart) as pipeline:
        pipeline.tokens()


def train(
    recipe: OneRecipe,
    restart: Restart = False,
    mirror: Mirror = None,
    runs: Runs = Path("runs"),
    overrides: Overrides = [],
) -> None:
    """Train on prepared tokens, or resume from the last checkpoint.

    Example: nanophi train demo

    On several GPUs: accelerate launch -m nanophi train nano-phi-115m
    """
    with mirrored(mirror), _open(recipe, runs, overrides, ("training",), restart) as pipeline:
        pipeline.make("training")


def card(recipe: OneRecipe, runs: Runs = Path("runs"), overrides: Overrides = []) -> None:
    """Write the model card of a finished run from its records.

    Example: nanophi card demo
    """
    with _open(recipe, runs, overrides, ("sample", "evaluation", "card")) as pipeline:
        pipeline.make("card")
    typer.echo(pipeline.path / "card" / "README.md")


def release(recipe: OneRecipe, runs: Runs = Path("runs"), overrides: Overrides = [], gguf: Gguf = None) -> None:
    """Build and verify the release folder of a finished run.

    Example: nanophi release demo --gguf f16,q8_0
    """
    from nanophi.model_card import gguf as llama

    kinds = llama.parse_kinds(gguf)
    with _open(recipe, runs, overrides, ("sample", "evaluation", "card", "release", "verification")) as pipeline:
        pipeline.make("verification")
        typer.echo(pipeline.path / "release")
        if kinds:
            for file in llama.export(pipeline.path / "release", kinds, pipeline.path / "gguf"):
                typer.echo(file["path"])


def worker(recipe: OneRecipe, restart: Restart = False, mirror: str | None = None, runs: Runs = Path("runs")) -> None:
    """Train and evaluate one prepared run, for `--jobs`; stop when standard input ends.

    Example: nanophi worker runs/demo/recipe.yaml
    """
    stop_with_parent()
    stages = ("training", "sample", "evaluation")
    with mirrored(mirror, must_arrive=False), _open(recipe, runs, [], stages, restart) as pipeline:
        pipeline.make("sample")
        pipeline.make("evaluation")


@contextlib.contextmanager
def _open(
    recipe: Path, runs: Path, overrides: list[str], build: tuple[str, ...], restart: bool = False
) -> Iterator[Pipeline]:
    """The recipe's pipeline, its run directory locked; stages outside `build` must be up to date already."""
    pipeline = Pipeline(load_recipe(recipe, overrides), runs, build, restart=restart)
    if "tokens" not in build and not pipeline.path.is_dir() and not mirror_url():
        raise UserError(f"{pipeline.path} does not exist; run `nanophi prepare` or `nanophi run` first, or name --runs")
    with pipeline.run.lock() if is_main_process() else contextlib.nullcontext():
        yield pipeline


@contextlib.contextmanager
def _locked(pipelines: Sequence[Pipeline]) -> Iterator[None]:
    with contextlib.ExitStack() as locks:
        for pipeline in pipelines:
            locks.enter_context(pipeline.run.lock())
        yield


def run_recipes(
    recipes: Sequence[Recipe], runs: Path, report: Report = print, jobs: int = 1, restart: bool = False
) -> None:
    """Every stage of every recipe; several are compared at the end, and trained and evaluated `jobs` at once.

    Raises `UserError`, before anything runs, if a recipe cannot be run to its end here.
    """
    from nanophi.eval import render
    from nanophi.training.advice import advice

    if world_size() > 1:
        raise UserError("only `nanophi train` runs on several processes; run `nanophi prepare` first, and `run` last")
    check_distinct(recipes)
    pipelines = [Pipeline(recipe, runs, report=report, restart=restart) for recipe in recipes]
    with _locked(pipelines) if mirror_url() else contextlib.nullcontext():  # the mirror may have what is checked
        for pipeline in pipelines:
            pipeline.check("verification")
    for pipeline in pipelines:
        with pipeline.run.lock():
            pipeline.tokens()
        for line in advice(pipeline.recipe, pipeline.path):
            report(f"{pipeline.recipe.name}: {line}")
    jobs = min(jobs, len(recipes))
    train_side_by_side(pipelines, jobs)
    if jobs > 1:
        pipelines = [Pipeline(recipe, runs, report=report) for recipe in recipes]  # as the workers left them
    with _locked(pipelines):
        compare_runs(pipelines)
        for pipeline in pipelines:
            pipeline.make("report")
            pipeline.make("verification")
    first = pipelines[0]
    if len(pipelines) > 1 or first.recipe.conversations:
        report("\n" + render.to_text(read_json(first.path / "comparison.json")))
    for pipeline in pipelines:
        sample = read_json(pipeline.path / "sample.json")
        asked = "" if isinstance(sample["prompt"], str) else sample["prompt"][-1]["content"] + "\n"
        report(f"\n{pipeline.recipe.name} writes:\n{asked}{sample['text']}")
    report(f"\nreport:  {first.path / 'report.html'}\nrelease: {first.path / 'release'}")


def train_side_by_side(pipelines: Sequence[Pipeline], jobs: int, finished: Report = lambda name: None) -> None:
    """Train and evaluate several runs of one folder, `jobs` at once; what they share is made first, once.

    `finished` gets the name of each that has been evaluated. Raises `UserError` naming those that failed, once the
    others are done (with one at a time, from the first that fails). All of them can be resumed.
    """
    if jobs > 1 and "RANK" in os.environ:
        raise UserError("--jobs starts processes of its own; leave out `accelerate launch` or `torchrun`")
    with _locked(pipelines):
        for pipeline in pipelines:
            pipeline.tokens()
    if jobs == 1:
        for pipeline in pipelines:
            with pipeline.run.lock():
                pipeline.make("sample")
                pipeline.make("evaluation")
            finished(pipeline.recipe.name)
        return
    worker = [sys.executable, "-m", "nanophi", "worker", *["--restart"] * pipelines[0].restart]
    worker += ["--mirror", url] if (url := mirror_url()) else []
    let_go(wait=False)  # the mirrors, which the workers keep
    commands = {
        pipeline.recipe.name: [*worker, str(pipeline.path / "recipe.yaml"), "--runs", str(pipeline.path.parent)]
        for pipeline in pipelines
    }
    side_by_side(commands, jobs, pipelines[0].report, finished)
