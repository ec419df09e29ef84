"""A release on its way to the Hub and back: pushed, used by a stranger, verified, submitted.

    python tests/publish.py RELEASE        (make hub RELEASE=runs/demo/release)

The real huggingface_hub client talks to the loopback Hub; every step is a fresh process with an empty cache, away from
the checkout. The release must lie in its run directory, with a checkpoint beside its own, as `make demo` leaves it.
Exit status 1 and one line per failure if a step does not do what it promises.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hub_server import HubServer  # type: ignore[import-not-found]

from nanophi.files import read_json

REPO_ID = "org/demo"

USE = """
import json, sys
from transformers import pipeline
options, prompt, settings = json.loads(sys.argv[1])
made = pipeline("text-generation", model="org/demo", device="cpu", **options)
print(json.dumps([type(made.model).__name__, made(prompt, **settings)[0]["generated_text"]]))
"""

BAD_WARNINGS = ("newly initialized", "to instantiate a model of type", "not used when")


class Stranger:
    """Runs commands with nothing but the Hub's address and a token."""

    def __init__(self, hub: HubServer, scratch: Path) -> None:
        self.hub, self.scratch, self.started = hub, scratch, 0

    def __call__(self, *command: str) -> subprocess.CompletedProcess[str]:
        home = self.scratch / f"home-{self.started}"
        home.mkdir()
        self.started += 1
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
        environment = {**kept, **self.hub.environment(home)}
        return subprocess.run(
            [sys.executable, *command], env=environment, cwd=home, capture_output=True, text=True, timeout=600
        )

    def nanophi(self, *arguments: str) -> list[str]:
        """Runs a verb; what is wrong with the outcome."""
        done = self("-I", "-m", "nanophi", *arguments)
        return [] if done.returncode == 0 else [line for line in [*done.stdout.splitlines(), done.stderr] if line]

    def use(self, options: dict[str, Any], sample: dict[str, Any], expected: list[str]) -> list[str]:
        """Loads with `pipeline` and lets it write; what is wrong with the outcome."""
        done = self("-I", "-c", USE, json.dumps([options, sample["prompt"], sample["settings"]]))
        if done.returncode:
            return done.stderr.splitlines()[-1:]
        found = json.loads(done.stdout.splitlines()[-1])
        wrong = [f"expected {expected}, got {found}"] if found != expected else []
        return wrong + [
            f"warns: {line}" for line in done.stderr.splitlines() if any(bad in line for bad in BAD_WARNINGS)
        ]


def publish(release: Path, hub: HubServer, scratch: Path, report: Callable[[str], None] = print) -> list[str]:
    """Every step in order; one line per failure."""
    release = release.resolve()
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
        wrong = stranger.nanophi("push", str(release), "--repo-id", REPO_ID, "--public", "--gguf", "f16,q8_0")
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
        return wrong

    step(f"push: main, {', '.join(branches)}, tag {described['tag']}; GGUF files", push)
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
