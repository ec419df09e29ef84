"""Suites: which lm-eval tasks are run, with how many examples in the prompt, and on which items.

A suite is data. The task definitions are lm-eval's own, unmodified (and ours under `tasks/`, in lm-eval's format);
only the location of the data and the number of shots are set here. `open-llm-v1` follows the first Open LLM
Leaderboard (lm-eval group `openllm`): its six tasks, shots and metrics, beside ARC-Easy. A task that is named by
itself runs as lm-eval defines it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.utils
import lm_eval.api.task
import lm_eval.tasks
import tqdm
import transformers
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager

from nanophi.core.errors import UserError
from nanophi.eval.catalogue import LEADERBOARD, TASKS

OUR_TASKS = Path(__file__).parent / "tasks"
# TaskManager reads thousands of YAML files (several seconds); the suites' own tasks lie in these few folders.
STOCK_FOLDERS = (
    "arc",
    "blimp",
    "gsm8k",
    "hellaswag",
    "lambada",
    "mmlu/default",
    "piqa",
    "sciq",
    "truthfulqa",
    "winogrande",
)
GENERATED_TOKENS = 256
"""Tokens that lm-eval generates for a task that does not say how many."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a suite.

    Attributes:
        task: lm-eval's name of a task or of a group, which counts as one line (`mmlu`: 57 subjects).
        num_fewshot: examples in the prompt; None: what the task's definition says.
        items: at most this many items of each task, drawn by hash; None: all of them.
    """

    task: str
    num_fewshot: int | None = None
    items: int | None = None

    @property
    def metric(self) -> str | None:
        """The figure that leads, `metric,filter` as lm-eval names it; None: the task's first metric."""
        return TASKS[self.task].metric if self.task in TASKS else None


@dataclasses.dataclass(frozen=True)
class Suite:
    """A named list of entries; `average` names those whose mean is the suite's own figure (empty: it has none)."""

    name: str
    entries: tuple[Entry, ...]
    average: tuple[str, ...] = ()


OPEN_LLM_V1 = Suite(
    "open-llm-v1",
    (*(Entry(task, shots) for task, shots in LEADERBOARD.items()), Entry("arc_easy", 0)),
    average=tuple(LEADERBOARD),
)

# Enough items to see that everything works and about how good a model is; not enough to rank two models.
QUICK_ITEMS = {"arc_challenge": 40, "hellaswag": 40, "mmlu": 4, "truthfulqa_mc2": 40, "winogrande": 100, "gsm8k": 8}
QUICK = Suite(
    "quick",
    tuple(dataclasses.replace(entry, items=QUICK_ITEMS.get(entry.task, 150)) for entry in OPEN_LLM_V1.entries),
)

# Tasks on which models of about 100M parameters are above chance, or whose right answers' bits per byte rank them.
SIGNAL = Suite(
    "signal",
    tuple(
        Entry(task) for task in ("arc_easy", "arc_challenge", "hellaswag", "sciq", "piqa", "lambada_openai", "blimp")
    ),
)

HELDOUT = Suite(
    "heldout",
    (Entry("heldout_bits_per_byte", 0), Entry("heldout_continuation", 0), Entry("heldout_order", 0)),
)

ANSWERS = Suite("answers", (Entry("answers_bits_per_byte", 0), Entry("answers_ended", 0)))

SUITES = {suite.name: suite for suite in (ANSWERS, HELDOUT, QUICK, SIGNAL, OPEN_LLM_V1)}


@dataclasses.dataclass
class LoadedSuite:
    """A suite whose tasks are loaded and ready to run.

    Attributes:
        suite: from `find_suite`.
        tasks: every leaf task by name, in the order of the suite.
        entries: the suite's entry that each leaf task belongs to.
        groups: lm-eval groups (`mmlu` and its four categories) by name, with their children.
        datasets: per leaf task, the id of its dataset and the folder it was read from (None: the Hub).
    """

    suite: Suite
    tasks: dict[str, Task]
    entries: dict[str, Entry]
    groups: dict[str, Group]
    datasets: dict[str, tuple[str, Path | None]]


