"""How fast a corpus becomes tokens, in how much memory, and whether the scorer knows quality where it never saw it.

    python benchmarks/data_speed.py --corpus DIR --tokenizer DIR --benchmarks DIR [--files N] [--workers 2]

Prints MB/s of every step of `nanophi prepare` (gather with cleaning, exact and near deduplication and decontamination;
score; select; tokenizer; tokenize and pack) and the peak resident memory of any process, beside a plain
`datasets.map` tokenization with the same tokenizer and number of processes in the same run. Then the area under the ROC
curve of the linear scorer on sources that it was not fitted on. Writes data_speed.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import psutil
import pyarrow.parquet as pq

from nanophi.records import write_json
from nanophi.training import corpus, packing, quality, tokenizer
from nanophi.training.recipe import Data, Quality, Tokenizer

HIGH = {"textbook", "reference", "encyclopedia"}
LOW = {"chat-log", "transcript", "latex"}
FIT_ON = ("openstax", "wiki_split", "babylm_partial", "openlogic_tex")
"""One source of each of four kinds; the other three labelled sources (reference, chat log, latex) are unseen."""


class Peak:
    """Largest resident set of this process or any of its descendants by step, sampled ten times a second.

    `private` leaves out file pages that processes share with the page cache (memory-mapped files, libraries).
    """

    def __init__(self) -> None:
        self.resident: dict[str, int] = {}
        self.private: dict[str, int] = {}
        self.step = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.1):
            for process in (me, *me.children(recursive=True)):
                try:
                    memory = process.memory_info()
                except psutil.Error:
                    continue
                step, private = self.step, memory.rss - getattr(memory, "shared", 0)
                self.resident[step] = max(self.resident.get(step, 0), memory.rss)
                self.private[step] = max(self.private.get(step, 0), private)


def prepare(args: argparse.Namespace, files: list[Path], work: Path) -> dict[str, Any]:
    """Run every data stage once and time it."""
    chosen = work / "input"
    chosen.mkdir()
    for file in files:
        (chosen / file.name).symlink_to(file.resolve())
    data = Data.model_validate(
        {
            "sources": [{"files": str(chosen / "*.parquet"), "source_column": "source"}],
            "deduplication": {"similarity": 0.5},
            "decontamination": {"benchmarks": str(args.benchmarks)},
            "workers": args.workers,
        }
    )
    scorer = Quality(
        high=["openstax", "cia_factbook", "wiki_split"], low=["ubuntu_irc", "stacks_tex", "babylm_partial"]
    )
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        peak.step = name
        started = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - started
        speed, memory = size / 1e6 / seconds[name], peak.private.get(name, 0) / 1e9
        print(f"  {name:<20} {seconds[name]:7.1f} s  {speed:7.1f} MB/s  {memory:5.2f} GB", flush=True)

    size = sum(pq.read_table(file, columns=["text"])["text"].nbytes for file in files)
    print(f"{len(files)} files, {size / 1e6:.0f} MB of text, {args.workers} workers")
    with Peak() as peak:
        with step("gather"):
            documents = corpus.gather(data, work / "documents")
        with step("score"):
            quality.score(work / "documents", scorer, data, 0, work / "scores")
        with step("select"):
            quality.select(
                work / "documents", work / "scores", scorer.model_copy(update={"threshold": None}), work / "kept"
            )
        with step("tokenizer"):
            tokenizer.build(work / "documents", Tokenizer(path=str(args.tokenizer)), 0, work / "tokenizer")
        with step("tokenize and pack"):
            tokens = packing.pack(work / "documents", work / "kept", work / "tokenizer", 1024, data, 0, work / "tokens")
    total = sum(seconds.values())
    resident, private = max(peak.resident.values()), max(peak.private.values())
    print(f"  {'whole prepare':<20} {total:7.1f} s  {size / 1e6 / total:7.1f} MB/s  {private / 1e9:5.2f} GB")
    print(f"  the largest process: {resident / 1e9:.2f} GB resident, {private / 1e9:.2f} GB without shared pages")
    return {
        "files": len(files),
        "bytes": size,
        "workers": args.workers,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "megabytes_per_second": round(size / 1e6 / total, 2),
        "peak_resident_bytes": resident,
        "peak_private_bytes": private,
        "peak_private_bytes_by_step": peak.private,
        "dropped": documents["dropped"],
        "tokens": tokens["train"]["tokens"],
        "sha256": tokens["train"]["sha256"],
    }


def plain_map(args: argparse.Namespace, file: Path, work: Path) -> dict[str, Any]:
    """Tokenize one file as most people do."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    plain = AutoTokenizer.from_pretrained(args.tokenizer, model_max_length=int(1e30))
    dataset = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(work / "cache"))
    size = dataset.data.column("text").nbytes
    started = time.perf_counter()
    dataset.map(
        lambda batch: {"input_ids": plain(batch["text"])["input_ids"]},
        batched=True,
        num_proc=args.workers,
        remove_columns=dataset.column_names,
    )
    seconds = time.perf_counter() - started
    print(f"plain datasets.map, {size / 1e6:.0f} MB: {seconds:.1f} s  {size / 1e6 / seconds:.1f} MB/s")
    return {"bytes": size, "seconds": round(seconds, 2), "megabytes_per_second": round(size / 1e6 / seconds, 2)}


