"""Facts about tasks: title, leading metric, Hub dataset, part in the first Open LLM Leaderboard.

Read from `tasks.yaml`; imports nothing heavy, so that the card and the comparison can use it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


@dataclasses.dataclass(frozen=True)
class HubDataset:
    """A benchmark as the leaderboard names it in `model-index`."""

    id: str
    name: str
    split: str
    metric: str
    config: str | None = None


@dataclasses.dataclass(frozen=True)
class Leaderboard:
    """A task's part in the first Open LLM Leaderboard."""

    shots: int
    title: str


@dataclasses.dataclass(frozen=True)
class Task:
    """One entry of `tasks.yaml`. `metric` is lm-eval's `metric,filter` that leads."""

    title: str
    metric: str
    answer_tokens: int = 1
    hub: HubDataset | None = None
    leaderboard: Leaderboard | None = None


def _load() -> dict[str, Task]:
    entries = yaml.safe_load(Path(__file__).with_name("tasks.yaml").read_text(encoding="utf-8"))
    tasks = {}
    for name, entry in entries.items():
        hub, leaderboard = entry.pop("hub", None), entry.pop("leaderboard", None)
        tasks[name] = Task(
            **entry,
            hub=HubDataset(**hub) if hub else None,
            leaderboard=Leaderboard(**leaderboard) if leaderboard else None,
        )
    return tasks


TASKS = _load()
LEADERBOARD = {name: task.leaderboard.shots for name, task in TASKS.items() if task.leaderboard}
"""The six tasks whose mean was the first Open LLM Leaderboard's score, in its order -> examples in their prompt."""
CUT_APART = ("answers_bits_per_byte",)
"""Tasks whose prompt and answer are cut into tokens apart, as in a chat. lm-eval moves white space from the end of a
prompt (the template's line end) to the answer, where it would be scored."""


def title(task: str, shots: int | None = None) -> str:
    """A task's title, `HellaSwag (10-shot)`; lm-eval's name if it has none."""
    name = TASKS[task].title if task in TASKS else task
    return f"{name} ({shots}-shot)" if shots else name


def main_rows(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a comparison's main table: its tasks, and what a filter keeps and drops below all held-out text."""
    rows: list[dict[str, Any]] = []
    for task, row in comparison["tasks"].items():
        rows.append({"task": task, **row})
        if rows[-1]["task"] == "heldout_bits_per_byte":
            rows += comparison.get("filter", {}).values()
    return rows


def row_title(row: Mapping[str, Any]) -> str:
    """Title of a row of `main_rows`."""
    return row.get("part") or title(row["task"], row["num_fewshot"])


def position(task: str) -> int:
    """Sort key of a task in tables; tasks that are not in `tasks.yaml` come last."""
    names = list(TASKS)
    return names.index(task) if task in TASKS else len(names)


def references() -> dict[str, Any]:
    """The scores of other models in `references.yaml`, published elsewhere."""
    return yaml.safe_load(Path(__file__).with_name("references.yaml").read_text(encoding="utf-8"))
