"""Facts about suites, tasks and metrics from `tasks.yaml`, and how a metric's numbers are written.

Imports nothing heavy, so that the card and the comparison can use it. Loading tasks and their data is for suites.py.
"""

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


@dataclasses.dataclass(frozen=True)
class Task:
    """One of the `tasks` in `tasks.yaml`, where its keys are explained."""

    title: str
    metric: str
    folder: str | None = None
    made_from: str | None = None
    answer_tokens: int = 1
    cut_apart: bool = False
    hub: Any = None
    leaderboard: Any = None
    benchmark: Any = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a suite: a task or a group. Shots None: as its definition has it; items None: all of them."""

    task: str
    shots: int | None = None
    items: int | None = None

    @property
    def name(self) -> str:
        """As on the command line: `winogrande:5`."""
        return self.task if self.shots is None else f"{self.task}:{self.shots}"


@dataclasses.dataclass(frozen=True)
class Suite:
    """A named list of entries."""

    name: str
    entries: tuple[Entry, ...]


def _task(hub: Any = None, leaderboard: Any = None, **facts: Any) -> Task:
    hub = hub and types.SimpleNamespace(**{"config": None, **hub})
    return Task(**facts, hub=hub, leaderboard=leaderboard and types.SimpleNamespace(**leaderboard))


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))


_FACTS = _read("tasks.yaml")
TASKS = {name: _task(**facts) for name, facts in _FACTS["tasks"].items()}
SUITES = {
    name: Suite(name, tuple(Entry(task, **facts) for task, facts in tasks.items()))
    for name, tasks in _FACTS["suites"].items()
}
METRICS: dict[str, dict[str, Any]] = _FACTS["metrics"]
LEADERBOARD = {name: task.leaderboard.shots for name, task in TASKS.items() if task.leaderboard}
"""The six tasks whose mean was the first Open LLM Leaderboard's score, in its order -> examples in their prompt."""

HELDOUT_BITS = "heldout_bits_per_byte"
"""The task that scores all held-out text."""


def title(task: str, shots: int | None = None) -> str:
    """A task's title, `HellaSwag (10-shot)`; lm-eval's name if it has none."""
    name = TASKS[task].title if task in TASKS else task
    return f"{name} ({shots}-shot)" if shots else name


def made_from(task: str) -> str | None:
    """What of a run's own a task's items are made from: `documents`, `conversations`, `tokens`; None: a benchmark."""
    return TASKS[task].made_from if task in TASKS else None


def suite_made_from(suite: str, what: str) -> bool:
    """Whether any task in a suite's name, or in names with commas, is made from a run's own `what`."""
    parts = [part.strip().partition(":")[0] for part in suite.split(",")]
    tasks = [entry.task for part in parts if part in SUITES for entry in SUITES[part].entries]
    return any(made_from(task) == what for task in [*tasks, *(part.replace("-", "_") for part in parts)])


def too_long(what: str, tokens: int, context: int) -> str:
    """`what`, too many for a context of so many tokens; empty if `tokens` fit."""
    return f"{what}, too many for a context of {context} tokens" if tokens > context else ""


def main_rows(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a comparison's main table: its tasks, and what a filter keeps and drops below all held-out text."""
    rows: list[dict[str, Any]] = []
    for task, row in comparison["tasks"].items():
        rows.append({"task": task, **row})
        if rows[-1]["task"] == HELDOUT_BITS:
            rows += comparison.get("filter", {}).values()
    return rows


def row_title(row: Mapping[str, Any]) -> str:
    """Title of a row of `main_rows`."""
    return row.get("part") or title(row["task"], row["num_fewshot"])


def position(task: str) -> int:
    """Sort key of a task in tables; tasks that are not in `tasks.yaml` come last."""
    return list(TASKS).index(task) if task in TASKS else len(TASKS)


def references() -> dict[str, Any]:
    """The scores of other models in `references.yaml`, published elsewhere."""
    return _read("references.yaml")


# How a metric's numbers are written


def metric_name(name: str) -> str:
    """A metric in words: `accuracy, length-normalised`; lm-eval's name where there are none."""
    return METRICS.get(name, {}).get("name", name)


def is_percent(metric: str) -> bool:
    """Whether a metric is a share of one, which is shown in percent."""
    return METRICS.get(metric, {}).get("percent", False)


def scale(metric: str) -> tuple[float, int]:
    """Factor and decimals in which a metric is shown: shares in percent with two, the rest as they are with four."""
    return (100.0, 2) if is_percent(metric) else (1.0, 4)


def metric(value: float | None, name: str) -> str:
    """A metric's value, standard error or chance level in its unit; `-` where there is none."""
    factor, places = scale(name)
    return "-" if value is None else f"{factor * value:.{places}f}"


def score(entry: Mapping[str, Any] | None, name: str) -> str:
    """`39.84 ± 3.10`: an entry with `value` and `stderr` (or None) of metric `name`; empty without an entry."""
    if entry is None:
        return ""
    error = "" if entry["stderr"] is None else f" ± {metric(entry['stderr'], name)}"
    return metric(entry["value"], name) + error


def difference(entry: Mapping[str, Any], name: str) -> str:
    """`+0.1113 [+0.0850, +0.1380]`: a difference and its 95 % interval, where it has one."""
    factor, places = scale(name)
    value, *bounds = (f"{factor * number:+.{places}f}" for number in (entry["value"], *(entry["interval"] or ())))
    return value + (f" [{', '.join(bounds)}]" if bounds else "")
