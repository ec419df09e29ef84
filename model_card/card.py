"""The model card: a pure function of the records that are shipped with it.

`collect` reduces a run's records to what a stranger needs (no paths of this machine, no per-item samples beyond a
few), `render` turns them into README.md through `template.md`, and `build` writes both with the figures. Whoever has
the shipped records can render the card again and must get the same text: that is how `nanophi verify` checks it.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from nanophi.files import UserError, read_json, write_json, write_text
from nanophi.model_card import figures

TEMPLATE = Path(__file__).parent / "template.md"

LATER_STAGES = ("comparison", "report", "card", "release", "verification")
"""Not told in the card: a second build must find the same records as the first."""

PRIVATE_KEYS = ("examples", "refused")

HELDOUT_ITEMS, HELDOUT_ITEM_BYTES = 12, 1500

Records = dict[str, Any]
"""Relative file name under `records/` -> contents."""

HUB_TASKS = {
    # task: (dataset type, name, config, split, name of the metric), as the leaderboard wrote them
    "arc_challenge": ("ai2_arc", "AI2 Reasoning Challenge", "ARC-Challenge", "test", "normalized accuracy"),
    "arc_easy": ("ai2_arc", "AI2 Reasoning Challenge (Easy)", "ARC-Easy", "test", "accuracy"),
    "hellaswag": ("hellaswag", "HellaSwag", None, "validation", "normalized accuracy"),
    "mmlu": ("cais/mmlu", "MMLU", "all", "test", "accuracy"),
    "truthfulqa_mc2": ("truthful_qa", "TruthfulQA", "multiple_choice", "validation", "mc2"),
    "winogrande": ("winogrande", "Winogrande", "winogrande_xl", "validation", "accuracy"),
    "gsm8k": ("gsm8k", "GSM8k", "main", "test", "accuracy"),
}
LEADERBOARD_TITLES = (
    "AI2 Reasoning Challenge (25-Shot)",
    "HellaSwag (10-Shot)",
    "MMLU (5-Shot)",
    "TruthfulQA (0-shot)",
    "Winogrande (5-shot)",
    "GSM8k (5-shot)",
)
LEADERBOARD = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k")

PERCENT_METRICS = ("acc", "acc_norm", "exact_match", "acc_bytes", "mc1", "mc2", "f1")
METRIC_NAMES = {
    "acc": "accuracy",
    "acc_norm": "accuracy, length-normalised",
    "acc_bytes": "accuracy, byte-normalised",
    "exact_match": "exact match",
    "bits_per_byte": "bits per byte",
    "byte_perplexity": "byte perplexity",
    "word_perplexity": "word perplexity",
}
PLACEHOLDERS = re.compile(
    r"More Information Needed|\bTODO\b|\bTBD\b|\bFIXME\b|\{\{|\}\}|\{%|\bnan\b|\bNone\b|\bUndefined\b"
)


def build(run: Path, output: Path, checkpoint: Path | None = None, repo_id: str | None = None) -> dict[str, Any]:
    """Write `README.md`, `figures/`, `records/` and, where the Hub takes them, `.eval_results/`.

    Args:
        run: the run directory.
        output: folder to write in.
        checkpoint: the checkpoint that the card describes; None: the last one.
        repo_id: where it will be on the Hub; None: what the recipe says, or the run's name.

    Returns:
        `{"characters": length of the card, "figures": [names], "evaluations": number of metric rows}`.

    Raises:
        UserError: if a record is missing or records contradict each other, naming them.
    """
    records = collect(run, checkpoint or last_checkpoint(run))
    records["run.json"]["repo_id"] = repo_id or records["run.json"]["repo_id"]
    wrong = contradictions(records)
    if wrong:
        raise UserError(f"{run}: the records contradict each other: {'; '.join(wrong)}")
    text = render(records)
    wrong = problems(text)
    if wrong:
        raise UserError(f"{run}: the card is not fit to publish: {'; '.join(wrong)}")
    output.mkdir(parents=True, exist_ok=True)
    write_records(records, output / "records")
    names = figures.build(records, output / "figures")
    write_text(output / "README.md", text)
    for name, content in eval_results_files(records).items():
        write_text(output / ".eval_results" / name, content)
    return {"characters": len(text), "figures": names, "evaluations": len(headline(records))}


# --- records ------------------------------------------------------------------------------------------------------


def last_checkpoint(run: Path) -> Path:
    """The checkpoint of the highest step."""
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    if not checkpoints:
        raise UserError(f"{run} has no checkpoints; run `nanophi train` on its recipe first")
    return checkpoints[-1]


def collect(run: Path, checkpoint: Path) -> Records:
    """The records of one checkpoint in the form in which they are shipped."""
    record = read_json(run / "record.json")
    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{run / 'recipe.yaml'} is missing; run `nanophi run` on its recipe") from None
    records: Records = {
        "recipe.yaml": portable(recipe),
        "run.json": {
            "repo_id": recipe["card"]["repo_id"] or recipe["name"],
            "revision": checkpoint.name,
            "tag": recipe["card"]["version"],
            "final": checkpoint.name == last_checkpoint(run).name,
            "finished": record["stages"]["training"]["finished"],
            "environment": record["environment"],
            "seconds": {name: stage["seconds"] for name, stage in record["stages"].items() if name not in LATER_STAGES},
        },
        "model.json": _model_record(checkpoint),
        "training.json": portable(read_json(run / "training.json")),
        "checkpoint.json": portable(read_json(checkpoint / "checkpoint.json")),
    }
    records["revisions.json"] = revisions(run)
    optional = {
        "documents.json": run / "data" / "documents" / "documents.json",
        "quality.json": run / "data" / "quality" / "quality.json",
        "tokens.json": run / "data" / "tokens" / "tokens.json",
        "sample.json": run / "sample.json",
    }
    if records["run.json"]["final"]:
        optional["comparison.json"] = run / "comparison.json"  # It compares finished models.
    for name, path in optional.items():
        if path.exists():
            record = read_json(path)
            # Other people's text, and names of files: of use to who made the run only.
            records[name] = portable({key: value for key, value in record.items() if key not in PRIVATE_KEYS})
    if "sample.json" in records:
        sample = records["sample.json"]
        sample["text"] = sample.get("checkpoints", {}).get(checkpoint.name, sample["text"])
    for suite, results in evaluations(run, checkpoint.name).items():
        records[f"evals/{suite}.json"] = results
    items = _heldout_items(run, checkpoint.name)
    if items:
        records["heldout.json"] = items
    return records


def revisions(run: Path) -> list[dict[str, Any]]:
    """The run's kept checkpoints in order of step: name, step, tokens seen, losses and leading scores."""
    entries = []
    for checkpoint in sorted((run / "checkpoints").glob("step-*")):
        state = read_json(checkpoint / "checkpoint.json")
        keys = ("step", "tokens_seen", "train_loss", "eval_loss")
        entry = {"revision": checkpoint.name} | {key: state[key] for key in keys}
        if state.get("eval_step", state["step"]) != state["step"]:
            entry["eval_loss"] = None  # Measured at an earlier step.
        rows = headline({f"evals/{suite}.json": value for suite, value in evaluations(run, checkpoint.name).items()})
        entries.append(entry | {"scores": {f"{row['task']}/{row['metric']}": row["value"] for row in rows}})
    return entries


