"""Does a killed run resume bit for bit, and how fast? Writes benchmarks/resume.json.

    python benchmarks/resume.py

Kills: a tiny run (with dropout, so that the random state counts) is ended by SIGKILL ten times, each time at a random
moment after its process began, and started again; the final weights are compared with those of a run left alone, for
AdamW and for Muon.

Place: a run of 14,000 steps of 512 rows over 254,000 rows, whose checkpoint says step 13,999; seconds from the start of
training to the first batch. Beside it, the same rows as an `IterableDataset`, which `Trainer` skips by reading them,
over a tenth of the steps.
"""

import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch
from transformers import Trainer, TrainerState, TrainingArguments

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core.environment import environment
from nanophi.core.files import read_json, write_json
from nanophi.core.names import step_name
from nanophi.core.recipe import Training
from nanophi.modeling_nanophi import NanoPhiForCausalLM
from nanophi.training import checkpoints, trainer
from nanophi.training.rows import PackedCollator, PackedRows

KILLS, KILL_WITHIN_SECONDS, KILL_SEED = 10, 3.0, 0
STEPS, BATCH, ROWS = 14_000, 512, 254_000
VOCAB = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "resid_pdrop": 0.1,
}
KILLED: dict[str, Any] = {
    "steps": 1000,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "warmup_steps": 20,
    "save_steps": 7,
    "eval_steps": 100,
    "logging_steps": 10,
}
PLACED: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": BATCH,
    "micro_batch_size": 16,
    "learning_rate": 1e-3,
    "save_steps": 1,
    "eval_steps": STEPS,
}


def make_run(run: Path, rows: int, context_length: int) -> Path:
    """A run directory that is ready to train on random tokens."""
    generator = np.random.default_rng(0)
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=context_length)})
    for split, count in (("train", rows), ("heldout", 16)):
        tokens = generator.integers(0, VOCAB, (count, context_length), dtype=np.int32)
        dataset = datasets.Dataset.from_dict({"input_ids": list(tokens)}, features=features)
        dataset.save_to_disk(str(run / "data/tokens" / split))
    write_json(
        run / "data/tokens/tokens.json",
        {"train": {"sha256": "random"}, "heldout": {"sha256": "random", "bytes_per_token": 4.0}},
    )
    (run / "data/tokenizer").mkdir()
    (run / "data/tokenizer/tokenizer.json").write_text("{}")
    return run


def train(run: Path, settings: dict[str, Any], context_length: int) -> dict[str, Any]:
    config = NanoPhiConfig(**SHAPE, max_position_embeddings=context_length)
    resume = checkpoints.newest_valid_state(run)
    return trainer.train(run, Training(**settings), config, seed=1, resume=resume)


# Kills


def child(run: Path, optimizer: str) -> None:
    """What the killed process does: say that it is there, and train."""
    (run / "began").touch()
    train(run, {**KILLED, "optimizer": optimizer}, 64)


