"""A tiny finished run to be the base of a chat model, and files of conversations."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from finished_run import SHAPE  # type: ignore[import-not-found]
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core.files import write_json
from nanophi.core.recipe import Recipe, load_recipe
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.pipeline import Pipeline

END = "<|endoftext|>"
TRAINING = {"steps": 6, "batch_size": 2, "learning_rate": 3e-3, "schedule": "constant", "precision": "fp32"}
TRAINING |= {"save_steps": 3, "logging_steps": 1, "eval_steps": 6}


def make_base(folder: Path) -> Path:
    """A run of one checkpoint: bytes are its tokens."""
    alphabet = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END, unk_token=END)
    checkpoint = folder / "checkpoints/step-000001"
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    NanoPhiForCausalLM(NanoPhiConfig(**SHAPE, vocab_size=len(alphabet), **ids)).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    write_json(checkpoint / "tokenizer_config.json", config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    training = {"steps": 1, "batch_size": 1, "learning_rate": 1e-3}
    data = {"sources": [{"embedded": "documentation"}]}
    recipe = Recipe(name=folder.name, data=data, model=SHAPE, training=training, evaluation={"suites": []})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.dump()))
    write_json(folder / "record.json", {"stages": {"training": {}}})
    split = {"sha256": "a1", "documents": 1, "bytes": 10, "tokens": 10, "bytes_per_token": 1.0}
    write_json(folder / "data/tokens/tokens.json", {"train": split, "heldout": split})
    documents = {"read": 1, "train": 1, "heldout": 1, "dropped": {}}
    write_json(folder / "data/documents/documents.json", documents)
    write_json(folder / "data/quality/quality.json", {"threshold": 0.5, "share": None})
    for name in ("train", "heldout"):
        text = {"id": ["0" * 16], "source": ["web"], "text": [f"A {name} text.\n  The  known answer."]}
        pq.write_table(pa.table(text), folder / f"data/documents/{name}-00000.parquet")
    return folder


def write_rows(path: Path, rows: list) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talk(number: int) -> list[dict[str, str]]:
    """A conversation of two exchanges."""
    texts = (f"Say {number}.", f"It is {number * 7}.", "Again?", f"Yes, {number}.")
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def on_finished(run: Path, runs: Path, repo_id: str, **fields) -> Pipeline:
    """A chat model of two steps on a copy of the finished run, which was published as `repo_id`."""
    shutil.copytree(run, runs / "base")
    recipe = yaml.safe_load((runs / "base/recipe.yaml").read_text())
    recipe["card"]["repo_id"] = repo_id
    (runs / "base/recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [{"messages": talk(number)[:2]} for number in range(8)]
    return pipeline(runs, rows, training={"steps": 2, "save_steps": 2}, evaluation={"suites": []}, **fields)


def pipeline(runs: Path, rows: list, name: str = "chat", **fields) -> Pipeline:
    """A recipe on `runs/base` with conversations of its own."""
    write_rows(runs / f"{name}.jsonl", rows)
    held = write_rows(runs / f"{name}-heldout.jsonl", rows[:1]) if fields.pop("held", True) else None
    sources = [{"files": str(runs / f"{name}.jsonl")}]
    if held:
        text = json.dumps(rows[0]).replace("Say 0", "Tell me").replace("Yes, 0.", "No.").replace("It is 0.", "Nothing.")
        write_rows(held, [json.loads(text)])
        sources.append({"files": str(held), "heldout": True})
    values = {"name": name, "base": str(runs / "base"), "conversations": sources, "training": dict(TRAINING)}
    values["training"] |= fields.pop("training", {})
    recipe = runs / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({**values, **fields}))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return Pipeline(load_recipe(recipe), runs, report=lambda line: None)