def evaluations(run: Path, checkpoint: str) -> dict[str, dict[str, Any]]:
    """Suite name -> lm-eval's results for a checkpoint, reduced to what is shipped."""
    prefix = f"{checkpoint}-"
    return {
        path.stem.removeprefix(prefix): reduce_results(read_json(path))
        for path in sorted((run / "evals").glob(f"{prefix}*.json"))
    }


def reduce_results(results: dict[str, Any]) -> dict[str, Any]:
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
    kept = {key: results[key] for key in keys if key in results}
    kept["config"] = {
        key: value for key, value in results["config"].items() if key not in ("model", "model_args", "device")
    }
    kept["nanophi"] = {
        key: results["nanophi"][key]
        for key in ("format", "suite", "headline", "average", "heldout", "data")
        if key in results["nanophi"]
    }
    return portable(kept)


def _heldout_items(run: Path, checkpoint: str) -> list[dict[str, Any]]:
    """A few short held-out documents with their recorded log-likelihoods, so that a stranger can score them again."""
    from nanophi.data.documents import heldout

    path = run / "evals" / f"{checkpoint}-heldout.json"
    if not path.exists():
        return []
    documents = heldout(run / "data" / "documents", ["text"])
    items = []
    for sample in read_json(path)["samples"]["heldout_bits_per_byte"]:
        log_likelihood, size = sample["bits_per_byte"]
        text = documents[sample["doc_id"]]["text"] if sample["doc_id"] < len(documents) else ""
        if size == len(text.encode()) <= HELDOUT_ITEM_BYTES:
            items.append({"text": text, "log_likelihood": log_likelihood})
    return items[:HELDOUT_ITEMS]


