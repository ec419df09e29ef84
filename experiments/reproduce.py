"""`nanophi reproduce`: train a published model again from its release, and compare the results with the published ones.

What a release is, and whether it is whole, is decided in `model_card`.
"""

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from typer import Option

from nanophi.core.bases import INHERITED
from nanophi.core.environment import environment
from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import read_json, write_text
from nanophi.core.names import RUN, final_checkpoint, is_hub_id, split_revision
from nanophi.core.options import Overrides, ReleaseOrId, Revision
from nanophi.core.recipe import load_recipe
from nanophi.core.recipe_file import dump
from nanophi.core.run import Report

LEARNED_FROM = {
    "base_sha256": "base's weights",
    "chat_train_sha256": "conversations",
    "chat_heldout_sha256": "held-out conversations",
}
"""Key of checkpoint.json -> name of a row, of what training began with and, for a chat model, read."""


class Row(NamedTuple):
    """A figure of both runs; `agrees` is None where a difference means nothing by itself."""

    name: str
    published: Any
    here: Any
    agrees: bool | None

    def line(self) -> str:
        """The row on screen."""
        verdict = {True: "agrees", False: "DIFFERS", None: "may differ"}[self.agrees]
        return f"  {verdict:<11} {self.name:<40} {_shown(self.published):>14} {_shown(self.here):>14}"


def reproduce(
    release: ReleaseOrId,
    revision: Revision = None,
    runs: Annotated[Path, Option("--runs", help="Folder for the new run.")] = Path("reproductions"),
    overrides: Overrides = [],
) -> None:
    """Run a release's recipe again and compare the results.

    Example: nanophi reproduce runs/demo/release
    """
    from nanophi.pipeline import run_recipes

    file = fetch_recipe(release, runs, revision)
    recipe = load_recipe(file, [*_as_recorded(runs / "published"), *overrides])
    run_recipes([recipe], runs)
    rows = compare_with_published(runs / "published", runs / recipe.name)
    if differing := [row.name for row in rows if row.agrees is False]:
        raise UserError(f"{release} was not reproduced: {', '.join(differing)}")


def _as_recorded(published: Path) -> list[str]:
    """Overrides that give a recipe its recorded precision; this process gets the recorded number of threads.

    Sums depend on both in their last bits.
    """
    import torch

    threads = read_json(published / "records/run.json")["environment"].get("cpu_threads")
    if threads and not torch.cuda.is_available():
        torch.set_num_threads(threads)
    precision = read_json(published / "records/training.json").get("summary", {}).get("precision")
    return [f"training.precision={precision}"] if precision in ("fp32", "bf16") else []


def fetch_recipe(release: str, output: Path, revision: str | None = None, report: Report = print) -> Path:
    """The file with a release's recipe, its name ending in `-reproduced`; the records go into `published/` beside it.

    Raises `UserError` if there is no such release, or its records are not those of its manifest.
    """
    from nanophi.model_card.manifest import MANIFEST, file_problems
    from nanophi.model_card.records import complete_records, read_records
    from nanophi.model_card.verify import find_release

    folder, kept = find_release(release, revision, [MANIFEST, "records/*"]), output / "published"
    fetched = ("records/", MANIFEST)
    if wrong := [line for line in file_problems(folder, partial=True) if any(name in line for name in fetched)]:
        raise UserError(f"{release}: the records are not those of the manifest: {'; '.join(wrong)}")
    with complete_records():
        records = read_records(folder / "records")
        recipe, name = records["recipe.yaml"], str(records["recipe.yaml"].get("name"))
        if not re.fullmatch(RUN, name):
            raise UserError(f"{release}: its recipe has the name {name!r}, which no run can have")
        if kept.exists() and not (kept / MANIFEST).is_file():
            raise UserError(f"{kept} is in the way: it does not hold the records of a release; choose another --runs")
        with user_errors(f"{output} cannot be written; choose another --runs"):
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(folder / "records", kept / "records", copy_function=shutil.copyfile)
            shutil.copyfile(folder / MANIFEST, kept / MANIFEST)
        if recipe.get("conversations"):  # how the base was made is the base's to say, whose copy here may lie elsewhere
            recipe = {key: value for key, value in recipe.items() if key not in INHERITED}
        path = output / f"{name}-reproduced.yaml"
        recipe = {**recipe, "name": path.stem}
        write_text(path, dump(recipe))
        here = _versions(environment())
        for package, version in _versions(records["run.json"]["environment"]).items():
            if version != here.get(package):
                report(f"{package}: published with {version}, here {here.get(package, 'not installed')}")
        if recipe["training"]["arguments"]:
            report(f"the recipe sets training.arguments {recipe['training']['arguments']}; read them before you run it")
        if private := dict(_private(recipe, records.get("conversations.json"))):
            options = " ".join(f"--set {assignment}" for assignment in private)
            names = ", ".join(private.values())
            report(f"the recipe names data that was not published ({names}); name your copy with {options}")
    return path


