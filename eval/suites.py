"""Loading the tasks of a suite: where lm-eval defines them, where their data is, which items are drawn.

The tasks are lm-eval's own, unmodified (and ours under `tasks/`, in its format); only the location of the data and the
number of shots are set here. The suites themselves are entries of `tasks.yaml`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
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

from nanophi.core.errors import UserError, suggest, user_errors
from nanophi.eval.catalogue import SUITES, TASKS, Entry, Suite, made_from, too_long

OUR_TASKS = Path(__file__).parent / "tasks"
GENERATED_TOKENS = 256  # by lm-eval, for a task that does not say how many


Origins = dict[str, tuple[str, Path | None]]
"""Per leaf task, the id of its dataset and the folder that it is read from (None: the Hub)."""


@dataclasses.dataclass
class LoadedSuite:
    """A suite whose leaf tasks are loaded, in its order, with the suite's entry and the data of each, and the groups.

    `groups` are lm-eval's (`mmlu` and its four categories), with their children.
    """

    suite: Suite
    tasks: dict[str, Task]
    entries: dict[str, Entry]
    groups: dict[str, Group]
    datasets: Origins


def find_suite(name: str, num_fewshot: int | None = None) -> Suite:
    """The suite of that name, or one of the suites, lm-eval tasks and groups that `name` lists with commas.

    A task may have its number of examples in the prompt, `winogrande:5,arc_easy`; any other has `num_fewshot`, or what
    its definition has. Raises `UserError` for an unknown task, and for a suite with `num_fewshot`.
    """
    parts = [part.strip() for part in name.split(",")]
    if num_fewshot is not None and (fixed := [part for part in parts if part in SUITES]):
        raise UserError(f"suite '{fixed[0]}' fixes its number of shots; name tasks instead, such as winogrande:5")
    if name in SUITES:
        return SUITES[name]
    groups = [SUITES[part].entries if part in SUITES else (_entry(part, num_fewshot),) for part in parts]
    entries = [entry for group in groups for entry in group]
    leaves = [leaf for entry in entries for leaf in _leaves(_manager(entries), entry.task)]
    if twice := {leaf for leaf in leaves if leaves.count(leaf) > 1}:
        raise UserError(f"task '{min(twice)}' is named twice in '{name}'; name it once per command")
    named = (part if part in SUITES else group[0].name for part, group in zip(parts, groups, strict=True))
    return Suite(",".join(named), tuple(entries))


def _entry(text: str, num_fewshot: int | None) -> Entry:
    """An entry from `task` or `task:shots`."""
    if text.endswith((".yaml", ".yml")):
        raise UserError(f"'{text}' is a file; tasks are named, not read from YAML files, which may run code")
    task, colon, shots = text.partition(":")
    if colon and not shots.isdecimal():
        raise UserError(f"'{text}' does not name a number of shots; write it like {task or 'winogrande'}:5")
    # lm-eval's spelling: `arc-easy` is `arc_easy`, unless there is a task with that very name.
    underscored = task.replace("-", "_")
    known = underscored in _common().task_index or task not in _everything().task_index
    return Entry(underscored if known else task, int(shots) if colon else num_fewshot)


def context_problem(suites: Sequence[str], context: int) -> str:
    """Which task of some suites needs a longer context than a model has, in one line; empty if none does.

    This reads the tasks' definitions, not their data. Long prompts are cut from the left; answers are not.
    """
    for name in suites:
        suite = find_suite(name)
        manager = _manager(suite.entries)
        for entry in suite.entries:
            answer = TASKS[entry.task].answer_tokens if entry.task in TASKS else 1
            for leaf in _leaves(manager, entry.task):
                what, config = f"task '{leaf}' (suite '{name}')", manager.task_index[leaf].cfg or {}
                about = f"{what} has answers of about {answer} tokens"
                if problem := generation_problem(what, config, context) or too_long(about, answer, context):
                    return f"{problem}; choose other suites or a larger max_position_embeddings"
    return ""


def generation_problem(what: str, config: Mapping[str, Any], context: int) -> str:
    """Why a task that generates text leaves no room for a question in a context; empty if it does, or scores text."""
    if config.get("output_type") != "generate_until":
        return ""
    tokens = (config.get("generation_kwargs") or {}).get("max_gen_toks", GENERATED_TOKENS)
    return too_long(f"{what} generates {tokens} tokens after a question", tokens + 1, context)


def check_heldout(suites: Sequence[str], documents: Path, tokenizer: Path, max_position_embeddings: int) -> None:
    """Raise `UserError` if a task cannot be made of held-out `documents`, or an answer is longer than the context."""
    entries = (entry for name in suites for entry in find_suite(name).entries if made_from(entry.task) == "documents")
    suite = Suite("heldout", tuple(dict.fromkeys(entries)))
    if not suite.entries:
        return
    try:
        loaded = load_suite(suite, heldout=documents)
    except UserError as error:
        raise UserError(f"evaluation.suites: {error}") from error
    encode = transformers.AutoTokenizer.from_pretrained(str(tokenizer))

    def tokens(text: str) -> int:
        return len(encode(text, verbose=False)["input_ids"])

    for name, task in loaded.tasks.items():
        with quiet():
            task.build_all_requests()
        pairs = [request.args for request in task.instances if request.request_type == "loglikelihood"]
        # As the scorer counts them: what an answer adds to the tokens of its prompt.
        needed = max((tokens(prompt + answer) - tokens(prompt.rstrip()) for prompt, answer in pairs), default=0)
        if problem := too_long(f"an answer of task '{name}' has {needed} tokens", needed, max_position_embeddings):
            remedy = "choose other evaluation.suites, or a larger model.max_position_embeddings"
            raise UserError(f"evaluation.suites: {problem}; {remedy}")


def find_data(suite: Suite, *, data: Path | None = None, heldout: Path | None = None) -> Origins:
    """Where the data of every leaf task is. Reads no data; raises `UserError` for data that is missing."""
    manager = _manager(suite.entries)
    leaves = [leaf for entry in suite.entries for leaf in _leaves(manager, entry.task)]
    return {leaf: _origin(leaf, manager.task_index[leaf].cfg or {}, data, heldout) for leaf in leaves}


def load_suite(suite: Suite, *, data: Path | None = None, heldout: Path | None = None) -> LoadedSuite:
    """Build the suite's tasks and read their data.

    `data` has the datasets under their Hub ids (`<data>/allenai/ai2_arc`; None: the Hub), `heldout` a run's held-out
    documents.
    """
    manager, origins = _manager(suite.entries), find_data(suite, data=data, heldout=heldout)
    loaded = LoadedSuite(suite, {}, {}, {}, origins)
    for entry in suite.entries:
        for leaf in _leaves(manager, entry.task):
            loaded.entries[leaf] = entry
            loaded.tasks[leaf] = _load_task(manager, leaf, entry, *origins[leaf])
        _members(manager, entry.task, loaded)
    return loaded


def sample_of_items(task: Task, items: int | None) -> list[int] | None:
    """Indices of a fixed sample of a task's items, ascending; None: all.

    It is drawn by hash of the index, so that it is spread over the task and a larger sample contains a smaller one.
    """
    total = len(task.eval_docs)
    if items is None or items >= total:
        return None
    order = sorted(range(total), key=lambda index: hashlib.sha256(str(index).encode()).digest())
    return sorted(order[:items])


@functools.cache
def _everything() -> TaskManager:
    """All of lm-eval's tasks: thousands of YAML files, several seconds."""
    return TaskManager(include_path=str(OUR_TASKS))