def portable(value: Any) -> Any:
    """A JSON-able value with absolute paths cut to their last part: where things lay is nobody's business."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"/[\w.+-]+(/[\w.+*@=-]+)+/?", value):
        return Path(value).name
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_records(records: Records, folder: Path) -> None:
    """Write each record under its name."""
    for name, value in records.items():
        if name.endswith(".yaml"):
            write_text(folder / name, yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))
        else:
            write_json(folder / name, value)


def read_records(folder: Path) -> Records:
    """Read what `write_records` wrote. Raises `UserError` for a file that cannot be parsed."""
    records: Records = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".yaml":
            try:
                records[name] = yaml.safe_load(path.read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise UserError(f"{path} is not valid YAML ({' '.join(str(error).split())})") from None
        elif path.suffix == ".json":
            records[name] = read_json(path)
    if "run.json" not in records or "recipe.yaml" not in records:
        raise UserError(f"{folder} does not hold the records of a release")
    return records


def weight_shapes(path: Path) -> dict[str, list[int]]:
    """Tensor name -> shape, from a safetensors header (8 bytes of length, then JSON); no weight is read."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def _model_record(checkpoint: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    # config.json leaves out what equals the library's defaults; the class knows them.
    config = AutoConfig.from_pretrained(checkpoint).to_dict()
    config.update(config["rope_parameters"])
    shapes: dict[str, list[int]] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        shapes.update(weight_shapes(shard))
    if not shapes:
        raise UserError(f"{checkpoint} has no .safetensors file; the checkpoint is incomplete, train it again")
    embedding = math.prod(shapes["model.embed_tokens.weight"])
    head = math.prod(shapes["lm_head.weight"]) if "lm_head.weight" in shapes else 0
    total = sum(math.prod(shape) for shape in shapes.values())
    keys = (
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
    return {
        "config": {key: config[key] for key in keys},
        "parameters": total,
        "parameters_without_embeddings": total - embedding - head,
    }


# --- checks -------------------------------------------------------------------------------------------------------


def contradictions(records: Records) -> list[str]:
    """Statements of two records that cannot both be true, one line each."""
    recipe, checkpoint = records["recipe.yaml"], records["checkpoint.json"]
    training, run = recipe["training"], records["run.json"]
    wrong = []
    if run["final"] and checkpoint["step"] != training["steps"]:
        wrong.append(f"checkpoint.json says step {checkpoint['step']}, recipe.yaml says {training['steps']} steps")
    if f"step-{checkpoint['step']:06d}" != run["revision"]:
        wrong.append(f"checkpoint.json says step {checkpoint['step']}, its folder is {run['revision']}")
    for key, said in recipe["model"].items():
        has = records["model.json"]["config"].get(key, said)
        if has != said and not (key == "vocab_size" and recipe["tokenizer"]["path"] is None):
            wrong.append(f"config.json says {key} {has}, recipe.yaml says {said}")
    context = records["model.json"]["config"]["max_position_embeddings"]
    expected = checkpoint["step"] * training["batch_size"] * context
    if checkpoint["tokens_seen"] != expected:
        wrong.append(
            f"checkpoint.json says {checkpoint['tokens_seen']} tokens seen, "
            f"{checkpoint['step']} steps of {training['batch_size']} x {context} are {expected}"
        )
    quality = records.get("quality.json")
    for key in ("threshold", "share"):
        if quality is not None and quality[key] != recipe["quality"][key]:
            wrong.append(f"quality.json has {key} {quality[key]}, recipe.yaml says {recipe['quality'][key]}")
    compared = records.get("comparison.json", {"tasks": {}})["tasks"]
    for row in headline(records) if run["final"] else []:
        score = compared.get(row["task"], {"scores": {}})["scores"].get(recipe["name"])
        # Of two suites with the same task, the comparison has the one with more items.
        if score is not None and score["items"] == row["items"] and score["value"] != row["value"]:
            wrong.append(
                f"comparison.json says {row['task']} {score['value']}, evals/{row['suite']}.json says {row['value']}"
            )
    said, has = records["training.json"]["summary"]["parameters"], records["model.json"]["parameters"]
    if said != has:
        wrong.append(f"training.json says {said} parameters, the weights have {has}")
    for evaluation in records["training.json"]["evaluations"]:
        same = evaluation["step"] == checkpoint["step"] and checkpoint.get("eval_loss") is not None
        if same and not math.isclose(evaluation["loss"], checkpoint["eval_loss"], rel_tol=1e-6):
            wrong.append(
                f"training.json says evaluation loss {evaluation['loss']} at step {checkpoint['step']}, "
                f"checkpoint.json says {checkpoint['eval_loss']}"
            )
    return wrong


def problems(text: str) -> list[str]:
    """What makes a card unfit for the Hub, one line each: placeholders, and metadata the Hub would refuse."""
    # A model may write what it likes: its samples stand in code blocks.
    prose = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    wrong = [f"placeholder {match.group()!r}" for match in PLACEHOLDERS.finditer(prose)]
    parts = text.split("---\n", 2)
    if len(parts) != 3 or parts[0]:
        return [*wrong, "no YAML metadata between '---' lines at the top"]
    try:
        metadata = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        return [*wrong, f"the metadata is not valid YAML ({' '.join(str(error).split())})"]
    for key in ("language", "license", "library_name", "pipeline_tag", "tags"):
        if not metadata.get(key):
            wrong.append(f"metadata key '{key}' is missing")
    license_id = str(metadata.get("license", ""))
    if license_id != license_id.lower() or (license_id == "other" and not metadata.get("license_name")):
        wrong.append(f"license {license_id!r} is not an identifier of the Hub")
    for dataset in metadata.get("datasets", []):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset):
            wrong.append(f"dataset {dataset!r} is not a Hub id")
    for model in metadata.get("model-index", []):
        for result in model["results"]:
            wrong.extend(
                f"model-index: {result['dataset']['name']}: value {metric['value']!r} is not a number"
                for metric in result["metrics"]
                if not isinstance(metric["value"], int | float) or not math.isfinite(metric["value"])
            )
    if len(parts[2]) < 200:
        wrong.append("the text is shorter than the 200 characters that a leaderboard asks for")
    return wrong