def find_suite(name: str, num_fewshot: int | None = None) -> Suite:
    """The suite of that name, or one made of the lm-eval tasks that `name` lists.

    Args:
        name: suites, lm-eval tasks and groups with commas; a task with its number of examples in the prompt where that
            is to differ from the task's own definition: `winogrande:5,arc_easy`.
        num_fewshot: examples in the prompt of every task that does not say otherwise.

    Raises:
        UserError: for a task that lm-eval does not know, with the nearest names; for a suite with `num_fewshot`.
    """
    entries: list[Entry] = []
    names: list[str] = []
    for part in (part.strip() for part in name.split(",")):
        if part in SUITES and num_fewshot is not None:
            raise UserError(f"suite '{part}' fixes its number of shots; name tasks instead, such as winogrande:5")
        found = SUITES[part].entries if part in SUITES else (_entry(part, num_fewshot),)
        entries += found
        names += [part] if part in SUITES else [_spelled(entry) for entry in found]
    if name in SUITES:
        return SUITES[name]
    manager = _manager(tuple(entry.task for entry in entries))
    leaves = [leaf for entry in entries for leaf in _leaves(manager, entry.task)]
    if twice := {leaf for leaf in leaves if leaves.count(leaf) > 1}:
        raise UserError(f"task '{min(twice)}' is named twice in '{name}'; name it once per command")
    return Suite(",".join(names), tuple(entries))


def _spelled(entry: Entry) -> str:
    return entry.task + ("" if entry.num_fewshot is None else f":{entry.num_fewshot}")


def _entry(text: str, num_fewshot: int | None) -> Entry:
    """An entry from `task` or `task:shots`."""
    task, colon, shots = text.partition(":")
    if not colon:
        return Entry(_known_name(task), num_fewshot)
    if not shots.isdecimal():
        raise UserError(f"'{text}' does not name a number of shots; write it like {task or 'winogrande'}:5")
    return Entry(_known_name(task), int(shots))


def _known_name(task: str) -> str:
    """lm-eval's spelling of a task: `arc-easy` is `arc_easy`, unless there is a task with that very name."""
    underscored = task.replace("-", "_")
    return underscored if underscored in _common().task_index or task not in _everything().task_index else task


def context_problem(suites: Sequence[str], max_position_embeddings: int) -> str:
    """Which task of some suites needs a longer context than a model has, in one line; empty if none does.

    This reads the definitions of the tasks, not their data, so that it can be checked before a model is trained.
    Prompts that are too long are cut from the left, as in lm-eval; answers cannot be cut.

    Raises:
        UserError: for an unknown suite or task.
    """
    for name in suites:
        suite = find_suite(name)
        manager = _manager(tuple(entry.task for entry in suite.entries))
        for entry in suite.entries:
            answer = TASKS[entry.task].answer_tokens if entry.task in TASKS else 1
            for leaf in _leaves(manager, entry.task):
                config = manager.task_index[leaf].cfg or {}
                if config.get("output_type") == "generate_until":
                    tokens = (config.get("generation_kwargs") or {}).get("max_gen_toks", GENERATED_TOKENS)
                    needed, what = tokens + 1, f"generates {tokens} tokens after a question"
                else:
                    needed, what = answer, f"has answers of about {answer} tokens"
                if max_position_embeddings < needed:
                    return (
                        f"task '{leaf}' (suite '{name}') {what}, too many for a context of {max_position_embeddings} "
                        "tokens; choose other suites or a larger max_position_embeddings"
                    )
    return ""


def check_heldout(suites: Sequence[str], documents: Path, tokenizer: Path, max_position_embeddings: int) -> None:
    """Whether a run can be measured on its held-out documents, before a model is trained on the others.

    Args:
        suites: names; tasks of theirs on other data are not looked at.
        documents: the run's `data/documents`.
        tokenizer: folder of its tokenizer.
        max_position_embeddings: the model's context in tokens.

    Raises:
        UserError: if a task cannot be made from these documents, or an answer is longer than the context.
    """
    found = (entry for name in suites for entry in find_suite(name).entries if entry.task.startswith("heldout_"))
    entries = tuple(dict.fromkeys(found))
    if not entries:
        return
    try:
        loaded = load_suite(Suite("heldout", entries), heldout=documents)
    except UserError as error:
        raise UserError(f"evaluation.suites: {error}") from error
    encode = transformers.AutoTokenizer.from_pretrained(str(tokenizer))
    for name, task in loaded.tasks.items():
        with quiet():
            task.build_all_requests()
        pairs = [request.args for request in task.instances if request.request_type == "loglikelihood"]
        # As the scorer counts them: what an answer adds to the tokens of its prompt.
        texts = list({text for prompt, answer in pairs for text in (prompt.rstrip(), prompt + answer)})
        tokens = dict(zip(texts, map(len, encode(texts, verbose=False)["input_ids"]), strict=True)) if texts else {}
        needed = max((tokens[prompt + answer] - tokens[prompt.rstrip()] for prompt, answer in pairs), default=0)
        if needed > max_position_embeddings:
            raise UserError(
                f"evaluation.suites: an answer of task '{name}' has {needed} tokens, too many for a context of "
                f"{max_position_embeddings}; choose other evaluation.suites, or a larger model.max_position_embeddings"
            )


