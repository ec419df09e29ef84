"""What a stage depends on: the hash of a local path's contents, or the commit that a Hub revision stands for."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanophi.core.errors import UserError, one_line
from nanophi.core.files import read_json, sha256_of, sha256_of_file, write_json, write_text
from nanophi.core.names import is_hub_id, local, shown, walk
from nanophi.core.run import RunDirectory

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")

Kind = Literal["model", "dataset", "space"]


class Contents:
    """SHA-256 of files' contents, remembered in a JSON file, if any, by the files' sizes and times."""

    def __init__(self, memory: Path | None = None) -> None:
        self.memory = memory
        self._known: dict[str, list[Any]] = {}
        if memory is not None and memory.exists():
            with contextlib.suppress(UserError):  # a damaged memory is only a slow one
                self._known = read_json(memory)

    def files(self, paths: Iterable[Path]) -> list[list[str]]:
        """`[path, hash]` of each file, in the order given."""
        return [[shown(path), self._file(path)] for path in paths]

    def of(self, name: str | Path, ignore: Sequence[str] = ()) -> str:
        """Hash of a file, or of the names and contents of a folder's files without hidden ones and what to ignore."""
        path = local(name)
        if not path.exists():
            raise UserError(f"{shown(name)}: no such file or folder")
        if path.is_file():
            return self._file(path)
        inside = [file for file in walk(path) if file.is_file() and not file.name.endswith(tuple(ignore))]
        return sha256_of([[shown(file.relative_to(path)), self._file(file)] for file in inside])

    def save(self) -> None:
        if self.memory is not None and self._known:
            write_json(self.memory, self._known)

    def _file(self, path: Path) -> str:
        state, key = path.stat(), shown(path.absolute())
        times = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
        *known, digest = self._known.get(key, [""])
        if known != times:
            digest = sha256_of_file(path)
            # A file that was changed a moment ago may change again without a visible change of its times.
            if time.time() - max(state.st_mtime, state.st_ctime) > 2:
                self._known[key] = [*times, digest]
        return str(digest)


@functools.cache  # so that the runs of one command see the same commit
def resolve_commit(repo_id: str, revision: str | None, kind: Kind) -> str:
    """The commit that a revision (None: `main`) on the Hub stands for; without a network, the one last seen here."""
    wanted = revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", wanted):
        return wanted
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    # The Hub's own cache of what a revision is; a download of a commit does not write it.
    reference = Path(HF_HUB_CACHE) / f"{kind}s--{repo_id.replace('/', '--')}" / "refs" / wanted
    try:
        commit = str(HfApi().repo_info(repo_id, repo_type=kind, revision=revision).sha)
        with contextlib.suppress(OSError):  # a cache that is read-only
            write_text(reference, commit)
        return commit
    except RepositoryNotFoundError:
        raise UserError(f"{kind} {repo_id} does not exist on the Hub, or is private: try `hf auth login`") from None
    except RevisionNotFoundError:
        raise UserError(f"{kind} {repo_id} has no revision '{wanted}' on the Hub") from None
    except Exception as error:  # httpx's, huggingface_hub's and the system's errors of a network that is not there
        if reference.is_file():
            return reference.read_text(encoding="utf-8").strip()
        raise UserError(f"{kind} {repo_id} cannot be looked up on the Hub ({one_line(error)})") from None


def same_on_hub(path: Path, there: RepoFile) -> bool:
    """Whether a file is the one on the Hub, which knows LFS files by SHA-256 and others by git's SHA-1 of a blob."""
    if there.size != path.stat().st_size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == sha256_of_file(path)
    content = path.read_bytes()
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Inputs:
    """What a run's recipe names: hashes of local paths' contents, commits of repositories on the Hub.

    Its directory remembers the hashes, its record the commits: a revision is looked up once in the life of a run.
    """

    def __init__(self, run: RunDirectory, write: bool = True) -> None:
        self.run, self.write = run, write
        self.contents = Contents(run.path / ".inputs.json")

    def commit_of(self, repo_id: str, revision: str | None, kind: Kind) -> str:
        """The commit that a revision of a repository on the Hub had when this run first named it."""
        name = f"{kind} {repo_id}@{revision or 'main'}"
        known = self.run.record.get("hub", {})
        if name not in known:
            known = {**known, name: resolve_commit(repo_id, revision, kind)}
            if self.write:
                self.run.update_record(hub=known)
        return str(known[name])

    def model(self, name: str, ignore: Sequence[str] = (), revision: str | None = None) -> dict[str, str]:
        """What a model or tokenizer is: `{path, sha256}` of a local folder, which comes first, or `{hub, commit}`."""
        if local(name).exists():
            return {"path": name, "sha256": self.contents.of(name, ignore)}
        if not is_hub_id(name):
            raise UserError(f"{name}: no such file or folder, and not a Hub id like ORG/NAME")
        return {"hub": name, "commit": self.commit_of(name, revision, "model")}