def _versions(environment: dict[str, Any]) -> dict[str, str]:
    return {"nanophi": environment["nanophi"], "python": environment["python"], **environment["packages"]}


def compare_with_published(published: Path, run: Path, report: Report = print) -> list[Row]:
    """A reproduced run beside the published `records/` and manifest, at the checkpoint that they describe.

    Scores agree within two standard errors of their difference; hashes if they are equal. Raises `UserError` if the
    run has no checkpoint of the published step.
    """
    from nanophi.data.stages import split_hashes
    from nanophi.model_card import records
    from nanophi.model_card.manifest import MANIFEST

    with records.complete_records():
        theirs = records.read_records(published / "records")
        step = theirs["run.json"]["revision"]
        checkpoint = final_checkpoint(run) if theirs["run.json"]["final"] else run / "checkpoints" / step
        if not checkpoint.is_dir():
            raise UserError(f"{checkpoint} is missing: {published} describes {step}, which the new run did not keep")
        ours = records.collect(run, checkpoint)
        tokens = split_hashes(read_json(run / "data" / "tokens" / "tokens.json"))
        hashes = read_json(published / MANIFEST)["provenance"]["data_sha256"]
        rows = [
            _equal(f"{split} tokens, SHA-256", sha256, tokens.get(split))
            for split, sha256 in hashes.items()
            if "conversations.json" not in theirs  # else they are the base's, whose weights say more
        ]
        rows += [*_training_rows(theirs, ours), *_score_rows(theirs, ours)]
    for row in rows:
        report(row.line())
    return rows


def _equal(name: str, there: Any, here: Any) -> Row:
    return Row(name, there, here, there == here)


def _training_rows(theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[Row]:
    there, here = (records["checkpoint.json"] for records in (theirs, ours))
    for key, name in LEARNED_FROM.items():
        if key in there:
            yield _equal(f"{name}, SHA-256", there[key], here.get(key))
    yield _equal("parameters", *(records["model.json"]["parameters"] for records in (theirs, ours)))
    # Weights and losses are equal only with the same versions, kind of processor and number of threads.
    keys = ["train_loss", "eval_loss"]
    if theirs["run.json"]["final"]:
        there, here = (records["training.json"]["summary"] for records in (theirs, ours))
        keys = ["weights_sha256", "final_loss", "final_bits_per_byte", "seconds"]
    for key in keys:
        name = "weights, SHA-256" if key == "weights_sha256" else key.replace("_", " ")
        if (there[key], here[key]) != (None, None):  # a chat model has no bits per byte of held-out text
            yield Row(name, there[key], here[key], there[key] == here[key] or None)


def _score_rows(theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[Row]:
    from nanophi.model_card.records import leading_scores

    found = {(score.suite, score.task, score.metric): score for score in leading_scores(ours)}
    for score in leading_scores(theirs):
        again = found.get((score.suite, score.task, score.metric))
        noise = 2 * math.hypot(score.stderr or 0, (again and again.stderr) or 0)
        agrees = again is not None and abs(score.value - again.value) <= noise
        yield Row(f"{score.task}, {score.metric}", score.value, again and again.value, agrees)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}"
    return value[:12] if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else "missing"


def _private(recipe: dict[str, Any], chat: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """What a recipe names that only its author has: the assignment that names another copy, and the names.

    `chat` is the record of a chat model's conversations, which knows where its base is published.
    """
    if base := recipe.get("base"):
        repo_id = split_revision(base)[0]
        on_hub = chat["repo_id"] if chat else repo_id if is_hub_id(repo_id) else None
        if repo_id != (on_hub and split_revision(on_hub)[0]):
            yield f"base={on_hub or '...'}", str(base)
    key, sources = ("conversations", recipe["conversations"]) if chat else ("data.sources", recipe["data"]["sources"])
    own = [source for source in sources if not source["embedded"] and not is_hub_id(source["hub"] or "")]
    if own:
        yield f"'{key}=[...]'", ", ".join(source["files"] or source["hub"] for source in own)
