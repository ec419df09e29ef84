"""What README.md says to type works as it stands: its commands, on a demo of a few steps and a few documents."""

import contextlib
import gzip
import io
import json
import os
import pydoc_data.topics
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import fresh
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from command import nanophi
from hub_server import HubServer
from readme import README, ROOT, blocks, commands, run

from nanophi.cli import HIDDEN
from nanophi.cli import VERBS as TABLE
from nanophi.core.files import read_json
from nanophi.core.recipe import load_recipe
from nanophi.core.recipe_file import RECIPES
from nanophi.data import quality
from nanophi.eval import catalogue
from nanophi.experiments import ablation_render, ladder_render

COMMANDS = commands("The command")
VERBS = {name for name, verb in TABLE.items() if isinstance(verb, str) and name not in HIDDEN}
VERBS |= {f"quality {name}" for name in TABLE["quality"]}

SOURCES = [{"files": "good/*.jsonl.gz", "name": "good"}]
SOURCES += [{"files": "web/*.parquet", "name": "web", "text_column": "content"}]
SMALL = {
    "data": {"sources": SOURCES, "heldout_fraction": 0.1, "workers": 1},
    "quality": {"high": ["good"], "low": ["web"]},
    "tokenizer": {"vocab_size": 400},
    "model": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8},
    "training": {"steps": 8, "batch_size": 4, "warmup_steps": 2, "save_steps": 4, "keep_steps": [4], "eval_steps": 4}
    | {"logging_steps": 2},
    "evaluation": {"limit": 8},
}


def verb(arguments: list[str]) -> str:
    return " ".join(arguments[: 2 if arguments[0] == "quality" else 1])


