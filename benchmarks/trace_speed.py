"""Speed and memory of `nanophi trace`: scans of 0.26B synthetic tokens, as many as the published run's, and of a run's.

    python benchmarks/trace_speed.py --run runs/corpus   # a run whose tokenizer is phi-2's; can be left out

Synthetic tokens are drawn from a Zipf law over 50,295 tokens, documents are 1,000 tokens on average, and the text that
is looked for is 60 tokens of a document. Each scan is a process of its own; median and spread are over the scans.
The result is written to trace_speed.json beside this file.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from nanophi.core.environment import environment
from nanophi.core.files import write_json
from nanophi.core.run import now
from nanophi.data import trace

ROW, VOCABULARY, END = 1024, 50_295, 50_256


def make(folder: Path, tokens: int) -> None:
    rng = np.random.default_rng(0)

    def rows() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(tokens // ROW // 4096):
            block = (rng.zipf(1.2, 4096 * ROW) - 1) % VOCABULARY
            block[rng.random(len(block)) < 0.001] = END
            for row in block.astype(np.int32).reshape(-1, ROW):
                yield {"input_ids": row}

    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=ROW)})
    cache = folder.with_name("cache")
    datasets.Dataset.from_generator(rows, features=features, cache_dir=str(cache)).save_to_disk(str(folder))


def scan(folder: Path) -> None:
    stream = trace.Stream(folder, END)
    middle = stream.read(len(stream) // 2, len(stream) // 2 + (1 << 16))
    document = middle[np.flatnonzero(middle == END)[0] + 1 :]
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    spans = trace.find_spans(stream, document[:60].astype(np.int64), VOCABULARY)
    seconds = time.perf_counter() - began
    # Pages of the file that is mapped are counted too, though the system can drop them at any time.
    private = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    result = {"seconds": seconds, "tokens": len(stream), "spans": len(spans), "longest": spans[0].length}
    print(json.dumps(result | {"anonymous_kb": int(private[0].split()[1]), "rss_before_kb": before}))


def measure(folder: Path, scans: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--scan", str(folder)]
    runs = [json.loads(subprocess.check_output(command)) for _ in range(scans)]
    speeds = sorted(run["tokens"] / run["seconds"] for run in runs)
    return {
        "tokens": runs[0]["tokens"],
        "tokens_per_second": {"median": statistics.median(speeds), "min": speeds[0], "max": speeds[-1]},
        "peak_anonymous_mb": max(run["anonymous_kb"] for run in runs) / 1000,
        "scans": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=260_000_000)
    parser.add_argument("--scans", type=int, default=5)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--scan", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scan:
        scan(arguments.scan)
        return
    result: dict[str, Any] = {
        "command": "python benchmarks/trace_speed.py",
        "finished": now(),
        "environment": environment(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch) / "train", arguments.tokens)
        result["synthetic"] = measure(Path(scratch) / "train", arguments.scans)
    if arguments.run:
        result["run"] = measure(arguments.run / "data/tokens/train", arguments.scans)
    write_json(Path(__file__).with_suffix(".json"), result)
    for name in {"synthetic", "run"} & set(result):
        print(name, json.dumps({key: value for key, value in result[name].items() if key != "scans"}, indent=2))


if __name__ == "__main__":
    main()
