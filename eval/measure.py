"""Measure one model on one suite with lm-eval, and write everything that a reader needs to check or compare it.

Which models, and what is drawn of several, is for evaluate.py; what the scores are, for results.py.
"""

import bz2
import contextlib
import dataclasses
import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import numpy as np
import torch
import transformers
from lm_eval.api.task import Task
from lm_eval.loggers.utils import add_tokenizer_info
from lm_eval.utils import hash_string

from nanophi.core.environment import environment
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, remove, sha256_of, sha256_of_file, sha256_of_tree, write_json, write_text
from nanophi.core.formatting import duration
from nanophi.core.names import resolve
from nanophi.core.run import Report
from nanophi.eval import suites
from nanophi.eval.catalogue import HELDOUT_BITS, score
from nanophi.eval.metrics import bits_figures, heldout_figures, memorisation_figures
from nanophi.eval.models import load_model
from nanophi.eval.results import ANSWER_METRIC, FORMAT, PROTOCOL, every_score, mean_of, read_result, result_name
from nanophi.eval.scorer import NotScorable, ScorerLM
from nanophi.eval.statistics import mean_stderr
from nanophi.eval.suites import LoadedSuite, generation_problem, quiet

# lm-eval's own seeds (`simple_evaluate`): others would draw other few-shot examples.
RANDOM_SEED, FEWSHOT_SEED = 0, 1234
BOOTSTRAP_ITERATIONS = 100_000

Parts = dict[str, dict[str, Any]]
"""What `run_task` returns for each task."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure; the options of the verb explain them. `limit` draws a fixed sample, the same for every model."""

    data: Path | None = None
    heldout: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 16
    dtype: str = "auto"
    trust_remote_code: bool = False


def measure(
    model: str | Path, suite: str, output: Path, options: Options, report: Report = print, *, shared: bool = False
) -> dict[str, Any]:
    """Measure a model on a suite and write the result file `output`, or one in that folder with a name of its own.

    Each task's results are kept as soon as it ends (in `.<file's name>.partial/`): killed and called again with the
    same inputs, it resumes with the next task. If `shared`, the file's name is the beginning of several models' own.
    """
    if resolve(model).folder is None:
        report(f"{model}: no such folder, looking on the Hub")
    chosen = suites.find_suite(suite, options.num_fewshot)
    suites.find_data(chosen, data=options.data, heldout=options.heldout)  # before the model is loaded
    with quiet():
        network, tokenizer, identity = load_model(model, options.dtype, options.trust_remote_code)
    loaded = suites.load_suite(chosen, data=options.data, heldout=options.heldout)
    with quiet():
        lm = ScorerLM(network, tokenizer, options.batch_size)
    if lm.unshared_because:
        report(f"{identity['name']}: prefixes are not shared, since {lm.unshared_because}; slower, same results")
    indices = {
        name: suites.sample_of_items(task, min(filter(None, (options.limit, loaded.entries[name].items)), default=None))
        for name, task in loaded.tasks.items()
    }
    inputs = {
        "format": PROTOCOL,
        "model": identity,
        "suite": [[name, task.config.num_fewshot, indices[name]] for name, task in loaded.tasks.items()],
        "data": _data_hashes(loaded),
        "environment": {key: value for key, value in environment().items() if key not in ("cpu_threads", "commit")},
    }
    key = sha256_of(inputs)
    if output.suffix != ".json":
        output /= result_name(identity["name"], chosen.name, key)
    elif shared:
        output = output.with_name(result_name(output.stem, identity["name"], key))
    if output.exists():
        with contextlib.suppress(UserError):
            earlier = read_result(output)
            if earlier["nanophi"].get("key") == key:
                report(f"{output.name} is up to date")
                return earlier
        report(f"{output.name} holds another measurement, which this one will replace")
    for name, task in loaded.tasks.items():
        config = {"output_type": task.OUTPUT_TYPE, "generation_kwargs": task.config.generation_kwargs}
        if problem := generation_problem(f"task '{name}'", config, lm.max_length):
            raise UserError(f"{problem}, which {model} has; choose other tasks (--suite)")
    started, partial = time.monotonic(), output.with_name(f".{output.name}.partial")
    if not (partial / "key").is_file() or (partial / "key").read_text() != key:  # of tasks that are finished
        remove(partial)
        write_text(partial / "key", key)
    parts = _run_tasks(lm, loaded, indices, partial, report)
    result = _result(lm, loaded, parts, identity, options)
    result["nanophi"] |= {"key": key, "data": inputs["data"]}
    write_json(output, result)
    shutil.rmtree(partial)
    report(f"{output.name} written, {duration(time.monotonic() - started)}")
    return result


