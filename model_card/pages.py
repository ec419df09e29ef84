"""Markdown pages from Jinja templates: the model card, and the pages of what is published beside a model.

A value that is missing, None or not a number stops a page: nothing is filled in. Text from data is escaped by the
template (`text`, `code`, `fenced`), which also has the wording; what is shown is decided by the callers.
"""

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import CardData

from nanophi.core import formatting, markup
from nanophi.core.errors import UserError
from nanophi.core.files import write_text
from nanophi.core.names import is_hub_id
from nanophi.core.version import __version__
from nanophi.eval import catalogue
from nanophi.model_card import exports
from nanophi.model_card.manifest import write_manifest

FOLDER = Path(__file__).parent  # of the templates


def render(template: str, **values: Any) -> str:
    """A page. Raises `UserError` if the template asks for something that no record holds."""
    try:
        return _ENVIRONMENT.get_template(template).render(**values)
    except (jinja2.UndefinedError, TypeError) as error:
        raise UserError(f"{template} needs a value that no record holds: {error}") from None


def write_page(output: Path, template: str, metadata: CardData, provenance: dict[str, Any], **values: Any) -> None:
    """Write README.md and the manifest of a repository beside a model's; its other files are there already."""
    write_text(output / "README.md", render(template, metadata=metadata.to_yaml(line_break="\n"), **values))
    write_manifest(output, {"nanophi": __version__, **provenance})


def html(template: str, data: Any) -> str:
    """A page that works by itself: a template of HTML, the common style, and the data that its script shows."""
    page, style = ((FOLDER / name).read_text(encoding="utf-8") for name in (template, "page.css"))
    return page.replace("/*STYLE*/", style).replace("/*DATA*/", markup.script_safe(data))


# Filters of the templates


def _present(value: Any) -> Any:
    """The value of an expression, unless it is nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise jinja2.UndefinedError(f"an expression is {value}")
    return value


class _Missing(jinja2.StrictUndefined):
    """A value that is not there; formatting it fails with its name, as every other use of it does."""

    __abs__ = __format__ = __round__ = jinja2.StrictUndefined._fail_with_undefined_error


def _of_value(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda value, *arguments: function(_present(value), *arguments)


def bits_per_byte(part: dict[str, Any] | None) -> str:
    """Bits per byte of a part of the held-out text, with the standard error if it is of several documents."""
    if part is None:
        return "-"
    stderr = part["bits_per_byte_stderr"] if part["documents"] > 1 else None
    return catalogue.score({"value": part["bits_per_byte"], "stderr": stderr}, "bits_per_byte")


def _verdicts(rows: list[dict[str, Any]]) -> str:
    """`better on "a", "b"; worse on "c"`, what is empty left out; in quotes, as titles have commas of their own."""
    parts = []
    for verdict in ("better", "worse", "within noise"):
        if titles := [f'"{row["title"]}"' for row in rows if row["verdict"] == verdict]:
            parts.append(f"{verdict} on {', '.join(titles)}")
    return "; ".join(parts)


FUNCTIONS: tuple[Callable[..., Any], ...] = (
    *(markup.code, markup.fenced, markup.text, exports.oldest_transformers),
    *(catalogue.metric_name, catalogue.row_title, catalogue.title),
    *(formatting.decimal, formatting.duration, formatting.figure),
    *(formatting.integer, formatting.percent, formatting.size),
)
FILTERS: dict[str, Callable[..., Any]] = {function.__name__: function for function in FUNCTIONS} | {
    "code_cell": lambda value: markup.code(value, cell=True),
    "literal": lambda text: json.dumps(text, ensure_ascii=False),
    "on_hub": lambda source: source["hub"] is not None and is_hub_id(source["hub"]),
    "plain": lambda text: re.sub(r"[{}\\`]", "", text),
    "rows": catalogue.main_rows,
    "shell": shlex.quote,
    "source_name": lambda source: source["name"] or source["hub"] or source["files"] or source["embedded"],
    "verdicts": _verdicts,
}
_LINES: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER), undefined=_Missing, finalize=_present, **_LINES
)
_ENVIRONMENT.filters.update({name: _of_value(function) for name, function in FILTERS.items()})
# Values that may be missing: `-` is shown.
_ENVIRONMENT.filters |= {
    "bits_per_byte": bits_per_byte,
    "metric": catalogue.metric,
    "score": lambda entry, metric: catalogue.score(entry, metric) or "-",
}
