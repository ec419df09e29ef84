"""The result file that `nanophi eval` writes: its name and format, and the scores that are derived from it on reading.

It is lm-eval's result JSON, with the log-likelihoods and metrics of every item, and one more key, `nanophi`: the lines
of the suite, the held-out figures by source, the environment, hashes of model and data. It holds no score twice.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of
from nanophi.core.names import step_folders
from nanophi.eval.catalogue import LEADERBOARD, TASKS, is_percent, title
from nanophi.eval.models import model_sha256

FORMAT = 3  # of the `nanophi` key in result files that are written
READABLE = (2, 3)  # format 2 has a `headline` of figures, which are not read, in place of `lines`
PROTOCOL = 2  # of how models are measured, in an evaluation's key: raised when the same inputs give other figures
FEW_ITEMS = 30  # with fewer items a score's standard error is not taken at its word
ANSWER_METRIC = "answer_bits_per_byte"
"""-log2 P(right answer | prompt) / bytes of the answer, averaged over the items.

It improves smoothly while a small model's accuracy is at chance.
"""


def file_stem(text: str) -> str:
    """A name or suite as part of a file's name, on any file system: `demo/step-000600` becomes `demo-step-000600`."""
    return re.sub(r"[^\w.,@=+-]+", "-", text).strip("-.")[:80]


def result_name(name: str, suite: str, key: str) -> str:
    """Name of a result file that no other measurement has: `demo-step-000600-heldout-1a2b3c4d.json`."""
    return f"{file_stem(name)}-{file_stem(suite)}-{key[:8]}.json"


def run_result_name(step: str, suite: str) -> str:
    """Name of a checkpoint's result file in its run directory's `evals/`: `step-000600-heldout.json`."""
    stem = file_stem(suite)
    return f"{step}-{stem}.json" if stem == suite else f"{step}-{stem}-{sha256_of(suite)[:8]}.json"


def distinct(paths: Sequence[str]) -> list[str]:
    """The shortest ends of some paths that tell them apart: `a/demo` and `b/demo`, but `demo` alone."""

    def end(path: str, length: int) -> str:
        return "/".join(path.split("/")[-length:])

    def shortest(path: str) -> str:
        others = set(paths) - {path}
        lengths = range(1, path.count("/") + 1)
        return next((end(path, n) for n in lengths if all(end(x, n) != end(path, n) for x in others)), path)

    return [shortest(path) for path in paths]


def read_result(path: Path) -> dict[str, Any]:
    """A result file's contents. Raises `UserError` if nanophi did not write it, or in another format."""
    content = read_json(path)
    written = content.get("nanophi") if isinstance(content, dict) else None
    if not isinstance(written, dict) or not {"headline", "lines"} & set(written):
        raise UserError(f"{path} is not a result of `nanophi eval`; run it again on that model")
    if (found := written.get("format")) not in READABLE:
        formats = " and ".join(map(str, READABLE))
        raise UserError(f"{path} has format {found}, this version reads {formats}; run `nanophi eval` again")
    return content


def is_result_of(path: Path, names: Sequence[str]) -> bool:
    """Whether a file is a result, of any format, of a model with one of these names."""
    written = read_json(path)["nanophi"]
    return bool({"headline", "lines"} & set(written)) and written["model"]["name"] in names


def item_values(content: Mapping[str, Any], task: str, metric: str) -> dict[tuple[int, str], Any]:
    """A metric of the items of a leaf task in a result file's contents that have it: a number, or (nats, bytes).

    They are keyed by what pairs an item with another model's: lm-eval's `doc_id` and `doc_hash`.
    """
    return {
        (sample["doc_id"], sample["doc_hash"]): sample[metric]
        for sample in content["samples"][task]
        if sample["filter"] == "none" and metric in sample
    }


