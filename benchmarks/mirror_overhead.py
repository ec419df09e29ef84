"""What does a mirror cost a training? Writes benchmarks/mirror_overhead.json.

    python benchmarks/mirror_overhead.py

The demo's model and training on random tokens, saved seven times as often as its recipe does, each time in a process of
its own: without a mirror, with one in a folder, and with one whose every call takes two seconds. The order alternates.
`wall_overhead` compares the training loops' wall times, whose scatter on a machine that does other things is larger
than what is sought. `own_overhead` is what the mirror took: the time for which the training waited for it (the end is
apart), and its threads' processor time, as a share of the training's wall or processor time, whichever is less.
"""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nanophi.core import mirror
from nanophi.core.environment import environment
from nanophi.core.files import write_json
from nanophi.core.recipe import load_recipe
from nanophi.core.run import RunDirectory
from nanophi.training.estimate import write_random_tokens
from nanophi.training.trainer import train

ARMS, REPEATS = ("none", "folder", "slow"), 3
STEPS, SAVE_STEPS, CALL_SECONDS = 60, 20, 2.0
CALLS = ("cat_file", "pipe_file", "find", "put_file", "get_file", "rm_file", "mv")


def slowly(call: Any, *args: Any, **options: Any) -> Any:
    time.sleep(CALL_SECONDS)
    return call(*args, **options)


def measure(arm: str, folder: Path) -> dict[str, float]:
    """One training in this process."""
    seconds = dict.fromkeys(("waited", "threads_cpu"), 0.0)
    recipe = load_recipe("demo")
    config = recipe.model_config_for(eos_token_id=0, bos_token_id=0)
    run = folder / "run"
    write_random_tokens(run, config, STEPS * recipe.training.batch_size)
    write_json(run / "record.json", {"stages": {}})
    plain_note, plain_copy, connect = mirror.Mirror.note, mirror.Mirror._copy, mirror.connect

    def note(self: mirror.Mirror) -> None:
        began = time.monotonic()
        plain_note(self)
        seconds["waited"] += time.monotonic() - began

    def copy(self: mirror.Mirror) -> None:
        plain_copy(self)
        seconds["threads_cpu"] += time.thread_time()

    def slow(url: str) -> tuple[Any, str]:
        files, path = connect(url)
        for name in CALLS:
            setattr(files, name, functools.partial(slowly, getattr(files, name)))
        return files, path

    mirror.Mirror.note, mirror.Mirror._copy = note, copy  # type: ignore[method-assign]
    if arm == "slow":
        mirror.connect = slow
    update = {"steps": STEPS, "save_steps": SAVE_STEPS, "eval_steps": STEPS + 1, "keep_steps": [], "warmup_steps": 10}
    training = recipe.training.model_copy(update={**update, "spike_threshold": None})
    (folder / "mirror").mkdir()
    with mirror.mirrored(None if arm == "none" else str(folder / "mirror")), RunDirectory(run).lock():
        began, busy = time.monotonic(), time.process_time()
        train(run, training, config, recipe.seed, lambda line: None)
        seconds["training"], seconds["training_cpu"] = time.monotonic() - began, time.process_time() - busy
    seconds["end"] = time.monotonic() - began - seconds["training"]
    return seconds


def main() -> None:
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for repeat in range(REPEATS):
        for arm in ARMS if repeat % 2 == 0 else ARMS[::-1]:
            with tempfile.TemporaryDirectory(prefix="mirror-overhead-") as folder:
                command = [sys.executable, __file__, arm, folder]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[arm].append(json.loads(done.stdout.splitlines()[-1]))
            print(arm, found[arm][-1], flush=True)
    result: dict[str, Any] = {"steps": STEPS, "save_steps": SAVE_STEPS, "call_seconds": CALL_SECONDS}
    plain = statistics.median(one["training"] for one in found["none"])
    for arm, all_of_it in found.items():
        middle = {key: statistics.median(one[key] for one in all_of_it) for key in all_of_it[0]}
        result[arm] = {"seconds": {key: round(value, 3) for key, value in middle.items()}}
        result[arm]["wall_overhead"] = round(middle["training"] / plain - 1, 4)
        own = middle["waited"] + middle["threads_cpu"]
        result[arm]["own_overhead"] = round(own / min(middle["training"], middle["training_cpu"]), 4)
        result[arm]["runs"] = all_of_it
    write_json(Path(__file__).with_suffix(".json"), {**result, "environment": environment()})
    print(json.dumps({arm: {**result[arm], "runs": None} for arm in ARMS}, indent=2))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
    else:
        main()
