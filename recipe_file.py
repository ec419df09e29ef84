"""Recipe files: found by path or built-in name, read with what they extend, changed by `--set`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nanophi.files import UserError

RECIPES = Path(__file__).parent / "recipes"


def find_recipe(path: str | Path) -> Path:
    """The file that `path` names: itself, or a built-in recipe of that name."""
    path = Path(path)
    for candidate in (path, *_built_in(str(path))):
        if candidate.is_file():
            return candidate
    built_in = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
    raise UserError(f"recipe {path} does not exist; built-in recipes: {', '.join(built_in)}")


def _built_in(name: str) -> tuple[Path, Path]:
    return RECIPES / name, RECIPES / f"{name}.yaml"


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a recipe file, on top of what it extends. Raises `UserError` if the file is no recipe."""
    if path in seen:
        raise UserError(f"{path}: 'extends' goes in a circle")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, found {type(values).__name__}")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    beside = path.parent / str(parent)
    parent_path = next((file.resolve() for file in (beside, *_built_in(str(parent))) if file.is_file()), None)
    if parent_path is None:
        raise UserError(f"{path}: extends {parent}, which does not exist")
    return _merge(read(parent_path, (*seen, path)), values)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def override(values: dict[str, Any], assignment: str) -> None:
    """Carry out `section.key=value` (the value in YAML) on a recipe's mapping. Raises `UserError` if it cannot."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"--set {assignment}: expected section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {assignment}: the value is not valid YAML") from None
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {assignment}: '{section}' is not a section")
    values[last] = value
