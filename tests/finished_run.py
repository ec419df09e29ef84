"""A finished run in miniature: a model of random weights, and records as the stages write them."""

import copy
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

from nanophi.core.files import read_json, sha256_of_file, write_json
from nanophi.core.version import __version__

STEPS, BATCH, CONTEXT, VOCABULARY = 30, 4, 128, 300
TOKENS = BATCH * CONTEXT  # of a step
KEPT_STEPS = (10, 20)
SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
TEXT = "The quick brown fox jumps over the lazy dog. A module holds definitions; a package holds modules. " * 20


def build_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, end = pre_tokenizers.ByteLevel.alphabet(), "<|endoftext|>"
    known = {"special_tokens": [end], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=VOCABULARY, **known))
    ends = {"bos_token": end, "eos_token": end, "model_max_length": CONTEXT}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)
    content = read_json(folder / "tokenizer.json")
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    config = read_json(folder / "tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))


def build_checkpoint(folder: Path, tokenizer: Path, step: int) -> None:
    import torch

    from nanophi import NanoPhiConfig, NanoPhiForCausalLM

    torch.manual_seed(step)
    config = NanoPhiConfig(vocab_size=VOCABULARY, initializer_range=0.3, bos_token_id=0, eos_token_id=0, **SHAPE)
    NanoPhiForCausalLM(config).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    state = {"step": step, "tokens_seen": step * TOKENS, "train_loss": 5.7 - step / 20, "eval_loss": 5.8 - step / 20}
    write_json(folder / "checkpoint.json", state)


def results_of(run: Path, step: int) -> dict[str, Any]:
    """What the evaluation stage writes for one checkpoint and the suite `heldout`."""
    bits, accuracy = 2.9 - step / 40, 0.26 + step / 200
    tasks = ("heldout_bits_per_byte", "heldout_continuation")
    items = dict(zip(tasks, (50, 200), strict=True))

    def figures(**values: tuple[float, float]) -> dict[str, float]:
        stderrs = {f"{metric}_stderr,none": stderr for metric, (_, stderr) in values.items()}
        return {f"{metric},none": value for metric, (value, _) in values.items()} | stderrs

    def part(stderr: float, size: int, documents: int) -> dict[str, Any]:
        return {"bits_per_byte": bits, "bits_per_byte_stderr": stderr, "bytes": size, "documents": documents}

    of_choices = figures(acc=(accuracy - 0.01, 0.03), acc_norm=(accuracy, 0.031), answer_bits_per_byte=(1.9, 0.02))
    measured = dict(zip(tasks, (figures(bits_per_byte=(bits, 0.05)), of_choices), strict=True))
    return {
        "results": {task: {"alias": task, "sample_len": items[task], **measured[task]} for task in tasks},
        "configs": {"heldout_continuation": {"custom_dataset": "<function>", "metadata": {"heldout": str(run)}}},
        "versions": dict.fromkeys(tasks, 1.0),
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": dict(zip(tasks, ({"bits_per_byte": False}, {"acc": True, "acc_norm": True}), strict=True)),
        "n-samples": {task: {"original": number, "effective": number} for task, number in items.items()},
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
            "lines": {task: {"tasks": [task], "chance": None if "bits" in task else 0.25} for task in tasks},
            "heldout": {
                **part(0.05, 100000, 50),
                "bz2": {"bits_per_byte": 2.6, "bytes": 100000},
                "by_source": {"docstrings": part(0.06, 60000, 30), "licences": part(0.07, 40000, 20)},
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

    def counts_of(rows: Any) -> dict[str, Any]:
        return {
            "documents": int(rows.sum()),
            "kept_documents": int((rows & kept).sum()),
            "bytes": int(size[rows].sum()),
            "kept_bytes": int(size[rows & kept].sum()),
            "mean_score": round(float(score[rows].mean()), 4),
        }

    counts, edges = np.histogram(score, bins=50, range=(0, 1))
    quality = {
        "rule": "score > 0.5",
        "threshold": 0.5,
        "share": None,
        "select": None,
        "cutoff": None,
        **counts_of(np.full(count, True)),
        "kept_fraction": round(float(kept.mean()), 4),
        "kept_bytes_fraction": round(float(size[kept].sum() / size.sum()), 4),
        "histogram": {"edges": [round(float(edge), 4) for edge in edges], "documents": counts.tolist()},
        "sweep": [
            {"threshold": round(cut, 2), "documents": int((score > cut).sum()), "bytes": int(size[score > cut].sum())}
            for cut in (0.05 * step for step in range(20))
        ],
        "sources": {name: counts_of(source == name) for name in ("docstrings", "licences", "topics")},
        "scorer": {"scorer": "linear", "high": ["topics"], "low": ["licences"], "documents": 300, "test_documents": 80}
        | {"roc_auc": 0.93, "brier": 0.1, "calibration": []},
        "examples": {
            kind: [{"id": "0" * 16, "source": "topics", "quality_score": 0.9, "text": f"A {kind} </script> text."}]
            for kind in ("best", "worst", "nearest_above", "nearest_below")
        },
    }
    write_json(run / "data" / "quality" / "quality.json", quality)
    scores = {"id": [f"{index:016x}" for index in range(count)], "source": source, "split": ["train"] * count}
    scores |= {"bytes": size, "quality_score": score.astype("float32")}
    (run / "data" / "scores").mkdir()
    pd.DataFrame(scores).to_parquet(run / "data" / "scores" / "scores.parquet")
    (run / "data" / "documents").mkdir()
    for split, rows in (("train", range(count)), ("heldout", range(50))):
        texts = [f"{split} document {row}: the quick brown fox jumps over {row} dogs." for row in rows]
        documents = {"id": [f"{row:016x}" for row in rows], "text": texts, "source": ["topics"] * len(rows)}
        pd.DataFrame(documents).to_parquet(run / "data" / "documents" / f"{split}-00000.parquet")
    summary = {"read": 500, "bytes": int(size.sum()), "train": count, "heldout": 50}
    summary |= {"dropped": {"exact_duplicate": 40, "near_duplicate": 10}, "duplicates": {"clusters": 5, "largest": 12}}
    summary |= {"sources": {}, "refused": ["/home/someone/secret.txt: not UTF-8"]}
    write_json(run / "data" / "documents" / "documents.json", summary)
    split = {"documents": 271, "bytes": 50000, "tokens": 20000, "rows": 156, "tail_tokens": 32, "bytes_per_token": 2.5}
    splits = {name: {**split, "sha256": digit * 64} for name, digit in (("train", "3"), ("heldout", "4"))}
    tokens = {"context_length": CONTEXT, **splits, "vocab_size": VOCABULARY}
    write_json(run / "data" / "tokens" / "tokens.json", tokens)


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
            "model": SHAPE,
            "training": {"steps": STEPS, "batch_size": BATCH, "learning_rate": 1e-3, "keep_steps": list(KEPT_STEPS)}
            | {"eval_steps": 10, "logging_steps": 1},
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

    def at(step: int, **values: Any) -> dict[str, Any]:
        return {"step": step, "tokens_seen": step * TOKENS, **values}

    rates = {"learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1000.0, "mfu": None}
    log = [at(step, loss=5.7 - step / 20, elapsed_seconds=step * 0.5, **rates) for step in range(1, STEPS + 1)]
    losses = {step: (5.8 - step / 20, round(2.9 - step / 40, 5)) for step in (*KEPT_STEPS, STEPS)}
    evaluations = [at(step, loss=loss, bits_per_byte=bits) for step, (loss, bits) in losses.items()]
    summary = {"checkpoint": f"checkpoints/step-{STEPS:06d}", "steps": STEPS, "tokens_seen": STEPS * TOKENS}
    summary |= {"epochs": 1.5, "parameters": 34412, "precision": "fp32", "seconds": 15.0}
    summary["weights_sha256"] = sha256_of_file(run / f"checkpoints/step-{STEPS:06d}/model.safetensors")
    summary |= {"tokens_per_second": 1000.0, "flops_per_token": 300000, "final_loss": log[-1]["loss"]}
    summary["final_bits_per_byte"] = evaluations[-1]["bits_per_byte"]
    write_json(run / "training.json", {"log": log, "evaluations": evaluations, "summary": summary})

    (run / "evals").mkdir()
    for step in (*KEPT_STEPS, STEPS):
        write_json(run / "evals" / f"step-{step:06d}-heldout.json", results_of(run, step))
    packages = {"torch": "2.13.0", "transformers": "5.23.0", "matplotlib": importlib.metadata.version("matplotlib")}
    environment = {"nanophi": __version__, "commit": "0123456789abcdef", "python": "3.11.9", "platform": "linux-x86_64"}
    environment |= {"packages": packages, "processor": "A processor", "cpu_threads": 2, "devices": []}
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
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A run without a release that a test may change."""
    ignored = shutil.ignore_patterns("release", "card")
    return Path(shutil.copytree(finished_run, tmp_path / finished_run.name, ignore=ignored))


@pytest.fixture(scope="session")
def records(finished_run: Path) -> dict[str, Any]:
    """What the release of `finished_run` has under `records/`. Do not change them: take `changed`."""
    from nanophi.model_card.records import collect

    return collect(finished_run, finished_run / "checkpoints" / f"step-{STEPS:06d}")


@pytest.fixture
def changed(records: dict[str, Any]) -> dict[str, Any]:
    """Records that a test may change."""
    return copy.deepcopy(records)


@pytest.fixture
def copied(built_release: Path, tmp_path: Path) -> Path:
    """A release that a test may change."""
    return Path(shutil.copytree(built_release, tmp_path / "release"))
