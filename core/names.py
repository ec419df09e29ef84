"""What a name on the command line or in a recipe refers to: a folder, a run, a release, or a repository on the Hub.

The one place that tells them apart, by name and file system only; the Hub is asked by `Named.fetch` alone.
"""

import dataclasses
import os
import re
from pathlib import Path

from nanophi.core.errors import UserError, printable, user_errors
from nanophi.core.files import read_json

CODE_FILES = ("configuration_nanophi.py", "modeling_nanophi.py")
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")
TOKENIZER_FILES = (
    *("added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json"),
)
"""The files of a model in a folder; of those of a tokenizer, the ones that it has."""

RUN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of the names of runs, which are folders beside one another."""
_HUB_ID = re.compile(r"\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
_STEP = re.compile(r"step-(\d{6}|[1-9]\d{6,})")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `ORG/NAME` of a repository on the Hub: each part at most 96 characters long."""
    return _HUB_ID.fullmatch(name) is not None and not re.search(r"\.\.|--|\.git$", name)


def split_revision(name: str) -> tuple[str, str | None]:
    """`ORG/NAME@REVISION` as id and revision; any other name, and a path that exists, as it is and None."""
    repo_id, at, revision = name.partition("@")
    return (repo_id, revision) if at and revision and is_hub_id(repo_id) and not local(name).exists() else (name, None)


def local(name: str | Path) -> Path:
    """The path that a name stands for, `~` expanded."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 (a user who does not exist is no error here)


def shown(path: str | Path) -> str:
    r"""A path as text that can be printed on a line and stored; bytes that are not UTF-8 as `\xNN`."""
    return printable(str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def step_name(step: int) -> str:
    """Name of a step's folder, its revision on the Hub, and the stem of its results: `step-000600`."""
    return f"step-{step:06d}"


def step_of(name: str | Path) -> int:
    """The step in a folder's name or path. Raises ValueError for a name that is not a step's."""
    if found := _STEP.fullmatch(Path(name).name):
        return int(found[1])
    raise ValueError(f"{name} is not the name of a step")


def step_folders(folder: Path) -> list[Path]:
    """The step folders in `checkpoints/` or `training_state/`, by step; anything else there is passed over."""
    return sorted((path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)), key=step_of)


@dataclasses.dataclass(frozen=True)
class Named:
    """What a name refers to: `folder`, or `repo_id` at `revision` (None: `main`) where there is no such folder."""

    name: str
    folder: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    key: str = ""  # the recipe's key that has the name, with a colon, for messages

    @property
    def is_run(self) -> bool:
        return self.folder is not None and (self.folder / "record.json").is_file()

    def error(self, problem: str) -> UserError:
        """`UserError`: the key, the name and what is wrong with it."""
        return UserError(f"{self.key}{self.name} {problem}")

    def fetch(self, patterns: list[str] | None = None) -> Path:
        """The folder; a repository is downloaded, or the part of it that `patterns` match."""
        if self.folder is not None:
            return self.folder
        from huggingface_hub import snapshot_download

        with user_errors(f"{self.key}there is no folder {self.name} here, and it cannot be downloaded from the Hub"):
            return Path(snapshot_download(str(self.repo_id), revision=self.revision, allow_patterns=patterns))

    def model(self, patterns: list[str] | None = None) -> Path:
        """The folder with configuration and weights: a run's final checkpoint, else what `fetch` gives."""
        folder = self.fetch(patterns)
        if self.is_run:
            return final_checkpoint(folder, self)
        if not (folder / "config.json").is_file():
            raise self.error("is not a model (no config.json)")
        return folder


def resolve(name: str | Path, key: str | None = None) -> Named:
    """What a name refers to; a folder comes before a repository. Raises `UserError` if it is neither."""
    folder, (repo_id, _, revision) = local(name), str(name).partition("@")
    prefix = f"{key}: " if key else ""
    if folder.is_dir():
        return Named(str(name), folder, key=prefix)
    missing = f"{prefix}folder {name} does not exist"
    if not is_hub_id(repo_id):
        raise UserError(f"{missing}, and it is not a Hub id like ORG/NAME")
    # A mistyped run looks like a Hub id, and without a network the Hub is asked for most of a minute.
    if runs := sorted(path.parent.name for path in Path(repo_id).parent.glob("*/recipe.yaml")):
        raise UserError(f"{missing}; {Path(repo_id).parent} holds {', '.join(runs)}")
    return Named(str(name), None, repo_id, revision or None, prefix)


def final_checkpoint(run: Path, named: Named | None = None) -> Path:
    """The last weights of a run directory. Raises `UserError` if its training is not finished."""
    checkpoints = step_folders(run / "checkpoints")
    if "training" not in read_json(run / "record.json")["stages"] or not checkpoints:
        raise (named or Named(run.name)).error("is a run that has not finished; run `nanophi run` on its recipe first")
    return checkpoints[-1]


def walk(folder: Path, above: frozenset[Path] = frozenset()) -> list[Path]:
    """Everything below a folder that is neither a folder nor hidden, sorted; linked folders count, but only once."""
    above |= {folder.resolve()}
    found = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            found.append(path)
        elif path.resolve() not in above:
            found += walk(path, above)
    return sorted(found)
