"""Recipe files: found by path or built-in name, read with what they extend, changed by `--set`."""

import re
from pathlib import Path
from typing import Any

import yaml

from nanophi.core.errors import UserError, user_errors

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


class _Dumper(yaml.SafeDumper):
    """`yaml.SafeDumper` which quotes all text that `_Loader`, too, would read as anything else."""


_BREAKS = set("\x85\u2028\u2029")  # ends of lines in YAML 1.1, which a reader changes unless they are escaped
_NUMBERS = {
    "int": r"[-+]?[0-9][0-9_]*$",
    # Not `12e45`, which may be a commit.
    "float": r"[-+]?([0-9]+[eE][-+][0-9]+|([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|\.(inf|Inf))$|\.(nan|NaN)$",
}
for _tag, _pattern in _NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))
_Dumper.add_representer(
    str, lambda dumper, text: yaml.ScalarNode("tag:yaml.org,2002:str", text, style='"' if _BREAKS & {*text} else None)
)


def find_recipe(name: str | Path, folder: Path = Path()) -> Path:
    """The file of that name in the folder, or the built-in recipe. Raises `UserError` if there is neither."""
    for candidate in (folder / name, RECIPES / name, RECIPES / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    built_in = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
    raise UserError(f"recipe {folder / name} does not exist; built-in recipes: {built_in}")


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a recipe file, on top of what it extends. Raises `UserError` if the file is no recipe."""
    if path.resolve() in seen:
        raise UserError(f"{path}: 'extends' goes in a circle")
    values = own(path)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    return _merge(read(find_recipe(str(parent), path.parent), (*seen, path.resolve())), values)


def own(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file, without what it extends. Raises `UserError` if the file is no recipe."""
    with user_errors(f"{path}: cannot be read"):
        text = path.read_text(encoding="utf-8")
    values = _load(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, found {type(values).__name__}")
    return values


def _load(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{what}: not valid YAML ({' '.join(str(error).split())})") from None


def dump(values: Any, width: int = 80) -> str:
    """A recipe's mapping as YAML, which `read` and readers of YAML 1.1 read alike; lines of about `width` columns."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)


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
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {assignment}: '{section}' is not a section")
    values[last] = _load(text, f"--set {assignment}")
