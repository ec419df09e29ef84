"""What CONTRIBUTING.md shows how to add is added as it stands there, and used."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import jinja2
import pytest
import tiny_run
import yaml

from nanophi import data, training
from nanophi.core import registry
from nanophi.core.recipe import Source, load_recipe
from nanophi.data import formats, sources
from nanophi.eval import catalogue, suites
from nanophi.model_card import card, pages
from nanophi.pipeline import Pipeline

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```\w+\n(?:# |\{# )([\w/.]+)(?:, in (\w+))?(?: #\})?\n(.*?)^```", re.M | re.S)
BLOCKS = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())
FILES = {path: text for path, place, text in BLOCKS if not place}
LINES = {place: text.strip() for _, place, text in BLOCKS if place}


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The files of the examples that are modules or templates of their own, in folders that the package finds too."""
    for path in ("data/variety.py", "training/adafactor.py", "model_card/sections/licences.md"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(FILES[path])
    for package in (data, training):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / package.__name__.split(".")[-1])])
    yield tmp_path
    for name in ("nanophi.data.variety", "nanophi.training.adafactor"):
        sys.modules.pop(name, None)


def register(monkeypatch, table, line, names=None):
    for key, value in eval(f"{{{line}}}", names or {}).items():
        monkeypatch.setitem(table, key, value)


def test_every_example_says_where_it_goes():
    assert set(LINES) == {"SCORERS", "READERS", "suites", "OPTIMIZERS", "SECTIONS"} and len(FILES) == 4
    assert not any((ROOT / path).exists() for path in FILES if path != "data/formats.py")


def test_a_scorer(added, monkeypatch):
    register(monkeypatch, registry.SCORERS, LINES["SCORERS"])
    rows = [f"{n} every word of this line is another one" for n in range(20)] + [f"{n} and" * 9 for n in range(20)]
    (added / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    (added / "held.jsonl").write_text('{"text": "a text of its own that is held out"}\n')
    files = {name: str(added / f"{name}.jsonl") for name in ("texts", "held")}
    sources = [{"files": file, "name": name, "heldout": name == "held"} for name, file in files.items()]
    sections = {"data": {"sources": sources, "deduplication": {"near": False}, "workers": 1}}
    sections |= {"quality": {"scorer": "variety", "threshold": 0.5}, "name": "new", "extends": "demo.yaml"}
    (added / "new.yaml").write_text(yaml.safe_dump(sections))
    summary = Pipeline(load_recipe(added / "new.yaml"), added / "runs", report=str).make("quality")
    assert (summary["documents"], summary["kept_documents"]) == (40, 20)


def test_a_format(added, monkeypatch):
    names = vars(formats).copy()
    exec(FILES["data/formats.py"], names)
    register(monkeypatch, formats.READERS, LINES["READERS"], names)
    (added / "notes.org").write_text("* One\nfirst\n** inner\n* Two\nsecond\n")
    rows = sources.reader(Source(files="notes.org"), str(added / "notes.org")).rows()
    assert [row.text for row in rows] == [b"One\nfirst\n** inner", b"Two\nsecond"]


def test_a_suite(added, monkeypatch):
    text = (ROOT / "eval/tasks.yaml").read_text()
    (added / "tasks.yaml").write_text(text.replace("\nsuites:\n", f"\nsuites:\n  {LINES['suites']}\n"))
    for name in ("catalogue.py", "references.yaml"):
        (added / name).write_text((ROOT / "eval" / name).read_text())
    spec = importlib.util.spec_from_file_location("changed_catalogue", added / "catalogue.py")
    changed = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, changed)
    spec.loader.exec_module(changed)
    entries = changed.SUITES["commonsense"].entries
    assert [(entry.task, entry.shots) for entry in entries] == [("hellaswag", None), ("piqa", None), ("winogrande", 5)]
    monkeypatch.setitem(catalogue.SUITES, "commonsense", changed.SUITES["commonsense"])
    assert suites.find_suite("commonsense").entries == entries
    assert suites.context_problem(["commonsense"], 1024) == ""


def test_an_optimizer(added, monkeypatch):
    register(monkeypatch, registry.OPTIMIZERS, LINES["OPTIMIZERS"])
    tiny_run.train(tiny_run.make_run(added / "run"), optimizer="adafactor", steps=30, logging_steps=10)
    losses = [entry["loss"] for entry in json.loads((added / "run/training.json").read_text())["log"]]
    assert losses[-1] < losses[0]


def test_a_section_of_the_card(added, monkeypatch, records):
    loaders = [jinja2.FileSystemLoader(added / "model_card"), pages._ENVIRONMENT.loader]
    monkeypatch.setattr(pages._ENVIRONMENT, "loader", jinja2.ChoiceLoader(loaders))
    monkeypatch.setattr(card, "SECTIONS", (*card.SECTIONS, *eval(f"[{LINES['SECTIONS']}]")))
    text = card.render(records)
    assert re.search(r"^## Licences of the sources\n\n- documentation: not stated$", text, re.M)
