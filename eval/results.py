"""The result file that `nanophi eval` writes: its name, format and headline figures, and how to read it.

It is lm-eval's result JSON (results, versions, n-shot, configs, samples, ...) with the log-likelihoods and metrics of
every item, and one more key, `nanophi`: the suite's leading figures, the held-out figures by source, the environment,
and hashes of model and data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of
from nanophi.core.names import step_folders
from nanophi.eval.models import model_sha256

FORMAT = 2
"""Version of the `nanophi` key in result files. A reader refuses another one."""

ANSWER_METRIC = "answer_bits_per_byte"
"""Bits per byte of the right answer: -log2 P(answer | prompt) / bytes of the answer, averaged over the items.

It uses the same log-likelihoods as accuracy, but improves smoothly while a small model's accuracy is at chance.
"""

ItemKey = tuple[int, str]
"""What pairs an item with another model's: lm-eval's `doc_id` and `doc_hash`."""


def file_stem(text: str) -> str:
    """A name or suite as part of a file's name, on any file system: `demo/step-000600` becomes `demo-step-000600`."""
    return re.sub(r"[^\w.,@=+-]+", "-", text).strip("-.")[:80]


def result_name(name: str, suite: str, key: str) -> str:
    """Name of a result file that no other measurement has: `demo-step-000600-heldout-1a2b3c4d.json`.

    Args:
        name, suite: what a person calls the model and what it was measured on.
        key: hash of everything that the result depends on.
    """
    return f"{file_stem(name)}-{file_stem(suite)}-{key[:8]}.json"


def run_result_name(step: str, suite: str) -> str:
    """Name of a checkpoint's result file in its run directory's `evals/`: `step-000600-heldout.json`."""
    stem = file_stem(suite)
    return f"{step}-{stem}.json" if stem == suite else f"{step}-{stem}-{sha256_of(suite)[:8]}.json"


def distinct(paths: Sequence[str]) -> list[str]:
    """The shortest ends of some paths that tell them apart: `a/demo` and `b/demo`, but `demo` alone."""
    labels = {}
    for path in set(paths):
        parts = path.split("/")
        others = [other.split("/") for other in set(paths) if other != path]
        length = next((n for n in range(1, len(parts)) if all(o[-n:] != parts[-n:] for o in others)), len(parts))
        labels[path] = "/".join(parts[-length:])
    return [labels[path] for path in paths]


def read_result(path: Path) -> dict[str, Any]:
    """A result file's contents. Raises `UserError` if it is none of ours or of another format."""
    content = read_json(path)
    written = content.get("nanophi") if isinstance(content, dict) else None
    if not isinstance(written, dict) or "headline" not in written:
        raise UserError(f"{path} is not a result of `nanophi eval`; run it again on that model")
    if written.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {written.get('format')}, this version reads {FORMAT}; run `nanophi eval` again"
        )
    return content


def item_values(content: Mapping[str, Any], task: str, metric: str, filter_name: str = "none") -> dict[ItemKey, Any]:
    """A metric of every item of a leaf task in a result file's contents: a number, or (nats, bytes) for bits per byte.

    Items that do not have the metric are left out.
    """
    return {
        (sample["doc_id"], sample["doc_hash"]): sample[metric]
        for sample in content["samples"][task]
        if sample["filter"] == filter_name and metric in sample
    }


def final_results(run: Path) -> list[Path]:
    """Result files of a run directory's last checkpoint, in its `evals/`.

    Raises:
        UserError: if there is none, or one that was measured on other weights than the checkpoint's.
    """
    checkpoints = step_folders(run / "checkpoints")
    found = sorted((run / "evals").glob(f"{checkpoints[-1].name}-*.json")) if checkpoints else []
    if not found:
        raise UserError(f"{run} holds no evaluation of its last checkpoint; run `nanophi run` on its recipe")
    expected = model_sha256(checkpoints[-1])
    for path in found:
        if read_result(path)["nanophi"]["model"].get("sha256") != expected:
            raise UserError(
                f"{path} was measured on other weights than {checkpoints[-1]}; run `nanophi run` on the recipe again"
            )
    return found


def headline(
    task: str,
    metric: str | None,
    leaves: Sequence[str],
    result: Mapping[str, Any],
    chances: Sequence[float | None],
) -> dict[str, Any]:
    """The headline figures of a task, or of a group of tasks: their unweighted mean.

    Args:
        task: name of the task or group.
        metric: the leading figure, `metric,filter`; None: the first that is no perplexity, of which no difference can
            be tested item by item (LAMBADA's accuracy, WikiText's bits per byte), or just the first.
        leaves: the leaf tasks in it; itself, for a single task.
        result: lm-eval's result.
        chances: expected score of a guess on each leaf task.
    """
    first = result["results"][leaves[0]]
    metrics = [key for key in first if "," in key and "_stderr" not in key]
    metric = metric or next((key for key in metrics if "perplexity" not in key), metrics[0])
    name, _, filter_name = metric.partition(",")
    known = [chance for chance in chances if chance is not None]
    return {
        "task": task,
        "metric": name,
        "filter": filter_name,
        "num_fewshot": result["n-shot"][leaves[0]],
        **(mean_of(result["results"], leaves, metric) or {}),
        "chance": float(np.mean(known)) if len(known) == len(leaves) else None,
        "higher_is_better": bool(result["higher_is_better"][leaves[0]].get(name, True)),
        "items": sum(result["n-samples"][leaf]["effective"] for leaf in leaves),
        "of": sum(result["n-samples"][leaf]["original"] for leaf in leaves),
        "tasks": list(leaves),
        ANSWER_METRIC: mean_of(result["results"], leaves, f"{ANSWER_METRIC},none"),
    }


def mean_of(results: Mapping[str, Any], leaves: Sequence[str], metric: str) -> dict[str, Any] | None:
    """`value` and `stderr` (None where unknown) of the unweighted mean over leaf tasks; None if one lacks `metric`."""
    if any(metric not in results[leaf] for leaf in leaves):
        return None
    error = metric.replace(",", "_stderr,")
    return mean_figures([{"value": results[leaf][metric], "stderr": results[leaf].get(error)} for leaf in leaves])


def mean_figures(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`value` and `stderr` of the unweighted mean of some scores; the standard error is None if one of theirs is."""
    errors = [figure["stderr"] for figure in figures]
    known = all(isinstance(error, float) for error in errors)  # lm-eval's is "N/A" for a single item
    return {
        "value": float(np.mean([figure["value"] for figure in figures])),
        "stderr": math.sqrt(sum(error**2 for error in errors)) / len(errors) if known else None,
    }
