"""The files of a release before anything is loaded: those of the manifest, and nothing but what nanophi writes.

A list of what is allowed, not of what is harmful: code and pickles can have any name, or none of the usual endings.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_file
from nanophi.model_card import signature
from nanophi.model_card.release import CODE_FILES, FILES, MANIFEST, list_files


def file_problems(folder: Path, partial: bool = False, written: re.Pattern[str] = FILES) -> list[str]:
    """What is wrong with a release's files before anything is loaded: changed, foreign, or naming foreign code.

    Args:
        folder: the release.
        partial: only a part of it was downloaded: what is there is checked.
        written: names of the files that nanophi writes into such a folder.
    """
    files = list_files(folder)
    changed = [line for line in checksums(folder, files) if not (partial and line.endswith(" is missing"))]
    return changed + foreign_files(folder, files, written) + foreign_references(folder)


def checksums(folder: Path, files: list[str]) -> list[str]:
    """Where the files are not those that the manifest lists."""
    try:
        listed = read_json(folder / MANIFEST)["files"]
        expected = {name: (entry["sha256"], entry["size"]) for name, entry in listed.items()}
    except UserError:
        return [f"{MANIFEST} is not valid JSON"]
    except (KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} does not list files with their sha256 and size"]
    unlisted = (MANIFEST, signature.SIGNATURE)
    wrong = [f"{name} is missing" for name in sorted(set(expected) - set(files))]
    wrong += [f"{name} is not in the manifest" for name in files if name not in {*expected, *unlisted}]
    for name in files:
        if name in expected:
            sha256, size = expected[name]
            if _is_lfs_pointer(folder / name):
                wrong.append(f"{name} is only a pointer of Git LFS; run `git lfs pull` in the clone")
            elif not (folder / name).is_file():
                wrong.append(f"{name} is a link to nothing")
            elif (folder / name).stat().st_size != size or sha256_of_file(folder / name) != sha256:
                wrong.append(f"{name} was changed")
    return wrong


def _is_lfs_pointer(path: Path) -> bool:
    start = b"version https://git-lfs.github.com/spec/"
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(start)) == start
    return False


def foreign_files(folder: Path, files: list[str], written: re.Pattern[str] = FILES) -> list[str]:
    """Files that nanophi does not write, links to elsewhere, and weights that are not safetensors."""
    wrong = []
    # A snapshot in the Hub's cache is made of links to the blobs beside it.
    blobs = folder.resolve().parents[1] / "blobs" if folder.resolve().parent.name == "snapshots" else None
    for name in files:
        path = folder / name
        if path.is_symlink() and path.resolve().parent != blobs:
            wrong.append(f"{name} is a link")
        elif not written.fullmatch(name):
            wrong.append(f"{name} is not a file that nanophi writes")
        elif path.suffix == ".safetensors" and path.is_file() and not _is_lfs_pointer(path):  # The checksums say those.
            wrong += _bad_safetensors(path, name)
    return wrong


def _bad_safetensors(path: Path, name: str) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except SafetensorError as error:
        return [f"{name} is not a valid safetensors file ({error})"]
    return []


def foreign_references(folder: Path) -> list[str]:
    """`auto_map` entries that point elsewhere, and other ways of a config to have code run."""
    modules = {Path(name).stem for name in CODE_FILES}
    wrong = []
    for path in sorted(folder.glob("*.json")):
        if path.name == MANIFEST:
            continue
        try:
            config = read_json(path)
        except UserError:
            wrong.append(f"{path.name} is not valid JSON")
            continue
        if not isinstance(config, dict):
            continue
        targets = config.get("auto_map") or {}
        if not isinstance(targets, dict):
            wrong.append(f"{path.name}: auto_map is not a mapping")
            continue
        for target in targets.values():
            for reference in target if isinstance(target, list) else [target]:
                if reference is not None and str(reference).rpartition(".")[0] not in modules:
                    wrong.append(f"{path.name}: auto_map names {reference}")
        for key in ("custom_generate", "custom_pipelines", "trust_remote_code"):
            if config.get(key):
                wrong.append(f"{path.name}: has '{key}'")
    return wrong
