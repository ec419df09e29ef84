"""Measure a model on a suite with lm-eval, and write everything that a reader needs to check or compare it.

    nanophi eval MODEL --suite open-llm-v1 --data benchmarks/
    nanophi eval runs/demo/checkpoints/step-000600 --suite heldout --heldout runs/demo/data/documents

The result file is lm-eval's result JSON (results, versions, n-shot, n-samples, configs, samples, ...) with the
log-likelihoods and metrics of every item, and one more key, `nanophi`: the suite's leading figures, the held-out
figures by source, the environment, and hashes of model and data.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
import lm_eval.evaluator
import numpy as np
import torch
import tqdm
import transformers
from lm_eval.api.task import Task
from lm_eval.loggers.utils import add_tokenizer_info
from lm_eval.utils import hash_string

from nanophi.eval.metrics import BitsPerByte
from nanophi.eval.results import FORMAT, read_result
from nanophi.eval.scorer import ScorerLM, TooLong
from nanophi.eval.suites import LoadedSuite, find_suite, load_suite, sample_of_items
from nanophi.files import UserError, read_json, remove, sha256_of, sha256_of_file, sha256_of_tree, write_json
from nanophi.run import environment

# lm-eval's own seeds (`simple_evaluate`): other ones draw other few-shot examples, and nothing compares any more.
RANDOM_SEED, FEWSHOT_SEED = 0, 1234
BOOTSTRAP_ITERATIONS = 100_000
CURVE_KEYS = ("metric", "value", "stderr", "chance", "higher_is_better", "items")


def evaluate(
    model: str | Path,
    suite: str,
    output: Path,
    *,
    data: Path | None = None,
    heldout: Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure a model on a suite and write the result file.

    A task's results are kept as soon as it ends (in `.<output's name>.partial/`): killed and called again with the
    same inputs, it goes on with the next task.

    Args:
        model: folder or Hub id of any causal language model; `id@revision` for a branch, tag or commit.
        suite: `heldout`, `quick`, `open-llm-v1`, or names of lm-eval tasks and groups, separated by commas.
        output: the result file (JSON).
        data: folder with the benchmarks under their Hub ids (`<data>/allenai/ai2_arc`); None: the Hub.
        heldout: a run's `data/documents`; the suite `heldout` needs it.
        limit: at most so many items per task: a fixed sample, the same for every model.
        batch_size: sequences per forward pass, at most.
        seed: of the bootstrap. Few-shot examples are always drawn with lm-eval's own seed.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 on a GPU, float32 on a CPU.
        trust_remote_code: run model code that comes with the model.
        report: called with one line for each thing worth telling a person.

    Returns:
        what was written.

    Raises:
        UserError: for an unknown suite, missing data, or something that is not a causal language model.
    """
    output = Path(output)
    loaded = load_suite(find_suite(suite), data=data, heldout=heldout)
    network, tokenizer, identity = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    with _quiet():
        lm = ScorerLM(network, tokenizer, batch_size)
    if lm.sharing:
        report(f"{identity['name']}: no prefixes are shared, since {lm.sharing}; slower, same results")
    indices = {
        name: sample_of_items(task, min(filter(None, (limit, loaded.entries[name].items)), default=None))
        for name, task in loaded.tasks.items()
    }
    inputs = {
        "format": FORMAT,
        "model": identity,
        "suite": [[name, task.config.num_fewshot, indices[name]] for name, task in loaded.tasks.items()],
        "data": _data_hashes(loaded),
        "environment": {key: value for key, value in environment().items() if key not in ("cpu_threads", "commit")},
    }
    key = sha256_of(inputs)
    if output.exists():
        with contextlib.suppress(UserError):
            earlier = read_result(output)
            if earlier["nanophi"].get("key") == key:
                report(f"{output} is up to date")
                return earlier
    for name, task in loaded.tasks.items():
        if task.OUTPUT_TYPE == "generate_until" and lm.max_length <= lm.max_gen_toks:
            raise UserError(
                f"task '{name}' generates {lm.max_gen_toks} tokens, which leaves no room for the question in the "
                f"{lm.max_length} tokens that {model} reads; choose other tasks (--suite)"
            )
    partial = _open_partial(output, key)
    started = time.monotonic()
    paths = {name: partial / f"{name}.json" for name in loaded.tasks}
    waiting = {
        name: _characters(task, indices[name]) for name, task in loaded.tasks.items() if not paths[name].exists()
    }
    if len(waiting) < len(paths):
        report(f"{len(paths) - len(waiting)} of {len(paths)} tasks were done before")
    scored = 0
    for name in list(waiting):
        result = _run_task(lm, name, loaded.tasks[name], indices[name])
        write_json(paths[name], result)
        scored += waiting.pop(name)
        left = (time.monotonic() - started) * sum(waiting.values()) / scored
        report(_line(result, name) + (f"; about {_duration(left)} left for {len(waiting)} more" if waiting else ""))
    parts = {name: read_json(path) for name, path in paths.items()}
    result = _merge(loaded, parts)
    result["config"] = {
        "model": str(model),
        "model_num_parameters": identity["parameters"],
        "model_dtype": identity["dtype"],
        "batch_size": batch_size,
        "device": str(network.device),
        "limit": limit,
        "bootstrap_iters": BOOTSTRAP_ITERATIONS,
        "random_seed": RANDOM_SEED,
        "fewshot_seed": FEWSHOT_SEED,
    }
    result["date"] = time.time()
    result["lm_eval_version"], result["transformers_version"] = lm_eval.__version__, transformers.__version__
    add_tokenizer_info(result, lm)
    result["total_evaluation_time_seconds"] = str(sum(part["seconds"] for part in parts.values()))
    result["nanophi"] = {
        "format": FORMAT,
        "key": key,
        "model": identity,
        **_summary(loaded, result, seed),
        "data": inputs["data"],
        "environment": environment(),
        "seconds": {name: part["seconds"] for name, part in parts.items()},
        "overflowing": {name: part["overflowing"] for name, part in parts.items() if part["overflowing"]},
    }
    write_json(output, result)
    shutil.rmtree(partial)
    report(f"{output} written, {_duration(time.monotonic() - started)}")
    return result


