"""The structure of the package: which part may import which, no circles, and files of one job each."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent
ROOMS = ("core", "data", "training", "eval", "model_card", "experiments")
MODEL = ("configuration_nanophi", "modeling_nanophi")
MAY_IMPORT = {
    # The two files that travel with a release import nothing of the package but each other.
    "configuration_nanophi": (),
    "modeling_nanophi": ("configuration_nanophi",),
    "core": ("configuration_nanophi",),
    "data": ("core", *MODEL),
    "training": ("core", "data", *MODEL),
    "eval": ("core", "data", *MODEL),
    "model_card": ("core", "data", "eval", *MODEL),
    "pipeline": ("core", "data", "training", "eval", "model_card", *MODEL),
    "experiments": ("core", "data", "training", "eval", "model_card", "pipeline", *MODEL),
    "cli": ("core",),
    "__main__": ("cli",),
    "__init__": ("core", *MODEL),
}
"""Room, or module at the root -> what it may import of the package, beside itself."""


def modules() -> dict[str, Path]:
    """Dotted name below `nanophi` -> file, of everything that is installed."""
    paths = [*PACKAGE.glob("*.py"), *(path for room in ROOMS for path in (PACKAGE / room).rglob("*.py"))]
    named = {}
    for path in paths:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return named


def imported(path: Path) -> set[str]:
    """Dotted names that a module imports, anywhere in its text; those of its own folder as `nanophi.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = f"nanophi.{node.module}" if node.level else str(node.module)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    below = {name: {target.removeprefix("nanophi.") for target in imported(path)} for name, path in known.items()}
    return {name: targets & set(known) - {name} for name, targets in below.items()}


def test_every_import_points_down(graph):
    upward = []
    for name, targets in graph.items():
        room = name.partition(".")[0]
        others = {target.partition(".")[0] for target in targets} - {room, *MAY_IMPORT[room]}
        upward += [f"{name} imports {other}" for other in others]
    assert not upward
    assert len(graph) > 40 and any(target.startswith("data.") for target in graph["pipeline"]), "the check sees imports"


def test_no_circle_of_imports(graph):
    circles = []
    finished: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            circles.append(" -> ".join((*above[above.index(name) :], name)))
        elif name not in finished:
            for target in sorted(graph[name]):
                visit(target, (*above, name))
            finished.add(name)

    for name in sorted(graph):
        visit(name, ())
    assert not circles


def test_every_library_that_is_imported_is_declared():
    """In `dependencies` or in an extra, so that no import works by another package's kindness alone."""
    declared = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [declared["dependencies"], *declared["optional-dependencies"].values()]
    names = {re.match(r"[\w.-]+", line).group().lower().replace("-", "_") for group in lists for line in group}
    distributions = {"yaml": "pyyaml", "sklearn": "scikit_learn"}
    missing = {
        f"{name} imports {target}"
        for name, path in modules().items()
        for target in {full.partition(".")[0] for full in imported(path)} - sys.stdlib_module_names - {"nanophi"}
        if distributions.get(target, target) not in names
    }
    assert not missing