def kill_and_restart(folder: Path, optimizer: str) -> dict[str, Any]:
    plain = make_run(folder / f"{optimizer}-plain", 1000, 64)
    undisturbed = train(plain, {**KILLED, "optimizer": optimizer}, 64)
    run = make_run(folder / f"{optimizer}-killed", 1000, 64)
    moments = random.Random(KILL_SEED)
    killed: list[dict[str, Any]] = []
    command = [sys.executable, __file__, "child", str(run), optimizer]
    while len(killed) < KILLS:
        (run / "began").unlink(missing_ok=True)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (run / "began").exists():
            time.sleep(0.01)
            if process.poll() is not None:
                raise SystemExit(f"{optimizer}: the process ended by itself ({process.returncode})")
        seconds = moments.uniform(0, KILL_WITHIN_SECONDS)
        time.sleep(seconds)
        process.kill()
        if process.wait() == 0:
            raise SystemExit(f"{optimizer}: the run was finished after {len(killed)} kills; raise its steps")
        last = next(reversed(checkpoints.states(run)), None)
        killed.append({"after_seconds": round(seconds, 3), "checkpoint": last.name if last else None})
        print(f"{optimizer}: kill {len(killed)}: {killed[-1]}", flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    again = read_json(run / "training.json")
    before = read_json(plain / "training.json")
    return {
        "kills": killed,
        "weights_sha256": undisturbed["weights_sha256"],
        "weights_sha256_after_kills": again["summary"]["weights_sha256"],
        "bit_identical": again["summary"]["weights_sha256"] == undisturbed["weights_sha256"],
        "same_evaluations": again["evaluations"] == before["evaluations"],
    }


# Place in the data


class FirstBatchError(Exception):
    """Raised where the first batch has arrived."""


def stop_at_first_batch(*args: Any, **kwargs: Any) -> Any:
    raise FirstBatchError


def checkpoint_at(run: Path, step: int) -> None:
    """Train one step, and let its checkpoint say another step."""
    plain = trainer.NanoPhiTrainer.training_step

    def one_step(self: trainer.NanoPhiTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 1:
            raise FirstBatchError
        return plain(self, *args, **kwargs)

    with contextlib.suppress(FirstBatchError), mock.patch.object(trainer.NanoPhiTrainer, "training_step", one_step):
        train(run, PLACED, 8)
    for folder in ("checkpoints", "training_state"):
        (run / folder / step_name(1)).rename(run / folder / step_name(step))
    path = run / "training_state" / step_name(step) / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "global_step": step}))


def find_place(folder: Path) -> dict[str, Any]:
    """Seconds to the first batch of step 13,999, by micro batch."""
    run = make_run(folder / "placed", ROWS, 8)
    checkpoint_at(run, STEPS - 1)
    result = {}
    begin = trainer.NanoPhiTrainer.train
    began = 0.0

    def timed_train(self: trainer.NanoPhiTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal began
        began = time.monotonic()
        return begin(self, *args, **kwargs)

    patched: dict[str, Any] = {"training_step": stop_at_first_batch, "train": timed_train}
    for micro_batch_size in (1, 16, 512):
        with mock.patch.multiple(trainer.NanoPhiTrainer, **patched):
            try:
                train(run, {**PLACED, "micro_batch_size": micro_batch_size}, 8)
            except FirstBatchError:
                result[str(micro_batch_size)] = round(time.monotonic() - began, 3)
    return result


class Stream(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """The same rows, one after another."""

    def __init__(self, rows: PackedRows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for position in range(len(self.rows)):
            yield self.rows[position]


def skip_by_reading(folder: Path, steps: int) -> float:
    """Seconds that a stock `Trainer` takes to the first batch after `steps` steps of an `IterableDataset`."""
    rows = PackedRows(folder / "placed/data/tokens/train", rows=STEPS * BATCH, seed=1)
    output = folder / "stock"
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        save_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    model = NanoPhiForCausalLM(NanoPhiConfig(**SHAPE, max_position_embeddings=8))
    stock = Trainer(model=model, args=arguments, train_dataset=Stream(rows), data_collator=PackedCollator(0, True))
    checkpoint = output / f"checkpoint-{steps}"
    stock.save_model(str(checkpoint))
    TrainerState(global_step=steps, max_steps=STEPS, train_batch_size=BATCH).save_to_json(
        str(checkpoint / "trainer_state.json")
    )
    with mock.patch.object(stock, "training_step", stop_at_first_batch):
        began = time.monotonic()
        try:
            stock.train(resume_from_checkpoint=str(checkpoint))
        except FirstBatchError:
            return time.monotonic() - began
    raise SystemExit("the stock Trainer never came to a batch")


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="resume-"))
    try:
        place = find_place(folder)
        tenth = STEPS // 10
        reading = skip_by_reading(folder, tenth)
        result = {
            "place": {
                "steps": STEPS,
                "batch_size": BATCH,
                "rows": ROWS,
                "at_step": STEPS - 1,
                "seconds_by_micro_batch": place,
                "trainer_skipping_a_stream": {"at_step": tenth, "seconds": round(reading, 1)},
            },
            "kills": {optimizer: kill_and_restart(folder, optimizer) for optimizer in ("adamw", "muon")},
            "environment": environment(),
        }
    finally:
        shutil.rmtree(folder)
    write_json(Path(__file__).with_suffix(".json"), result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