def evaluate_checkpoints(
    models: Sequence[str | Path], suite: str, folder: Path, **options: Any
) -> tuple[list[dict[str, Any]], Path | None]:
    """Measure several models, and draw their scores over the tokens that they had seen.

    Args:
        models: folders and Hub ids, as for `evaluate`; a run directory stands for all its checkpoints.
        suite: as for `evaluate`.
        folder: where the result files go (`<model>-<suite>.json`), and `curve-<suite>.json` and `.png` if two models
            or more are checkpoints of ours.
        options: the other arguments of `evaluate`.

    Returns:
        the result files' contents, in the order of the models, and the curve's JSON file, if there is one.
    """
    expanded = [checkpoint for model in models for checkpoint in checkpoints_of(model)]
    results = [evaluate(model, suite, Path(folder) / result_name(model, suite), **options) for model in expanded]
    points = sorted(
        (result["nanophi"] for result in results if "tokens_seen" in result["nanophi"]["model"]),
        key=lambda point: point["model"]["tokens_seen"],
    )
    if len(points) < 2:
        return results, None
    path = Path(folder) / f"curve-{suite}.json"
    curve = [
        {
            **{key: point["model"].get(key) for key in ("name", "step", "tokens_seen")},
            "scores": {line["task"]: {key: line[key] for key in CURVE_KEYS} for line in point["headline"]},
        }
        for point in points
    ]
    write_json(path, {"format": FORMAT, "suite": suite, "points": curve})
    draw_curve(curve, path.with_suffix(".png"))
    return results, path


def checkpoints_of(model: str | Path) -> list[str | Path]:
    """A run directory's checkpoints, by step; any other model is itself."""
    folder = Path(model) / "checkpoints"
    return sorted(folder.glob("step-*")) or [model] if folder.is_dir() else [model]


def result_name(model: str | Path, suite: str) -> str:
    """File name of a model's results on a suite: `step-000600-heldout.json`."""
    name = Path(model).resolve().name if Path(model).is_dir() else str(model).replace("/", "--").replace("@", "--")
    return f"{name}-{suite}.json"