def _result(
    lm: ScorerLM, loaded: LoadedSuite, parts: Parts, identity: dict[str, Any], options: Options
) -> dict[str, Any]:
    """What lm-eval writes about a measurement, and `nanophi`."""
    result: dict[str, Any] = {
        **_merge(loaded, parts),
        "config": {
            "model": identity["name"],
            "model_num_parameters": identity["parameters"],
            "model_dtype": identity["dtype"],
            "batch_size": options.batch_size,
            "device": str(lm.model.device),
            "limit": options.limit,
            "bootstrap_iters": BOOTSTRAP_ITERATIONS,
            "random_seed": RANDOM_SEED,
            "fewshot_seed": FEWSHOT_SEED,
        },
        "date": time.time(),
        "lm_eval_version": lm_eval.__version__,
        "transformers_version": transformers.__version__,
        "total_evaluation_time_seconds": str(sum(part["seconds"] for part in parts.values())),
    }
    add_tokenizer_info(result, lm)
    lines = {}
    for entry in loaded.suite.entries:
        leaves = [name for name, other in loaded.entries.items() if other is entry]
        chances = [parts[leaf]["chance"] for leaf in leaves]
        lines[entry.task] = {"tasks": leaves, "chance": None if None in chances else float(np.mean(chances))}
    result["nanophi"] = {"format": FORMAT, "model": identity, "suite": loaded.suite.name, "lines": lines}
    if HELDOUT_BITS in parts:
        result["nanophi"]["heldout"] = heldout_figures(result["samples"][HELDOUT_BITS], parts[HELDOUT_BITS]["bz2"])
    if "memorisation_train" in parts and "memorisation_heldout" in parts:
        result["nanophi"]["memorisation"] = memorisation_figures(result["samples"])
    result["nanophi"] |= {
        "environment": environment(),
        "seconds": {name: part["seconds"] for name, part in parts.items()},
        "overflowing": {name: part["overflowing"] for name, part in parts.items() if part["overflowing"]},
    }
    return result


def _run_tasks(
    lm: ScorerLM, loaded: LoadedSuite, indices: dict[str, list[int] | None], partial: Path, report: Report
) -> Parts:
    """Run each task that is not in the folder `partial` already."""
    started, scored = time.monotonic(), 0
    paths = {name: partial / f"{name}.json" for name in loaded.tasks}
    # What a task costs is about proportional to its items and the examples in their prompts.
    costs = {x: len(indices[x] or task.eval_docs) * (1 + task.config.num_fewshot) for x, task in loaded.tasks.items()}
    waiting = {name: costs[name] for name in paths if not paths[name].exists()}
    if len(waiting) < len(paths):
        report(f"{len(paths) - len(waiting)} of {len(paths)} tasks were finished before")
    for name in list(waiting):
        part = run_task(lm, name, loaded.tasks[name], indices[name])
        write_json(paths[name], part)
        scored += waiting.pop(name)
        left = (time.monotonic() - started) * sum(waiting.values()) / scored
        report(_line(part, name) + (f"; about {duration(left)} left for {len(waiting)} more" if waiting else ""))
    return {name: read_json(path) for name, path in paths.items()}


