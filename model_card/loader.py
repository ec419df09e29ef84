"""Loads a release in a fresh process, by either loader: stock Phi, or the release's own code (`trust_remote_code`).

The process has an empty cache, the packages of this one, and no nanophi. What it does is in `load_release.py`; what its
report has to be, in `checks.py`.
"""

import importlib.resources
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from nanophi.core.files import read_json, write_json
from nanophi.model_card.records import ShippedRecords


def load(folder: Path, records: ShippedRecords, scratch: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `load_release.py` answers for stock Phi and for the remote code, run at once; or `error`, one line."""
    script = importlib.resources.files("nanophi.model_card").joinpath("load_release.py").read_text(encoding="utf-8")
    sample = records.get("sample.json", {"prompt": "The ", "settings": {"do_sample": False, "max_new_tokens": 30}})
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "TRANSFORMERS_"))}
    # Packages may be on PYTHONPATH alone, or a user's; the current folder and code of other releases stay out.
    paths = [Path(entry).resolve() for entry in sys.path if entry]
    packages = [str(path) for path in paths if path != Path.cwd() and not (path / "transformers_modules").is_dir()]
    started = []
    for name in ("stock", "remote"):
        home = scratch / name
        home.mkdir()
        request = {
            "path": str(folder),
            "trust": name == "remote",
            "prompt": sample["prompt"],
            "settings": sample["settings"],
            "text": sample.get("text", sample["prompt"]),
            "documents": [item["text"] for item in records.get("heldout.json", [])],
            "answer": str(home / "answer.json"),
            "logits": str(home / "logits.safetensors"),
            "packages": packages,
        }
        write_json(home / "request.json", request)
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", script, str(home / "request.json")],
            cwd=home,
            env=kept | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append((process, request))
    stock, remote = (_answer(process, request) for process, request in started)
    return stock, remote


def _answer(process: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
    output, _ = process.communicate()
    if process.returncode == 0:
        return {**read_json(Path(request["answer"])), "logits": request["logits"]}
    last = [line for line in output.splitlines() if line.strip()][-1:] or [f"exit status {process.returncode}"]
    return {"error": last[0]}
