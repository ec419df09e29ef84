"""The records that are shipped with a release: what the card, the figures and `nanophi verify` are made from.

`collect` reduces a run's records to what a stranger needs: no paths of this machine, and of the documents only a few
short held-out ones. Whoever has the shipped records can render the card again and must get the same text. What they
contradict each other in is found in `consistency.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import read_json, write_json, write_text
from nanophi.core.names import final_checkpoint, step_folders
from nanophi.data import documents
from nanophi.eval import catalogue
from nanophi.eval import results as evaluation
from nanophi.eval.results import Score
from nanophi.model_card import exports, secrets

LATER_STAGES = ("comparison", "report", "card", "release", "verification")
"""Left out of the records: a second build must find the same ones as the first."""

PRIVATE_KEYS = ("examples", "refused")
"""Keys of the data stages' records with other people's text or names of files: of use only to who made the run."""

HELDOUT_ITEMS, HELDOUT_ITEM_BYTES = 12, 1500

CONFIG_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "partial_rotary_factor", "rope_theta", "hidden_act", "layer_norm_eps"),
    *("qk_layernorm", "tie_word_embeddings"),
)

KEPT_RESULTS = (
    *("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better", "task_hashes"),
    *("lm_eval_version", "transformers_version"),
)
KEPT_OF_OURS = ("format", "suite", "lines", "headline", "average", "heldout", "data")
"""Keys of lm-eval's results, and of our part of them, that are shipped: no samples, machine details and paths."""

OF_DATA = ("documents.json", "quality.json", "tokens.json")
IF_THERE = (*OF_DATA, "sample.json", "conversations.json", "comparison.json", "prediction.json")
REQUIRED = ("recipe.yaml", "run.json", "model.json", "training.json", "checkpoint.json", "revisions.json", *OF_DATA)
"""Records that every release has."""

ShippedRecords = dict[str, Any]
"""Relative file name under `records/` -> contents."""


def collect(run: Path, checkpoint: Path) -> ShippedRecords:
    """The records of one checkpoint, a folder under `run/checkpoints/`, in the form in which they are shipped.

    Raises:
        UserError: naming a record that is missing or damaged.
    """
    portable = secrets.PathRemover(run)
    final, record = final_checkpoint(run), read_json(run / "record.json")
    with user_errors(f"{run / 'recipe.yaml'} cannot be read; run `nanophi run` on its recipe"):
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    training = read_json(run / "training.json")
    if "samples" in training:
        training["samples"] = [entry for entry in training["samples"] if not secrets.found_in(entry["text"])]
    records: ShippedRecords = {
        "recipe.yaml": portable(recipe),
        "run.json": {
            "repo_id": recipe["card"]["repo_id"] or recipe["name"],
            "revision": checkpoint.name,
            # Of another folder of runs than the default one nothing is told: local paths are private.
            "folder": f"{'runs/' if run.resolve().parent.name == 'runs' else ''}{run.name}/release",
            "tag": recipe["card"]["version"],
            "final": checkpoint.name == final.name,
            "finished": record["stages"]["training"]["finished"],
            "environment": portable(record["environment"]),
            "seconds": {name: stage["seconds"] for name, stage in record["stages"].items() if name not in LATER_STAGES},
        },
        "model.json": model_record(checkpoint),
        "training.json": portable(training),
        "checkpoint.json": portable(read_json(checkpoint / "checkpoint.json")),
        "revisions.json": revisions(run),
    }
    for name in IF_THERE:
        path = run / (
            name if name in ("sample.json", "comparison.json", "prediction.json") else f"data/{Path(name).stem}/{name}"
        )
        # A comparison is one of finished models.
        if path.exists() and (name not in ("comparison.json", "prediction.json") or records["run.json"]["final"]):
            records[name] = portable({key: value for key, value in read_json(path).items() if key not in PRIVATE_KEYS})
    if "sample.json" in records:
        sample = records["sample.json"]
        sample["text"] = sample.get("checkpoints", {}).get(checkpoint.name, sample["text"])
    records |= portable(evaluations(run, checkpoint.name))
    if measures_heldout(records):
        records["heldout.json"] = list(itertools.islice(_heldout_items(run, checkpoint.name), HELDOUT_ITEMS))
    return records


def revisions(run: Path) -> list[dict[str, Any]]:
    """The run's kept checkpoints in order of step: name, step, tokens seen, losses and leading scores."""
    entries = []
    for checkpoint in step_folders(run / "checkpoints"):
        state = read_json(checkpoint / "checkpoint.json")
        entry: dict[str, Any] = {"revision": checkpoint.name}
        entry |= {key: state[key] for key in ("step", "tokens_seen", "train_loss", "eval_loss")}
        if state.get("eval_step", state["step"]) != state["step"]:
            entry["eval_loss"] = None  # Measured at an earlier step.
        scores = leading_scores(evaluations(run, checkpoint.name))
        entries.append(entry | {"scores": {f"{score.task}/{score.metric}": score.value for score in scores}})
    return entries