# --- evaluation ---------------------------------------------------------------------------------------------------


def headline(records: Records) -> list[dict[str, Any]]:
    """The leading figure of every task, in the order of the suites.

    Returns:
        dicts of suite, task, shots, metric, filter, value, stderr (None where there is none), chance (None if
        guessing has no expected score), items, of (items in the whole task), higher_is_better, percent.
    """
    rows = []
    for name, record in records.items():
        if name.startswith("evals/"):
            for line in record["nanophi"]["headline"]:
                row = {
                    key: line[key] for key in ("task", "metric", "filter", "value", "stderr", "chance", "items", "of")
                }
                row |= {"suite": Path(name).stem, "shots": line["num_fewshot"]}
                row |= {"higher_is_better": line["higher_is_better"], "percent": line["metric"] in PERCENT_METRICS}
                rows.append(row)
    return rows


def metric_rows(records: Records) -> list[dict[str, Any]]:
    """One row per leaf task and metric, from the shipped lm-eval results; the keys of `headline` but chance."""
    rows = []
    for name, record in records.items():
        if not name.startswith("evals/"):
            continue
        for task, metrics in record["results"].items():
            if task in record.get("groups", {}):
                continue
            for key, value in metrics.items():
                metric, _, name_of_filter = key.partition(",")
                if not name_of_filter or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                stderr = metrics.get(f"{metric}_stderr,{name_of_filter}")
                rows.append(
                    {
                        "suite": Path(name).stem,
                        "task": task,
                        "shots": record["n-shot"].get(task),
                        "metric": metric,
                        "filter": name_of_filter,
                        "value": value,
                        "stderr": stderr if isinstance(stderr, int | float) else None,
                        "items": record["n-samples"][task]["effective"],
                        "percent": metric in PERCENT_METRICS,
                    }
                )
    return rows


