"""Writes what editors and readers know of a recipe: `recipes/schema.json` and `docs/recipe.md`.

    python tests/recipe_schema.py

Both are made from `core/recipe.py`: types, defaults and limits from its classes, meanings from the comments beside the
fields. Recipes themselves are checked there, by the classes.
"""

import ast
import inspect
import json
import re
from typing import Any

import pydantic

from nanophi.core import dial, markup, recipe
from nanophi.core.files import write_text
from nanophi.core.recipe import SCHEMA

REFERENCE = SCHEMA.parents[1] / "docs/recipe.md"
EXTENDS = "a recipe file, or the name of a built-in recipe, whose values hold where this one states none"
DEPTH = "in place of a shape: width, heads, and what is not stated of batch, steps and rates follow from it"
SIGNS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def meanings(section: type[recipe.Section]) -> dict[str, str]:
    """Key -> the comment beside it and the text below it in the class; of a section, the class's own text."""
    lines, found = inspect.getsource(section).splitlines(), {}
    tree: Any = ast.parse("\n".join(lines)).body[0]
    for field, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            name = field.target.id
            beside = lines[field.end_lineno - 1][field.end_col_offset :].strip("# ")
            below = after.value.value if isinstance(after, ast.Expr) else ""
            words = f"{beside} {below}".strip() or inspect.getdoc(section.model_fields[name].annotation) or ""
            found[name] = " ".join(words.split())
    return found


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, in which no key is required: it may extend another recipe, which has them."""
    found = recipe.Recipe.model_json_schema()
    for section in recipe.Section.__subclasses__():
        definition = found if section is recipe.Recipe else found["$defs"][section.__name__]
        definition.pop("required", None)
        for key, words in meanings(section).items():
            definition["properties"][key]["description"] = words
    model = {"$ref": "#/$defs/Model", "description": found["properties"]["model"]["description"]}
    found["properties"] |= {"model": model, "extends": {"type": "string", "default": None, "description": EXTENDS}}
    found["$defs"]["Model"] = _model()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _model() -> dict[str, Any]:
    """The schema of `model`: fields of `NanoPhiConfig`, which its docstring explains, and the depth in their place."""
    from nanophi.configuration_nanophi import NanoPhiConfig

    explained = re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", str(inspect.getdoc(NanoPhiConfig)), re.MULTILINE)
    words = {name: " ".join(text.split()) for names, text in explained for name in names.split(", ")}
    types: dict[str, Any] = {"depth": int | None, **inspect.get_annotations(NanoPhiConfig)}
    words, defaults = {"depth": DEPTH, **words}, {"depth": None, **NanoPhiConfig().to_dict()}
    limits = {"depth": {"ge": 1, "le": dial.MAX_DEPTH}, **{name: {"ge": 1} for name in types if types[name] is int}}
    fields: dict[str, Any] = {
        name: (kind, pydantic.Field(default=defaults[name], description=words[name], **limits.get(name, {})))
        for name, kind in types.items()
    }
    forbid = pydantic.ConfigDict(extra="forbid", protected_namespaces=())
    return pydantic.create_model("Model", __config__=forbid, **fields).model_json_schema()


def reference() -> str:
    """`docs/recipe.md`: below its text, which stays, a table of each section's keys."""
    found = schema()
    head = REFERENCE.read_text(encoding="utf-8").partition("\n| key")[0]
    parts = [
        f"## {name}\n\n{section.get('description', '')}\n\n{_table(section)}"
        for name, section in found["$defs"].items()
    ]
    return "\n".join([head, _table(found), *parts])


def _table(section: dict[str, Any]) -> str:
    rows = []
    for key, spec in section["properties"].items():
        default = f"`{json.dumps(spec['default'])}`" if "default" in spec else "required"
        rows.append([f"`{key}`", _type(spec), "" if "$ref" in spec else default, spec["description"]])
    return markup.table(["key", "type", "default", "meaning"], rows, left=4) + "\n"


def _type(spec: dict[str, Any]) -> str:
    """A key's type and limits in words: `integer > 0 or null`."""
    if "$ref" in spec:
        name = spec["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in spec:
        return " or ".join(map(_type, spec["anyOf"]))
    if "enum" in spec:
        return " or ".join(f"`{value}`" for value in spec["enum"])
    if "items" in spec:
        return f"list of {_type(spec['items'])}"
    return " ".join([spec.get("type", "any"), *(f"{sign} {spec[key]}" for key, sign in SIGNS.items() if key in spec)])


if __name__ == "__main__":
    write_text(SCHEMA, json.dumps(schema(), indent=1) + "\n")
    write_text(REFERENCE, reference())
