"""Does the scorer give the results of lm-eval's `HFLM`, and how much faster? Same model, items and machine, in one run.

    python benchmarks/eval_speed.py --data ../shared/benchmarks --tokenizer ../shared/tokenizers/phi-2

Both score the leaderboard's six tasks at their number of shots with a randomly initialised nano-phi-115M. Each scorer
has a process of its own per task, whose peak memory is measured. They take turns, a block of items each, so that a
machine whose speed drifts drifts for both. Scoring (with tokenization) is timed, loading of model and data is not.
`HFLM` gets the batch size that is fastest for it (`--calibrate` measures it). Each task's figures are saved in
`benchmarks/eval_speed.json` as soon as it ends; run again with the same settings, the script resumes with the next
task. `--items 20 --mmlu-subjects 2 --output /tmp/look.json` gives a first look.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nanophi.core.files import read_json, write_json

SCORERS = ("hflm", "ours")
# Short and long few-shot prefixes, and two subjects whose five examples alone overflow 1,024 tokens.
MMLU = [
    "abstract_algebra",
    "world_religions",
    "college_physics",
    "high_school_european_history",
    "human_aging",
    "professional_medicine",
    "moral_scenarios",
    "econometrics",
    "marketing",
    "college_computer_science",
]
SHARE_OF_SUITE = {"arc_challenge": 1172, "hellaswag": 10042, "mmlu": 14042, "truthfulqa_mc2": 817, "winogrande": 1267}
SHARE_OF_SUITE["gsm8k"] = 1319
TARGETS = {"arc_challenge": 8.0, "hellaswag": 5.0, "mmlu": 5.0, "whole suite": 3.0}
BATCH_SIZES = {"arc_challenge": 1, "hellaswag": 1, "mmlu": 1, "truthfulqa_mc2": 1, "winogrande": 1, "gsm8k": 16}
"""The fastest of 1, 4, 16 and 32 for `HFLM`, on one core and on two."""
BLOCK = 64
"""Items per turn of a scorer, at least."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="benchmarks under their Hub ids")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer of 50,295 tokens")
    parser.add_argument("--items", type=int, default=200, help="items per task")
    parser.add_argument("--mmlu-subjects", type=int, default=10)
    parser.add_argument("--tasks", default=",".join(BATCH_SIZES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--calibrate", action="store_true", help="only try batch sizes of HFLM on a few items")
    parser.add_argument("--ours", action="store_true", help="only time ours, and write nothing: to work on the scorer")
    parser.add_argument("--quick", action="store_true", help="also time the suite `quick` as a whole, on all cores")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    with tempfile.TemporaryDirectory() as folder:
        job = {"model": f"{folder}/model", "data": str(options.data), "threads": options.threads}
        job |= {"items": options.items, "subjects": MMLU[: options.mmlu_subjects]}
        with Worker({**job, "do": "make", "tokenizer": str(options.tokenizer)}) as made:
            made.read()
        if options.calibrate:
            calibrate(options.tasks.split(","), job)
            return
        if options.ours:
            ours(options.tasks.split(","), job)
            return
        benchmark(options, job, Path(folder))


def calibrate(tasks: list[str], job: dict[str, Any]) -> None:
    """Print HFLM's seconds by batch size on a few items of each task."""
    for task in tasks:
        sizes = (8, 16, 32) if task == "gsm8k" else (1, 4, 16)
        seconds = {}
        for size in sizes:
            few = {"items": 32 if task == "gsm8k" else 8, "subjects": job["subjects"][:4]}
            with Worker({**job, **few, "do": "score", "scorer": "hflm", "task": task, "batch_size": size}) as stock:
                seconds[size] = round(sum(stock.ask(block)["seconds"] for block in range(stock.read()["blocks"])), 1)
        print(f"{task}: {seconds}", flush=True)


def ours(tasks: list[str], job: dict[str, Any]) -> None:
    """Print the scorer's own seconds and peak memory on each task."""
    for task in tasks:
        with Worker({**job, "do": "score", "scorer": "ours", "task": task}) as scorer:
            seconds = sum(scorer.ask(block)["seconds"] for block in range(scorer.read()["blocks"]))
            peak = scorer.ask("end")["peak_mib"]
        print(f"{task}: {seconds:.1f} s, {peak:.0f} MiB", flush=True)


def benchmark(options: argparse.Namespace, job: dict[str, Any], folder: Path) -> None:
    """Run the tasks that are not done yet, and write what is known after each."""
    settings = {key: job[key] for key in ("threads", "items", "subjects")}
    report: dict[str, Any] = read_json(options.output) if options.output.exists() else {}
    if report.get("settings") != settings:
        report = {"settings": settings, "tasks": {}}
    for task in options.tasks.split(","):
        if task not in report["tasks"]:
            report["tasks"][task] = run(task, job)
            write(report, options.output)
        print(line(task, report["tasks"][task]), flush=True)
    if options.quick and "quick" not in report:
        threads = os.cpu_count()
        with Worker({**job, "threads": threads, "do": "quick", "output": str(folder / "quick.json")}) as quick:
            report["quick"] = {"threads": threads, "seconds": quick.read()["seconds"]}
    write(report, options.output)
    print(f"these items: {report['these_items']['ratio']:.1f}x")
    print(f"extrapolated to the suite's numbers of items: {report['whole_suite']['ratio']:.1f}x")
    if "quick" in report:
        print(f"suite quick: {report['quick']['seconds']:.0f} s on {report['quick']['threads']} threads")
    print(f"written: {options.output}")


def write(report: dict[str, Any], path: Path) -> None:
    """Put the tasks' figures together and write the report."""
    tasks = report["tasks"]
    # The whole suite has its tasks' true numbers of items, not the same number of each.
    weights = {task: SHARE_OF_SUITE[task] / row["items"] for task, row in tasks.items()}
    seconds = {s: sum(weights[t] * row[s]["seconds"] for t, row in tasks.items()) for s in SCORERS}
    sampled = {s: sum(row[s]["seconds"] for row in tasks.values()) for s in SCORERS}
    hours = {s: seconds[s] / 3600 for s in SCORERS}
    report["whole_suite"] = {"hours": hours, "ratio": seconds["hflm"] / seconds["ours"]}
    report["these_items"] = {"seconds": sampled, "ratio": sampled["hflm"] / sampled["ours"]}
    ratios = {task: row["ratio"] for task, row in tasks.items()} | {"whole suite": report["these_items"]["ratio"]}
    report["targets"] = {name: {"target": t, "measured": ratios[name]} for name, t in TARGETS.items() if name in ratios}
    write_json(path, report)


def line(task: str, row: dict[str, Any]) -> str:
    """A task's figures for a person."""
    stock, ours = row["hflm"], row["ours"]
    return (
        f"{task:16} {row['items']:5} items, {row['overflowing']:5} of {row['requests']} requests overflow; "
        f"HFLM {stock['seconds']:.1f} s, ours {ours['seconds']:.1f} s: {row['ratio']:.1f}x "
        f"({min(row['ratios']):.1f} to {max(row['ratios']):.1f} by block); "
        f"peak {stock['peak_mib']:.0f} and {ours['peak_mib']:.0f} MiB; "
        f"log-likelihoods differ by {row['largest_difference']:.1e}, outputs by {row['different_outputs']}, "
        f"decisions by {row['different_decisions']}"
    )


def run(task: str, job: dict[str, Any]) -> dict[str, Any]:
    """Speed, memory and differences of the two scorers on one task."""
    common = {**job, "do": "score", "task": task, "batch_size": BATCH_SIZES[task]}
    with Worker({**common, "scorer": "hflm"}) as hflm, Worker({**common, "scorer": "ours"}) as ours:
        workers = {"hflm": hflm, "ours": ours}
        counts = {name: worker.read() for name, worker in workers.items()}["ours"]
        blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in SCORERS}
        for block in range(counts["blocks"]):
            # Whoever came second comes first in the next block.
            for name in SCORERS if block % 2 else SCORERS[::-1]:
                blocks[name].append(workers[name].ask(block))
        ends = {name: worker.ask("end") for name, worker in workers.items()}
    answers = {name: [answer for part in parts for answer in part["answers"]] for name, parts in blocks.items()}
    pairs = list(zip(answers["ours"], answers["hflm"], strict=True))
    texts = isinstance(pairs[0][0], str)
    seconds = {name: sum(part["seconds"] for part in parts) for name, parts in blocks.items()}
    return {
        **{key: counts[key] for key in ("items", "requests")},
        **{key: ends["ours"][key] for key in ("overflowing", "sharing", "environment")},
        "hflm_batch_size": BATCH_SIZES[task],
        "ratio": seconds["hflm"] / seconds["ours"],
        "ratios": [a["seconds"] / b["seconds"] for a, b in zip(blocks["hflm"], blocks["ours"], strict=True)],
        "largest_difference": 0.0 if texts else max(abs(a[0] - b[0]) for a, b in pairs),
        "different_greedy": 0 if texts else sum(a[1] != b[1] for a, b in pairs),
        "different_outputs": sum(a != b for a, b in pairs) if texts else 0,
        # mc2 is a share of probability, the other metrics are 0 or 1.
        "different_decisions": sum(
            any(abs(a[metric] - b[metric]) > 1e-3 for metric in a)
            for a, b in zip(ends["ours"]["decisions"], ends["hflm"]["decisions"], strict=True)
        ),
        **{
            name: {
                "seconds": seconds[name],
                "cpu_seconds": sum(part["cpu_seconds"] for part in parts),
                "peak_mib": ends[name]["peak_mib"],
            }
            for name, parts in blocks.items()
        },
    }


class Worker:
    """A process that takes requests and gives answers, each as a line of JSON."""

    def __init__(self, job: dict[str, Any]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, __file__, "--data", job["data"], "--tokenizer", "-", "--worker", json.dumps(job)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.communicate()

    def ask(self, question: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> Any:
        """The next line that is an answer; libraries print lines of their own."""
        assert self.process.stdout is not None
        for text in self.process.stdout:
            if text.startswith("answer: "):
                return json.loads(text.removeprefix("answer: "))
        raise SystemExit(f"a worker ended with status {self.process.wait()}")


def answer(value: Any) -> None:
    """Send a line of JSON to the parent process."""
    print(f"answer: {json.dumps(value)}", flush=True)


def worker(job: dict[str, Any]) -> None:
    """Do a job in this process."""
    import torch

    torch.set_num_threads(job["threads"])
    if job["do"] == "make":
        make(job)
    elif job["do"] == "quick":
        from nanophi.eval.measure import Options, measure

        started = time.monotonic()
        with contextlib.redirect_stdout(sys.stderr):
            measure(job["model"], "quick", Path(job["output"]), Options(data=Path(job["data"])))
        answer({"seconds": time.monotonic() - started})
    else:
        score(job)


def make(job: dict[str, Any]) -> None:
    """Save a randomly initialised nano-phi-115M."""
    import torch
    import transformers

    from nanophi import NanoPhiConfig, NanoPhiForCausalLM

    words = transformers.AutoTokenizer.from_pretrained(job["tokenizer"])
    torch.manual_seed(0)
    config = NanoPhiConfig(
        vocab_size=50295,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        bos_token_id=50256,
        eos_token_id=50256,
    )
    NanoPhiForCausalLM(config).save_pretrained(job["model"])
    words.save_pretrained(job["model"])
    answer(None)


def score(job: dict[str, Any]) -> None:
    """Score the requested blocks of a task's items, and at the end send the decisions."""
    from lm_eval.models.huggingface import HFLM

    from nanophi.core.environment import environment
    from nanophi.eval.models import load_model
    from nanophi.eval.scorer import ScorerLM

    network, tokenizer, _ = load_model(job["model"], dtype="float32")
    instances, tasks = build(job["task"], job)
    lm: HFLM = (
        ScorerLM(network, tokenizer)
        if job["scorer"] == "ours"
        else HFLM(pretrained=network, tokenizer=tokenizer, batch_size=job["batch_size"])
    )
    method = getattr(lm, instances[0].request_type)
    blocks = divide(instances)
    items = len({(instance.task_name, instance.doc_id) for instance in instances})
    answer({"blocks": len(blocks), "items": items, "requests": len(instances)})
    for text in sys.stdin:
        request = json.loads(text)
        if request == "end":
            break
        started, cpu = time.monotonic(), time.process_time()
        answers = method(blocks[request])
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu
        answer({"answers": answers, "seconds": seconds, "cpu_seconds": cpu_seconds})
        for instance, found in zip(blocks[request], answers, strict=True):
            instance.resps.append(found)
    else:
        return
    answer(
        {
            "decisions": decide(tasks),
            "overflowing": lm.overflowing if isinstance(lm, ScorerLM) else None,
            "sharing": lm.unshared_because if isinstance(lm, ScorerLM) else None,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "environment": environment(),
        }
    )


def divide(instances: list[Any]) -> list[list[Any]]:
    """Requests in blocks of `BLOCK` items or a few more; an MMLU subject, whose items share examples, stays whole."""
    groups: dict[Any, list[Any]] = {}
    for instance in instances:
        key = instance.task_name if instance.task_name.startswith("mmlu") else instance.doc_id
        groups.setdefault(key, []).append(instance)
    blocks: list[list[Any]] = [[]]
    items = 0
    for group in groups.values():
        if items >= BLOCK:
            blocks.append([])
            items = 0
        blocks[-1] += group
        items += len({instance.doc_id for instance in group})
    if items < BLOCK / 2 and len(blocks) > 1:
        last = blocks.pop()
        blocks[-1] += last
    return blocks


def build(name: str, job: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The requests of a fixed sample of a task's items, as lm-eval builds them."""
    from nanophi.eval.measure import FEWSHOT_SEED
    from nanophi.eval.suites import SUITES, Suite, load_suite, quiet, sample_of_items

    entries = [entry for entry in SUITES["open-llm-v1"].entries if entry.task == name]
    with quiet():
        loaded = load_suite(Suite(name, tuple(entries)), data=Path(job["data"]))
        tasks = [loaded.tasks[leaf] for leaf in loaded.tasks]
        count = job["items"]
        if name == "mmlu":
            tasks = [loaded.tasks[f"mmlu_{subject}"] for subject in job["subjects"]]
            count = -(-count // len(tasks))
        for task in tasks:
            task.set_fewshot_seed(FEWSHOT_SEED)
            task.build_all_requests(samples=sample_of_items(task, count))
    return [instance for task in tasks for instance in task.instances], tasks


def decide(tasks: list[Any]) -> list[Any]:
    """Every item's metrics, as lm-eval computes them from the answers."""
    decisions = []
    for task in tasks:
        task.apply_filters()
        by_doc: dict[int, list[Any]] = {}
        for instance in task.instances:
            by_doc.setdefault(instance.doc_id, []).append(instance)
        for instances in by_doc.values():
            for key in instances[0].filtered_resps:
                found = [instance.filtered_resps[key] for instance in sorted(instances, key=lambda i: i.idx)]
                metrics = task.process_results(instances[0].doc, found)
                decisions.append({metric: float(value) for metric, value in metrics.items()})
    return decisions


if __name__ == "__main__":
    main()