def run_task(lm: ScorerLM, name: str, task: Task, indices: list[int] | None) -> dict[str, Any]:
    """Evaluate one task with lm-eval: JSON-able, with samples of what is worth keeping and their `ANSWER_METRIC`."""
    started = time.monotonic()
    overflowing = lm.overflowing
    # What `lm_eval.simple_evaluate` does before it calls `evaluate`.
    random.seed(RANDOM_SEED)
    np.random.seed(FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)
    task.set_fewshot_seed(FEWSHOT_SEED)
    try:
        with quiet():
            result: Any = lm_eval.evaluator.evaluate(
                lm,
                {"tasks": {name: task}},
                samples=None if indices is None else {name: indices},
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
            )
    except NotScorable as error:
        raise UserError(f"task '{name}': {error}; choose other tasks (--suite)") from error
    samples = result["samples"][name]
    try:
        json.dumps([sample["filtered_resps"] for sample in samples], allow_nan=False, default=str)
    except ValueError:
        problem = "the model's log-likelihoods are not finite numbers; its weights are damaged"
        raise UserError(f"task '{name}': {problem}") from None
    hashes = "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)
    result["task_hashes"] = {name: hash_string(hashes)}
    result["chance"] = _chance(samples)
    answers = [answer_bits_per_byte(task, sample) for sample in samples]
    for sample, bits in zip(samples, answers, strict=True):
        sample |= {} if bits is None else {ANSWER_METRIC: bits}
    if None not in answers:
        values, figures = np.array(answers, dtype=float), result["results"][name]
        figures[f"{ANSWER_METRIC},none"] = float(values.mean())
        if (stderr := mean_stderr(values)) is not None:
            figures[f"{ANSWER_METRIC}_stderr,none"] = stderr
        result["higher_is_better"][name][ANSWER_METRIC] = False
    if name == HELDOUT_BITS:
        text = "\n".join(sample["doc"]["text"] for sample in samples).encode()
        result["bz2"] = {"bits_per_byte": 8 * len(bz2.compress(text, 9)) / len(text), "bytes": len(text)}
    result["samples"] = {name: [_reduced(sample) for sample in samples]}
    result["overflowing"] = lm.overflowing - overflowing
    result["seconds"] = round(time.monotonic() - started, 3)
    return _plain(result)


def _reduced(sample: dict[str, Any]) -> dict[str, Any]:
    """What pairs an item with another model's and shows how it was scored; prompts would take gigabytes."""
    hashes = ("doc_hash", "prompt_hash", "target_hash")
    kept = (ANSWER_METRIC, "doc_id", "filter", "filtered_resps", "metrics", *hashes, *sample["metrics"])
    reduced = {key: sample[key] for key in kept if key in sample}
    if isinstance(sample["target"], int):
        reduced["target"] = sample["target"]
    if isinstance(sample["doc"], dict):
        reduced |= {key: sample["doc"][key] for key in ("source", "occurrences") if key in sample["doc"]}
    return reduced


def answer_bits_per_byte(task: Task, sample: dict[str, Any]) -> float | None:
    """-log2 P(right answer | prompt) / bytes of the right answer, for one of lm-eval's samples; None if it has none.

    The answer is the text that lm-eval scored, without the delimiter before it; of several right ones the likeliest. If
    the choices are prompts and one text follows them all (Winogrande), it is that text after the right prompt.
    """
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        return None
    scores = [score for score, _ in sample["filtered_resps"]]
    if task.OUTPUT_TYPE == "loglikelihood":
        right: Any = 0
    else:
        right = task.doc_to_text(sample["doc"]) if task.multiple_input else task.doc_to_target(sample["doc"])
        choices = task.doc_to_choice(sample["doc"])
        scores = scores[: len(choices)]
        if isinstance(right, str):
            right = choices.index(right) if right in choices else None
    indices = [index for index in (right if isinstance(right, list) else [right]) if index in range(len(scores))]
    if not indices:
        return None
    best = max(indices, key=lambda index: scores[index])
    answer = sample["arguments"][best][1].removeprefix(task.config.target_delimiter)
    return -scores[best] / math.log(2) / len(answer.encode()) if answer else None


