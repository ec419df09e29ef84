"""A release, its control, scorer and data on their way to the Hub and back: pushed, used by a stranger, verified.

    python tests/publish.py RELEASE        (make hub RELEASE=runs/demo/release)

The real huggingface_hub client talks to the loopback Hub; every step is a fresh process with an empty cache, away from
the checkout. The release must lie in its run directory, with a checkpoint beside its own, as `make demo` leaves it. Its
control is that of the run directory's name and `-control`, where there is one.
Exit status 1 and one line per failure if a step does not do what it promises.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from hub_server import HubServer  # type: ignore[import-not-found]

from nanophi.core.files import read_json

REPO_ID, CONTROL_ID = "org/demo", "org/demo-control"

USE = """
import json, sys
from transformers import pipeline
options, prompt, settings = json.loads(sys.argv[1])
made = pipeline("text-generation", model="org/demo", device="cpu", **options)
print(json.dumps([type(made.model).__name__, made(prompt, **settings)[0]["generated_text"]]))
"""

STREAM = """
import hashlib, json
from datasets import load_dataset
rows = list(load_dataset("org/demo-data", split="train", streaming=True))
print(json.dumps([len(rows), sum(row["kept"] for row in rows)]))
assert all(hashlib.sha256(row["text"].encode()).hexdigest() == row["id"] for row in rows)
"""

BAD_WARNINGS = "newly initialized|to instantiate a model of type|not used when"


class Stranger:
    """Runs commands with nothing but the Hub's address and a token."""

    def __init__(self, hub: HubServer, scratch: Path) -> None:
        self.hub, self.scratch, self.started = hub, scratch, 0

    def __call__(self, *command: str) -> subprocess.CompletedProcess[str]:
        home = self.scratch / f"home-{self.started}"
        home.mkdir()
        self.started += 1
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
        place: Any = {"env": {**kept, **self.hub.environment(home)}, "cwd": home}
        return subprocess.run([sys.executable, "-I", *command], **place, capture_output=True, text=True, timeout=600)

    def nanophi(self, *arguments: str) -> list[str]:
        """Runs a verb; what is wrong with the outcome."""
        done = self("-m", "nanophi", *arguments)
        return [] if done.returncode == 0 else [line for line in [*done.stdout.splitlines(), done.stderr] if line]

    def use(self, options: dict[str, Any], sample: dict[str, Any], expected: list[str]) -> list[str]:
        """Loads with `pipeline` and lets it write; what is wrong with the outcome."""
        done = self("-c", USE, json.dumps([options, sample["prompt"], sample["settings"]]))
        if done.returncode:
            return done.stderr.splitlines()[-1:]
        found = json.loads(done.stdout.splitlines()[-1])
        wrong = [f"expected {expected}, got {found}"] if found != expected else []
        return wrong + [f"warns: {line}" for line in done.stderr.splitlines() if re.search(BAD_WARNINGS, line)]


