"""The files of a release: which it may have, their manifest, and what is wrong with them before anything is loaded.

A list of what is allowed, not of what is harmful: code and pickles can have any name, or none of the usual endings.
What the files say of each other is compared in `checks.py`.
"""

import re
from pathlib import Path
from typing import Any

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_file, write_json
from nanophi.core.names import CODE_FILES, MODEL_FILES, TOKENIZER_FILES

MANIFEST = "MANIFEST.json"
SIGNATURE = "model.sig"
_WHOLE = ("README.md", "LICENSE", "revisions.json", MANIFEST, SIGNATURE, *MODEL_FILES, *CODE_FILES, *TOKENIZER_FILES)
# The names of all files that a release may have.
FILES = re.compile(
    "|".join(map(re.escape, _WHOLE))
    + r"|figures/(loss|quality|evaluation)\.png|records/(evals/)?[^/]+\.(json|yaml)|\.eval_results/[^/]+\.yaml"
)
# What git, the Hub's client and the file managers of operating systems leave in a folder: no part of it.
_LEFT_BEHIND = re.compile(
    r"^\.git(attributes$|ignore$|/|$)|^\.cache/|(^|/)(\.DS_Store|\._[^/]*|Thumbs\.db|desktop\.ini)$"
)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def list_files(folder: Path) -> list[str]:
    """Relative POSIX names of all files in a release, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return sorted(name for name in names if not _LEFT_BEHIND.search(name))


def write_manifest(folder: Path, provenance: dict[str, Any]) -> None:
    """Write `MANIFEST.json` over every other file in the folder but a signature, which signs the manifest too."""
    files = {
        name: {"sha256": sha256_of_file(folder / name), "size": (folder / name).stat().st_size}
        for name in list_files(folder)
        if name not in (MANIFEST, SIGNATURE)
    }
    write_json(folder / MANIFEST, {"format": 1, "provenance": provenance, "files": files})


def file_problems(folder: Path, partial: bool = False, written: re.Pattern[str] = FILES) -> list[str]:
    """What is wrong with a release's files, before anything is loaded; of a `partial` download, of what is there."""
    files = list_files(folder)
    changed = [line for line in checksums(folder, files) if not (partial and line.endswith(" is missing"))]
    return changed + foreign_files(folder, files, written) + foreign_references(folder)


def checksums(folder: Path, files: list[str]) -> list[str]:
    """Where the files are not those that the manifest lists."""
    try:
        expected = {name: entry["sha256"] for name, entry in read_json(folder / MANIFEST)["files"].items()}
    except (UserError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} does not list files with their sha256"]
    wrong = [f"{name} is missing" for name in sorted(set(expected) - set(files))]
    for name in files:
        if name not in {*expected, MANIFEST, SIGNATURE}:
            wrong.append(f"{name} is not in the manifest")
        elif not (folder / name).is_file():
            wrong.append(f"{name} is a link to nothing")
        elif name in expected and sha256_of_file(folder / name) != expected[name]:
            pointer = "is only a pointer of Git LFS; run `git lfs pull` in the clone"
            wrong.append(f"{name} {pointer if _is_lfs_pointer(folder / name) else 'was changed'}")
    return wrong


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def foreign_files(folder: Path, files: list[str], written: re.Pattern[str] = FILES) -> list[str]:
    """Files that nanophi does not write, links to elsewhere, and weights that are not safetensors."""
    from safetensors import SafetensorError, safe_open

    wrong = []
    # A snapshot in the Hub's cache is made of links to the blobs beside it.
    blobs = folder.resolve().parents[1] / "blobs" if folder.resolve().parent.name == "snapshots" else None
    for name in files:
        path = folder / name
        if path.is_symlink() and path.resolve().parent != blobs:
            wrong.append(f"{name} is a link")
        elif not written.fullmatch(name):
            wrong.append(f"{name} is not a file that nanophi writes")
        elif path.suffix == ".safetensors" and not _is_lfs_pointer(path):  # `checksums` names those
            try:
                with safe_open(path, "pt"):
                    pass
            except SafetensorError as error:
                wrong.append(f"{name} is not a valid safetensors file ({error})")
    return wrong


def foreign_references(folder: Path) -> list[str]:
    """`auto_map` entries that point elsewhere, and other ways of a config to have code run."""
    modules = {Path(name).stem for name in CODE_FILES}
    wrong = []
    for path in sorted(set(folder.glob("*.json")) - {folder / MANIFEST}):
        try:
            config = read_json(path)
        except UserError:
            wrong.append(f"{path.name} is not valid JSON")
            continue
        config = config if isinstance(config, dict) else {}
        targets = config.get("auto_map") or {}
        if not isinstance(targets, dict):
            wrong.append(f"{path.name}: auto_map is not a mapping")
            continue
        for target in targets.values():
            for reference in target if isinstance(target, list) else [target]:
                if reference is not None and str(reference).rpartition(".")[0] not in modules:
                    wrong.append(f"{path.name}: auto_map names {reference}")
        runs_code = ("custom_generate", "custom_pipelines", "trust_remote_code")
        wrong += [f"{path.name}: has '{key}'" for key in runs_code if config.get(key)]
    return wrong
