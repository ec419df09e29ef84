"""Loads a release in a fresh process, by either loader: stock Phi, or the release's own code (`trust_remote_code`).

The process has an empty cache and no access to this checkout, and reports what it loaded and what that computes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from nanophi.core.files import read_json, write_json
from nanophi.model_card.records import ShippedRecords

# Runs with `python -I`, so that neither the current folder nor PYTHONPATH can give it code.
SCRIPT = r"""
import json, logging, os, sys, warnings
request = json.load(open(sys.argv[1]))
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import logging as hub_logging

messages = []
class Collect(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())
hub_logging.get_logger("transformers").addHandler(Collect(logging.WARNING))
warnings.showwarning = lambda message, *rest, **more: messages.append(str(message))
hub_logging.disable_progress_bar()

path, trust = request["path"], request["trust"]
model, info = AutoModelForCausalLM.from_pretrained(
    path, trust_remote_code=trust, dtype=torch.float32, output_loading_info=True
)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
texts = [generator(prompt, **request["settings"])[0]["generated_text"] for prompt in request["prompts"]]
texts = [text if isinstance(text, str) else text[-1]["content"] for text in texts]  # of messages, the answer
context = model.config.max_position_embeddings
ids = tokenizer(request["text"], return_tensors="pt").input_ids[:, :context]
if ids.shape[1] < 8:
    ids = torch.arange(8)[None] % model.config.vocab_size
with torch.no_grad():
    logits = model(input_ids=ids).logits[0].double()
    scores = []
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for text in request["documents"]:
        # lm-eval's rolling windows: each token is predicted once, a later window begins at the last one's end.
        row = [prefix] + tokenizer(text, add_special_tokens=False).input_ids
        total, done = 0.0, 1
        while done < len(row):
            end = min(done + context, len(row))
            window = torch.tensor([row[max(0, end - context - 1) : end]])
            chosen = torch.log_softmax(model(input_ids=window[:, :-1]).logits, -1)[0, done - end :]
            total += chosen.gather(1, window[0, done - end :, None]).sum().item()
            done = end
        scores.append(total)
save_file({"logits": logits}, request["logits"])
json.dump(
    {
        "class": type(model).__module__.split(".")[0] + "." + type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loading": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "messages": messages,
        "texts": texts,
        "scores": scores,
        "uses_nanophi": "nanophi" in sys.modules,
    },
    open(request["answer"], "w"),
)
"""


def load(folder: Path, records: ShippedRecords, scratch: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a release with both loaders at once, each in a process of its own.

    Args:
        folder: the release.
        records: its records; the sample's prompt is continued, the held-out documents are scored.
        scratch: an empty folder.

    Returns:
        of stock Phi and of the remote code: `class`, `parameters`, `loading` (what did not fit), `messages`, `texts`,
        `scores`, `uses_nanophi` and `logits` (a safetensors file); or `error`, one line.
    """
    sample = records.get("sample.json", {"prompt": "The ", "settings": {"do_sample": False, "max_new_tokens": 30}})
    processes = []
    for name, trust in (("stock", False), ("remote", True)):
        home = scratch / name
        home.mkdir()
        request = {
            "path": str(folder),
            "trust": trust,
            "prompts": [sample["prompt"]],
            "settings": sample["settings"],
            "text": sample.get("text", sample["prompt"]),
            "documents": [item["text"] for item in records.get("heldout.json", [])],
            "answer": str(home / "answer.json"),
            "logits": str(home / "logits.safetensors"),
        }
        variables = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "TRANSFORMERS_"))
        }
        variables |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        write_json(home / "request.json", request)
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", SCRIPT, str(home / "request.json")],
            cwd=home,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append((process, request))
    answers = []
    for process, request in processes:
        output, _ = process.communicate()
        if process.returncode == 0:
            answers.append({**read_json(Path(request["answer"])), "logits": request["logits"]})
        else:
            last = [line for line in output.splitlines() if line.strip()][-1:] or [f"exit status {process.returncode}"]
            answers.append({"error": last[0]})
    return answers[0], answers[1]
