"""The records that are shipped with a release: what the card, the figures and `nanophi verify` are made from.

`collect` reduces a run's records to what a stranger needs: no paths of this machine, and of the documents only a few
short held-out ones. What they contradict each other in is found in `consistency.py`.
"""

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import read_json, write_json, write_text
from nanophi.core.names import final_checkpoint, step_folders
from nanophi.core.recipe_file import dump
from nanophi.data import documents
from nanophi.eval import catalogue
from nanophi.eval import results as evaluation
from nanophi.eval.results import Score
from nanophi.model_card import exports, secrets

# Left out of the records: a second build must find the same ones as the first.
LATER_STAGES = ("comparison", "report", "card", "release", "verification")
PRIVATE_KEYS = ("examples", "refused")  # of the data stages' records: other people's text, names of files
HELDOUT_ITEMS, HELDOUT_ITEM_BYTES = 12, 1500
CONFIG_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "partial_rotary_factor", "rope_theta", "hidden_act", "layer_norm_eps"),
    *("qk_layernorm", "tie_word_embeddings"),
)
KEPT_RESULTS = (
    *("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better", "task_hashes"),
    *("lm_eval_version", "transformers_version", "date"),
)
PRIVATE_CONFIG = ("model", "model_args", "device")
# Keys of lm-eval's results, and of our part of them, that are shipped: no samples, machine details and paths.
KEPT_OF_OURS = ("format", "suite", "lines", "headline", "average", "heldout", "memorisation", "data")
OF_DATA = ("documents.json", "quality.json", "tokens.json")
IF_THERE = (*OF_DATA, "sample.json", "conversations.json", "comparison.json", "prediction.json")
OF_FINISHED = ("comparison.json", "prediction.json")  # of finished models
OF_RUN = ("sample.json", *OF_FINISHED)
REQUIRED = ("recipe.yaml", "run.json", "model.json", "training.json", "checkpoint.json", "revisions.json", *OF_DATA)
ShippedRecords = dict[str, Any]  # relative file name under `records/` -> contents


def collect(run: Path, checkpoint: Path) -> ShippedRecords:
    """The records of one checkpoint, a folder under `run/checkpoints/`, in the form in which they are shipped."""
    record, training = read_json(run / "record.json"), read_json(run / "training.json")
    final = checkpoint.name == final_checkpoint(run).name
    with user_errors(f"{run / 'recipe.yaml'} cannot be read; run `nanophi run` on its recipe"):
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    if "samples" in training:
        training["samples"] = [entry for entry in training["samples"] if not secrets.found_in(entry["text"])]
    records: ShippedRecords = {
        "recipe.yaml": recipe,
        "run.json": {
            "repo_id": recipe["card"]["repo_id"] or recipe["name"],
            "revision": checkpoint.name,
            # Of another folder of runs than the default one nothing is told: local paths are private.
            "folder": f"{'runs/' if run.resolve().parent.name == 'runs' else ''}{run.name}/release",
            "tag": recipe["card"]["version"],
            "final": final,
            "finished": record["stages"]["training"]["finished"],
            "environment": record["environment"],
            "seconds": {name: stage["seconds"] for name, stage in record["stages"].items() if name not in LATER_STAGES},
        },
        "model.json": model_record(checkpoint),
        "training.json": training,
        "checkpoint.json": read_json(checkpoint / "checkpoint.json"),
        "revisions.json": revisions(run),
    }
    for name in IF_THERE:
        path = run / (name if name in OF_RUN else f"data/{Path(name).stem}/{name}")
        if path.exists() and (name not in OF_FINISHED or final):
            records[name] = {key: value for key, value in read_json(path).items() if key not in PRIVATE_KEYS}
    if sample := records.get("sample.json"):
        sample["text"] = sample.get("checkpoints", {}).get(checkpoint.name, sample["text"])
    records |= evaluations(run, checkpoint.name)
    if measures_heldout(records):
        records["heldout.json"] = _heldout_items(run, checkpoint.name)
    shipped: ShippedRecords = secrets.PathRemover(run)(records)
    return shipped


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
    """The records `evals/SUITE.json`: lm-eval's results for a checkpoint's own weights, reduced to what is shipped."""
    shipped = {}
    for name, content in evaluation.checkpoint_results(run / "checkpoints" / checkpoint).items():
        kept = {key: content[key] for key in KEPT_RESULTS if key in content}
        config = {key: value for key, value in content["config"].items() if key not in PRIVATE_CONFIG}
        ours = {key: content["nanophi"][key] for key in KEPT_OF_OURS if key in content["nanophi"]}
        shipped[f"evals/{name}.json"] = {**kept, "config": config, "nanophi": ours}
    return shipped