def evaluations(run: Path, checkpoint: str) -> dict[str, dict[str, Any]]:
    """The records `evals/SUITE.json`: lm-eval's results for a checkpoint, reduced to what is shipped.

    Results of other weights, which a run that was trained again may still hold, are passed over.
    """
    return {
        f"evals/{name}.json": {
            **{key: content[key] for key in KEPT_RESULTS if key in content},
            "config": {
                key: value for key, value in content["config"].items() if key not in ("model", "model_args", "device")
            },
            "nanophi": {key: content["nanophi"][key] for key in KEPT_OF_OURS if key in content["nanophi"]},
        }
        for name, content in evaluation.checkpoint_results(run / "checkpoints" / checkpoint).items()
    }


def _heldout_items(run: Path, checkpoint: str) -> Iterator[dict[str, Any]]:
    """Short held-out documents with their recorded log-likelihoods, so that a stranger can score them again.

    Documents that hold something like a secret, or a path of this machine, are left out: the records are public.
    """
    task = catalogue.HELDOUT_BITS
    evaluated = evaluation.checkpoint_results(run / "checkpoints" / checkpoint).values()
    samples: list[Any] = next((one["samples"][task] for one in evaluated if task in one["samples"]), [])
    texts = [row["text"] for row in documents.heldout(run / "data" / "documents", ["text"])] if samples else []
    found: list[tuple[int, dict[str, Any]]] = []
    for sample in samples:
        log_likelihood, size = sample["bits_per_byte"]
        text = texts[sample["doc_id"]] if sample["doc_id"] < len(texts) else ""
        if size == len(text.encode()) and not secrets.found_in(text, [run]):
            found.append((size, {"text": text, "log_likelihood": log_likelihood}))
    short = [item for size, item in found if size <= HELDOUT_ITEM_BYTES]
    # With none that is short, the shortest: a release whose figures nobody can check is none.
    yield from short or [item for _, item in sorted(found, key=lambda entry: entry[0])[:1]]


def write_records(records: ShippedRecords, folder: Path) -> None:
    """Write each record under its name."""
    for name, value in records.items():
        if name.endswith(".yaml"):
            write_text(folder / name, yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))
        else:
            write_json(folder / name, value)


def read_records(folder: Path) -> ShippedRecords:
    """Read what `write_records` wrote. Raises `UserError` for a file that is missing, or cannot be parsed."""
    records: ShippedRecords = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix not in (".yaml", ".json"):
            continue
        with user_errors(f"{path} is not valid {path.suffix[1:].upper()}"):
            text = path.read_text(encoding="utf-8")
            records[name] = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
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


def model_record(checkpoint: Path) -> dict[str, Any]:
    """`model.json` of a folder with a model: its architecture and its numbers of parameters."""
    from safetensors import safe_open
    from transformers import AutoConfig

    # config.json leaves out what equals the library's defaults; the class knows them.
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False).to_dict()
    config.update(config["rope_parameters"])
    scaled = exports.scaling(config["rope_parameters"])
    sizes: dict[str, int] = {}
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(shard, "np") as file:
            sizes |= {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if not sizes:
        raise UserError(f"{checkpoint} has no .safetensors file; the checkpoint is incomplete, train it again")
    total = sum(sizes.values())
    return {
        "config": {key: config[key] for key in CONFIG_KEYS} | ({"rope_scaling": scaled} if scaled else {}),
        "parameters": total,
        "parameters_without_embeddings": total - sizes["model.embed_tokens.weight"] - sizes.get("lm_head.weight", 0),
    }


# What the records hold, in the form in which card, figures, report page and reproduction use it


def results(records: ShippedRecords) -> list[dict[str, Any]]:
    """What is shipped of lm-eval's results, one dict per suite."""
    return [record for name, record in records.items() if name.startswith("evals/")]


def leading_scores(records: ShippedRecords) -> list[Score]:
    """The leading score of every task, in the order of `eval/tasks.yaml`."""
    return in_order(records, evaluation.leading_scores)


def in_order(records: ShippedRecords, derive: Callable[[dict[str, Any]], list[Score]]) -> list[Score]:
    """Scores that `derive` finds in the results of each suite, in the order of `eval/tasks.yaml`."""
    found = [score for result in results(records) for score in derive(result)]
    return sorted(found, key=lambda score: catalogue.position(score.task))


def measures_heldout(records: ShippedRecords) -> bool:
    """Whether held-out documents were scored, so that `heldout.json` must be there, though none may fit into it."""
    return any(score.task == catalogue.HELDOUT_BITS for score in leading_scores(records))


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