@functools.cache
def _common() -> TaskManager:
    """The tasks of `tasks.yaml`, from the few folders that it names."""
    stock = Path(lm_eval.tasks.__file__).parent
    folders = sorted({task.folder for task in TASKS.values() if task.folder})
    return TaskManager(include_path=[*(stock / folder for folder in folders), OUR_TASKS], include_defaults=False)


def _manager(entries: Sequence[Entry]) -> TaskManager:
    """An index of tasks that has all of these. Raises `UserError` for an unknown one, with the nearest names."""
    common, names = _common(), [entry.task for entry in entries]
    # A group or tag in these folders may have more tasks elsewhere, unless tasks.yaml has it.
    if all(name in common.task_index and (name in TASKS or name in common.all_subtasks) for name in names):
        return common
    manager = _everything()
    for name in names:
        if name not in manager.task_index:
            near = suggest(name, [*SUITES, *manager.all_tasks], most=3)
            hint = near if near.startswith("did you mean") else f"suites are {', '.join(SUITES)}"
            raise UserError(f"unknown suite or task '{name}'; {hint}")
    return manager


def _children(manager: TaskManager, name: str) -> list[str]:
    """Names of the tasks and groups directly in a group or tag; empty for a task."""
    entry = manager.task_index[name]
    if name in manager.all_tags:
        return sorted(entry.tags)
    members = (entry.cfg or {}).get("task", []) if name in manager.all_groups else []
    children = [child if isinstance(child, str) else child.get("task", child.get("group")) for child in members]
    if any(not isinstance(child, str) or child not in manager.task_index for child in children):
        raise UserError(f"group '{name}' defines tasks inline; name its tasks one by one instead")
    return children


