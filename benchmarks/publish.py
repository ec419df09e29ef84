"""How much memory does it take to publish 388 MB of text, and how fast is it scanned? Writes benchmarks/publish.json.

    python benchmarks/publish.py ../shared/corpus [RUNS]

A run over the corpus (a tiny model, so that there is a release) is made in RUNS, or a temporary folder, unless it is
there. `nanophi push --data text --scorer` then publishes it in a process of its own to the loopback Hub in this one,
which says how much memory the process took at its peak. The scan for secrets and paths is timed on the parquet files
that were published, in bytes of text, decompression included.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from nanophi.core.environment import environment
from nanophi.core.files import write_json
from nanophi.model_card import secrets

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hub_server import HubServer  # type: ignore[import-not-found]

NANOPHI = [sys.executable, "-m", "nanophi"]


def recipe(corpus: Path) -> dict[str, Any]:
    """Every document of the corpus, and as little training as a release needs."""
    return {
        "name": "published",
        "data": {
            "sources": [{"hub": str(corpus), "name": "corpus", "source_column": "source", "license": "other"}],
            "max_tokens": 200_000,
            "heldout_max_documents": 50,
        },
        "quality": {"high": ["openstax", "peps"], "low": ["ubuntu_irc", "babylm_partial"]},
        "tokenizer": {"vocab_size": 1024},
        "model": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
        },
        "training": {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "eval_steps": 4, "save_steps": 4},
    }


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python benchmarks/publish.py CORPUS [RUNS]")
    with tempfile.TemporaryDirectory(prefix="nanophi-publish-") as temporary, HubServer() as hub:
        scratch = Path(temporary)
        runs = Path(sys.argv[2]) if len(sys.argv) == 3 else scratch / "runs"
        release = runs / "published" / "release"
        if not release.is_dir():
            (scratch / "published.yaml").write_text(yaml.safe_dump(recipe(Path(sys.argv[1]).resolve())))
            subprocess.run([*NANOPHI, "run", scratch / "published.yaml", "--runs", runs], check=True)
        variables = {**os.environ, **hub.environment(scratch / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        push = [*NANOPHI, "push", str(release), "--repo-id", "org/demo", "--scorer", "--data", "text"]
        start = time.monotonic()
        process = subprocess.Popen(push, env=variables)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        if status:
            sys.exit("the push failed")
        files = hub.repositories["dataset", "org/demo-data"].branches["main"].files
        shards = [name for name in files if name.endswith(".parquet")]
        documents = text = 0
        scan = 0.0
        for number, name in enumerate(shards):
            shard = scratch / f"{number}.parquet"
            shard.write_bytes(files[name].data)
            start = time.monotonic()
            found = secrets.found_in_file(shard)
            scan += time.monotonic() - start
            if found:
                sys.exit(f"{name}: {found[0]}")
            for batch in pq.ParquetFile(shard).iter_batches(columns=["text"]):
                documents, text = documents + len(batch), text + batch.nbytes
    unit = 1 if sys.platform == "darwin" else 1024
    result: dict[str, Any] = {
        "documents": documents,
        "text_bytes": text,
        "parquet_bytes": sum(len(files[name].data) for name in shards),
        "push_seconds": round(seconds, 1),
        "push_peak_bytes": usage.ru_maxrss * unit,
        "scan_bytes_per_second": round(text / scan),
        "this_process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "environment": environment(),
    }
    write_json(Path(__file__).with_suffix(".json"), result)
    print(f"{text / 1e6:.0f} MB in {seconds:.0f} s, {result['push_peak_bytes'] / 1e9:.2f} GB at the peak; "
          f"scan {text / scan / 1e6:.0f} MB/s")  # fmt: skip


if __name__ == "__main__":
    main()
