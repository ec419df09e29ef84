"""Is the scorer as right as lm-eval's `HFLM`, and how much sooner? On the same model, items and machine, in one run.

    python benchmarks/eval_speed.py --data ../shared/benchmarks --tokenizer ../shared/tokenizers/phi-2

Both score the leaderboard's six tasks at their shots with a randomly initialised nano-phi-115M. Every pair of task and
scorer runs in a process of its own, whose peak memory is measured; what is timed is the scoring (with tokenization),
not the loading of model and data. `HFLM` gets the batch size that is fastest for it here. Writes the figures to
`benchmarks/eval_speed.json`. The whole takes hours on two cores; `--items 20 --mmlu-subjects 2` gives a first look.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCORERS = ("ours", "hflm")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="benchmarks under their Hub ids")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer of 50,295 tokens")
    parser.add_argument("--items", type=int, default=200, help="items per task")
    parser.add_argument("--mmlu-subjects", type=int, default=10)
    parser.add_argument("--tasks", default="arc_challenge,hellaswag,mmlu,truthfulqa_mc2,winogrande,gsm8k")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, help="of HFLM; default: the fastest of 1, 4 and 16")
    parser.add_argument("--quick", action="store_true", help="also time the suite `quick` as a whole")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    with tempfile.TemporaryDirectory() as folder:
        report = benchmark(options, Path(folder))
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {options.output}")


def benchmark(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run every worker and put their figures together."""
    common = {"model": str(folder / "model"), "data": str(options.data), "threads": options.threads}
    common |= {"items": options.items, "subjects": MMLU[: options.mmlu_subjects]}
    call({**common, "do": "make", "tokenizer": str(options.tokenizer)})
    batch_size = options.batch_size
    tried = {}
    if batch_size is None:
        for size in (1, 4, 16):
            tried[size] = call({**common, "do": "calibrate", "batch_size": size})["seconds"]
        batch_size = min(tried, key=lambda size: tried[size])
        print(f"HFLM is fastest with batch size {batch_size}: {tried}", flush=True)
    report: dict[str, Any] = {"command": " ".join(sys.argv), "hflm_batch_size": batch_size, "hflm_batch_sizes": tried}
    report["tasks"] = {}
    for task in options.tasks.split(","):
        runs = {
            scorer: call({**common, "do": "score", "scorer": scorer, "task": task, "batch_size": batch_size})
            for scorer in SCORERS
        }
        report["environment"] = runs["ours"].pop("environment")
        del runs["hflm"]["environment"]
        report["tasks"][task] = row = compare(runs)
        print(
            f"{task:16} {row['items']:5} items, {row['overflowing']:5} of {row['requests']} requests overflow; "
            f"HFLM {row['hflm']['seconds']:.1f} s, ours {row['ours']['seconds']:.1f} s: {row['ratio']:.1f}x "
            f"(processor time: {row['hflm']['cpu_seconds'] / row['ours']['cpu_seconds']:.1f}x); peak "
            f"{row['hflm']['peak_mib']:.0f} and {row['ours']['peak_mib']:.0f} MiB; "
            f"log-likelihoods differ by {row['largest_difference']:.1e}, decisions by {row['different_decisions']}",
            flush=True,
        )
    # The whole suite has its tasks' true numbers of items, not the same number of each.
    weights = {task: SHARE_OF_SUITE[task] / row["items"] for task, row in report["tasks"].items()}
    seconds = {s: sum(weights[t] * row[s]["seconds"] for t, row in report["tasks"].items()) for s in SCORERS}
    sampled = {s: sum(row[s]["seconds"] for row in report["tasks"].values()) for s in SCORERS}
    report["whole_suite"] = {
        "hours": {s: seconds[s] / 3600 for s in SCORERS},
        "ratio": seconds["hflm"] / seconds["ours"],
    }
    report["these_items"] = {"seconds": sampled, "ratio": sampled["hflm"] / sampled["ours"]}
    print(f"these items: {report['these_items']['ratio']:.1f}x")
    print(f"extrapolated to the suite's numbers of items: {report['whole_suite']['ratio']:.1f}x")
    if options.quick:
        report["quick_seconds"] = call({**common, "do": "quick", "output": str(folder / "quick.json")})["seconds"]
        print(f"suite quick: {report['quick_seconds']:.0f} s")
    ratios = {
        **{task: row["ratio"] for task, row in report["tasks"].items()},
        "whole suite": report["these_items"]["ratio"],
    }
    report["targets"] = {name: {"target": t, "measured": ratios[name]} for name, t in TARGETS.items() if name in ratios}
    return report


