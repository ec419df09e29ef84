"""What a name in a recipe or on the command line refers to, and the identity of what it holds.

A name is a local path (file, folder, glob) or a repository on the Hub. What a stage depends on is what the name
*holds*: the hash of a local path's contents, the commit that a Hub revision stands for.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanophi.files import UserError, printable, read_json, reason, sha256_of, sha256_of_file, write_json

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

_HUB_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_HUB_ID = re.compile(f"{_HUB_NAME}/{_HUB_NAME}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")

Kind = Literal["model", "dataset"]


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `ORG/NAME` of a repository on the Hub: each part at most 96 characters long."""
    return _HUB_ID.fullmatch(name) is not None and not re.search(r"\.\.|--|\.git$", name)


def model_folder(model: str | Path, key: str | None = None) -> Path | None:
    """The folder that a model's name refers to; None for a repository on the Hub, `ORG/NAME` or `ORG/NAME@revision`.

    Looks at the name and the file system only: nothing is loaded and the Hub is not asked.

    Args:
        model: the name.
        key: of the recipe that names it, for the message of an error.

    Raises:
        UserError: if it is neither, or names a run that is missing in a folder of runs.
    """
    folder = local(model)
    if folder.is_dir():
        return folder
    repo_id = str(model).partition("@")[0]
    missing = f"{key + ': ' if key else ''}folder {model} does not exist"
    if not is_hub_id(repo_id):
        raise UserError(f"{missing}, and it is not a Hub id like ORG/NAME")
    # A mistyped run looks like a Hub id, and without a network the Hub is asked for most of a minute.
    if runs := sorted(path.parent.name for path in Path(repo_id).parent.glob("*/recipe.yaml")):
        raise UserError(f"{missing}; {Path(repo_id).parent} holds {', '.join(runs)}")
    return None


def split_revision(name: str) -> tuple[str, str | None]:
    """`ORG/NAME@REVISION` as id and revision; any other name, and a path that exists, as it is and None."""
    repo_id, at, revision = name.partition("@")
    return (repo_id, revision) if at and revision and is_hub_id(repo_id) and not local(name).exists() else (name, None)


def local(name: str | Path) -> Path:
    """The path that a name stands for, `~` expanded."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 (a user who does not exist is no error here)


def shown(path: str | Path) -> str:
    r"""A path as text that can be printed on a line and stored; bytes that are not UTF-8 as `\xNN`."""
    return printable(os.fsencode(path).decode("utf-8", "backslashreplace"))


def walk(folder: Path) -> list[Path]:
    """Everything below a folder that is neither a folder nor hidden, sorted; linked folders count, but only once."""

    def below(inner: Path, above: frozenset[Path]) -> Iterator[Path]:
        above |= {inner.resolve()}
        for path in inner.iterdir():
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                yield path
            elif path.resolve() not in above:
                yield from below(path, above)

    return sorted(below(folder, frozenset()))


class Contents:
    """SHA-256 of files' contents. A file whose size and times are those of last time is not read again.

    Args:
        memory: JSON file that remembers the hashes; None: this object alone does.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self.memory = memory
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        if memory is not None and memory.exists():
            with contextlib.suppress(UserError, TypeError, ValueError):  # a damaged memory is only a slow one
                known = {str(key): [*entry] for key, entry in dict(read_json(memory)).items()}
                self._known = {key: entry for key, entry in known.items() if len(entry) == 5}

    def files(self, paths: Iterable[Path]) -> list[list[str]]:
        """`[path, hash]` of each file, in the order given."""
        return [[shown(path), self._file(path)] for path in paths]

    def of(self, name: str | Path, ignore: Sequence[str] = ()) -> str:
        """Hash of a file, or of the names and contents of a folder's files (hidden ones apart).

        Args:
            name: the file or folder.
            ignore: endings of names that play no part.

        Raises:
            UserError: if there is no such file or folder.
        """
        path = local(name)
        if not path.exists():
            raise UserError(f"{shown(name)}: no such file or folder")
        if path.is_file():
            return self._file(path)
        inside = [file for file in walk(path) if file.is_file() and not file.name.endswith(tuple(ignore))]
        return sha256_of([[shown(file.relative_to(path)), self._file(file)] for file in inside])

    def save(self) -> None:
        """Write the memory."""
        if self.memory is not None and self._changed:
            write_json(self.memory, self._known)
            self._changed = False

    def _file(self, path: Path) -> str:
        state = path.stat()
        times = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
        key = shown(path.absolute())
        known = self._known.get(key)
        if known is not None and known[:-1] == times:
            return str(known[-1])
        digest = sha256_of_file(path)
        # A file that was changed a moment ago may change again without a visible change of its times.
        if time.time() - max(state.st_mtime, state.st_ctime) > 2:
            self._known[key], self._changed = [*times, digest], True
        return digest


@functools.cache  # so that the runs of one command see the same commit
def resolve_commit(repo_id: str, revision: str | None, kind: Kind) -> str:
    """The commit that a revision (None: `main`) of a repository on the Hub stands for.

    Without a network it is the one that was last seen on this machine.

    Raises:
        UserError: if the repository or revision does not exist, or cannot be asked for and was never downloaded.
    """
    wanted = revision or "main"
    if _COMMIT.fullmatch(wanted):
        return wanted
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    remembered = huggingface_hub.cached_assets_path("nanophi", f"{kind}s/{repo_id}", "refs") / f"{wanted}.json"
    try:
        commit = str(huggingface_hub.HfApi().repo_info(repo_id, repo_type=kind, revision=revision).sha)
        write_json(remembered, commit)
        return commit
    except RepositoryNotFoundError:
        raise UserError(
            f"{kind} {repo_id} does not exist on the Hub, or is private: check the name, or log in by `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{kind} {repo_id} has no revision '{wanted}' on the Hub") from None
    except Exception as error:  # httpx's, huggingface_hub's and the system's errors of a network that is not there
        if remembered.is_file():
            return str(read_json(remembered))
        reference = Path(HF_HUB_CACHE) / f"{kind}s--{repo_id.replace('/', '--')}" / "refs" / wanted
        if reference.is_file():
            return reference.read_text(encoding="utf-8").strip()
        raise UserError(
            f"{kind} {repo_id} cannot be looked up on the Hub ({reason(error)}), and it was never seen on this machine"
        ) from None


def same_on_hub(path: Path, there: RepoFile) -> bool:
    """Whether a file is the one on the Hub, which knows LFS files by SHA-256 and others by git's SHA-1 of a blob.

    Nothing is downloaded.
    """
    if there.size != path.stat().st_size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == sha256_of_file(path)
    content = path.read_bytes()
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
