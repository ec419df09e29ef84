"""`nanophi reproduce`: train a published model again from its release, and compare the results with the published ones.

Fetches the records, runs their recipe, and compares number by number. What a release is, and whether it is whole, is
`model_card`'s to say.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from typer import Option

from nanophi.core.bases import INHERITED
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_text
from nanophi.core.names import final_checkpoint, is_hub_id, split_revision
from nanophi.core.options import Overrides, ReleaseOrId, Revision
from nanophi.core.recipe import load_recipe
from nanophi.core.version import __version__

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
    differing = [
        row.name for row in compare_with_published(runs / "published", runs / recipe.name) if row.agrees is False
    ]
    if differing:
        raise UserError(f"{release} was not reproduced: {', '.join(differing)}")


def _as_recorded(published: Path) -> list[str]:
    """Overrides that give a recipe its recorded precision; this process gets the recorded number of threads.

    Sums depend on both in their last bits. With the same machine and packages the weights are then the same.
    """
    import torch

    threads = read_json(published / "records/run.json")["environment"].get("cpu_threads")
    if threads and not torch.cuda.is_available():
        torch.set_num_threads(threads)
    precision = read_json(published / "records/training.json").get("summary", {}).get("precision")
    return [f"training.precision={precision}"] if precision in ("fp32", "bf16") else []


def fetch_recipe(
    release: str, output: Path, revision: str | None = None, report: Callable[[str], None] = print
) -> Path:
    """The file with a release's recipe, its name ending in `-reproduced`; the records go into `published/` beside it.

    Of a release on the Hub, only the manifest and the records are fetched.

    Raises:
        UserError: if there is no such release, or its records are not those of its manifest.
    """
    from nanophi.model_card.manifest import MANIFEST, file_problems
    from nanophi.model_card.records import complete_records, read_records
    from nanophi.model_card.verify import find_release

    folder = find_release(release, revision, [MANIFEST, "records/*"])
    fetched = ("records/", MANIFEST)
    wrong = [line for line in file_problems(folder, partial=True) if any(name in line for name in fetched)]
    if wrong:
        raise UserError(f"{release}: the records are not those of the manifest: {'; '.join(wrong)}")
    with complete_records():
        records = read_records(folder / "records")
        recipe = records["recipe.yaml"]
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(recipe.get("name"))):
            raise UserError(f"{release}: its recipe has the name {recipe.get('name')!r}, which no run can have")
        kept = output / "published"
        if kept.exists() and not (kept / MANIFEST).is_file():
            raise UserError(f"{kept} is in the way: it does not hold the records of a release; choose another --runs")
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder / "records", kept / "records", copy_function=shutil.copyfile)
        shutil.copyfile(folder / MANIFEST, kept / MANIFEST)
        if recipe.get("conversations"):  # how the base was made is the base's to say, whose copy here may lie elsewhere
            recipe = {key: value for key, value in recipe.items() if key not in INHERITED}
        recipe["name"] = f"{recipe['name']}-reproduced"
        path = output / f"{recipe['name']}.yaml"
        write_text(path, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        for row in environment_rows(records["run.json"]["environment"]):
            report(f"{row.name}: published with {row.published}, here {row.here}")
        if recipe["training"]["arguments"]:
            report(f"the recipe sets training.arguments {recipe['training']['arguments']}; read them before you run it")
        if private := dict(_private(recipe, records.get("conversations.json"))):
            names = ", ".join(name for names in private.values() for name in names)
            options = " ".join(f"--set {assignment}" for assignment in private)
            report(f"the recipe names data that was not published ({names}); name your copy with {options}")
    return path


def environment_rows(published: dict[str, Any]) -> list[Row]:
    """Versions that differ between a release's environment and this one."""

    def version_of(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    here = {"nanophi": __version__, "python": platform.python_version()}
    here |= {name: version_of(name) for name in published["packages"]}
    there = {"nanophi": published["nanophi"], "python": published["python"], **published["packages"]}
    return [Row(name, there[name], here[name], None) for name in there if there[name] != here[name]]


def compare_with_published(published: Path, run: Path, report: Callable[[str], None] = print) -> list[Row]:
    """A reproduced run beside the published records, at the checkpoint that they describe.

    Args:
        published: folder with the published `records/` and manifest.
        run: the run directory of the reproduction.
        report: gets one line for each row.

    Returns:
        rows for the data, the weights, the losses and every leading score. Scores agree if they lie within two
        standard errors of each other; hashes if they are equal.

    Raises:
        UserError: if the run has no checkpoint of the published step.
    """
    from nanophi.model_card import records
    from nanophi.model_card.manifest import MANIFEST

    with records.complete_records():
        theirs = records.read_records(published / "records")
        step = theirs["run.json"]["revision"]
        checkpoint = final_checkpoint(run) if theirs["run.json"]["final"] else run / "checkpoints" / step
        if not checkpoint.is_dir():
            raise UserError(f"{checkpoint} is missing: {published} describes {step}, which the new run did not keep")
        ours = records.collect(run, checkpoint)
        tokens = read_json(run / "data" / "tokens" / "tokens.json")
        hashes = read_json(published / MANIFEST)["provenance"]["data_sha256"]
        rows = [
            Row(f"{split} tokens, SHA-256", sha256, tokens[split]["sha256"], sha256 == tokens[split]["sha256"])
            for split, sha256 in hashes.items()
            if "conversations.json" not in theirs  # else they are the base's, whose weights say more
        ]
        rows += [*_training_rows(theirs, ours), *_score_rows(theirs, ours)]
    for row in rows:
        report(row.line())
    return rows


def _training_rows(theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[Row]:
    there, here = (records["checkpoint.json"] for records in (theirs, ours))
    for key, name in LEARNED_FROM.items():
        if key in there:
            yield Row(f"{name}, SHA-256", there[key], here.get(key), there[key] == here.get(key))
    size, again = (records["model.json"]["parameters"] for records in (theirs, ours))
    yield Row("parameters", size, again, size == again)
    # Weights and losses are equal only with the same versions, kind of processor and number of threads: worth knowing,
    # no fault.
    keys = ["train_loss", "eval_loss"]
    if theirs["run.json"]["final"]:
        there, here = (records["training.json"]["summary"] for records in (theirs, ours))
        keys = ["weights_sha256", "final_loss", "final_bits_per_byte", "seconds"]
    for key in keys:
        name = "weights, SHA-256" if key == "weights_sha256" else key.replace("_", " ")
        if (there[key], here[key]) != (None, None):  # a chat model has no bits per byte of held-out text
            yield Row(name, there[key], here[key], True if there[key] == here[key] else None)


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


def _private(recipe: dict[str, Any], chat: dict[str, Any] | None) -> Iterator[tuple[str, list[str]]]:
    """What a recipe names that only its author has: the assignment that names another copy, and the names.

    `chat` is the record of a chat model's conversations, which knows where its base is published.
    """
    base = recipe.get("base")
    if base:
        repo_id = split_revision(base)[0]
        on_hub = chat["repo_id"] if chat else repo_id if is_hub_id(repo_id) else None
        if repo_id != (on_hub and split_revision(on_hub)[0]):
            yield f"base={on_hub or '...'}", [base]
    key, sources = ("conversations", recipe["conversations"]) if chat else ("data.sources", recipe["data"]["sources"])
    names = [
        source["files"] or source["hub"]
        for source in sources
        if not source["embedded"] and not is_hub_id(source["hub"] or "")
    ]
    if names:
        yield f"'{key}=[...]'", names
