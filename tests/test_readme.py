"""What the README says to type works: its commands, at a reduced size, from a folder that is not the checkout."""

import gzip
import json
import os
import pydoc_data.topics
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import nanophi
from nanophi import cli
from nanophi.files import read_json

ROOT = Path(nanophi.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NANOPHI = [sys.executable, "-m", "nanophi"]
SMALL = {
    "training.steps": 12,
    "training.keep_steps": [6],
    "training.save_steps": 6,
    "training.warmup_steps": 2,
    "training.batch_size": 4,
    "evaluation.limit": 12,
}
SMALL_OPTIONS = [part for key, value in SMALL.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def shell(command: list[str], folder: Path, **kwargs) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **kwargs.pop("env", {})}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def make_line(target: str) -> list[str]:
    """The `nanophi` command that `make TARGET` runs, without the path in front."""
    makefile = (ROOT / "Makefile").read_text()
    line = re.search(rf"^{target}:.*\n\t\$\(BIN\)/nanophi (.*)$", makefile, flags=re.MULTILINE)
    assert line is not None
    return shlex.split(line.group(1))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """`make demo`, with fewer steps and items."""
    folder = tmp_path_factory.mktemp("readme")
    assert any(re.match(r"make demo\b", block) for block in blocks("bash"))
    arguments = [str(ROOT / part) if part.startswith("recipes/") else part for part in make_line("demo")]
    done = shell([*NANOPHI, *arguments, *SMALL_OPTIONS], folder)
    return folder, done.stdout


def test_the_demo_prints_its_comparison_and_a_sample(demo):
    folder, out = demo
    assert "bits per byte" in out
    assert "bz2 -9, same text" in out
    assert "demo-control" in out
    sample = read_json(folder / "runs/demo/sample.json")["text"]
    assert sample in out
    assert "release: runs/demo/release" in out
    corpus = read_json(folder / "runs/demo/data/documents/documents.json")
    assert corpus["bytes"] > 10e6
    quality = read_json(folder / "runs/demo/data/quality/quality.json")
    assert 0.2 < quality["kept_bytes_fraction"] < 0.8
    control = read_json(folder / "runs/demo-control/data/tokens/tokens.json")
    filtered = read_json(folder / "runs/demo/data/tokens/tokens.json")
    assert filtered["heldout"] == control["heldout"]
    assert filtered["train"]["tokens"] < control["train"]["tokens"]


def test_the_python_snippet_runs(demo):
    folder, _ = demo
    snippets = [block for block in blocks("python") if "pipeline(" in block]
    assert snippets
    for snippet in snippets:
        for trusted in (False, True):
            code = snippet.replace('release")', 'release", trust_remote_code=True)') if trusted else snippet
            environment = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
            done = shell([sys.executable, "-I", "-c", code], folder, env=environment)
            assert done.stdout.startswith("The function returns")
            assert done.stdout.rstrip("\n") == read_json(folder / "runs/demo/sample.json")["text"].rstrip("\n")
            for complaint in ("newly initialized", "You are using a model of type"):
                assert complaint not in done.stderr


def test_a_second_time_everything_is_up_to_date(demo):
    folder, _ = demo
    arguments = [str(ROOT / part) if part.startswith("recipes/") else part for part in make_line("demo")]
    out = shell([*NANOPHI, *arguments, *SMALL_OPTIONS], folder).stdout
    assert " done in " not in out
    assert "shared with" not in out
    assert "up to date" in out


def test_own_data(tmp_path):
    """The recipe under "Your own data", with the sources that need no Hub."""
    recipe = next(block for block in blocks("yaml") if "name: mine" in block)
    lines = [line for line in recipe.splitlines() if "hub:" not in line or "scorer" in line]
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    (tmp_path / "good").mkdir()
    (tmp_path / "web").mkdir()
    texts = [
        text[start : start + 2000] for text in pydoc_data.topics.topics.values() for start in range(0, len(text), 2000)
    ]
    with gzip.open(tmp_path / "good/a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    spam = [
        f"{number} BUY NOW!!! " + " ".join(f"www.{word}.com/$$$" for word in text.split()[:200])
        for number, text in enumerate(texts)
    ]
    pq.write_table(pa.table({"content": spam}), tmp_path / "web/a.parquet")
    commands = [
        line.split("#")[0].split() for block in blocks("bash") for line in block.splitlines() if "mine.yaml" in line
    ]
    assert [command[:2] for command in commands] == [["nanophi", "prepare"], ["nanophi", "run"]]
    shell([*NANOPHI, *commands[0][1:], *SMALL_OPTIONS], tmp_path)
    quality = read_json(tmp_path / "runs/mine/data/quality/quality.json")
    assert quality["sources"]["good"]["kept_documents"] > 0.9 * quality["sources"]["good"]["documents"]
    assert quality["sources"]["web"]["kept_documents"] < 0.1 * quality["sources"]["web"]["documents"]
    assert (tmp_path / "runs/mine/data/quality/quality.md").exists()


def test_every_verb_in_the_readme_exists():
    verbs = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    verbs |= {group.name for group in cli.app.registered_groups}
    named = set(re.findall(r"nanophi (?!VERB)([a-z]+)\b", "\n".join(re.findall(r"`([^`\n]+)`", README))))
    assert named <= verbs
    table = re.search(r"## The command\n(.*?)\n## ", README, flags=re.DOTALL).group(1)
    assert all(f"{verb}" in table for verb in verbs)


def test_every_file_in_the_layout_exists():
    layout = README.split("## Layout")[1]
    names = re.findall(r"[\w/]+\.(?:py|md)\b", layout)
    assert len(names) > 4
    for name in names:
        assert (ROOT / name).exists(), name
    for folder in re.findall(r"^(\w+)/ ", layout, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