def compare(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Speed, memory and differences of the two scorers on one task."""
    answers = {scorer: run.pop("answers") for scorer, run in runs.items()}
    decisions = {scorer: run.pop("decisions") for scorer, run in runs.items()}
    texts = isinstance(answers["ours"][0], str)
    pairs = list(zip(answers["ours"], answers["hflm"], strict=True))
    return {
        **{key: runs["ours"].pop(key) for key in ("items", "requests", "overflowing", "sharing")},
        "ratio": runs["hflm"]["seconds"] / runs["ours"]["seconds"],
        "largest_difference": 0.0 if texts else max(abs(a[0] - b[0]) for a, b in pairs),
        "different_greedy": 0 if texts else sum(a[1] != b[1] for a, b in pairs),
        "different_outputs": sum(a != b for a, b in pairs) if texts else 0,
        # mc2 is a share of probability, the other metrics are 0 or 1.
        "different_decisions": sum(
            any(abs(a[metric] - b[metric]) > 1e-3 for metric in a)
            for a, b in zip(decisions["ours"], decisions["hflm"], strict=True)
        ),
        **{scorer: {key: run[key] for key in ("seconds", "cpu_seconds", "peak_mib")} for scorer, run in runs.items()},
    }


def call(job: dict[str, Any]) -> dict[str, Any]:
    """Run a worker process and return its last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [sys.executable, __file__, "--data", job["data"], "--tokenizer", "-", "--worker", json.dumps(job)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def worker(job: dict[str, Any]) -> None:
    """One job in a process of its own; its result is the last line of its output."""
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    if job["do"] == "make":
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
        print("{}")
        return
    if job["do"] == "quick":
        from nanophi.eval.evaluate import evaluate

        started = time.monotonic()
        evaluate(
            job["model"],
            "quick",
            Path(job["output"]),
            data=Path(job["data"]),
            report=lambda line: print(line, file=sys.stderr),
        )
        print(json.dumps({"seconds": time.monotonic() - started}))
        return
    from lm_eval.models.huggingface import HFLM

    from nanophi.eval.evaluate import load_model
    from nanophi.eval.scorer import ScorerLM

    network, tokenizer, _ = load_model(job["model"], dtype="float32")
    instances, tasks = build(job["task"] if job["do"] == "score" else "arc_challenge", job)
    ours = job.get("scorer") == "ours"
    lm: HFLM = (
        ScorerLM(network, tokenizer)
        if ours
        else HFLM(pretrained=network, tokenizer=tokenizer, batch_size=job["batch_size"])
    )
    if job["do"] == "calibrate":
        instances = instances[:32]
    method = getattr(lm, instances[0].request_type)
    started, cpu = time.monotonic(), time.process_time()
    answers = method(instances)
    result: dict[str, Any] = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu}
    if job["do"] == "score":
        from nanophi.records import environment

        for instance, answer in zip(instances, answers, strict=True):
            instance.resps.append(answer)
        result |= {
            "answers": answers,
            "decisions": decide(tasks),
            "items": len({(instance.task_name, instance.doc_id) for instance in instances}),
            "requests": len(instances),
            "overflowing": lm.overflowing if isinstance(lm, ScorerLM) else None,
            "sharing": lm.sharing if isinstance(lm, ScorerLM) else None,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "environment": environment(),
        }
    print(json.dumps(result))


def build(name: str, job: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The requests of a fixed sample of a task's items, as lm-eval builds them."""
    from nanophi.eval.evaluate import FEWSHOT_SEED, _quiet
    from nanophi.eval.suites import OPEN_LLM_V1, Suite, load_suite, sample_of_items

    entries = [entry for entry in OPEN_LLM_V1.entries if entry.task == name]
    with _quiet():
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
