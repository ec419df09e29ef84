"""A finished run in miniature: a model of random weights, and records as the stages write them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from nanophi.core.files import sha256_of_file, write_json
from nanophi.core.version import __version__

STEPS, BATCH, CONTEXT, VOCABULARY = 30, 4, 128, 300
KEPT_STEPS = (10, 20)
TEXT = "The quick brown fox jumps over the lazy dog. A module holds definitions; a package holds modules. " * 20


def build_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=CONTEXT
    ).save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))


def build_checkpoint(folder: Path, tokenizer: Path, step: int) -> None:
    import torch

    from nanophi import NanoPhiConfig, NanoPhiForCausalLM

    torch.manual_seed(step)
    config = NanoPhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    NanoPhiForCausalLM(config).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    write_json(
        folder / "checkpoint.json",
        {
            "step": step,
            "tokens_seen": step * BATCH * CONTEXT,
            "train_loss": 5.7 - step / 20,
            "eval_loss": 5.8 - step / 20,
        },
    )


def results_of(run: Path, step: int) -> dict[str, Any]:
    """What the evaluation stage writes for one checkpoint and the suite `heldout`."""
    bits, accuracy = 2.9 - step / 40, 0.26 + step / 200
    return {
        "results": {
            "heldout_bits_per_byte": {
                "alias": "heldout_bits_per_byte",
                "sample_len": 50,
                "bits_per_byte,none": bits,
                "bits_per_byte_stderr,none": 0.05,
            },
            "heldout_continuation": {
                "alias": "heldout_continuation",
                "sample_len": 200,
                "acc,none": accuracy - 0.01,
                "acc_stderr,none": 0.03,
                "acc_norm,none": accuracy,
                "acc_norm_stderr,none": 0.031,
                "answer_bits_per_byte,none": 1.9,
                "answer_bits_per_byte_stderr,none": 0.02,
            },
        },
        "configs": {"heldout_continuation": {"custom_dataset": "<function>", "metadata": {"heldout": str(run)}}},
        "versions": {"heldout_bits_per_byte": 1.0, "heldout_continuation": 1.0},
        "n-shot": {"heldout_bits_per_byte": 0, "heldout_continuation": 0},
        "higher_is_better": {
            "heldout_bits_per_byte": {"bits_per_byte": False},
            "heldout_continuation": {"acc": True, "acc_norm": True},
        },
        "n-samples": {
            "heldout_bits_per_byte": {"original": 50, "effective": 50},
            "heldout_continuation": {"original": 200, "effective": 200},
        },
        "task_hashes": {"heldout_bits_per_byte": "0" * 64, "heldout_continuation": "1" * 64},
        "samples": {"heldout_bits_per_byte": heldout_samples(run, step), "heldout_continuation": []},
        "config": {"model": str(run / "checkpoints"), "batch_size": 16, "device": "cpu", "limit": None},
        "date": 1.0,
        "lm_eval_version": "0.4.13",
        "transformers_version": "5.23.0",
        "tokenizer_pad_token": ["<|endoftext|>", "0"],
        "nanophi": {
            "format": 3,
            "model": {"name": f"step-{step:06d}"},
            "suite": "heldout",
            "lines": {
                "heldout_bits_per_byte": {"tasks": ["heldout_bits_per_byte"], "chance": None},
                "heldout_continuation": {"tasks": ["heldout_continuation"], "chance": 0.25},
            },
            "heldout": {
                "bits_per_byte": bits,
                "bits_per_byte_stderr": 0.05,
                "bytes": 100000,
                "documents": 50,
                "bz2": {"bits_per_byte": 2.6, "bytes": 100000},
                "by_source": {
                    "docstrings": {
                        "bits_per_byte": bits,
                        "bits_per_byte_stderr": 0.06,
                        "bytes": 60000,
                        "documents": 30,
                    },
                    "licences": {"bits_per_byte": bits, "bits_per_byte_stderr": 0.07, "bytes": 40000, "documents": 20},
                },
            },
            "data": {"heldout": "2" * 64},
            "environment": {},
            "seconds": {"heldout_bits_per_byte": 1.0},
        },
    }


def write_data(run: Path) -> None:
    """The records of the data stages."""
    random = np.random.default_rng(0)
    count = 400
    score = random.beta(3, 2, count)
    size = random.integers(200, 5000, count)
    source = random.choice(["docstrings", "licences", "topics"], count)
    kept = score > 0.5
    sources = {
        name: {
            "documents": int((source == name).sum()),
            "kept_documents": int(((source == name) & kept).sum()),
            "bytes": int(size[source == name].sum()),
            "kept_bytes": int(size[(source == name) & kept].sum()),
            "mean_score": round(float(score[source == name].mean()), 4),
        }
        for name in ("docstrings", "licences", "topics")
    }
    counts, edges = np.histogram(score, bins=50, range=(0, 1))
    quality = {
        "rule": "score > 0.5",
        "threshold": 0.5,
        "share": None,
        "select": None,
        "cutoff": None,
        "documents": count,
        "kept_documents": int(kept.sum()),
        "bytes": int(size.sum()),
        "kept_bytes": int(size[kept].sum()),
        "kept_fraction": round(float(kept.mean()), 4),
        "kept_bytes_fraction": round(float(size[kept].sum() / size.sum()), 4),
        "mean_score": round(float(score.mean()), 4),
        "histogram": {"edges": [round(float(edge), 4) for edge in edges], "documents": counts.tolist()},
        "sweep": [
            {
                "threshold": round(0.05 * step, 2),
                "documents": int((score > 0.05 * step).sum()),
                "bytes": int(size[score > 0.05 * step].sum()),
            }
            for step in range(20)
        ],
        "sources": sources,
        "scorer": {
            "scorer": "linear",
            "high": ["topics"],
            "low": ["licences"],
            "documents": 300,
            "test_documents": 80,
            "roc_auc": 0.93,
            "brier": 0.1,
            "calibration": [],
        },
        "examples": {
            kind: [{"id": "0" * 16, "source": "topics", "quality_score": 0.9, "text": f"A {kind} </script> text."}]
            for kind in ("best", "worst", "nearest_above", "nearest_below")
        },
    }
    write_json(run / "data" / "quality" / "quality.json", quality)
    scores = {
        "id": [f"{index:016x}" for index in range(count)],
        "source": source,
        "split": ["train"] * count,
        "bytes": size,
        "quality_score": score.astype("float32"),
    }
    (run / "data" / "scores").mkdir()
    pd.DataFrame(scores).to_parquet(run / "data" / "scores" / "scores.parquet")
    (run / "data" / "documents").mkdir()
    for split, rows in (("train", count), ("heldout", 50)):
        documents = {
            "id": [f"{index:016x}" for index in range(rows)],
            "text": [
                f"{split} document {index}: the quick brown fox jumps over {index} dogs." for index in range(rows)
            ],
            "source": ["topics"] * rows,
        }
        pd.DataFrame(documents).to_parquet(run / "data" / "documents" / f"{split}-00000.parquet")
    write_json(
        run / "data" / "documents" / "documents.json",
        {
            "read": 500,
            "bytes": int(size.sum()),
            "train": count,
            "heldout": 50,
            "dropped": {"exact_duplicate": 40, "near_duplicate": 10},
            "duplicates": {"clusters": 5, "largest": 12},
            "sources": {},
            "refused": ["/home/someone/secret.txt: not UTF-8"],
        },
    )
    counts_of_split = {
        "documents": 271,
        "bytes": 50000,
        "tokens": 20000,
        "rows": 156,
        "tail_tokens": 32,
        "bytes_per_token": 2.5,
    }
    write_json(
        run / "data" / "tokens" / "tokens.json",
        {
            "context_length": CONTEXT,
            "train": {**counts_of_split, "sha256": "3" * 64},
            "heldout": {**counts_of_split, "sha256": "4" * 64},
            "vocab_size": VOCABULARY,
        },
    )


def heldout_samples(run: Path, step: int) -> list[dict[str, Any]]:
    """Log-likelihoods of the held-out documents, by plain transformers on whole documents."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "checkpoints" / f"step-{step:06d}"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = pd.read_parquet(run / "data" / "documents" / "heldout-00000.parquet").to_dict("records")
    rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    samples = []
    for number, row in enumerate(rows):
        ids = torch.tensor([[0, *tokenizer(row["text"]).input_ids]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        scored = [-loss * (ids.shape[1] - 1), len(row["text"].encode())]
        samples.append({"doc_id": number, "source": row["source"], "bits_per_byte": scored})
    return samples


def build_run(run: Path) -> None:
    from nanophi.core.recipe import Recipe

    recipe = Recipe.model_validate(
        {
            "name": run.name,
            "seed": 7,
            "data": {"sources": [{"embedded": "documentation", "name": "documentation"}]},
            "model": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": CONTEXT,
            },
            "training": {
                "steps": STEPS,
                "batch_size": BATCH,
                "learning_rate": 1e-3,
                "keep_steps": list(KEPT_STEPS),
                "eval_steps": 10,
                "logging_steps": 1,
            },
            "tokenizer": {"vocab_size": VOCABULARY},
            "card": {"prompt": "The module ", "version": "v1.0"},
        }
    )
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.dump(), sort_keys=False))

    build_tokenizer(run / "data" / "tokenizer")
    for step in (*KEPT_STEPS, STEPS):
        build_checkpoint(run / "checkpoints" / f"step-{step:06d}", run / "data" / "tokenizer", step)
    (run / "training_state" / f"step-{STEPS:06d}").mkdir(parents=True)
    (run / "training_state" / f"step-{STEPS:06d}" / "optimizer.pt").write_bytes(b"never released")

    write_data(run)

    log = []
    for step in range(1, STEPS + 1):
        log.append(
            {
                "step": step,
                "loss": 5.7 - step / 20,
                "learning_rate": 1e-3,
                "grad_norm": 1.0,
                "tokens_seen": step * BATCH * CONTEXT,
                "tokens_per_second": 1000.0,
                "mfu": None,
                "elapsed_seconds": step * 0.5,
            }
        )
    evaluations = [
        {
            "step": step,
            "tokens_seen": step * BATCH * CONTEXT,
            "loss": 5.8 - step / 20,
            "bits_per_byte": round(2.9 - step / 40, 5),
        }
        for step in (*KEPT_STEPS, STEPS)
    ]
    summary = {
        "checkpoint": f"checkpoints/step-{STEPS:06d}",
        "steps": STEPS,
        "tokens_seen": STEPS * BATCH * CONTEXT,
        "epochs": 1.5,
        "parameters": 34412,
        "precision": "fp32",
        "seconds": 15.0,
        "tokens_per_second": 1000.0,
        "flops_per_token": 300000,
        "weights_sha256": sha256_of_file(run / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors"),
        "final_loss": log[-1]["loss"],
        "final_bits_per_byte": evaluations[-1]["bits_per_byte"],
    }
    write_json(run / "training.json", {"log": log, "evaluations": evaluations, "summary": summary})

    (run / "evals").mkdir()
    for step in (*KEPT_STEPS, STEPS):
        write_json(run / "evals" / f"step-{step:06d}-heldout.json", results_of(run, step))
    environment = {
        "nanophi": __version__,
        "commit": "0123456789abcdef",
        "python": "3.11.9",
        "platform": "linux-x86_64",
        "packages": {
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "matplotlib": importlib.metadata.version("matplotlib"),
        },
        "processor": "A processor",
        "cpu_threads": 2,
        "devices": [],
    }
    finished = {"inputs": {}, "finished": "2026-11-23T08:00:00Z", "seconds": 1.5, "summary": {}}
    stages = {
        name: {"key": hashlib.sha256(name.encode()).hexdigest(), **finished}
        for name in ("documents", "scores", "quality", "tokenizer", "tokens", "training")
    }
    write_json(run / "record.json", {"stages": stages, "environment": environment})


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose stages before the card are done. Do not change it: copy it."""
    from nanophi.core import sample

    run = tmp_path_factory.mktemp("runs") / "tiny"
    build_run(run)
    sample.write_sample(run / "checkpoints" / f"step-{STEPS:06d}", "The module ", run / "sample.json")
    return run


@pytest.fixture(scope="session")
def built_release(finished_run: Path) -> Path:
    """The release of `finished_run`, at `finished_run / "release"`. Do not change it: copy it."""
    from nanophi.model_card import card, release

    card.build(finished_run, finished_run / "card")
    checkpoint = finished_run / "checkpoints" / f"step-{STEPS:06d}"
    release.build(finished_run, checkpoint, finished_run / "card", finished_run / "release")
    return finished_run / "release"


@pytest.fixture
def copied(built_release: Path, tmp_path: Path) -> Path:
    """A release that a test may change."""
    return Path(shutil.copytree(built_release, tmp_path / "release"))