def _leaves(manager: TaskManager, name: str) -> list[str]:
    """All tasks in a task, group or tag."""
    if name in manager.all_subtasks:
        return [name]
    return [leaf for child in _children(manager, name) for leaf in _leaves(manager, child)]


def _members(manager: TaskManager, name: str, loaded: LoadedSuite) -> list[Task | Group]:
    """The task or group of that name, or what a tag stands for; lm-eval's groups are added to `loaded`."""
    if name in loaded.tasks:
        return [loaded.tasks[name]]
    members = [member for child in _children(manager, name) for member in _members(manager, child, loaded)]
    if name not in manager.all_groups:
        return members
    fields, config = dataclasses.fields(GroupConfig), manager.task_index[name].cfg or {}
    loaded.groups[name] = Group.from_config({x.name: config[x.name] for x in fields if x.name in config})
    for member in members:
        loaded.groups[name].add(member)
    return [loaded.groups[name]]


def _origin(task: str, config: dict[str, Any], data: Path | None, heldout: Path | None) -> tuple[str, Path | None]:
    """Dataset id and local folder of a task's data. Raises `UserError` if it is not there."""
    heldout = heldout and Path(heldout).resolve()
    if made_from(task) == "documents":
        if heldout is None or not list(heldout.glob("heldout-*.parquet")):
            needs = f"task '{task}' needs held-out documents"
            raise UserError(f"{needs} (heldout-*.parquet); name a run's data/documents folder (--heldout)")
        return "heldout", heldout
    if made_from(task) == "tokens":
        if not heldout or not (heldout.parent / "tokens" / "train").is_dir():
            raise UserError(f"task '{task}' needs the data/documents folder of a run with data/tokens (--heldout)")
        return "tokens", heldout.parent / "tokens"
    if made_from(task) == "conversations":
        folder = heldout and heldout.parent / "conversations"
        if folder is None or not (folder / "heldout.parquet").is_file():
            raise UserError(f"task '{task}' needs the data/documents folder of a run with conversations (--heldout)")
        return "answers", folder
    dataset = str(config.get("dataset_path"))
    folder = data and Path(data).resolve() / dataset
    if folder and not folder.is_dir():
        raise UserError(f"task '{task}' needs the dataset {dataset}, which is not in {data} (looked for {folder})")
    return dataset, folder


def _load_task(manager: TaskManager, name: str, entry: Entry, dataset: str, folder: Path | None) -> Task:
    overrides: dict[str, Any] = {"task": name}
    if made_from(name):
        overrides["dataset_kwargs"] = {"heldout": str(folder)}
    elif folder is not None:
        overrides["dataset_path"] = str(folder)
    where = f"folder {folder}" if folder else f"dataset {dataset} on the Hub; use a local copy with --data"
    with user_errors(f"task '{name}': cannot load {where}"), quiet():
        # At top level a dict with a "task" key defines a new task; inside a group it refers to the one of that name.
        (task,) = manager.load([{"group": "nanophi", "task": [overrides]}])["tasks"].values()
    defined = task.get_config("num_fewshot")
    if defined == 0 and entry.shots:
        raise UserError(f"task '{name}' is zero-shot by its definition; leave out the number of shots")
    task.set_config("num_fewshot", (defined or 0) if entry.shots is None else entry.shots)
    return task


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' logging and progress bars, which would drown the lines about the evaluation itself."""
    bars, hub = transformers.utils.logging, huggingface_hub.utils
    libraries = (
        (bars.is_progress_bar_enabled(), bars.disable_progress_bar, bars.enable_progress_bar),
        (not datasets.are_progress_bars_disabled(), datasets.disable_progress_bars, datasets.enable_progress_bars),
        (not hub.are_progress_bars_disabled(), hub.disable_progress_bars, hub.enable_progress_bars),
    )
    with contextlib.ExitStack() as stack:
        for is_shown, hide, show in libraries:
            if is_shown:
                hide()
                stack.callback(show)
        stack.callback(setattr, lm_eval.api.task, "tqdm", lm_eval.api.task.tqdm)
        lm_eval.api.task.tqdm = functools.partial(tqdm.tqdm, disable=True)
        logger = logging.getLogger("lm_eval")
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        yield