def draw_curve(curve: list[dict[str, Any]], path: Path) -> None:
    """Scores with their 95 % intervals over tokens seen, one panel per task, chance dotted; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(curve[0]["scores"])
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(1 + 3 * len(tasks), 3), squeeze=False, sharex=True, layout="constrained"
    )
    tokens = [point["tokens_seen"] for point in curve]
    for axis, task in zip(axes[0], tasks, strict=True):
        scores = [point["scores"][task] for point in curve]
        errors = [1.96 * (score["stderr"] or 0) for score in scores]
        axis.errorbar(tokens, [score["value"] for score in scores], yerr=errors, marker="o", capsize=3)
        if scores[0]["chance"] is not None:
            axis.axhline(scores[0]["chance"], color="black", linestyle=":", linewidth=1)
        axis.set_title(f"{task} ({scores[0]['metric']})", fontsize=9)
        axis.set_xlabel("tokens seen")
        axis.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(f".{path.name}.part")
    figure.savefig(partial, format="png", dpi=150)
    plt.close(figure)
    partial.replace(path)


def load_model(
    model: str | Path, *, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, dict[str, Any]]:
    """A causal language model ready to be measured, its tokenizer, and what identifies it.

    Returns:
        the model (in evaluation mode, on the GPU if there is one), its tokenizer, and a JSON-able description:
        `name`, `sha256` of a folder's weights and configuration or `revision` of a Hub id, `parameters`, `dtype`,
        `architecture`, and `step` and `tokens_seen` of a checkpoint of ours.

    Raises:
        UserError: if it cannot be loaded, is not a causal language model, or does not fit its tokenizer.
    """
    source, _, revision = str(model).partition("@")
    folder = Path(source)
    local = folder.is_dir()
    if local:
        source, revision = str(folder.resolve()), ""
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is not a model: it has no config.json")
    elif folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(f"model folder {source} does not exist")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype '{dtype}' is not one of auto, float32, bfloat16, float16")
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **common)
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=getattr(torch, dtype), use_safetensors=True, **common
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **common)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if "Unrecognized configuration class" in reason:
            reason = f"model type '{config.model_type}' is not a causal language model"
        raise UserError(f"cannot load {model}: {reason[:300]}") from error
    rows = network.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"{model}: the tokenizer has {len(tokenizer)} tokens but the weights only {rows} rows; "
            "it is another model's tokenizer"
        )
    network = network.to(device).eval()
    identity: dict[str, Any] = {"name": folder.name if local else str(model)}
    if local:
        files = [
            path for pattern in ("*.safetensors", "config.json", "tokenizer*.json") for path in folder.glob(pattern)
        ]
        identity["sha256"] = sha256_of({path.name: sha256_of_file(path) for path in files})
    else:
        identity["revision"] = getattr(config, "_commit_hash", None)
    identity["architecture"] = type(network).__name__
    identity["parameters"] = network.num_parameters()
    identity["dtype"] = dtype
    if (folder / "checkpoint.json").is_file():
        checkpoint = read_json(folder / "checkpoint.json")
        identity |= {key: checkpoint[key] for key in ("step", "tokens_seen") if key in checkpoint}
    return network, tokenizer, identity


def _characters(task: Task, indices: list[int] | None) -> int:
    """About how many characters of prompt a task's items have together, from a few of them: a measure of its cost."""
    task.set_fewshot_seed(FEWSHOT_SEED)
    docs = task.eval_docs
    some = (indices or range(len(docs)))[:: max(1, len(indices or docs) // 4)]
    prompts = [task.fewshot_context(docs[i], num_fewshot=task.config.num_fewshot) for i in some]
    lengths = [len(prompt if isinstance(prompt, str) else prompt[0]) for prompt in prompts]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        lengths = [len(task.doc_to_target(docs[i])) for i in some]
    return 1 + sum(lengths) * len(indices or docs) // len(lengths)


def _run_task(lm: ScorerLM, name: str, task: Task, indices: list[int] | None) -> dict[str, Any]:
    """lm-eval's evaluation of one task, as plain data, with the samples cut down to what is worth keeping."""
    started = time.monotonic()
    overflowing = lm.overflowing
    # What `lm_eval.simple_evaluate` does before it calls `evaluate`.
    random.seed(RANDOM_SEED)
    np.random.seed(FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)
    task.set_fewshot_seed(FEWSHOT_SEED)
    try:
        with _quiet():
            result: Any = lm_eval.evaluator.evaluate(
                lm,
                {"tasks": {name: task}},
                samples=None if indices is None else {name: indices},
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
            )
    except TooLong as error:
        raise UserError(f"task '{name}': {error}; choose other tasks (--suite)") from error
    samples = result["samples"][name]
    if not all(math.isfinite(score) for sample in samples for score in _numbers(sample["filtered_resps"])):
        raise UserError(f"task '{name}': the model's log-likelihoods are not finite numbers; its weights are damaged")
    result["task_hashes"] = {
        name: hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))
    }
    result["chance"] = _chance(samples)
    if name == "heldout_bits_per_byte":
        text = "\n".join(sample["doc"]["text"] for sample in samples).encode()
        result["bz2"] = {"bits_per_byte": 8 * len(bz2.compress(text, 9)) / len(text), "bytes": len(text)}
    result["samples"] = {name: [_slim(sample) for sample in samples]}
    result["overflowing"] = lm.overflowing - overflowing
    result["seconds"] = round(time.monotonic() - started, 3)
    return _plain(result)


