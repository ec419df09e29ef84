"""The records that are shipped with a release: what the card, the figures and `nanophi verify` are made from.

`collect` reduces a run's records to what a stranger needs: no paths of this machine, and of the documents only a few
short held-out ones. Whoever has the shipped records can render the card again and must get the same text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json, write_text
from nanophi.core.names import step_folders
from nanophi.data import documents
from nanophi.eval import catalogue, results
from nanophi.model_card import secrets

LATER_STAGES = ("comparison", "report", "card", "release", "verification")
"""Left out of the records: a second build must find the same ones as the first."""

PRIVATE_KEYS = ("examples", "refused")
"""Keys of the data stages' records with other people's text or names of files: of use only to who made the run."""

HELDOUT_ITEMS, HELDOUT_ITEM_BYTES = 12, 1500

CONFIG_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "hidden_act",
    "layer_norm_eps",
    "qk_layernorm",
    "tie_word_embeddings",
)

ShippedRecords = dict[str, Any]
"""Relative file name under `records/` -> contents."""


def final_checkpoint(run: Path) -> Path:
    """The checkpoint of the highest step. Raises `UserError` if there is none."""
    checkpoints = step_folders(run / "checkpoints")
    if not checkpoints:
        raise UserError(f"{run} has no checkpoints; run `nanophi train` on its recipe first")
    return checkpoints[-1]


def release_folder(run: Path) -> str:
    """How the card calls the release before it is on the Hub: `runs/demo/release`.

    Of another folder of runs than the default one nothing is said: where things lie is private.
    """
    return f"{'runs/' if run.resolve().parent.name == 'runs' else ''}{run.name}/release"


def collect(run: Path, checkpoint: Path) -> ShippedRecords:
    """The records of one checkpoint in the form in which they are shipped.

    Args:
        run: the run directory.
        checkpoint: a folder under `run/checkpoints/`.

    Raises:
        UserError: naming a record that is missing or damaged.
    """
    portable = secrets.PathRemover(run)
    record = read_json(run / "record.json")
    if "training" not in record["stages"]:
        raise UserError(f"{run}: the training has not finished; run `nanophi run` on its recipe")
    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{run / 'recipe.yaml'} is missing; run `nanophi run` on its recipe") from None
    training = read_json(run / "training.json")
    if "samples" in training:
        training["samples"] = [entry for entry in training["samples"] if not secrets.found_in(entry["text"])]
    records: ShippedRecords = {
        "recipe.yaml": portable(recipe),
        "run.json": {
            "repo_id": recipe["card"]["repo_id"] or recipe["name"],
            "revision": checkpoint.name,
            "folder": release_folder(run),
            "tag": recipe["card"]["version"],
            "final": checkpoint.name == final_checkpoint(run).name,
            "finished": record["stages"]["training"]["finished"],
            "environment": portable(record["environment"]),
            "seconds": {name: stage["seconds"] for name, stage in record["stages"].items() if name not in LATER_STAGES},
        },
        "model.json": model_record(checkpoint),
        "training.json": portable(training),
        "checkpoint.json": portable(read_json(checkpoint / "checkpoint.json")),
        "revisions.json": revisions(run),
    }
    optional = {
        "documents.json": run / "data" / "documents" / "documents.json",
        "quality.json": run / "data" / "quality" / "quality.json",
        "tokens.json": run / "data" / "tokens" / "tokens.json",
        "sample.json": run / "sample.json",
        "conversations.json": run / "data" / "conversations" / "conversations.json",
    }
    if records["run.json"]["final"]:
        optional["comparison.json"] = run / "comparison.json"  # It compares finished models.
    for name, path in optional.items():
        if path.exists():
            content = read_json(path)
            records[name] = portable({key: value for key, value in content.items() if key not in PRIVATE_KEYS})
    if "sample.json" in records:
        sample = records["sample.json"]
        sample["text"] = sample.get("checkpoints", {}).get(checkpoint.name, sample["text"])
    for suite, results in evaluations(run, checkpoint.name).items():
        records[f"evals/{suite}.json"] = portable(results)
    if measures_heldout(records):
        records["heldout.json"] = _heldout_items(run, checkpoint.name)
    return records


def measures_heldout(records: ShippedRecords) -> bool:
    """Whether held-out documents were scored, so that `heldout.json` must be there, though none may fit into it."""
    return any(row["task"] == "heldout_bits_per_byte" for row in leading_scores(records))


def revisions(run: Path) -> list[dict[str, Any]]:
    """The run's kept checkpoints in order of step: name, step, tokens seen, losses and leading scores."""
    entries = []
    for checkpoint in step_folders(run / "checkpoints"):
        state = read_json(checkpoint / "checkpoint.json")
        keys = ("step", "tokens_seen", "train_loss", "eval_loss")
        entry = {"revision": checkpoint.name} | {key: state[key] for key in keys}
        if state.get("eval_step", state["step"]) != state["step"]:
            entry["eval_loss"] = None  # Measured at an earlier step.
        rows = leading_scores(
            {f"evals/{name}.json": value for name, value in evaluations(run, checkpoint.name).items()}
        )
        entries.append(entry | {"scores": {f"{row['task']}/{row['metric']}": row["value"] for row in rows}})
    return entries


