"""A tiny run that is ready to train, for the tests of training."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished_run import SHAPE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core.errors import UserError
from nanophi.core.recipe import Training
from nanophi.training import checkpoints, trainer

VOCAB, CONTEXT, EOS = 61, 64, 0
CONFIG = {**SHAPE, "max_position_embeddings": CONTEXT, "vocab_size": VOCAB, "bos_token_id": EOS, "eos_token_id": EOS}
CONFIG["resid_pdrop"] = 0.1  # dropout makes the random state part of what a resumed run must restore
TRAINING = {"steps": 24, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 2, "schedule": "wsd"}
TRAINING |= {"precision": "fp32", "save_steps": 6, "keep_steps": [10], "eval_steps": 12, "logging_steps": 1}

PROMPT = "w7 w8"
# 10 rows of 64 tokens hold 640: documents across rows, several in a row, one that the cut leaves out, one cut short.
DOCUMENTS = {
    "source": ["web", "code", "web", "wiki", "code", "web", "rare"],
    "tokens": [100, 10, 5, 200, 300, 60, 9],
    "bytes": [400, 20, 11, 650, 350, 250, 30],
}


def make_run(path: Path, rows: int = 100) -> Path:
    """A run directory that is ready to train: rows whose next token is mostly the last one plus one."""
    generator, hashes = np.random.default_rng(0), {}
    for split, count in (("train", rows), ("heldout", 10)):
        steps = np.where(generator.random((count, CONTEXT)) < 0.9, 1, generator.integers(0, VOCAB, (count, CONTEXT)))
        write_rows(path / "data/tokens" / split, np.cumsum(steps, axis=1) % VOCAB)
        hashes[split] = stream_hash(path / "data/tokens" / split)
    tokens = {"train": {"sha256": hashes["train"]}, "heldout": {"sha256": hashes["heldout"], "bytes_per_token": 2.0}}
    (path / "data/tokens/tokens.json").write_text(json.dumps(tokens))
    (path / "data/tokenizer").mkdir()
    (path / "data/tokenizer/tokenizer.json").write_text("{}")
    return path


def add_decay(run: Path, seed: int, rows: int = 30) -> Path:
    """Other rows for the decay: the next token is mostly the last one plus two."""
    generator = np.random.default_rng(seed)
    steps = np.where(generator.random((rows, CONTEXT)) < 0.9, 2, generator.integers(0, VOCAB, (rows, CONTEXT)))
    write_rows(run / "data/tokens/decay", np.cumsum(steps, axis=1) % VOCAB)
    tokens = json.loads((run / "data/tokens/tokens.json").read_text())
    tokens["decay"] = {"sha256": stream_hash(run / "data/tokens/decay")}
    (run / "data/tokens/tokens.json").write_text(json.dumps(tokens))
    return run


def stream_hash(folder: Path) -> str:
    rows = np.array(datasets.load_from_disk(str(folder))["input_ids"], "<i4")
    return hashlib.sha256(rows.tobytes()).hexdigest()


def write_rows(folder: Path, tokens: np.ndarray) -> None:
    """(rows, CONTEXT) tokens as packing writes them."""
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=CONTEXT)})
    dataset = datasets.Dataset.from_dict({"input_ids": tokens.astype(np.int32).tolist()}, features=features)
    dataset.save_to_disk(str(folder))


def replace_rows(run: Path, change: Callable[[int, np.ndarray], np.ndarray]) -> None:
    """Write the training rows anew, each as `change(index, row)`."""
    folder = run / "data/tokens/train"
    rows = np.array(datasets.load_from_disk(str(folder))["input_ids"])
    shutil.rmtree(folder)
    write_rows(folder, np.array([change(index, row) for index, row in enumerate(rows)]))
    recorded = folder.parent / "tokens.json"
    tokens = json.loads(recorded.read_text())
    tokens["train"]["sha256"] = stream_hash(folder)
    recorded.write_text(json.dumps(tokens))


def add_sources(run: Path) -> Path:
    """Sources of the held-out rows, and a tokenizer that can write samples."""
    pq.write_table(pa.table(DOCUMENTS), run / "data/tokens/heldout-documents.parquet")
    words = Tokenizer(models.WordLevel({"<eos>": EOS, **{f"w{i}": i for i in range(1, VOCAB)}}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (run / "data/tokenizer/tokenizer.json").unlink()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(run / "data/tokenizer")
    return run


def train(run: Path, prompt: str | None = None, **changes) -> dict:
    """Train, or resume from the last whole state."""
    settings = {"seed": 1, "prompt": prompt, "resume": checkpoints.newest_valid_state(run)}
    return trainer.train(run, Training(**{**TRAINING, **changes}), NanoPhiConfig(**CONFIG), **settings)


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # the process group's, passed on by a launcher


@contextlib.contextmanager
def ends_at(
    step: int, event: Callable[[], None] = interrupt, method: str = "training_step", match: str | None = None
) -> Iterator[None]:
    """Let `event()` happen before a call of a trainer's method in a step, and find that it ends the training."""
    plain, left = getattr(trainer.NanoPhiTrainer, method), [event]

    def wrapped(self, *args, **kwargs):
        if left and self.state.global_step == step:
            left.pop()()
        return plain(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises((KeyboardInterrupt, UserError), match=match):
        patch.setattr(trainer.NanoPhiTrainer, method, wrapped)
        yield