def publish(release: Path, hub: HubServer, scratch: Path, report: Callable[[str], None] = print) -> list[str]:
    """Every step in order; one line per failure."""
    release = release.resolve()
    control = release.parent.with_name(f"{release.parent.name}-control") / "release"
    stranger, sample = Stranger(hub, scratch), read_json(release / "records" / "sample.json")
    described = read_json(release / "records" / "run.json")
    branches = [entry["revision"] for entry in read_json(release / "revisions.json")]
    if len(branches) < 2:
        return [f"{release} has no checkpoint beside its own; one is needed (training.keep_steps)"]
    failures: list[str] = []

    def step(name: str, check: Callable[[], list[str]]) -> None:
        start = time.monotonic()
        wrong = check()
        failures.extend(f"{name}: {line}" for line in wrong)
        report(f"{'FAILED' if wrong else 'ok    '} {time.monotonic() - start:5.1f} s  {name}")

    def push() -> list[str]:
        wrong = []
        if control.is_dir():
            wrong += stranger.nanophi("push", str(control), "--repo-id", CONTROL_ID, "--public")
        everything = ["--gguf", "f16,q8_0", "--scorer", "--data", "text", "--collection", "nano-phi-demo"]
        links = ["--control", CONTROL_ID] if control.is_dir() else []
        wrong += stranger.nanophi("push", str(release), "--repo-id", REPO_ID, "--public", *everything, *links)
        repository = hub.repositories.get(("model", REPO_ID))
        there = sorted(repository.branches) if repository else []
        if there != sorted(["main", *branches]):
            wrong.append(f"branches {there}, expected main and {branches}")
        elif repository.private or repository.tags.get(described["tag"]) is not repository.branches["main"]:
            wrong.append(f"tag {described['tag']} is not main, or the repository is not public")
        companion = hub.repositories.get(("model", f"{REPO_ID}-GGUF"))
        files = sorted(name for name in companion.branches["main"].files if ".gguf" in name) if companion else []
        if files != ["demo-f16.gguf", "demo-q8_0.gguf"]:
            wrong.append(f"GGUF files of the companion are {files}")
        collected = [{item["id"] for item in entry["items"]} for entry in hub.collections.values()]
        expected = {REPO_ID, *(f"{REPO_ID}-{suffix}" for suffix in ("quality", "data", "GGUF")), *links[1:]}
        if collected != [expected]:
            wrong.append(f"the collections hold {collected}, expected {expected}")
        return wrong

    def score() -> list[str]:
        """A stranger scores files of his own; here they are the run's held-out documents, whose scores are known."""
        mine, output = release.parent / "data" / "documents" / "heldout-*.parquet", scratch / "mine.parquet"
        named = ["--scorer", f"model:{REPO_ID}-quality@{described['tag']}", "--output", str(output)]
        if wrong := stranger.nanophi("quality", "score", str(mine), *named):
            return wrong
        known = pq.read_table(release.parent / "data" / "scores" / "scores.parquet", columns=["id", "quality_score"])
        scores = dict(zip(*known.to_pydict().values(), strict=True))
        found = pq.read_table(output).to_pylist()
        # A document's score differs in its last bit with the documents that it is multiplied with.
        differing = [row["id"] for row in found if abs(scores[row["id"]] - row["quality_score"]) > 1e-6]
        return [f"{len(differing)} of {len(found)} scores differ"] if differing or not found else []

    def stream() -> list[str]:
        done = stranger("-c", STREAM)
        if done.returncode:
            return done.stderr.splitlines()[-1:]
        quality = read_json(release.parent / "data" / "quality" / "quality.json")
        found = json.loads(done.stdout.splitlines()[-1])
        expected = [quality["documents"], quality["kept_documents"]]
        return [f"expected {expected} documents and kept ones, got {found}"] if found != expected else []

    def run_again() -> list[str]:
        """The recipe on the data set's page, completed, gives the tokens of the run."""
        page = hub.repositories["dataset", f"{REPO_ID}-data"].branches["main"].files["README.md"].data.decode()
        on_page = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
        if on_page is None:
            return ["the data set's page has no recipe"]
        own = yaml.safe_load((release.parent / "recipe.yaml").read_text(encoding="utf-8"))
        values = {"name": "again", **yaml.safe_load(on_page[1]), "model": own["model"], "training": own["training"]}
        (scratch / "again.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        if wrong := stranger.nanophi("prepare", str(scratch / "again.yaml"), "--runs", str(scratch / "runs")):
            return wrong
        both = [read_json(run / "data/tokens/tokens.json") for run in (release.parent, scratch / "runs" / "again")]
        first, second = ([tokens[split]["sha256"] for split in ("train", "heldout")] for tokens in both)
        return [f"token hashes {second}, expected {first}"] if first != second else []

    everything_else = f"GGUF files, scorer, data, {'control, ' if control.is_dir() else ''}collection"
    step(f"push: main, {', '.join(branches)}, tag {described['tag']}; {everything_else}", push)
    if failures:
        return failures
    final, first = sample["text"], branches[0]
    step("pipeline without trust", lambda: stranger.use({}, sample, ["PhiForCausalLM", final]))
    trusting = {"trust_remote_code": True}
    step("pipeline with trust", lambda: stranger.use(trusting, sample, ["NanoPhiForCausalLM", final]))
    earlier = ["PhiForCausalLM", sample["checkpoints"][first]]
    step(f"pipeline at {first}", lambda: stranger.use({"revision": first}, sample, earlier))
    step("verify", lambda: stranger.nanophi("verify", REPO_ID))
    step(f"verify at {first}", lambda: stranger.nanophi("verify", REPO_ID, "--revision", first))
    step("score files with the published scorer", score)
    step("stream the data set", stream)
    step("prepare the recipe over the published data: equal tokens", run_again)
    step("submit, the folder", lambda: stranger.nanophi("submit", str(release), "--repo-id", REPO_ID))
    step("submit, the repository", lambda: stranger.nanophi("submit", REPO_ID))
    return failures


def main() -> None:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "MANIFEST.json").is_file():
        sys.exit("usage: make hub RELEASE=runs/demo/release    (a release folder inside its run directory)")
    with tempfile.TemporaryDirectory(prefix="nanophi-hub-") as scratch, HubServer() as hub:
        failures = publish(Path(sys.argv[1]), hub, Path(scratch))
    for failure in failures:
        print(f"hub: {failure}", file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
