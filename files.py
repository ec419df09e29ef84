"""Files written whole or not at all, hashes of contents, and the error whose message a user sees."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, with its name, and the remedy."""


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


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) so that a reader sees the old contents or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run the stage again") from None


def replace_tree(source: Path, target: Path) -> None:
    """Move `source` (file or folder) to `target` on the same file system, in place of what is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir() and not target.is_symlink():
        # A non-empty folder cannot be renamed over; the old one leaves under a name that is not mistaken for output.
        discarded = target.with_name(f".{target.name}.{os.getpid()}.old")
        target.rename(discarded)
        source.rename(target)
        shutil.rmtree(discarded)
    else:
        source.replace(target)


def link_or_copy(source: str, target: str) -> str:
    """A hard link to a file, or a copy where the file system has no links; for `shutil.copytree`."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def copy_tree(source: Path, target: Path) -> None:
    """Copy a file or folder, by hard links where the file system allows (outputs are never changed in place)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=link_or_copy)
    else:
        link_or_copy(str(source), str(target))


def remove(path: Path) -> None:
    """Delete a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
