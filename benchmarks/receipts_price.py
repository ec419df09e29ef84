"""What the receipts cost: seconds of each check, beside the whole `prepare`, `train` and start-up of the demo.

    python benchmarks/receipts_price.py        # about 6 minutes on two cores

Each check is timed inside the verb that makes it, so its share needs no second run. The result is written to
benchmarks/receipts_price.json. The limits: 5 % of `prepare`, 2 % of `train`, 0.1 s of the start.
"""

import functools
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nanophi import pipeline
from nanophi.core.environment import environment
from nanophi.core.files import write_json
from nanophi.core.recipe import load_recipe

CHECKS = {
    "prepare": ["nanophi.data.tokenizer:check"],
    "train": ["nanophi.training.receipt:check", "nanophi.training.trainer:check_tokens"],
    "start": ["nanophi.core.surroundings:settle"],
}
STARTS = 20
START = """
import time
from nanophi.core import surroundings
started = time.perf_counter()
surroundings.settle()
print(time.perf_counter() - started)
"""


def main() -> None:
    spent: dict[str, float] = {}

    def timed(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

        return wrapped

    for path in (*CHECKS["prepare"], *CHECKS["train"]):
        module, _, name = path.partition(":")
        setattr(importlib.import_module(module), name, timed(path, getattr(importlib.import_module(module), name)))
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = pipeline.Pipeline(load_recipe("demo"), Path(folder))
        for verb, make in (("prepare", run.tokens), ("train", functools.partial(run.make, "training"))):
            started = time.perf_counter()
            make()
            seconds[verb] = time.perf_counter() - started
    starts = [float(subprocess.check_output([sys.executable, "-c", START])) for _ in range(STARTS)]
    result = {
        verb: {
            "seconds": round(seconds[verb], 2),
            "checks": {path: round(spent[path], 3) for path in CHECKS[verb]},
            "share": round(sum(spent[path] for path in CHECKS[verb]) / seconds[verb], 4),
        }
        for verb in seconds
    }
    result["start"] = {CHECKS["start"][0]: round(statistics.median(starts), 4)}
    print(json.dumps(result, indent=2))
    write_json(Path(__file__).with_suffix(".json"), {"environment": environment(), **result})


if __name__ == "__main__":
    main()
