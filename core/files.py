"""Files that are written whole or not at all, and hashes of contents. Nothing here knows what a file means."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nanophi.core.errors import UserError


def sha256_of(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value in its canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tree(path: Path) -> str:
    """Hex SHA-256 over the relative names and contents of every file in a folder (or of one file)."""
    if path.is_file():
        return sha256_of_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return sha256_of([[file.relative_to(path).as_posix(), sha256_of_file(file)] for file in files])


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under, which replaces `path` at the end, or leaves nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) so that a reader sees the old contents or the new, never a part."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """`write_text` for JSON: two-space indent, keys in the order given, NaN refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file, or raise `UserError` naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None


def permit(path: Path) -> None:
    """Give a file the permissions of one that was opened normally: safetensors makes files for the owner alone."""
    os.umask(mask := os.umask(0))
    with contextlib.suppress(OSError):  # some mounts refuse every chmod, and decide permissions themselves
        path.chmod(0o666 & ~mask)


def replace_tree(source: Path, target: Path) -> None:
    """Move `source` (file or folder) to `target`, replacing what is there, or what a link there leads to."""
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = (target.with_name(f".{target.name}.{os.getpid()}.{suffix}") for suffix in ("new", "old"))
    others = f".{glob.escape(target.name)}.*"
    for left in (*target.parent.glob(f"{others}.new"), *target.parent.glob(f"{others}.old")):
        remove(left)  # by a process that was killed
    if source.stat().st_dev != target.parent.stat().st_dev:
        copy_tree(source, new)
        remove(source)
        source = new
    if target.is_dir():  # which cannot be renamed over if it is not empty
        target.rename(old)
    source.replace(target)
    remove(old)


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """A folder to write in, beside `output`, which it replaces once all is written."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.{os.getpid()}.", dir=output.parent) as scratch:
        work = Path(scratch) / "folder"
        work.mkdir()
        yield work
        replace_tree(work, output)


def link_or_copy(source: str, target: str) -> str:
    """A hard link to a file, or a copy where the file system has no links; for `shutil.copytree`."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def copy_tree(source: Path, target: Path) -> None:
    """Copy a file or folder, by hard links where the file system allows (outputs are never changed in place)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=link_or_copy)
    else:
        link_or_copy(str(source), str(target))


def remove(path: Path) -> None:
    """Delete a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def can_make(folder: Path) -> bool:
    """Whether a folder is writable, or could be made."""
    while not os.path.exists(folder) and folder != folder.parent:  # noqa: PTH110 (which raises below a closed folder)
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def check_writable(path: Path, folder: Path) -> None:
    """Refuse an output for which nothing can be written in `folder`."""
    if not can_make(folder):
        raise UserError(f"{path} cannot be written; choose another name for the output")


def check_own_folder(folder: Path, names: Sequence[str], command: str) -> None:
    """Refuse an output folder that holds anything but `names`, what the command writes, the first in any case."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; `nanophi {command}` writes a folder: choose another name")
    held = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if other := held - {*names} if names[0] in held else held:
        raise UserError(f"{folder} holds {min(other)}, which `nanophi {command}` did not write: choose another folder")
    check_writable(folder, folder.parent)


def check_own_file(path: Path, is_own: Callable[[], bool], command: str) -> None:
    """Refuse an output file that is a folder, or that the command did not write, by what `is_own` finds in it."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; `nanophi {command}` writes a file: choose another name")
    own = not path.exists()
    with contextlib.suppress(Exception):  # whatever a library raises for a file that it cannot read
        own = own or is_own()
    if not own:
        raise UserError(f"{path} was not written by `nanophi {command}`: choose another name, or remove it")
    check_writable(path, path.parent)