def _numbers(value: Any) -> Iterator[float]:
    """The floating-point numbers in nested lists."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, float):
        yield value


def _slim(sample: dict[str, Any]) -> dict[str, Any]:
    """What pairs an item with another model's and says how it was scored; the prompts would be gigabytes."""
    kept = (
        "doc_id",
        "filter",
        "filtered_resps",
        "metrics",
        "doc_hash",
        "prompt_hash",
        "target_hash",
        *sample["metrics"],
    )
    slim = {key: sample[key] for key in kept}
    if isinstance(sample["target"], int):
        slim["target"] = sample["target"]
    if isinstance(sample["doc"], dict) and "source" in sample["doc"]:
        slim["source"] = sample["doc"]["source"]
    return slim


def _chance(samples: list[dict[str, Any]]) -> float | None:
    """Expected score of a guess: 1 / choices, item by item; for mc2 the share of true answers; None: not a choice."""
    scores = []
    for sample in samples:
        doc = sample["doc"]
        if isinstance(doc, dict) and "mc2_targets" in doc and "acc_norm" not in sample["metrics"]:
            labels = doc["mc2_targets"]["labels"]
            if len(labels) == len(sample["arguments"]):
                scores.append(sum(labels) / len(labels))
                continue
        if "acc" not in sample["metrics"] or len(sample["arguments"]) < 2:
            return None
        scores.append(1 / len(sample["arguments"]))
    return float(np.mean(scores))


def _plain(value: Any) -> Any:
    """JSON-able copy: tuples and arrays to lists, numpy scalars to Python's, anything else to its text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _open_partial(output: Path, key: str) -> Path:
    """The folder for finished tasks, emptied if it holds those of other inputs."""
    partial = output.with_name(f".{output.name}.partial")
    if not (partial / "key").is_file() or (partial / "key").read_text() != key:
        remove(partial)
        partial.mkdir(parents=True)
        (partial / "key").write_text(key)
    return partial


def _data_hashes(loaded: LoadedSuite) -> dict[str, Any]:
    """SHA-256 of each dataset folder; datasets from the Hub are pinned by the per-item hashes in the samples."""
    folders = dict(loaded.datasets.values())
    hashes: dict[str, Any] = {}
    for dataset, folder in folders.items():
        if dataset == "heldout" and folder is not None:
            hashes[dataset] = sha256_of({path.name: sha256_of_file(path) for path in folder.glob("heldout-*.parquet")})
        else:
            hashes[dataset] = sha256_of_tree(folder) if folder is not None else None
    return hashes


def _merge(loaded: LoadedSuite, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One lm-eval result from the results of single tasks, groups aggregated by lm-eval."""
    keys = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "task_hashes", "samples")
    merged: dict[str, Any] = {key: {} for key in keys}
    for part in parts.values():
        for key in keys:
            merged[key].update(part[key])
    merged["nanophi_parts"] = {name: {key: part.get(key) for key in ("chance", "bz2")} for name, part in parts.items()}
    if loaded.groups:
        merged["group_subtasks"] = {name: group.child_names for name, group in loaded.groups.items()}
        merged["groups"] = {}
        for name, group in loaded.groups.items():
            aggregate = _plain(group.aggregate(merged["results"]))
            merged["results"][name] = merged["groups"][name] = aggregate
            merged["versions"][name] = group.version
            shots = {merged["n-shot"][task.task_name] for task in group.get_all_tasks()}
            if len(shots) == 1:
                merged["n-shot"][name] = shots.pop()
    return merged