def checkpoint_results(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Suite, as it is in the file's name -> contents of a checkpoint's result files, in its run directory's `evals/`.

    Results of other weights, which a run that was trained again may still hold, are passed over.
    """
    prefix, evals = f"{checkpoint.name}-", checkpoint.parent.parent / "evals"
    found = {path.stem.removeprefix(prefix): read_result(path) for path in sorted(evals.glob(f"{prefix}*.json"))}
    current = (None, model_sha256(checkpoint)) if found else ()
    return {name: content for name, content in found.items() if content["nanophi"]["model"].get("sha256") in current}


def final_results(run: Path) -> list[Path]:
    """Result files of a run directory's last checkpoint. Raises `UserError` for none, or one of other weights."""
    checkpoints = step_folders(run / "checkpoints")
    found = sorted((run / "evals").glob(f"{checkpoints[-1].name}-*.json")) if checkpoints else []
    if not found:
        raise UserError(f"{run} holds no evaluation of its last checkpoint; run `nanophi run` on its recipe")
    expected = model_sha256(checkpoints[-1])
    for path in found:
        if read_result(path)["nanophi"]["model"].get("sha256") != expected:
            other = f"was measured on other weights than {checkpoints[-1]}"
            raise UserError(f"{path} {other}; run `nanophi run` on the recipe again")
    return found


@dataclasses.dataclass(frozen=True)
class Score:
    """One model's score on one task, or the unweighted mean of a group's; the only form that a score has in memory."""

    suite: str  # what was asked for: a suite's name, or names of tasks
    task: str  # lm-eval's name of it; `average` for the mean of the leaderboard's six
    metric: str
    filter: str
    value: float  # in the metric's own unit; a share is between 0 and 1
    stderr: float | None
    items: int
    of: int  # items that the task has
    shots: int | None  # None for a mean of tasks with different numbers of examples in the prompt
    chance: float | None  # expected score of a guess
    higher_is_better: bool
    leaves: tuple[str, ...]  # the tasks that it is the mean of

    @property
    def title(self) -> str:
        """The task's title with its shots: `HellaSwag (10-shot)`."""
        return title(self.task, self.shots)

    @property
    def percent(self) -> bool:
        """Whether it is shown in percent."""
        return is_percent(self.metric)

    @property
    def against_chance(self) -> str | None:
        """`above`, `below` or `within` two standard errors of chance; None for a score without a level of chance.

        Of few items the error is at least that of guessing: eight wrong answers have none of their own.
        """
        if self.chance is None:
            return None
        error = self.stderr or 0.0
        if not error or self.items < FEW_ITEMS:
            error = max(error, math.sqrt(self.chance * (1 - self.chance) / self.items))
        if abs(self.value - self.chance) <= 2 * error:
            return "within"
        return "above" if (self.value > self.chance) == self.higher_is_better else "below"


def leading_scores(result: Mapping[str, Any]) -> list[Score]:
    """The score that leads each line of the suite, in its order, from a result file or what a release has of one."""
    scores = (_score(result, task, line, _leading_metric(result, task, line)) for task, line in _lines(result).items())
    return [score for score in scores if score]


def answer_scores(result: Mapping[str, Any]) -> list[Score]:
    """Bits per byte of the right answers (`ANSWER_METRIC`), of each line of the suite where all items have them."""
    scores = (_score(result, task, line, f"{ANSWER_METRIC},none") for task, line in _lines(result).items())
    return [dataclasses.replace(score, chance=None) for score in scores if score]


def every_score(result: Mapping[str, Any]) -> list[Score]:
    """Every metric of every leaf task, as lm-eval has them; their `chance` is None."""
    return [
        score
        for task, metrics in result["results"].items()
        if task not in result.get("groups", {})
        for key in _metrics(metrics)
        if (score := _score(result, task, {"tasks": [task], "chance": None}, key))
    ]


def average_score(scores: Sequence[Score]) -> Score | None:
    """The mean of the first Open LLM Leaderboard's six tasks, if `scores` has them all at the board's shots."""
    found = {score.task: score for score in scores}
    six = [found[task] for task, shots in LEADERBOARD.items() if task in found and found[task].shots == shots]
    if len(six) < len(LEADERBOARD):
        return None
    value, stderr = mean([score.value for score in six], [score.stderr for score in six])
    items, of, leaves = sum(s.items for s in six), sum(s.of for s in six), tuple(s.task for s in six)
    return Score(six[0].suite, "average", "mean of six", "none", value, stderr, items, of, None, None, True, leaves)


def mean(values: Sequence[float], stderrs: Sequence[Any]) -> tuple[float, float | None]:
    """The unweighted mean of some scores and its standard error, which is None if one of theirs is unknown."""
    import numpy as np  # not for whoever only reads a file's name

    known = all(isinstance(stderr, float) for stderr in stderrs)  # lm-eval's is "N/A" for a single item
    stderr = math.sqrt(sum(stderr**2 for stderr in stderrs)) / len(stderrs) if known else None
    return float(np.mean(values)), stderr


def mean_of(results: Mapping[str, Any], leaves: Sequence[str], key: str) -> tuple[float, float | None] | None:
    """`mean` of a figure, `metric,filter`, over leaf tasks in lm-eval's results; None if one lacks it."""
    if any(key not in results[leaf] for leaf in leaves):
        return None
    error = key.replace(",", "_stderr,")
    return mean([results[leaf][key] for leaf in leaves], [results[leaf].get(error) for leaf in leaves])


def _lines(result: Mapping[str, Any]) -> dict[str, Any]:
    """Each line of the suite -> its leaf `tasks`, and the `chance` of a guess: what lm-eval's own keys do not have."""
    ours = result["nanophi"]
    return ours["lines"] if "lines" in ours else {line["task"]: line for line in ours["headline"]}  # format 2


def _metrics(metrics: Mapping[str, Any]) -> list[str]:
    """The keys `metric,filter` of a task's results that hold a number."""
    return [x for x, value in metrics.items() if "," in x and "_stderr," not in x and isinstance(value, int | float)]


def _leading_metric(result: Mapping[str, Any], task: str, line: Mapping[str, Any]) -> str:
    """The figure that leads, `metric,filter`: what `tasks.yaml` has, else the first that is no perplexity.

    No difference of perplexities can be tested item by item; LAMBADA has an accuracy beside it, WikiText bits per byte.
    """
    if task in TASKS:
        return TASKS[task].metric
    metrics = _metrics(result["results"][line["tasks"][0]])
    return next((key for key in metrics if "perplexity" not in key), metrics[0])


def _score(result: Mapping[str, Any], task: str, line: Mapping[str, Any], key: str) -> Score | None:
    """The score of a line of the suite; None if one of its leaf tasks lacks that metric."""
    leaves, (metric, filter_name) = line["tasks"], key.split(",")
    if (found := mean_of(result["results"], leaves, key)) is None:
        return None
    counts = [result["n-samples"][leaf] for leaf in leaves]
    return Score(
        suite=result["nanophi"]["suite"],
        task=task,
        metric=metric,
        filter=filter_name,
        value=found[0],
        stderr=found[1],
        items=sum(count["effective"] for count in counts),
        of=sum(count["original"] for count in counts),
        shots=result["n-shot"].get(leaves[0]),
        chance=line["chance"],
        higher_is_better=bool(result["higher_is_better"][leaves[0]].get(metric, True)),
        leaves=tuple(leaves),
    )