def find_data(
    suite: Suite, *, data: Path | None = None, heldout: Path | None = None
) -> dict[str, tuple[str, Path | None]]:
    """Where the data of every leaf task is: the id of its dataset, and the folder (None: the Hub). Reads no data.

    Args: those of `load_suite`.

    Raises:
        UserError: for data that is missing.
    """
    manager = _manager(tuple(entry.task for entry in suite.entries))
    leaves = [leaf for entry in suite.entries for leaf in _leaves(manager, entry.task)]
    return {leaf: _origin(leaf, manager.task_index[leaf].cfg or {}, data, heldout) for leaf in leaves}


def load_suite(suite: Suite, *, data: Path | None = None, heldout: Path | None = None) -> LoadedSuite:
    """Build the suite's tasks and read their data.

    Args:
        suite: from `find_suite`.
        data: folder with the datasets under their Hub ids (`<data>/allenai/ai2_arc`); None: the Hub.
        heldout: folder with `heldout-*.parquet`, for the tasks that are made from held-out documents.

    Raises:
        UserError: for an unknown task, or data that is missing.
    """
    manager = _manager(tuple(entry.task for entry in suite.entries))
    tasks: dict[str, Task] = {}
    entries: dict[str, Entry] = {}
    groups: dict[str, Group] = {}
    origins = find_data(suite, data=data, heldout=heldout)
    for entry in suite.entries:
        leaves = _leaves(manager, entry.task)
        for leaf in leaves:
            entries[leaf] = entry
            tasks[leaf] = _load_task(manager, leaf, entry, *origins[leaf])
        if leaves != [entry.task]:
            _group(manager, entry.task, tasks, groups)
    return LoadedSuite(suite, tasks, entries, groups, origins)


def sample_of_items(task: Task, items: int | None) -> list[int] | None:
    """Indices of a fixed sample of a task's items, ascending; None: all.

    The sample is drawn by hash of the index, so it is spread over the task (the first items of HellaSwag, for one,
    all come from the same source) and a larger sample contains a smaller one.
    """
    total = len(task.eval_docs)
    if items is None or items >= total:
        return None
    order = sorted(range(total), key=lambda index: hashlib.sha256(str(index).encode()).digest())
    return sorted(order[:items])


@functools.cache
def _everything() -> TaskManager:
    return TaskManager(include_path=str(OUR_TASKS))


@functools.cache
def _common() -> TaskManager:
    stock = Path(lm_eval.tasks.__file__).parent
    return TaskManager(include_path=[*(stock / folder for folder in STOCK_FOLDERS), OUR_TASKS], include_defaults=False)


def _manager(names: Sequence[str]) -> TaskManager:
    """An index of tasks that has all `names`. Raises `UserError` for an unknown one, with the nearest names."""
    if all(_is_whole(_common(), name) for name in names):
        return _common()
    manager = _everything()
    for name in names:
        if name not in manager.task_index:
            candidates = [*SUITES, *manager.all_tasks]
            near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"suites are {', '.join(SUITES)}"
            raise UserError(f"unknown suite or task '{name}'; {hint}")
    return manager


def _is_whole(manager: TaskManager, name: str) -> bool:
    """Whether an index of some folders knows all of a name: a tag may have more tasks elsewhere."""
    entry = manager.task_index.get(name)
    if entry is None or (entry.tags and entry.yaml_path is None):
        return False
    children = (entry.cfg or {}).get("task") if "group" in (entry.cfg or {}) else []
    return all(isinstance(child, str) and _is_whole(manager, child) for child in children or [])