def _heldout_items(run: Path, checkpoint: str) -> list[dict[str, Any]]:
    """Short held-out documents without secrets, with their log-likelihoods: a stranger can score them again."""
    task = catalogue.HELDOUT_BITS
    evaluated = evaluation.checkpoint_results(run / "checkpoints" / checkpoint).values()
    samples: list[Any] = next((one["samples"][task] for one in evaluated if task in one["samples"]), [])
    texts = [row["text"] for row in documents.heldout(run / "data" / "documents", ["text"])] if samples else []
    short: list[dict[str, Any]] = []
    long: list[dict[str, Any]] = []
    for sample in samples:
        log_likelihood, size = sample["bits_per_byte"]
        text = texts[sample["doc_id"]] if sample["doc_id"] < len(texts) else ""
        if size == len(text.encode()) and not secrets.found_in(text, [run]):
            (short if size <= HELDOUT_ITEM_BYTES else long).append({"text": text, "log_likelihood": log_likelihood})
            if len(short) == HELDOUT_ITEMS:
                break
    # With none that is short, the shortest: a release whose figures nobody can check is none.
    return short or sorted(long, key=lambda item: len(item["text"].encode()))[:1]


def write_records(records: ShippedRecords, folder: Path) -> None:
    """Write each record under its name."""
    for name, value in records.items():
        if name.endswith(".yaml"):
            write_text(folder / name, dump(value, width=100))
        else:
            write_json(folder / name, value)


def read_records(folder: Path) -> ShippedRecords:
    """Read what `write_records` wrote. Raises `UserError` for a file that is missing, or cannot be parsed."""
    records: ShippedRecords = {}
    parsers: dict[str, Callable[[str], Any]] = {".yaml": yaml.safe_load, ".json": json.loads}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in parsers):
        with user_errors(f"{path} is not valid {path.suffix[1:].upper()}"):
            content = parsers[path.suffix](path.read_text(encoding="utf-8"))
        records[path.relative_to(folder).as_posix()] = content
    for name in [*REQUIRED, *records]:
        if not isinstance(records.get(name), list if name in ("revisions.json", "heldout.json") else dict):
            what = "has another form than nanophi gives it" if name in records else "is missing"
            raise UserError(f"{folder} does not hold the records of a release: {name} {what}")
    return records


def complete_records() -> AbstractContextManager[None]:
    """What a record lacks, or has in another form, becomes a `UserError`."""
    return user_errors("the records are not complete")


def model_record(checkpoint: Path) -> dict[str, Any]:
    """`model.json` of a folder with a model: its architecture and its numbers of parameters."""
    from safetensors import safe_open
    from transformers import AutoConfig

    # config.json leaves out what equals the library's defaults; the class knows them.
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False).to_dict()
    config.update(config["rope_parameters"])
    scaled = exports.scaling(config["rope_parameters"])
    weights = checkpoint / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{weights} is missing; the checkpoint is incomplete, train it again")
    with safe_open(weights, "np") as file:
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    total, embeddings = sum(sizes.values()), sizes["model.embed_tokens.weight"] + sizes.get("lm_head.weight", 0)
    kept = {key: config[key] for key in CONFIG_KEYS} | ({"rope_scaling": scaled} if scaled else {})
    return {"config": kept, "parameters": total, "parameters_without_embeddings": total - embeddings}


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
    """Whether held-out documents were scored, so that `heldout.json` must be there."""
    return any(score.task == catalogue.HELDOUT_BITS for score in leading_scores(records))


def training_sources(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipe's sources without those that are held out as a whole, or that no phase reads."""
    sources = recipe["data"]["sources"]
    return [source for source in sources if not source.get("heldout") and source.get("phase") != "none"]


def hardware(records: ShippedRecords) -> str:
    """The machine in words."""
    environment = records["run.json"]["environment"]
    if devices := environment.get("devices"):
        return " + ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
    threads = environment["cpu_threads"]
    return f"{environment['processor']}, {threads} thread{'s' if threads != 1 else ''}, no GPU"
