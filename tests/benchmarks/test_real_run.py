"""The filter experiment, at a size that says nothing but runs every step of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "real_run.py"
WORDS = {
    "textbook": "the theorem explains why energy of a closed system remains constant because forces are conservative",
    "reference": "population area climate capital exports government language of the country is described here",
    "encyclopedia": "he was born in a small town and became known for his work on the history of music",
    "chat-log": "lol ok brb whats the cmd again?? >> sudo apt pls thx :) dunno man try it",
    "transcript": "um yeah so I I think uh you know like we was going to mhm the thing",
    "latex": r"\begin{lemma} \label{a} Let $X \to Y$ be \emph{flat} \cite{b} \end{lemma} \section{c} \frac{1}{2}",
}


def write_corpus(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 60), ("validation", 6)):
        rows = [
            (" ".join(generator.choice(WORDS[kind].split(), 80)), kind) for _ in range(count) for kind in sorted(WORDS)
        ]
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts, kinds = zip(*rows, strict=True)
        pq.write_table(pa.table({"text": texts, "kind": kinds}), path)


def write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def test_three_arms_from_corpus_to_published_comparison(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    write_tokenizer(tmp_path / "tokenizer")
    model = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    command = [sys.executable, str(SCRIPT), "--recipe", "nano-phi-115m", "--suites", "heldout", "--minutes", "3"]
    command += ["--corpus", "corpus", "--tokenizer", "tokenizer", "--runs", "runs", "--output", "out", "--steps", "8"]
    for override in (
        f"model={json.dumps(model)}",
        "training.batch_size=4",
        "training.micro_batch_size=4",
        "training.logging_steps=2",
        "training.precision=fp32",
        "evaluation.limit=10",
        "data.workers=1",
        "data.deduplication.near=false",
    ):
        command += ["--set", override]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["runs"]) == ["filtered-seed-0", "control-seed-0", "matched-seed-0"]
    share = results["plan"]["kept_share"]
    assert 0.2 < share < 0.7
    filtered, control, matched = results["runs"].values()
    assert filtered["tokens_seen"] == control["tokens_seen"] == matched["tokens_seen"] == 8 * 4 * 256
    assert 0.1 < filtered["unique_tokens"] / control["unique_tokens"] < 0.8
    assert abs(matched["unique_tokens"] / control["unique_tokens"] - share) < 0.1
    assert set(filtered["by_kind"]) == set(WORDS)
    comparison = json.loads((tmp_path / "out/comparison.json").read_text())
    assert comparison["baseline"] == "control-seed-0"
    assert (tmp_path / "out/curves.png").stat().st_size > 10_000
    assert (tmp_path / "out/card/README.md").exists()
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert " done in " not in again.stdout, "a finished experiment has nothing left to do"