def _children(manager: TaskManager, name: str) -> list[str] | None:
    """Names of the tasks and groups directly in a group or tag; None for a task."""
    entry = manager.task_index[name]
    if entry.tags and entry.yaml_path is None:
        return sorted(entry.tags)
    config = entry.cfg or {}
    if "group" not in config:
        return None
    children = [child if isinstance(child, str) else child.get("task", child.get("group")) for child in config["task"]]
    if any(not isinstance(child, str) or child not in manager.task_index for child in children):
        raise UserError(f"group '{name}' defines tasks inline; name its tasks one by one instead")
    return children


def _leaves(manager: TaskManager, name: str) -> list[str]:
    children = _children(manager, name)
    if children is None:
        return [name]
    return [leaf for child in children for leaf in _leaves(manager, child)]


def _group(manager: TaskManager, name: str, tasks: dict[str, Task], groups: dict[str, Group]) -> list[Task | Group]:
    """`name` in lm-eval's tree: a task, a group with its children, or the tasks of a tag."""
    children = _children(manager, name)
    if children is None:
        return [tasks[name]]
    members = [member for child in children for member in _group(manager, child, tasks, groups)]
    config = manager.task_index[name].cfg or {}
    if "group" not in config:
        return members
    fields = {field.name for field in dataclasses.fields(GroupConfig)}
    group = Group.from_config(GroupConfig(**{key: value for key, value in config.items() if key in fields}))
    for member in members:
        group.add(member)
    groups[name] = group
    return [group]


def _origin(task: str, config: dict[str, Any], data: Path | None, heldout: Path | None) -> tuple[str, Path | None]:
    """Dataset id and local folder of a task's data. Raises `UserError` if `data` does not contain it."""
    if task.startswith("heldout_"):
        if heldout is None:
            raise UserError(f"task '{task}' needs held-out documents; name a run's data/documents folder (--heldout)")
        if not list(Path(heldout).glob("heldout-*.parquet")):
            raise UserError(f"no heldout-*.parquet in {heldout}; name a run's data/documents folder (--heldout)")
        return "heldout", Path(heldout).resolve()
    if task.startswith("answers_"):
        folder = Path(heldout).resolve().parent / "conversations" if heldout is not None else None
        if folder is None or not (folder / "heldout.parquet").is_file():
            raise UserError(f"task '{task}' needs the data/documents folder of a run with conversations (--heldout)")
        return "heldout", folder
    dataset = str(config.get("dataset_path"))
    if data is None:
        return dataset, None
    folder = Path(data).resolve() / dataset
    if not folder.is_dir():
        raise UserError(f"task '{task}' needs the dataset {dataset}, which is not in {data} (looked for {folder})")
    return dataset, folder


def _load_task(manager: TaskManager, name: str, entry: Entry, dataset: str, folder: Path | None) -> Task:
    overrides: dict[str, Any] = {"task": name}
    if dataset == "heldout":
        overrides["dataset_kwargs"] = {"heldout": str(folder)}
    elif folder is not None:
        overrides["dataset_path"] = str(folder)
    try:
        # At top level a dict with a "task" key defines a new task; inside a group it refers to the one of that name.
        with quiet():
            (task,) = manager.load([{"group": "nanophi", "task": [overrides]}])["tasks"].values()
    except UserError:
        raise
    except Exception as error:
        where = f"folder {folder}" if folder else f"dataset {dataset} on the Hub (use a local copy with --data)"
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"task '{name}': cannot load {where}: {type(error).__name__}: {reason}") from error
    defined = task.get_config("num_fewshot")
    if defined == 0 and entry.num_fewshot:
        raise UserError(f"task '{name}' is zero-shot by its definition; leave out the number of shots")
    task.set_config("num_fewshot", (defined or 0) if entry.num_fewshot is None else entry.num_fewshot)
    return task


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' logging and progress bars, which would drown the lines about the evaluation itself."""
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    bars_of_datasets = not datasets.are_progress_bars_disabled()
    bars_of_transformers = transformers.utils.logging.is_progress_bar_enabled()
    bars_of_hub = not huggingface_hub.utils.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(tqdm.tqdm, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
        if bars_of_datasets:
            datasets.enable_progress_bars()
        if bars_of_transformers:
            transformers.utils.logging.enable_progress_bar()
        if bars_of_hub:
            huggingface_hub.utils.enable_progress_bars()