def evaluations(run: Path, checkpoint: str) -> dict[str, dict[str, Any]]:
    """Suite name -> lm-eval's results for a checkpoint, reduced to what is shipped.

    Results of other weights, which a run that was trained again may still hold, are passed over.
    """
    from nanophi.eval.models import model_sha256

    prefix, found = f"{checkpoint}-", {}
    files = sorted((run / "evals").glob(f"{prefix}*.json"))
    contents = {path.stem.removeprefix(prefix): read_json(path) for path in files}
    measured = {name: content["nanophi"]["model"].get("sha256") for name, content in contents.items()}
    current = model_sha256(run / "checkpoints" / checkpoint) if any(measured.values()) else None
    for name, content in contents.items():
        if measured[name] in (None, current):
            found[name] = _reduce_results(content)
    return found


def _reduce_results(found: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's result dict without per-item samples, machine details and paths."""
    keys = (
        "results",
        "groups",
        "group_subtasks",
        "versions",
        "n-shot",
        "n-samples",
        "higher_is_better",
        "task_hashes",
        "lm_eval_version",
        "transformers_version",
    )
    kept = {key: found[key] for key in keys if key in found}
    kept["config"] = {
        key: value for key, value in found["config"].items() if key not in ("model", "model_args", "device")
    }
    kept["nanophi"] = {
        key: found["nanophi"][key]
        for key in ("format", "suite", "lines", "headline", "heldout", "data")
        if key in found["nanophi"]
    }
    return kept


def _heldout_items(run: Path, checkpoint: str) -> list[dict[str, Any]]:
    """A few short held-out documents with their recorded log-likelihoods, so that a stranger can score them again.

    Documents that hold something like a secret, or a path of this machine, are left out: the records are public.
    """
    path = run / "evals" / f"{checkpoint}-heldout.json"
    if not path.exists():
        return []
    texts = [row["text"] for row in documents.heldout(run / "data" / "documents", ["text"])]
    items: list[dict[str, Any]] = []
    for sample in read_json(path)["samples"]["heldout_bits_per_byte"]:
        log_likelihood, size = sample["bits_per_byte"]
        text = texts[sample["doc_id"]] if sample["doc_id"] < len(texts) else ""
        short = size == len(text.encode()) <= HELDOUT_ITEM_BYTES
        if short and not secrets.found_in(text, [run]):
            items.append({"text": text, "log_likelihood": log_likelihood})
        if len(items) == HELDOUT_ITEMS:
            break
    return items


def write_records(records: ShippedRecords, folder: Path) -> None:
    """Write each record under its name."""
    for name, value in records.items():
        if name.endswith(".yaml"):
            write_text(folder / name, yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))
        else:
            write_json(folder / name, value)


REQUIRED = (
    *("recipe.yaml", "run.json", "model.json", "training.json", "checkpoint.json", "revisions.json"),
    *("documents.json", "quality.json", "tokens.json"),
)
"""Records that every release has."""


