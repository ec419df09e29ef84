"""Recipe files: found by path or built-in name, read with what they extend, changed by `--set`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from nanophi.core.errors import UserError

RECIPES = Path(__file__).parent.parent / "recipes"


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` with the numbers of YAML 1.2, which refuses a key that is there twice.

    PyYAML follows YAML 1.1, where `0100` is 64, `1:30` is 90 and `1e-5` is text.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is there twice", key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*$")
_NUMBER = re.compile(
    r"[-+]?(?:[0-9]+[eE][-+][0-9]+|(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)$|[-+]?\.(?:inf|Inf)$|\.(?:nan|NaN)$"
)
"""Not `12e45`, which may be a commit."""
for _tag, _pattern in (("int", _INTEGER), ("float", _NUMBER)):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))


def find_recipe(path: str | Path) -> Path:
    """The file that `path` names: itself, or a built-in recipe of that name."""
    path = Path(path)
    for candidate in (path, *_built_in(str(path))):
        if candidate.is_file():
            return candidate
    built_in = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
    if (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is a run, not a recipe; name {path / 'recipe.yaml'} or a built-in recipe: {built_in}")
    raise UserError(f"recipe {path} does not exist; built-in recipes: {built_in}")


def _built_in(name: str) -> tuple[Path, Path]:
    return RECIPES / name, RECIPES / f"{name}.yaml"


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a recipe file, on top of what it extends. Raises `UserError` if the file is no recipe."""
    if path in seen:
        raise UserError(f"{path}: 'extends' goes in a circle")
    values = own(path)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    beside = path.parent / str(parent)
    parent_path = next((file.resolve() for file in (beside, *_built_in(str(parent))) if file.is_file()), None)
    if parent_path is None:
        raise UserError(f"{path}: extends {parent}, which does not exist")
    return _merge(read(parent_path, (*seen, path)), values)


def own(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file, without what it extends. Raises `UserError` if the file is no recipe."""
    try:
        values = _load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, found {type(values).__name__}")
    return values


def _load(text: str) -> Any:
    return yaml.load(text, _Loader)


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
        value = _load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"--set {assignment}: the value is not valid YAML") from None
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {assignment}: '{section}' is not a section")
    values[last] = value