def shell(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A current folder with text of its own, where `demo` and `demo-control` are recipes for a very small model."""
    folder = tmp_path_factory.mktemp("readme")
    topics = pydoc_data.topics.topics.values()
    texts = [text[start : start + 2000] for text in topics for start in range(0, len(text), 2000)][:150]
    words = [" ".join(f"www.{word}.com/$$$" for word in text.split()[:200]) for text in texts]
    spam = [f"{number} BUY NOW!!! {text}" for number, text in enumerate(words)]
    for name in ("good", "web", "books", "chat"):
        (folder / name).mkdir()
    for name, documents in (("good", texts), ("chat", spam)):
        with gzip.open(folder / name / "a.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    pq.write_table(pa.table({"content": spam}), folder / "web/a.parquet")
    for number, text in enumerate(texts):
        (folder / f"books/{number}.txt").write_text(text)
    (folder / "demo.yaml").write_text(yaml.safe_dump({"extends": str(RECIPES / "demo.yaml"), **SMALL}))
    (folder / "demo").write_text("extends: demo.yaml")
    shutil.copyfile(RECIPES / "demo-control.yaml", folder / "demo-control")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def demo(folder):
    """What `make demo` leaves, and what it printed."""
    makefile = (ROOT / "Makefile").read_text()
    line = re.search(r"^demo:.*\n\t\$\(BIN\)/nanophi (.*) --jobs 2$", makefile, flags=re.MULTILINE)
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as printed:
        assert not nanophi(*shlex.split(line.group(1)))
    printed.seek(0)
    return folder, printed.read()


def test_the_demo_prints_what_the_readme_shows(demo):
    folder, out = demo
    shown = {re.split(r" {2,}", line.strip())[0].rstrip(":") for line in blocks("text")[0].splitlines()}
    assert len(shown) > 8
    assert not [words for words in shown if words not in out]
    assert read_json(folder / "runs/demo/sample.json")["text"] in out
    assert "report:  runs/demo/report.html\nrelease: runs/demo/release" in out
    sources = read_json(folder / "runs/demo/data/quality/quality.json")["sources"]
    assert sources["good"]["kept_documents"] > 0.9 * sources["good"]["documents"]
    assert sources["web"]["kept_documents"] < 0.1 * sources["web"]["documents"]
    control = read_json(folder / "runs/demo-control/data/tokens/tokens.json")
    filtered = read_json(folder / "runs/demo/data/tokens/tokens.json")
    assert filtered["heldout"] == control["heldout"]
    assert filtered["train"]["tokens"] < control["train"]["tokens"]


ON_THE_HUB = ("push", "submit")
SLOW = ("ladder",)  # it measures the speed of a larger model
OFFLINE = [
    pytest.param(line, id=verb(line), marks=[pytest.mark.slow] * (verb(line) in SLOW))
    for line in COMMANDS
    if verb(line) not in (*ON_THE_HUB, "show")
]


@pytest.mark.parametrize("arguments", OFFLINE)
def test_a_command_works_as_it_stands(demo, capsys, arguments):
    assert not nanophi(*arguments)
    out = capsys.readouterr().out
    if verb(arguments) == "run":
        assert "up to date" in out
        assert " done in " not in out
        assert "shared with" not in out


def test_the_page_is_shown_until_ctrl_c(demo):
    folder, _ = demo
    (line,) = [line for line in COMMANDS if verb(line) == "show"]
    done = run(["-m", "nanophi", *line], folder, os.environ)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stdout


def test_publishing_works_as_it_stands(demo, tmp_path):
    """In one process of its own, because the client reads the Hub's address when it is imported."""
    folder, _ = demo
    lines = [line for line in COMMANDS if verb(line) in ON_THE_HUB]
    script = """
import json, sys
from nanophi.cli import main
for arguments in json.loads(sys.argv.pop()):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as stopped:
        if stopped.code:
            raise
"""
    with HubServer() as hub:
        shell([sys.executable, "-c", script, json.dumps(lines)], folder, **hub.environment(tmp_path))
        branches = hub.repositories[("model", "ORG/nano-phi-demo")].branches
        assert sorted(branches) == ["main", "step-000004", "step-000008"]


def test_the_python_snippet_runs(demo):
    folder, _ = demo
    expected = read_json(folder / "runs/demo/sample.json")["text"].rstrip("\n")
    snippet = blocks("python")[0]
    trusting = snippet.replace('release")', 'release", trust_remote_code=True)')
    assert trusting != snippet
    code = snippet + trusting + "print(type(generator.model).__name__)"
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    done = fresh.Popen([sys.executable, "-I", "-c", code], folder, environment)
    out = done.communicate()[0]
    assert done.returncode == 0, out
    assert out.count(expected) == 2
    assert "NanoPhiForCausalLM" in out
    for complaint in ("newly initialized", "You are using a model of type"):
        assert complaint not in out


def test_own_data(folder):
    """The recipe under "Your own data", with the sources that need no Hub."""
    recipe = next(block for block in blocks("yaml") if "name: mine" in block)
    lines = [line for line in recipe.splitlines() if "hub:" not in line]
    (folder / "mine.yaml").write_text("\n".join(lines))
    for arguments in commands("Your own data"):
        assert not nanophi(*arguments)
    assert (folder / "runs/mine/data/quality/quality.md").exists()
    assert (folder / "runs/mine/release/MANIFEST.json").exists()


def test_a_scorer_of_ones_own(folder, capsys):
    """The examples in the help of `nanophi quality`, one after the other."""
    for function in (quality.fit, quality.score, quality.report):
        example = re.search(r"Example: nanophi (.*)", function.__doc__).group(1)
        assert not nanophi(*shlex.split(example))
    assert "test documents" in capsys.readouterr().out
    assert "of 150 documents kept" in (folder / "quality/quality.md").read_text()


def test_what_is_named_outside_the_blocks_exists():
    assert {verb(arguments) for arguments in COMMANDS} | {"quality fit", "launch"} >= VERBS
    for line in re.findall(r"`(?:accelerate launch -m )?(nanophi (?!VERB)[^`\n]+)`", README):
        recipes = [word for word in line.split() if (RECIPES / f"{word}.yaml").exists()]
        assert line.split()[1] in {name.split()[0] for name in VERBS}
        assert all(load_recipe(name).name == name for name in recipes)
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / target).exists(), target