def _summary(loaded: LoadedSuite, result: dict[str, Any], seed: int) -> dict[str, Any]:
    """The suite's leading figures, and those of the held-out documents by source."""
    parts = result.pop("nanophi_parts")
    headline = []
    for entry in loaded.suite.entries:
        leaves = [name for name, other in loaded.entries.items() if other is entry]
        first = result["results"][leaves[0]]
        metric = entry.metric or next(key for key in first if "," in key and "_stderr" not in key)
        stderr = metric.replace(",", "_stderr,")
        if leaves == ["heldout_bits_per_byte"]:
            scores = [result["samples"][leaves[0]][i]["bits_per_byte"] for i in range(first["sample_len"])]
            overall = bits_per_byte_of(scores)
            first[metric], first[stderr] = overall["bits_per_byte"], overall["bits_per_byte_stderr"]
        values = [result["results"][leaf][metric] for leaf in leaves]
        errors = [result["results"][leaf].get(stderr) for leaf in leaves]
        chances = [parts[leaf]["chance"] for leaf in leaves]
        headline.append(
            {
                "task": entry.task,
                "metric": metric.split(",")[0],
                "filter": metric.split(",")[1],
                "num_fewshot": result["n-shot"][leaves[0]],
                # Several leaves (MMLU's subjects): the unweighted mean, as on the leaderboard.
                "value": float(np.mean(values)),
                "stderr": float(np.sqrt(np.sum(np.square(errors))) / len(errors))
                if all(isinstance(error, float) for error in errors)
                else None,
                "chance": float(np.mean(chances)) if None not in chances else None,
                "higher_is_better": bool(result["higher_is_better"][leaves[0]].get(metric.split(",")[0], True)),
                "items": sum(result["n-samples"][leaf]["effective"] for leaf in leaves),
                "of": sum(result["n-samples"][leaf]["original"] for leaf in leaves),
                "tasks": leaves,
            }
        )
    summary: dict[str, Any] = {"suite": loaded.suite.name, "headline": headline, "average": None}
    averaged = [line for line in headline if line["task"] in loaded.suite.average]
    if loaded.suite.average:
        summary["average"] = {
            "value": float(np.mean([line["value"] for line in averaged])),
            "stderr": float(np.sqrt(sum(line["stderr"] ** 2 for line in averaged)) / len(averaged)),
            "tasks": list(loaded.suite.average),
        }
    if "heldout_bits_per_byte" in loaded.tasks:
        samples = result["samples"]["heldout_bits_per_byte"]
        sources = sorted({sample["source"] for sample in samples})
        summary["heldout"] = {
            **bits_per_byte_of([sample["bits_per_byte"] for sample in samples]),
            "documents": len(samples),
            "bz2": parts["heldout_bits_per_byte"]["bz2"],
            "by_source": {
                source: {
                    **bits_per_byte_of([s["bits_per_byte"] for s in samples if s["source"] == source]),
                    "documents": sum(sample["source"] == source for sample in samples),
                }
                for source in sources
            },
        }
    return summary


def bits_per_byte_of(scores: list[Any]) -> dict[str, Any]:
    """`BitsPerByte` of lm-eval's (log-likelihood, bytes) pairs."""
    predictions, references = zip(*scores, strict=True)
    metric = BitsPerByte(keep_in_memory=True)
    return metric.compute(predictions=list(predictions), references=list(references))


def _line(part: dict[str, Any], name: str) -> str:
    values = part["results"][name]
    shown = []
    for key, value in values.items():
        if "," in key and "_stderr" not in key and isinstance(value, float):
            error = values.get(key.replace(",", "_stderr,"))
            shown.append(f"{key.split(',')[0]} {value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else ""))
    cut = f", {part['overflowing']} prompts cut to the context" if part["overflowing"] else ""
    return f"{name}: {', '.join(shown)} ({values['sample_len']} items{cut}, {_duration(part['seconds'])})"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's and datasets' logging and their bars over documents; ours over the model's work stay."""
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    bars = datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(tqdm.tqdm, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