def leaderboard(records: Records) -> dict[str, Any] | None:
    """The six tasks of Open LLM Leaderboard v1 and their average, in percent; None unless all their items were run."""
    for name, record in records.items():
        if not name.startswith("evals/") or not record["nanophi"].get("average"):
            continue
        lines = {line["task"]: line for line in record["nanophi"]["headline"]}
        if all(lines[task]["items"] == lines[task]["of"] for task in LEADERBOARD):
            average = record["nanophi"]["average"]
            return {
                "average": 100 * average["value"],
                "stderr": 100 * average["stderr"],
                "scores": {task: 100 * lines[task]["value"] for task in LEADERBOARD},
            }
    return None


def eval_results_files(records: Records) -> dict[str, str]:
    """`.eval_results/*.yaml` for the benchmarks that the Hub takes there: file name -> YAML."""
    files = {}
    for row in headline(records):
        if row["task"] == "gsm8k" and row["items"] == row["of"]:
            entry = EvalResultEntry(
                dataset_id="openai/gsm8k",
                task_id="gsm8k",
                value=round(100 * row["value"], 2),
                notes=f"{row['shots']}-shot, {row['filter']}, lm-evaluation-harness",
            )
            files["gsm8k.yaml"] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def metadata(records: Records) -> ModelCardData:
    """The card's YAML header."""
    recipe = records["recipe.yaml"]
    rows = headline(records)
    results = []
    for row in rows:
        if row["items"] != row["of"]:
            continue  # Beside others' scores on the whole benchmark, one on a part of it would mislead.
        known = HUB_TASKS.get(row["task"])
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=known[0] if known else row["task"],
                dataset_name=_shots_name(known[1] if known else row["task"], row["shots"]),
                dataset_config=known[2] if known else None,
                dataset_split=known[3] if known else None,
                dataset_args={"num_few_shot": row["shots"]} if row["shots"] is not None else None,
                metric_type=row["metric"],
                metric_name=known[4] if known else METRIC_NAMES.get(row["metric"], row["metric"]),
                metric_value=round(100 * row["value"], 2) if row["percent"] else round(row["value"], 4),
            )
        )
    hub = [source["hub"] for source in training_sources(recipe) if source["hub"] and is_hub_id(source["hub"])]
    summary = records["training.json"].get("summary", {})
    extra: dict[str, Any] = {"widget": [{"text": recipe["card"]["prompt"]}]}
    if summary.get("co2_grams") is not None:
        emissions = {
            "emissions": float(f"{summary['co2_grams']:.4g}"),
            "source": summary["co2_source"],
            "training_type": "pre-training",
            "geographical_location": summary.get("co2_region"),
            "hardware_used": hardware(records),
        }
        extra["co2_eq_emissions"] = {key: value for key, value in emissions.items() if value is not None}
    return ModelCardData(
        language="en",
        license=recipe["card"]["license"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["phi", "nanophi", "small-language-model", "pretrained-from-scratch"],
        datasets=list(dict.fromkeys(hub)) or None,
        metrics=sorted({row["metric"] if row["metric"] != "acc" else "accuracy" for row in rows}) or None,
        model_name=records["run.json"]["repo_id"].rpartition("/")[2] if results else None,
        eval_results=results or None,
        **extra,
    )


def _shots_name(name: str, shots: int | None) -> str:
    return name if shots is None else f"{name} ({shots}-Shot)"


def training_sources(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipe's sources without those that are held out as a whole."""
    return [source for source in recipe["data"]["sources"] if not source.get("heldout")]


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `ORG/NAME`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


# --- text ---------------------------------------------------------------------------------------------------------


def hardware(records: Records) -> str:
    """The machine in words."""
    environment = records["run.json"]["environment"]
    devices = environment.get("devices", [])
    if devices:
        return " + ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
    threads = environment["cpu_threads"]
    return f"{environment['processor']}, {threads} thread{'s' if threads != 1 else ''}, no GPU"


def render(records: Records) -> str:
    """README.md of a release. Raises `UserError` if the template asks for something that no record says."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update({name: _demanding(function) for name, function in FILTERS.items()})
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    header, rows, every = metadata(records), headline(records), metric_rows(records)
    evaluations = [value for name, value in records.items() if name.startswith("evals/")]
    utilisations = [entry["mfu"] for entry in records["training.json"]["log"] if entry["mfu"] is not None]
    try:
        return template.render(
            metadata=header.to_yaml(line_break="\n"),
            datasets=header.datasets or [],
            recipe=records["recipe.yaml"],
            run=records["run.json"],
            model=records["model.json"],
            training=records["training.json"],
            checkpoint=records["checkpoint.json"],
            sources=training_sources(records["recipe.yaml"]),
            revisions=records["revisions.json"],
            documents=records.get("documents.json"),
            quality=records.get("quality.json"),
            tokens=records.get("tokens.json"),
            comparison=records.get("comparison.json"),
            differences=differences(records.get("comparison.json")),
            sample=records.get("sample.json"),
            rows=rows,
            tasks=[row for row in every if not row["task"].startswith("mmlu_")],
            subjects=[row for row in every if row["task"].startswith("mmlu_")],
            harness=", ".join(sorted({value["lm_eval_version"] for value in evaluations})),
            heldout=next((value["nanophi"]["heldout"] for value in evaluations if "heldout" in value["nanophi"]), None),
            leaderboard=leaderboard(records),
            leaderboard_tasks=list(zip(LEADERBOARD_TITLES, LEADERBOARD, strict=True)),
            benchmarks=any(not row["task"].startswith("heldout_") for row in rows),
            by_source=by_source(records),
            noise=noise(rows),
            mfu=statistics.median(utilisations) if utilisations else None,
            hardware=hardware(records),
            figures=figures.names(records),
        )
    except jinja2.UndefinedError as error:
        raise UserError(f"the card needs a value that no record holds: {error.message}") from None


def differences(comparison: dict[str, Any] | None) -> dict[str, list[dict[str, Any]]] | None:
    """Label -> one row per task: how far it is from the baseline, and whether that is more than noise."""
    if comparison is None:
        return None
    rows: dict[str, list[dict[str, Any]]] = {}
    for task, row in comparison["tasks"].items():
        factor, places = _scale(row["metric"])
        for label, entry in row["differences"].items():
            low, high = (f"{factor * bound:+.{places}f}" for bound in entry["interval"])
            rows.setdefault(label, []).append(
                {
                    "task": task,
                    "shots": row["num_fewshot"],
                    "difference": f"{factor * entry['value']:+.{places}f}",
                    "interval": f"{low} to {high}",
                    "p": f"{entry['p_corrected']:.3f}" if entry["p_corrected"] >= 0.001 else "< 0.001",
                    "verdict": entry["verdict"],
                }
            )
    return rows


def by_source(records: Records) -> dict[str, Any] | None:
    """Held-out bits per byte of the compared models by source; None unless two or more were measured.

    Returns:
        `{"labels": names of the models, "rows": [{"source", "documents", "kept": share of the source's bytes that the
        filter kept, None if it is not trained on, "scores": cells in the order of the labels}]}`.
    """
    heldout = (records.get("comparison.json") or {}).get("heldout") or {}
    labels = [label for label in (records.get("comparison.json") or {}).get("labels", []) if label in heldout]
    if len(labels) < 2:
        return None
    filtered, rows = records.get("quality.json", {}).get("sources", {}), []
    for source in sorted({source for label in labels for source in heldout[label]["by_source"]}):
        parts = [heldout[label]["by_source"].get(source) for label in labels]
        scores = [
            "-"
            if part is None
            else f"{part['bits_per_byte']:.4f}"
            + (f" ± {part['bits_per_byte_stderr']:.4f}" if part["documents"] > 1 else "")
            for part in parts
        ]
        trained = filtered.get(source)
        rows.append(
            {
                "source": source,
                "documents": max(part["documents"] for part in parts if part is not None),
                "kept": trained["kept_bytes"] / trained["bytes"] if trained and trained["bytes"] else None,
                "scores": scores,
            }
        )
    return {"labels": labels, "rows": rows}


def noise(rows: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Tasks by whether guessing explains their score: `above` and `within` two standard errors of chance."""
    tasks: dict[str, list[str]] = {"above": [], "within": []}
    for row in rows:
        if row["chance"] is not None and row["stderr"]:
            above = row["value"] - row["chance"] > 2 * row["stderr"]
            tasks["above" if above else "within"].append(task_name(row))
    return tasks


def _demanding(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, but a missing value is named instead of failing as a type."""

    def call(value: Any, *arguments: Any) -> Any:
        if isinstance(value, jinja2.Undefined):
            str(value)  # StrictUndefined raises with the name.
        return function(value, *arguments)

    return call


def _scale(metric: str) -> tuple[float, int]:
    """Factor and decimal places in which a metric is shown: shares in percent, the rest as they are."""
    return (100.0, 2) if metric in PERCENT_METRICS or metric == "mean of six" else (1.0, 4)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float, places: int = 1) -> str:
    return f"{100 * value:.{places}f} %"


def _decimal(value: float, places: int = 3) -> str:
    return f"{value:.{places}f}"


def figure(value: float) -> str:
    """Three digits, more if they stand before the point: 0.00987, 51.2, 1,460."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _metric(row: dict[str, Any], key: str = "value") -> str:
    """A row's value, standard error or chance in the row's unit."""
    factor, places = _scale(row["metric"])
    return "-" if row[key] is None else f"{factor * row[key]:.{places}f}"


def _score(row: dict[str, Any], label: str) -> str:
    """A cell of the comparison: a label's score and its standard error."""
    if label not in row["scores"]:
        return "-"
    factor, places = _scale(row["metric"])
    score = row["scores"][label]
    error = "" if score["stderr"] is None else f" ± {factor * score['stderr']:.{places}f}"
    return f"{factor * score['value']:.{places}f}{error}"


def task_name(row: dict[str, Any]) -> str:
    """A task as a person would call it, with its shots."""
    name = row["task"].replace("heldout_order", "held-out sentence order").replace("heldout_", "held-out ")
    name = name.replace("_", " ")
    return name + (f" ({row['shots']}-shot)" if row["shots"] else "")


def _verdicts(rows: list[dict[str, Any]]) -> str:
    """`better on a, b, worse on c and within noise on d`, what is empty left out."""
    parts = []
    for verdict in ("better", "worse", "within noise"):
        tasks = [task_name(row) for row in rows if row["verdict"] == verdict]
        if tasks:
            parts.append(f"{verdict} on {', '.join(tasks)}")
    return "; ".join(parts)


def _cell(value: Any) -> str:
    """Text that may stand in a cell of a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").split())


def _fenced(text: str) -> str:
    """Text as a Markdown code block that it cannot break out of; what cannot be shown is replaced."""
    shown = "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", shown)), 3)
    return f"{fence}text\n{shown}\n{fence}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    """A large count in the form that a summary can carry: 2.4M, 7.3B."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g}{unit}"
    return f"{count:.0f}"


def _source_name(source: dict[str, Any]) -> str:
    return source["name"] or source["hub"] or source["files"] or source["embedded"]


FILTERS: dict[str, Any] = {
    "cell": _cell,
    "chance": lambda row: "-" if row["chance"] is None else f"{100 * row['chance']:.1f}",
    "count": _count,
    "decimal": _decimal,
    "duration": _duration,
    "figure": figure,
    "fenced": _fenced,
    "literal": lambda text: json.dumps(text, ensure_ascii=False),
    "metric": _metric,
    "metric_name": lambda name: METRIC_NAMES.get(name, name),
    "on_hub": lambda source: source["hub"] is not None and is_hub_id(source["hub"]),
    "percent": _percent,
    "score": _score,
    "size": _size,
    "source_name": _source_name,
    "task_name": task_name,
    "verdicts": _verdicts,
}
