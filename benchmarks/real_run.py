"""Does the quality filter help? nano-phi-115M on filtered text, on all of it, and on as much of it, side by side.

    python benchmarks/real_run.py --corpus ../shared/corpus --tokenizer ../shared/tokenizers/phi-2 \
        --benchmarks ../shared/benchmarks --minutes 20

Three runs of the same steps, each a recipe of its own that goes through `nanophi`'s stages:

    filtered   documents that score above the threshold, which is chosen from the scores alone, before any training,
               to keep the share of the text that the published model's filter kept (42 %)
    control    all documents: as much compute, so fewer epochs
    matched    a random part of all documents, as large as the filtered one: as much compute and as many epochs

A short probe measures tokens/s; from it and `--minutes` follow the steps, which `OUTPUT/plan.json` keeps: called again,
the command goes on where it stopped, with the same plan. Validation is the corpus's own split, by kind of text. Records
are copied to OUTPUT after every stage, so a run that is cut off leaves what it had. `--seeds 0 1` measures the noise
of the seed as well. The corpus's `kind` column labels the classifier's examples (textbook, reference and encyclopedia
good; chat log, transcript and LaTeX poor).

On a machine that lacks this package's dependencies, put their wheels on PYTHONPATH: datasets, dill, multiprocess,
evaluate, lm_eval with what it imports, rensa and pydantic.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from nanophi.eval import render
from nanophi.files import UserError, read_json, write_json, write_text
from nanophi.pipeline import Pipeline
from nanophi.recipe import Recipe, load_recipe
from nanophi.run import environment
from nanophi.training.estimate import PUBLISHED_TOKENS

ARMS = ("filtered", "control", "matched")
HIGH, LOW = ["textbook", "reference", "encyclopedia"], ["chat-log", "transcript", "latex"]
KEPT_SHARE = 0.42
PROBE_STEPS = 40
DEFAULTS = [
    # Far fewer tokens than the recipe's 7.3B: smaller steps, so that there are enough of them.
    "training.batch_size=128",
    "training.micro_batch_size=32",
    "training.logging_steps=10",
    "data.decontamination.ngram=13",
]


def recipe_of(args: argparse.Namespace, name: str, plan: dict[str, Any], seed: int = 0) -> Recipe:
    """The recipe of one arm: the built-in one, with this corpus, the plan's steps, and what makes it that arm."""
    arm = name.partition("-")[0]
    # Weights below one keep a random part; the held-out source has the same only because a name has one weight.
    weight = plan["kept_share"] if arm == "matched" else 1.0
    shared = {"source_column": "kind", "weight": weight}
    sources = [
        {"files": str(args.corpus / "data/train-*.parquet"), **shared},
        {"files": str(args.corpus / "data/validation-*.parquet"), "heldout": True, **shared},
    ]
    steps = plan.get("steps", PROBE_STEPS)
    values: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "data.sources": sources,
        "data.decontamination.benchmarks": str(args.benchmarks) if args.benchmarks else None,
        "quality.scorer": "linear",
        "quality.high": HIGH,
        "quality.low": LOW,
        "quality.threshold": plan["threshold"] if arm == "filtered" else None,
        "tokenizer.path": str(args.tokenizer),
        "training.steps": steps,
        "training.warmup_steps": min(100, steps // 10),
        "training.keep_steps": [],
        "training.save_steps": max(1, steps // 4),
        "training.eval_steps": max(1, steps // 8),
        "evaluation.suites": args.suites,
        "evaluation.data": str(args.benchmarks) if args.benchmarks else None,
        "card.title": f"nano-phi-115M {arm}",
    }
    return load_recipe(
        args.recipe, [*DEFAULTS, *(f"{key}={json.dumps(value)}" for key, value in values.items()), *args.overrides]
    )


def choose_threshold(scores: Path) -> tuple[float, float]:
    """The threshold, to two digits, that keeps the share of the training text nearest to `KEPT_SHARE`; that share."""
    table = pq.read_table(scores, columns=["quality_score", "bytes", "split"])
    train = np.array(table["split"].to_pylist()) == "train"
    values, sizes = table["quality_score"].to_numpy()[train], table["bytes"].to_numpy()[train]
    shares = {step / 100: float(sizes[values > step / 100].sum() / sizes.sum()) for step in range(1, 100)}
    threshold = min(shares, key=lambda step: abs(shares[step] - KEPT_SHARE))
    return threshold, shares[threshold]


def make_plan(args: argparse.Namespace, began: float) -> dict[str, Any]:
    """Threshold, tokens/s and steps, in the order in which they must be settled; see the module."""
    path = args.output / "plan.json"
    if path.exists():
        return read_json(path)
    plan: dict[str, Any] = {"threshold": None, "kept_share": 1.0, "arms": args.arms, "seeds": args.seeds}
    probe = Pipeline(recipe_of(args, "probe", plan), args.runs)
    probe.quality()
    plan["threshold"], plan["kept_share"] = choose_threshold(probe.path / "data/scores/scores.parquet")
    print(f"threshold {plan['threshold']} keeps {plan['kept_share']:.1%} of the text")
    plan["environment"] = environment()
    if args.steps is not None:
        plan["steps"] = args.steps
    else:
        probe.tokens()
        started = time.monotonic()
        speed = probe.training()["tokens_per_second"]
        training = probe.recipe.training
        step_seconds = training.batch_size * probe.recipe.model_config_for().max_position_embeddings / speed
        start_up = max(0.0, time.monotonic() - started - training.steps * step_seconds)
        runs = len(args.arms) * len(args.seeds)
        left = args.minutes * 60 - (time.monotonic() - began) - runs * (start_up + 60 * args.evaluation_minutes)
        plan |= {"probe_tokens_per_second": speed, "start_up_seconds": round(start_up, 1)}
        plan["steps"] = int(left / runs / step_seconds)
        if plan["steps"] < PROBE_STEPS:
            raise UserError(
                f"{args.minutes:g} minutes leave {plan['steps']} steps for each of {runs} runs "
                f"at {speed:,.0f} tokens/s; raise --minutes, or name fewer --arms or --seeds"
            )
    write_json(path, plan)
    return plan


def publish(pipeline: Pipeline, output: Path) -> None:
    """Copy what a run has by now, without data, weights and items."""
    target = output / pipeline.recipe.name
    for name in (
        "recipe.yaml",
        "record.json",
        "training.json",
        "sample.json",
        "data/documents/documents.json",
        "data/quality/quality.json",
        "data/quality/quality.md",
        "data/quality/quality.png",
        "data/tokens/tokens.json",
    ):
        if (pipeline.path / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(pipeline.path / name, target / name)
    for file in (pipeline.path / "evals").glob("*.json"):
        result = read_json(file)
        result.pop("samples", None)
        write_json(target / "evals" / file.name, result)


def measure(args: argparse.Namespace, plan: dict[str, Any]) -> list[Pipeline]:
    """Train and evaluate every arm under every seed; the first seed's arms come first."""
    pipelines = []
    for seed in args.seeds:
        for arm in args.arms:
            pipeline = Pipeline(recipe_of(args, f"{arm}-seed-{seed}", plan, seed), args.runs)
            with pipeline.run.lock():
                pipeline.write_recipe()
                for stage in (pipeline.tokens, pipeline.training, pipeline.sample, pipeline.evaluation):
                    stage()
                    publish(pipeline, args.output)
            pipelines.append(pipeline)
    return pipelines


def draw(pipelines: list[Pipeline], path: Path) -> None:
    """Training loss, and validation bits per byte, against tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for pipeline in pipelines:
        history = read_json(pipeline.path / "training.json")
        arm = pipeline.recipe.name.partition("-")[0]
        style = {"color": f"C{ARMS.index(arm)}", "label": pipeline.recipe.name, "alpha": 0.8}
        left.plot([e["tokens_seen"] / 1e6 for e in history["log"]], [e["loss"] for e in history["log"]], lw=1, **style)
        evaluations = history["evaluations"]
        tokens = [entry["tokens_seen"] / 1e6 for entry in evaluations]
        right.plot(tokens, [entry["bits_per_byte"] for entry in evaluations], marker="o", ms=3, **style)
    for axes, title in ((left, "training loss (its own text)"), (right, "validation bits per byte (all kinds)")):
        axes.set(xlabel="million tokens seen", title=title)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def report(pipelines: list[Pipeline], plan: dict[str, Any], output: Path) -> dict[str, Any]:
    """`results.json` and `results.md`: speed, epochs, validation by kind with the seed's noise, and the comparison."""
    runs: dict[str, Any] = {}
    for pipeline in pipelines:
        history = read_json(pipeline.path / "training.json")
        tokens = read_json(pipeline.path / "data/tokens/tokens.json")["train"]["tokens"]
        final = history["evaluations"][-1]
        speeds = [entry["mfu"] for entry in history["log"][1:] if entry["mfu"] is not None]
        runs[pipeline.recipe.name] = {
            **{key: history["summary"][key] for key in ("steps", "tokens_seen", "seconds", "tokens_per_second")},
            "mfu": float(np.median(speeds)) if speeds else None,
            "unique_tokens": tokens,
            "epochs": round(history["summary"]["tokens_seen"] / tokens, 2),
            "bits_per_byte": final["bits_per_byte"],
            "by_kind": final.get("by_source", {}),
        }
    speed = float(np.median([run["tokens_per_second"] for run in runs.values()]))
    headline: dict[str, Any] = {"tokens_per_second": speed, "hours_for_7.3B_tokens": PUBLISHED_TOKENS / speed / 3600}
    if torch.cuda.is_available():
        benchmark = Path(__file__).parent / "train_speed.json"
        device = torch.cuda.get_device_name()
        known = read_json(benchmark).get(device) if benchmark.exists() else None
        headline |= {"device": device, "train_speed_benchmark": known}
    result = {"plan": plan, "headline": headline, "runs": runs}
    write_json(output / "results.json", result)

    kinds = sorted({kind for run in runs.values() for kind in run["by_kind"]})
    lines = [
        "| run | tokens/s | MFU | tokens seen | unique tokens | epochs | validation bits per byte |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, run in runs.items():
        mfu = "" if run["mfu"] is None else f"{run['mfu']:.1%}"
        lines.append(
            f"| {name} | {run['tokens_per_second']:,.0f} | {mfu} | {run['tokens_seen']:,} | {run['unique_tokens']:,} "
            f"| {run['epochs']} | {run['bits_per_byte']:.4f} |"
        )
    lines += ["", f"| bits per byte | {' | '.join(runs)} |", "|---" + "|---:" * len(runs) + "|"]
    lines += [
        f"| {kind} | " + " | ".join(f"{run['by_kind'].get(kind, float('nan')):.4f}" for run in runs.values()) + " |"
        for kind in kinds
    ]
    for arm in ARMS:
        values = [run["bits_per_byte"] for name, run in runs.items() if name.startswith(f"{arm}-")]
        if len(values) > 1:
            lines.append(f"\nSpread over {len(values)} seeds, {arm}: {max(values) - min(values):.4f} bits per byte.")
    write_text(output / "results.md", "\n".join(lines) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with data/train-* and validation-*.parquet")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--benchmarks", type=Path, help="folder with the benchmarks in Hub-dataset layout")
    parser.add_argument("--minutes", type=float, default=20.0, help="for everything")
    parser.add_argument("--evaluation-minutes", type=float, default=1.0, help="of them, for each run's evaluation")
    parser.add_argument("--steps", type=int, help="instead of what --minutes allows")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--suites", nargs="+", default=["heldout", "quick", "arc_easy,hellaswag,winogrande"])
    parser.add_argument("--recipe", default="nano-phi-115m-fast")
    parser.add_argument("--runs", type=Path, default=Path("runs/real"))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(""))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    began = time.monotonic()
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        plan = make_plan(args, began)
        print(f"{plan['steps']} steps for each of {', '.join(args.arms)}; seeds {args.seeds}")
        pipelines = measure(args, plan)
        report(pipelines, plan, args.output)
        draw(pipelines, args.output / "curves.png")
        # The control of the first seed, or the last run if there is none, is what the others are compared with.
        pipelines.sort(key=lambda pipeline: pipeline.recipe.name == f"control-seed-{args.seeds[0]}")
        first = pipelines[0]
        with first.run.lock():
            first.comparison(pipelines)
            first.card()
            if len(pipelines) > 1:
                for name in ("comparison.json", "comparison.md", "comparison.png"):
                    shutil.copyfile(first.path / name, args.output / name)
                print("\n" + render.to_text(read_json(first.path / "comparison.json")))
            shutil.copytree(first.path / "card", args.output / "card", dirs_exist_ok=True)
    except UserError as error:
        raise SystemExit(f"real_run: {error}") from None
    print((args.output / "results.md").read_text())
    print(f"{(time.monotonic() - began) / 60:.1f} minutes; written: {args.output}")


if __name__ == "__main__":
    main()
