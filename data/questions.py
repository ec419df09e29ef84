"""The embedded questions: what the documentation of Python and of the installed packages answers.

What does os.path.join do?              the first sentence of its docstring; of a class: What is ...?
Which arguments does os.path.join take? from its signature
Where do I find join of os.path?        its kind and module
"""

import ast
import inspect
import re
from collections.abc import Iterator
from typing import Any

from nanophi.data import installed_docs
from nanophi.data.documents import id_of, uniform_from_id

PACKAGE_OBJECTS = 150
"""Of one package (of the standard library ten times as many), so that no large one is most of the questions."""
HELDOUT_SHARE = 0.1
_SENTENCE = re.compile(r"[A-Z].{15,160}?[a-z)\]]\.(?=\s|$)", re.DOTALL)
_MARKUP = re.compile(r":\w+:`~?\.?([^`<]+)`|``?([^`]+)``?|\*\*?([^*\s][^*]*)\*\*?")
_NOT_PROSE = re.compile(r"[`<>{}|\\]|::|>>>|https?:")


def conversations() -> Iterator[tuple[bool, str, str]]:
    """`(held out, question, answer)` in an order that depends on the installed versions alone, each question once."""
    seen: set[str] = set()
    for group in installed_docs.groups():
        for name, kind, documentation, arguments in _objects(group):
            sentence = first_sentence(documentation)
            if sentence is None or name in seen:
                continue
            seen.add(name)
            held_out = bool(uniform_from_id([id_of(sentence)])[0] < HELDOUT_SHARE)
            if held_out and len(documentation) >= installed_docs.MINIMUM_CHARACTERS:
                continue  # the corpus may hold it
            verb = f"What does {name} do?" if kind in ("function", "method") else f"What is {name}?"
            yield held_out, verb, sentence
            if arguments is not None:
                listed = " and ".join(filter(None, (", ".join(arguments[:-1]), arguments[-1]))) if arguments else "none"
                yield held_out, f"Which arguments does {name} take?", f"It takes {listed}."
            elif kind == "class":
                module, _, last = name.rpartition(".")
                yield held_out, f"Where do I find {last} of {module}?", f"It is a class in the module {module}."


def first_sentence(documentation: str) -> str | None:
    """The first sentence of a docstring on one line, without markup; None if it has none of 20 to 160 characters."""
    text = _MARKUP.sub(lambda match: next(filter(None, match.groups())), documentation.split("\n\n")[0])
    match = _SENTENCE.match(" ".join(text.split()))
    return match.group() if match and not _NOT_PROSE.search(match.group()) else None


def _objects(group: str) -> Iterator[tuple[str, str, str, list[str] | None]]:
    """Public `(name, kind, docstring, arguments of a function)` of the standard library or of an installed package."""
    files = installed_docs.python_files(group)
    left = PACKAGE_OBJECTS * (10 if group == "python" else 1)
    # In pseudo-random order, so that the limit leaves a cross-section.
    for name in sorted(files, key=id_of):
        parts = name.removesuffix(".py").removesuffix("/__init__").split("/")
        if any(part.startswith("_") or not part.isidentifier() for part in parts):
            continue
        tree = installed_docs.parse(installed_docs.read(files[name]))
        if tree is None:
            continue
        for found in _of_tree(tree, "os.path" if name == "posixpath.py" else ".".join(parts), "module"):
            yield found
            left -= 1
            if left == 0:
                return


def _of_tree(node: Any, name: str, kind: str) -> Iterator[tuple[str, str, str, list[str] | None]]:
    if documentation := ast.get_docstring(node):
        arguments = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments = [argument.arg for argument in given if argument.arg not in ("self", "cls")]
            rest = (("*", node.args.vararg), ("**", node.args.kwarg))
            arguments = [*arguments, *(stars + argument.arg for stars, argument in rest if argument)][:8]
        yield name, kind, inspect.cleandoc(documentation), arguments
    for child in node.body if kind in ("module", "class") else ():
        if isinstance(child, installed_docs.DEFINITIONS) and child.name[0] != "_":
            inner = "class" if isinstance(child, ast.ClassDef) else "method" if kind == "class" else "function"
            yield from _of_tree(child, f"{name}.{child.name}", inner)