def _chance(samples: list[dict[str, Any]]) -> float | None:
    """Expected score of a guess: the mean of 1 / choices; for mc2 the share of true answers; None for other tasks."""
    scores = []
    for sample in samples:
        doc, choices = sample["doc"], len(sample["arguments"])
        if isinstance(doc, dict) and "mc2_targets" in doc and len(doc["mc2_targets"]["labels"]) == choices:
            scores.append(sum(doc["mc2_targets"]["labels"]) / choices)
        elif "acc" in sample["metrics"] and choices > 1:
            scores.append(1 / choices)
        else:
            return None
    return float(np.mean(scores))


def _plain(value: Any) -> Any:
    """A JSON-able copy: tuples, sets and arrays become lists, numpy scalars Python's, anything else a string."""

    def convert(item: Any) -> Any:
        if isinstance(item, np.generic | np.ndarray):
            return item.tolist()
        return list(item) if isinstance(item, set) else str(item)

    return json.loads(json.dumps(value, default=convert))


def _data_hashes(loaded: LoadedSuite) -> dict[str, str | None]:
    """SHA-256 of each dataset folder; datasets from the Hub are pinned by the per-item hashes in the samples."""

    def hashed(dataset: str, folder: Path) -> str:
        # Items do not depend on what else a run has there.
        own = {"heldout": "heldout*.parquet", "answers": "heldout*.parquet", "tokens": "tokens.json"}.get(dataset)
        if own is None:
            return sha256_of_tree(folder)
        return sha256_of({path.name: sha256_of_file(path) for path in folder.glob(own)})

    origins = dict.fromkeys(loaded.datasets.values())
    return {dataset: hashed(dataset, folder) if folder else None for dataset, folder in origins}


def _merge(loaded: LoadedSuite, parts: Parts) -> dict[str, Any]:
    """Merge the results of single tasks into one lm-eval result, with lm-eval's aggregates of groups."""
    keys = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "task_hashes", "samples")
    merged: dict[str, Any] = {key: {} for key in keys}
    for key in keys:
        for part in parts.values():
            merged[key].update(part[key])
    for name in [name for name in loaded.tasks if "bits_per_byte,none" in merged["results"][name]]:
        pairs = [sample["bits_per_byte"] for sample in merged["samples"][name]]
        # lm-eval has no standard error for it.
        merged["results"][name]["bits_per_byte_stderr,none"] = bits_figures(pairs)["bits_per_byte_stderr"]
    if loaded.groups:
        merged["group_subtasks"] = {name: group.child_names for name, group in loaded.groups.items()}
        merged["groups"] = {}
        for name, group in loaded.groups.items():
            aggregate = _plain(group.aggregate(merged["results"]))
            leaves = [task.task_name for task in group.get_all_tasks()]
            if answers := mean_of(merged["results"], leaves, f"{ANSWER_METRIC},none"):
                aggregate[f"{ANSWER_METRIC},none"], aggregate[f"{ANSWER_METRIC}_stderr,none"] = answers
            merged["results"][name] = merged["groups"][name] = aggregate
            merged["versions"][name] = group.version
            shots = {merged["n-shot"][leaf] for leaf in leaves}
            if len(shots) == 1:
                merged["n-shot"][name] = shots.pop()
    return merged


def _line(part: dict[str, Any], name: str) -> str:
    """A finished task in one line: `arc_easy: acc 31.20 ± 0.95, ... (2,376 items, 41 s)`."""
    scores = every_score(part | {"nanophi": {"suite": name}})
    shown = ", ".join(f"{one.metric} {score(vars(one), one.metric)}" for one in scores)
    prompts = part["overflowing"]
    cut = f", {prompts} prompt{'s' * (prompts > 1)} cut to the context" if prompts else ""
    items = part["results"][name]["sample_len"]
    return f"{name}: {shown} ({items} items{cut}, {duration(part['seconds'])})"
