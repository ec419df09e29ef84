"""Peak memory of training with evaluations at the 115M shape on a processor, beside what `nanophi estimate` says.

    python benchmarks/train_memory.py                 # 4 x 1024 tokens, float32 and bf16; about 6 minutes on two cores

Each precision runs in processes of its own: two steps, an evaluation of two batches, one more step. Peaks are those
of the process (VmHWM), above what it held before the model was built. glibc keeps freed memory for itself, so a second
process is told to return it (`returned`): what is left are tensors, which the estimate counts. Added to
benchmarks/train_memory.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nanophi.core.environment import environment
from nanophi.core.files import read_json, write_json
from nanophi.core.recipe import load_recipe
from nanophi.core.run import now

RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""glibc's settings for a process that gives freed blocks back to the system at once."""


def peak() -> int:
    """Bytes that this process has held at most."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def work(precision: str, rows: int) -> None:
    """Train, evaluate, and print the peaks before the model, before the evaluation and at the end."""
    from nanophi.training import estimate, trainer

    recipe = load_recipe("nano-phi-115m")
    config = recipe.model_config_for(eos_token_id=0, bos_token_id=0)
    update = {
        **{"steps": 3, "batch_size": rows, "micro_batch_size": rows, "warmup_steps": 0, "precision": precision},
        **{"keep_steps": [], "save_steps": 100, "eval_steps": 2, "logging_steps": 1, "spike_threshold": None},
    }
    peaks = []
    plain = trainer.NanoPhiTrainer.evaluate

    def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        peaks.append(peak())
        return plain(self, *args, **kwargs)

    trainer.NanoPhiTrainer.evaluate = evaluate  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        estimate.write_random_tokens(run, config, 2 * rows)
        base = peak()
        trainer.train(run, recipe.training.model_copy(update=update), config, 0)
    print(json.dumps({"training_bytes": peaks[0] - base, "with_evaluation_bytes": peak() - base}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("train_memory.json"))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.rows)
        return
    from nanophi.training.budget import peak_bytes

    recipe = load_recipe("nano-phi-115m")
    result: dict[str, Any] = {"shape": f"{arguments.rows} x {recipe.model_config_for().max_position_embeddings} tokens"}
    for precision in arguments.precisions:
        result[precision] = {}
        command = [sys.executable, __file__, "--work", precision, "--rows", str(arguments.rows)]
        training = recipe.training.model_copy(update={"precision": precision, "batch_size": arguments.rows})
        estimated = peak_bytes(recipe.model_config_for(), training, arguments.rows)
        for name, settings in (("as it is", {}), ("returned", RETURN_FREED)):
            environ = {**os.environ, **settings}
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ).stdout
            measured = json.loads(output.strip().splitlines()[-1])
            ratio = round(estimated / measured["with_evaluation_bytes"], 3)
            result[precision][name] = {**measured, "estimated_bytes": estimated, "estimated_to_measured": ratio}
            print(f"{precision}, freed memory {name}: {json.dumps(result[precision][name])}", flush=True)
    results = read_json(arguments.output) if arguments.output.exists() else []
    write_json(arguments.output, [*results, {"finished": now(), "environment": environment(), **result}])


if __name__ == "__main__":
    main()