def read_records(folder: Path) -> ShippedRecords:
    """Read what `write_records` wrote. Raises `UserError` for a file that is missing, or cannot be parsed."""
    records: ShippedRecords = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix not in (".yaml", ".json"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            records[name] = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        except (yaml.YAMLError, ValueError) as error:
            kind = path.suffix[1:].upper()
            raise UserError(f"{path} is not valid {kind} ({' '.join(str(error).split())})") from None
    for name in [*REQUIRED, *records]:
        if not isinstance(records.get(name), list if name in ("revisions.json", "heldout.json") else dict):
            what = "has another form than nanophi gives it" if name in records else "is missing"
            raise UserError(f"{folder} does not hold the records of a release: {name} {what}")
    return records


@contextlib.contextmanager
def complete_records() -> Iterator[None]:
    """What a record lacks, or has in another form, becomes a `UserError`."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the records are not complete ({detail})") from error


def weight_shapes(path: Path) -> dict[str, list[int]]:
    """Tensor name -> shape, from a safetensors header (8 bytes of length, then JSON); no weight is read."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def model_record(checkpoint: Path) -> dict[str, Any]:
    """What `model.json` says of a folder with a model: its architecture and its numbers of parameters."""
    from transformers import AutoConfig

    # config.json leaves out what equals the library's defaults; the class knows them.
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False).to_dict()
    config.update(config["rope_parameters"])
    shapes: dict[str, list[int]] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        shapes.update(weight_shapes(shard))
    if not shapes:
        raise UserError(f"{checkpoint} has no .safetensors file; the checkpoint is incomplete, train it again")
    embedding = math.prod(shapes["model.embed_tokens.weight"])
    head = math.prod(shapes["lm_head.weight"]) if "lm_head.weight" in shapes else 0
    total = sum(math.prod(shape) for shape in shapes.values())
    return {
        "config": {key: config[key] for key in CONFIG_KEYS},
        "parameters": total,
        "parameters_without_embeddings": total - embedding - head,
    }


# What the records say, in the form in which card, figures, report page and reproduction use it


def leading_scores(records: ShippedRecords) -> list[dict[str, Any]]:
    """The leading score of every task, in the order of `eval/tasks.yaml`.

    Returns:
        dicts of suite, task, shots, metric, filter, value, stderr (None where there is none), chance (None if
        guessing has no expected score), items, of (items in the whole task), higher_is_better, percent, title.
    """
    rows = []
    for name, record in _evaluation_records(records):
        for score in results.leading_scores(record):
            row = dataclasses.asdict(score) | {"suite": name}
            rows.append(row | {"percent": score.percent, "title": score.title})
    return sorted(rows, key=lambda row: catalogue.position(row["task"]))


def every_score(records: ShippedRecords) -> list[dict[str, Any]]:
    """One row per leaf task and metric, from the shipped lm-eval results; the keys of `leading_scores` but chance."""
    rows = []
    for name, record in _evaluation_records(records):
        for task, metrics in record["results"].items():
            if task in record.get("groups", {}):
                continue
            for key, value in metrics.items():
                metric, _, filter_name = key.partition(",")
                if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                stderr = metrics.get(f"{metric}_stderr,{filter_name}")
                rows.append(
                    {
                        "suite": name,
                        "task": task,
                        "shots": record["n-shot"].get(task),
                        "metric": metric,
                        "filter": filter_name,
                        "value": value,
                        "stderr": stderr if isinstance(stderr, int | float) else None,
                        "items": record["n-samples"][task]["effective"],
                    }
                )
    return sorted(rows, key=lambda row: catalogue.position(row["task"]))


def _evaluation_records(records: ShippedRecords) -> Iterable[tuple[str, dict[str, Any]]]:
    return ((Path(name).stem, record) for name, record in records.items() if name.startswith("evals/"))


def title(row: dict[str, Any]) -> str:
    """The title of a row's `task` with its `shots`."""
    return catalogue.title(row["task"], row["shots"])


def training_sources(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipe's sources without those that are held out as a whole."""
    return [source for source in recipe["data"]["sources"] if not source.get("heldout")]


def hardware(records: ShippedRecords) -> str:
    """The machine in words."""
    environment = records["run.json"]["environment"]
    devices = environment.get("devices", [])
    if devices:
        return " + ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
    threads = environment["cpu_threads"]
    return f"{environment['processor']}, {threads} thread{'s' if threads != 1 else ''}, no GPU"
