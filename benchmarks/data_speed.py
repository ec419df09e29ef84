"""How fast a corpus becomes tokens, in how much memory, and whether the scorer knows quality where it never saw it.

    python benchmarks/data_speed.py --corpus DIR --tokenizer DIR --benchmarks DIR [--files N] [--workers 2]

Prints MB/s of every step of `nanophi prepare` (gather with cleaning, exact and near deduplication and decontamination;
score; select; tokenizer; tokenize and pack) and the peak resident memory of any process, beside a plain
`datasets.map` tokenization with the same tokenizer and number of processes in the same run. Then the area under the ROC
curve of the linear scorer on sources that it was not fitted on, and how many of 2,000 duplicates and 200 evaluation
items that are planted in the whole corpus are found. Writes data_speed.json beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.core.files import read_json, write_json
from nanophi.core.recipe import Data, Quality, Tokenizer
from nanophi.data import contamination, gather, linear, packing, scoring, tokenizer
from nanophi.data.documents import shards

HIGH = {"textbook", "reference", "encyclopedia"}
LOW = {"chat-log", "transcript", "latex"}
FIT_ON = ("openstax", "wiki_split", "babylm_partial", "openlogic_tex")
"""One source of each of four kinds; the other three labelled sources (reference, chat log, latex) are unseen."""


class Peak:
    """Largest resident set of any process by step, sampled ten times a second.

    `private` leaves out file pages that processes share with the page cache (memory-mapped files, libraries), and tells
    this process (`main`) from its descendants (`worker`).
    """

    def __init__(self) -> None:
        self.resident: dict[str, int] = {}
        self.private: dict[str, dict[str, int]] = {}
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
                self.resident[self.step] = max(self.resident.get(self.step, 0), memory.rss)
                private = self.private.setdefault(self.step, {"main": 0, "worker": 0})
                role = "main" if process.pid == me.pid else "worker"
                private[role] = max(private[role], memory.rss - getattr(memory, "shared", 0))


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
        speed, memory = size / 1e6 / seconds[name], peak.private.get(name, {"main": 0, "worker": 0})
        shown = f"{memory['main'] / 1e9:5.2f} GB here, {memory['worker'] / 1e9:5.2f} GB in a worker"
        print(f"  {name:<20} {seconds[name]:7.1f} s  {speed:7.1f} MB/s  {shown}", flush=True)

    size = sum(pq.read_table(file, columns=["text"])["text"].nbytes for file in files)
    print(f"{len(files)} files, {size / 1e6:.0f} MB of text, {args.workers} workers")
    with Peak() as peak:
        with step("gather"):
            documents = gather.gather(data, work / "documents")
        with step("score"):
            scoring.score(work / "documents", scorer, data, 0, work / "scores")
        with step("select"):
            scoring.select(
                work / "documents", work / "scores", scorer.model_copy(update={"threshold": None}), work / "kept"
            )
        with step("tokenizer"):
            tokenizer.build(work / "documents", Tokenizer(path=str(args.tokenizer)), 0, work / "tokenizer")
        with step("tokenize and pack"):
            tokens = packing.pack(work / "documents", work / "kept", work / "tokenizer", 1024, data, 0, work / "tokens")
    total = sum(seconds.values())
    resident = max(peak.resident.values())
    private = max(max(step.values()) for step in peak.private.values())
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


def planted(args: argparse.Namespace, files: list[Path], work: Path) -> dict[str, Any]:
    """Plant duplicates and evaluation items in the corpus; what is found, and what else is dropped for it."""
    generator = np.random.default_rng(0)
    data = {
        "sources": [{"files": str(work / "in" / "*.parquet"), "source_column": "source"}],
        "decontamination": {"benchmarks": str(args.benchmarks)},
        "workers": args.workers,
    }

    def stayed(name: str) -> set[str]:
        """Ids of the documents that `gather` keeps of what `work/in` holds."""
        gather.gather(Data.model_validate(data), work / name)
        paths = [path for split in ("train", "heldout") for path in shards(work / name, split)]
        return {key for path in paths for key in pq.read_table(path, columns=["id"])["id"].to_pylist()}

    (work / "in").mkdir()
    for file in files:
        (work / "in" / file.name).symlink_to(file.resolve())
    before = stayed("before")

    tables = [pq.read_table(file, columns=["text", "source"]) for file in files]
    texts = [text for table in tables for text in table["text"].to_pylist()]
    ids = [_id(text) for text in texts]
    usable = [row for row, text in enumerate(texts) if ids[row] in before and len(text.split()) >= 20]
    exact, near, hosts = np.split(generator.permutation(usable)[:2200], [1000, 2000])
    vocabulary = [word for row in generator.permutation(usable)[:500] for word in texts[row].split()]
    copies = [texts[row] for row in exact]
    changed = []
    for row in near:
        words = texts[row].split(" ")
        for place in generator.choice(len(words), max(1, round(0.05 * len(words))), replace=False):
            words[place] = vocabulary[generator.integers(len(vocabulary))]
        changed.append(" ".join(words))
    pools = {}
    for name, paths in contamination._benchmarks(args.benchmarks):
        items = [_item(row) for path in paths for row in pq.read_table(path).to_pylist()]
        pools[name] = [item for item in items if len(re.findall(r"[^\W_]+", item)) >= contamination.SHORTEST]
    origin = [sorted(pools)[number % len(pools)] for number in range(len(hosts))]
    with_item = {}
    for row, name in zip(hosts, origin, strict=True):
        lines = texts[row].split("\n")
        lines.insert(len(lines) // 2, pools[name][generator.integers(len(pools[name]))])
        with_item[int(row)] = "\n".join(lines)
    start = 0
    for file, table in zip(files, tables, strict=True):
        (work / "in" / file.name).unlink()
        rows = [with_item.get(row, texts[row]) for row in range(start, start + len(table))]
        pq.write_table(table.set_column(0, "text", pa.array(rows)), work / "in" / file.name, row_group_size=2048)
        start += len(table)
    extra = pa.table({"text": copies + changed, "source": ["planted"] * 2000})
    pq.write_table(extra, work / "in" / "zz-planted.parquet")
    after = stayed("after")

    listed = pq.read_table(work / "after" / "duplicates.parquet").to_pylist()
    repeated = {row["id"] for row in listed if row["reason"] == "exact" and row["source"] == "planted"}
    unrelated = before - {ids[row] for row in hosts}
    missed = [name for row, name in zip(hosts, origin, strict=True) if _id(with_item[int(row)]) in after]
    result = {
        "documents": len(texts),
        "exact_recall": float(np.mean([_id(text) in repeated for text in copies])),
        "near_recall": float(np.mean([_id(text) not in after for text in changed])),
        "unrelated_dropped": round(len(unrelated - after) / len(unrelated), 6),
        "dropped_without_planting": read_json(work / "before" / "documents.json")["dropped"],
        "items_planted": dict(Counter(origin)),
        "items_missed": dict(Counter(missed)),
    }
    print(
        f"planted in {len(texts)} documents: recall {result['exact_recall']:.3f} of 1,000 exact and "
        f"{result['near_recall']:.3f} of 1,000 near duplicates, {len(unrelated - after)} of {len(unrelated)} unrelated "
        f"documents dropped for it; {len(hosts) - len(missed)} of {len(hosts)} evaluation items found"
    )
    return result


def _id(text: str) -> str:
    return hashlib.sha256(text.replace("\r\n", "\n").replace("\r", "\n").strip().encode()).hexdigest()[:16]


def _item(row: dict[str, Any]) -> str:
    """An evaluation item with its right answer, as a text might quote it."""
    if "sentence" in row:
        return str(row["sentence"]).replace("_", row["option" + row["answer"]])
    if "ctx" in row:
        return f"{row['ctx']} {row['endings'][int(row['label'])]}"
    if "mc1_targets" in row:
        return f"{row['question']} {row['mc1_targets']['choices'][0]}"
    if isinstance(row.get("choices"), dict):
        return f"{row['question']} {row['choices']['text'][row['choices']['label'].index(row['answerKey'])]}"
    if "choices" in row:
        return f"{row['question']} {row['choices'][int(row['answer'])]}"
    return str(row["question"])


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

    def area(fitted: np.ndarray, tested: np.ndarray) -> tuple[float, float, float]:
        """ROC AUC, Brier score (each label weighing the same), seconds of the fit."""
        started = time.perf_counter()
        scorer, _ = linear.fit([texts[row] for row in fitted], labels[fitted], names[fitted].tolist(), 0)
        seconds = time.perf_counter() - started
        scores, good = scorer.score([texts[row] for row in tested]), labels[tested]
        brier = ((scores[good] - 1) ** 2).mean() / 2 + (scores[~good] ** 2).mean() / 2
        return float(roc_auc_score(good, scores)), float(brier), seconds

    seen = np.isin(names, FIT_ON)
    auc, brier, seconds = area(np.flatnonzero(seen), np.flatnonzero(~seen))
    unseen = sorted(set(names[~seen].tolist()))
    print(
        f"linear scorer fitted on {', '.join(FIT_ON)} in {seconds:.1f} s: "
        f"ROC AUC {auc:.4f}, Brier score {brier:.4f} on {', '.join(unseen)}"
    )
    left_out = {}
    order = np.random.default_rng(0).permutation(len(names))
    half = np.zeros(len(names), bool)
    half[order[: len(order) // 2]] = True
    for name in sorted(set(sources)):
        opposite = labels != labels[names == name][0]
        tested = (names == name) | (opposite & ~half)
        left_out[name], _, _ = area(np.flatnonzero(half & (names != name)), np.flatnonzero(tested))
        print(f"  without {name:<16} ROC AUC of it against the other label {left_out[name]:.4f}")
    return {
        "fitted_on": list(FIT_ON),
        "unseen": unseen,
        "roc_auc": round(auc, 4),
        "brier": round(brier, 4),
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
    parser.add_argument("--only", choices=["prepare", "planted", "scorer"])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    files = sorted((args.corpus / "data").glob("train-*.parquet"))
    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    if args.only in (None, "prepare"):
        result["prepare"] = []
        for count in args.files:
            work = Path(tempfile.mkdtemp(prefix="data-speed-"))
            try:
                # Each size in a fresh process, or one would start with what the last one left in memory.
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                    result["prepare"].append(fresh.submit(prepare, args, files[:count], work).result())
            finally:
                shutil.rmtree(work)
        with tempfile.TemporaryDirectory(prefix="data-speed-") as folder:
            result["plain_map"] = plain_map(args, files[0], Path(folder))
    if args.only in (None, "planted"):
        with tempfile.TemporaryDirectory(prefix="data-speed-") as folder:
            result["planted"] = planted(args, files, Path(folder))
    if args.only in (None, "scorer"):
        result["scorer"] = unseen_sources(files)
    write_json(args.output, result)


if __name__ == "__main__":
    main()