def answer(name: str, runs: int, beginning: str, folder: Path) -> tuple[dict, dict, str]:
    """What an experiment's records say now: its targets, the primary one's contrasts; and what the README says."""
    shutil.copytree(ROOT / "benchmarks" / name, folder, dirs_exist_ok=True)
    result = ablation_render.write_answer(folder)
    assert result["finished"] == len(result["runs"]) == runs
    assert (folder / "ablation.md").read_text() == (ROOT / f"benchmarks/{name}/ablation.md").read_text()
    answers = result["targets"]["answers"]
    quoted = " ".join(README[README.index(beginning) :].split("\n## ")[0].split())
    return result["targets"], {**answers["contrasts"], "check": answers["check"]}, quoted


def test_the_experiment_says_what_the_readme_says(tmp_path):
    targets, primary, quoted = answer("filter_effect", 24, "### Does the filter help?", tmp_path)
    assert primary["quality"]["verdict"] == "not found" and primary["check"]["verdict"] == "better"
    for name in ("quality", "repetition", "check"):
        for one in primary[name]["learning_rates"].values():
            assert catalogue.difference(one, "bits_per_byte") in quoted
    for target, verdict in (("kept", "better"), ("dropped", "worse")):
        quality = targets[target]["contrasts"]["quality"]
        assert quality["verdict"] == verdict
        assert all(f"{one['value']:+.4f}" in quoted for one in quality["learning_rates"].values())


def test_the_decays_say_what_the_readme_says(tmp_path):
    targets, primary, quoted = answer("decay_filter", 30, "The same filter at the end only", tmp_path)
    for found in primary.values():
        for one in found["learning_rates"].values():
            assert catalogue.difference(one, "bits_per_byte") in quoted
    assert primary["quality"]["verdict"] == "at one learning rate only" and primary["net"]["verdict"] == "not found"
    assert primary["check"]["verdict"] == "better"
    verdicts = ("kept", "net", "better"), ("dropped", "net", "worse"), ("dropped", "throughout", "worse")
    for name, contrast, verdict in verdicts:
        found = targets[name]["contrasts"][contrast]
        assert found["verdict"] == verdict
        assert all(f"{one['value']:+.4f}" in quoted for one in found["learning_rates"].values())


def test_the_ladder_says_what_the_readme_says(tmp_path):
    shutil.copytree(ROOT / "benchmarks/ladder", tmp_path, dirs_exist_ok=True)
    result = ladder_render.write_answer(tmp_path, ["d12", "published"])
    assert (tmp_path / "ladder.md").read_text() == (ROOT / "benchmarks/ladder/ladder.md").read_text()
    quoted = " ".join(README[README.index("Two ladders of 25 runs") :].split("![")[0].split())
    for entry in result["recipes"].values():
        found = entry["targets"]["heldout"]
        low, high = found["hidden"]["interval"]
        assert f"{found['hidden']['value']:.4f} [{low:.4f}, {high:.4f}]" in quoted
        assert f"{found['measured']:.4f}" in quoted and found["inside"]
        assert f"{found['hidden_ratio']:.2f}" in quoted and f"{found['ratio']:,.0f}" in quoted
        assert f"{100 * found['coverage']:.0f} %" in quoted and not found["confirmed"]


def numbers(value: object) -> dict[str, object]:
    """JSON with every number as a key of its own, which `pytest.approx` compares."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {f"{key} {name}": one for key, each in pairs for name, one in numbers(each).items()}
    return {"": value}


def test_the_dial_says_what_the_readme_says():
    folder = ROOT / "benchmarks/depth_dial"
    answer, script = read_json(folder / "answer.json"), runpy.run_path(str(folder / "run.py"))
    quoted = " ".join(README[README.index("Both scaled down to 3e12") :].split("\n\n")[0].split())
    assert numbers(answer) == pytest.approx(numbers(script["derived"]()), rel=1e-9)  # linear algebra differs by machine
    for budget in answer["flops"].values():
        for found in budget.values():
            low, high = found["interval"]
            assert f"{found['ratio']:.3f} [{low:.3f}, {high:.3f}]" in quoted and not found["extrapolated"]
    depths, rates = list(answer["rates"]), answer["rates"].values()
    best = [f"{found['best']:.2f}" for found in rates if found["within 1.5"]]
    told = [f"{', '.join(each[:-1])} and {each[-1]}" for each in (depths, best)]
    assert "At depths {} the best learning rates are {} times its own.".format(*told) in quoted
