"""The embedded corpus: English documentation of Python and of the packages that are installed beside nanophi.

Sources, by the name that documents carry:
    python-docs           the language reference (`pydoc_data.topics`)
    stdlib-docstrings     docstrings of the standard library, mostly prose
    package-docstrings    docstrings of installed packages, mostly prose
    parameter-lists       docstrings of both, mostly lists of parameters, attributes or options
    package-descriptions  long descriptions (README) of installed packages
    licences, changelogs  files of these kinds in installed packages

Modules are parsed, not imported. The same installed versions always give the same documents in the same order.
"""

import ast
import gc
import hashlib
import importlib.metadata
import inspect
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanophi.data.documents import id_of

HIGH = ("python-docs", "stdlib-docstrings")
"""Sources that serve as examples of good text for the linear scorer."""
LOW = ("licences", "changelogs", "parameter-lists")
"""Sources that serve as examples of low-quality text."""

DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MINIMUM_CHARACTERS = 300
_MAXIMUM_CHARACTERS = 20_000
# A few packages have tens of megabytes of near-identical docstrings; without a cap they would be the corpus.
_PACKAGE_BYTES = 1_000_000
_TESTS = re.compile(r"(^|/)(tests?|testing|_?test_[^/]*|idlelib|lib2to3)(/|\.py$)")
_PARAMETERS = re.compile(
    r"^\s*(Parameters|Args|Arguments|Attributes|Returns?|Raises|Yields|Keyword [Aa]rguments|Other Parameters|Options)"
    r"\s*:?\s*$|^\s*:(param|type|returns?|rtype|raises)\b|^\s*Args:",
    re.MULTILINE,
)
_MARKUP_LINE = re.compile(
    r"^\s*(<[^>]*>\s*)+$|^\s*\[?!\[|^\s*\.\. (image|figure|raw|\||_)|^\s*:(target|alt|height|width):|<img "
)
_STOPWORDS = {
    *("the", "of", "to", "and", "a", "in", "is", "that", "for", "it", "as", "be"),
    *("on", "with", "are", "this", "by", "or", "an", "not", "if", "from", "can", "which"),
}


def inputs() -> dict[str, Any]:
    """What the corpus depends on: Python's version and every installed distribution's."""
    versions = sorted({f"{_name(distribution)}=={distribution.version}" for distribution in _distributions()})
    return {"python": platform.python_version(), "packages": hashlib.sha256("\n".join(versions).encode()).hexdigest()}


def groups() -> list[str]:
    """Names of the corpus's parts, in order: `python`, then the installed packages."""
    return ["python", *(_name(distribution) for distribution in _distributions())]


def documents(group: str) -> Iterator[tuple[str, str]]:
    """`(source, text)` of one part."""
    for source, text in _python() if group == "python" else _package(group):
        # Without badges, images and lines that consist of tags.
        text = "\n".join(line for line in text.splitlines() if not _MARKUP_LINE.search(line)).strip()
        text = text[:_MAXIMUM_CHARACTERS] if source in ("licences", "changelogs") else text
        if len(text) >= MINIMUM_CHARACTERS and _is_english(text):
            yield source, text


def _name(distribution: importlib.metadata.Distribution) -> str:
    return re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()


def _distributions() -> list[importlib.metadata.Distribution]:
    found = {_name(distribution): distribution for distribution in importlib.metadata.distributions()}
    return [found[name] for name in sorted(found) if name not in ("nanophi", "")]


def _python() -> Iterator[tuple[str, str]]:
    from pydoc_data import topics

    for key in sorted(topics.topics):
        yield "python-docs", topics.topics[key]
    for path in python_files("python").values():
        yield from _docstrings(path, "stdlib-docstrings")


def _package(name: str) -> Iterator[tuple[str, str]]:
    distribution = importlib.metadata.distribution(name)
    yield "package-descriptions", str(distribution.metadata.json.get("description", ""))
    for file in sorted(distribution.files or (), key=str):
        lower = file.name.lower()
        if lower.startswith(("licen", "copying", "notice")) and ".py" not in lower:
            yield "licences", read(Path(str(file.locate())))
        elif lower.startswith(("change", "history", "news", "release")) and lower.endswith((".md", ".rst", ".txt")):
            yield "changelogs", read(Path(str(file.locate())))
    # In pseudo-random order, so that the cap leaves a cross-section.
    size = 0
    for _, path in sorted(python_files(name).items(), key=lambda item: id_of(item[0])):
        if size > _PACKAGE_BYTES:
            break
        for source, text in _docstrings(path, "package-docstrings"):
            size += len(text)
            yield source, text


def python_files(group: str) -> dict[str, Path]:
    """The Python files of a group by relative name, in order, tests apart."""
    if group == "python":
        library = Path(sysconfig.get_path("stdlib"))
        files = {path.relative_to(library).as_posix(): path for path in sorted(library.rglob("*.py"))}
        files = {name: path for name, path in files.items() if "-packages/" not in name}
    else:
        found = sorted(importlib.metadata.distribution(group).files or (), key=str)
        files = {str(file): Path(str(file.locate())) for file in found if file.name.lower().endswith(".py")}
    return {name: path for name, path in files.items() if not _TESTS.search(name)}


def read(path: Path) -> str:
    """A file's text; empty if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8", errors="strict")
    except (OSError, UnicodeDecodeError):
        return ""


def parse(text: str) -> ast.Module | None:
    """The syntax tree of a module; None if it has none."""
    collecting = gc.isenabled()
    gc.disable()  # a tree is many objects, none of them garbage: to collect while it grows doubles the time
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    finally:
        if collecting:
            gc.enable()


def _docstrings(path: Path, source: str) -> Iterator[tuple[str, str]]:
    text = read(path)
    pending: list[Any] = [parse(text)] if '"""' in text or "'''" in text else []
    while pending:
        node = pending.pop()
        body = getattr(node, "body", [])
        # Only definitions can hold docstrings; walking expressions would take most of the time.
        pending += [child for child in reversed(body) if isinstance(child, DEFINITIONS)]
        if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            value = body[0].value.value
            if isinstance(value, str) and len(value) >= MINIMUM_CHARACTERS:
                docstring = inspect.cleandoc(value)
                yield "parameter-lists" if _parameter_share(docstring) > 0.6 else source, docstring


def _parameter_share(text: str) -> float:
    """Share of the text that follows the first heading of a parameter list."""
    match = _PARAMETERS.search(text)
    return (len(text) - match.start()) / len(text) if match else 0.0


def _is_english(text: str) -> bool:
    """Whether the text is mostly English words: not a table, not encoded data, not another language."""
    letters = sum(map(str.isalpha, text))
    spaces = sum(map(str.isspace, text))
    if letters < 0.7 * (len(text) - spaces) or sum(map(str.isascii, text)) < 0.97 * len(text):
        return False
    words = re.findall(r"[a-z]+", text.lower())
    return bool(words) and sum(word in _STOPWORDS for word in words) >= 0.08 * len(words)