def unseen_sources(files: list[Path]) -> dict[str, Any]:
    """Fit on some labelled sources; ROC AUC on the others, and with each source left out in turn."""
    from sklearn.metrics import roc_auc_score

    texts, sources, good = [], [], []
    for file in files:
        table = pq.read_table(file, columns=["text", "source", "kind"]).to_pylist()
        for row in table[::2]:
            if row["kind"] in HIGH | LOW:
                texts.append(row["text"].encode())
                sources.append(row["source"])
                good.append(row["kind"] in HIGH)
    names, labels = np.array(sources), np.array(good)

    def area(fitted: np.ndarray, tested: np.ndarray) -> tuple[float, float]:
        started = time.perf_counter()
        scorer, _ = quality.fit([texts[row] for row in fitted], labels[fitted], names[fitted].tolist(), 0)
        seconds = time.perf_counter() - started
        return float(roc_auc_score(labels[tested], scorer.score([texts[row] for row in tested]))), seconds

    seen = np.isin(names, FIT_ON)
    auc, seconds = area(np.flatnonzero(seen), np.flatnonzero(~seen))
    unseen = sorted(set(names[~seen].tolist()))
    print(f"linear scorer fitted on {', '.join(FIT_ON)} in {seconds:.1f} s: ROC AUC {auc:.4f} on {', '.join(unseen)}")
    left_out = {}
    order = np.random.default_rng(0).permutation(len(names))
    half = np.zeros(len(names), bool)
    half[order[: len(order) // 2]] = True
    for name in sorted(set(sources)):
        opposite = labels != labels[names == name][0]
        tested = (names == name) | (opposite & ~half)
        left_out[name], _ = area(np.flatnonzero(half & (names != name)), np.flatnonzero(tested))
        print(f"  without {name:<16} ROC AUC of it against the other label {left_out[name]:.4f}")
    return {
        "fitted_on": list(FIT_ON),
        "unseen": unseen,
        "roc_auc": round(auc, 4),
        "fit_seconds": round(seconds, 2),
        "documents": int(seen.sum()),
        "each_left_out": {name: round(value, 4) for name, value in left_out.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with data/train-*.parquet")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--benchmarks", type=Path, required=True)
    parser.add_argument("--files", type=int, nargs="+", default=[2, 8], help="numbers of corpus files to prepare")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=["prepare", "scorer"])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    files = sorted((args.corpus / "data").glob("train-*.parquet"))
    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    if args.only != "scorer":
        result["prepare"] = []
        for count in args.files:
            work = Path(tempfile.mkdtemp(prefix="data-speed-"))
            try:
                result["prepare"].append(prepare(args, files[:count], work))
            finally:
                shutil.rmtree(work)
        with tempfile.TemporaryDirectory(prefix="data-speed-") as folder:
            result["plain_map"] = plain_map(args, files[0], Path(folder))
    if args.only != "prepare":
        result["scorer"] = unseen_sources(files)
    write_json(args.output, result)


if __name__ == "__main__":
    main()
