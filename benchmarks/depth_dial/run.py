"""Does the dial choose well? Its learning rates against a sweep, and its FLOP against the published recipe's.

    python benchmarks/depth_dial/run.py                # resumes; about 2 hours with --jobs 2 on two cores
    python benchmarks/depth_dial/run.py --plan         # the plan alone, with its FLOP
    python benchmarks/depth_dial/run.py --answer       # answer.json and answer.png again, from plan and records

Text, tokenizer and context are those of benchmarks/ladder/d12.yaml (run from the repository's root). Two parts:

rates   depths 2, 3 and 4, trained for `RATE_TOKENS` tokens per parameter: the dial's rates times `FACTORS`. All factors
        under the first seed, those next to 1 under as many as are affordable (`RATE_SEEDS`). The best is where a
        parabola in log rate through the best three means is lowest; the dial has to be within a factor of 1.5 of it.
flops   at three budgets: the published recipe's shape, AdamW and cosine, scaled down, with its rate scaled by the usual
        rule (1 / width), and with its rate tuned (`TUNED` times that, first seed, then the best under three); and the
        dial's shape, Muon and WSD at `SHARES` of the budget, three seeds. Where the line through the dial's losses
        against log compute crosses the published recipe's loss is the FLOP ratio; its interval is from the seeds.

The plan (plan.json) is written before anything is trained and is not changed; every run has a record.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from nanophi.core import dial, plots
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json
from nanophi.core.recipe import Recipe, load_recipe
from nanophi.core.run import now
from nanophi.experiments import ablation, records
from nanophi.pipeline import Pipeline
from nanophi.training.budget import flops_per_token

HERE = Path(__file__).parent
DIAL, PUBLISHED = HERE.parent / "ladder/d12.yaml", HERE.parent / "ladder/published.yaml"
SEEDS = (0, 1, 2)
RATE_SEEDS = {2: SEEDS, 3: SEEDS[:2], 4: SEEDS[:1]}
RATE_TOKENS, FACTORS = 1.0, (0.44, 0.67, 1.0, 1.5, 2.25)
BUDGETS, TOKENS, SHARES, TUNED = (3e12, 1e13, 3e13), 20.0, (0.15, 0.25, 0.4, 0.6), (2.0, 4.0, 8.0)


def label(budget: float) -> str:
    """A budget in a run's name: `1.2e13`."""
    return f"{budget:.1e}".replace("+", "")


def flops_of(recipe: Recipe) -> float:
    """Training FLOP."""
    config = recipe.model_config_for()
    return records.tokens_seen(recipe) * flops_per_token(config, config.max_position_embeddings)


def sized(recipe: Recipe, name: str, shape: dict[str, Any], tokens: float, seed: int, factor: float = 1.0) -> Recipe:
    """A recipe at another shape and number of tokens, its settings scaled, its rates times a factor."""
    values, training, config = recipe.dump(), recipe.training, recipe.model_config_for()
    context = config.max_position_embeddings
    rates = training.learning_rate, training.muon_learning_rate
    own = dial.Anchor(config.hidden_size, records.tokens_seen(recipe), training.batch_size * context, *rates)
    settings = dial.scaled(own, shape["hidden_size"], tokens, context)
    settings |= {key: factor * settings[key] for key in ("learning_rate", "muon_learning_rate")}
    values["name"] = f"dial-{name}-x{factor:g}-seed-{seed}"
    values["model"] |= shape
    values["training"] |= settings | {"seed": seed, "eval_steps": settings["steps"] + 1, "keep_steps": []}
    values["evaluation"]["suites"] = [records.suite([])]
    return Recipe(**values)


def at_budget(recipe: Recipe, name: str, flops: float, seed: int, factor: float = 1.0) -> Recipe:
    """A recipe scaled to so many FLOP, at `TOKENS` per parameter, attention's FLOP counted."""
    config = recipe.model_config_for()
    model, vocab = {key: getattr(config, key) for key in dial.SHAPE}, config.vocab_size
    shape = dial.smaller(model, vocab, math.sqrt(flops / 6 / TOKENS))
    per_token = flops_per_token(recipe.model_config_for(**shape), config.max_position_embeddings)
    return sized(recipe, name, shape, flops / per_token, seed, factor)


def depth_of(recipe: Recipe, depth: int, seed: int, factor: float) -> Recipe:
    """The dial at a depth."""
    shape = dial.shape(depth, depth)
    tokens = RATE_TOKENS * dial.multiplying(shape, recipe.model_config_for().vocab_size)
    return sized(recipe, f"depth-{depth}", shape, tokens, seed, factor)


def rate_runs() -> list[Recipe]:
    """The dial at other rates."""
    ours = load_recipe(DIAL)
    return [
        depth_of(ours, depth, seed, factor)
        for depth, seeds in RATE_SEEDS.items()
        for seed in seeds
        for factor in FACTORS
        if seed == SEEDS[0] or 0.5 < factor < 2
    ]


def budget_runs() -> list[Recipe]:
    """All runs at the three budgets but those that depend on which tuned rate is best."""
    ours, theirs, runs = load_recipe(DIAL), load_recipe(PUBLISHED), []
    for budget in BUDGETS:
        runs += [at_budget(theirs, f"published-{label(budget)}", budget, seed) for seed in SEEDS]
        runs += [at_budget(theirs, f"published-{label(budget)}", budget, SEEDS[0], factor) for factor in TUNED]
        runs += [at_budget(ours, f"dial-{label(budget)}-{s:g}", s * budget, seed) for s in SHARES for seed in SEEDS]
    return runs


def tuned_runs() -> list[Recipe]:
    """The published recipe at its best rate, under the other seeds."""
    theirs, runs = load_recipe(PUBLISHED), []
    for budget in BUDGETS:
        factor = best_factor(budget)
        runs += [at_budget(theirs, f"published-{label(budget)}", budget, seed, factor) for seed in SEEDS[1:]]
    return runs


def loss(name: str) -> float:
    """Held-out bits per byte of a finished run."""
    values = np.array(read_json(records.record_path(HERE, name))["items"][records.HELDOUT]["values"], float)
    return ablation.value([(values[:, 0], values[:, 1])])


def best_factor(budget: float) -> float:
    """Of the published recipe's rate, under the first seed."""
    return min((1.0, *TUNED), key=lambda factor: loss(f"dial-published-{label(budget)}-x{factor:g}-seed-{SEEDS[0]}"))


def make(recipes: list[Recipe], runs: Path, jobs: int) -> None:
    """The runs that have no record yet."""
    pipelines = {recipe.name: Pipeline(recipe, runs) for recipe in recipes}

    def finished(name: str) -> None:
        records.write_record(pipelines[name], [], HERE, flops=flops_of(pipelines[name].recipe))

    records.run_missing(list(pipelines.values()), HERE, jobs, finished, print)


def plan() -> dict[str, Any]:
    """The plan, written if there is none. Raises `UserError` if the script has changed what it plans."""
    recipes = budget_runs() + rate_runs()
    keys = ("steps", "batch_size", "optimizer", "schedule", "learning_rate", "muon_learning_rate", "seed")
    runs: dict[str, Any] = {
        recipe.name: {
            "flops": flops_of(recipe),
            "model": recipe.model,
            "training": {key: getattr(recipe.training, key) for key in keys},
        }
        for recipe in recipes
    }
    made: dict[str, Any] = {"question": str(__doc__).split("Two parts:\n\n")[1], "runs": runs}
    path = HERE / "plan.json"
    if not path.exists():
        write_json(path, {**made, "planned": now()})
    elif {**made, "planned": read_json(path)["planned"]} != read_json(path):
        raise UserError(f"{path} is another plan; move it and records/ away to ask another question")
    total = sum(run["flops"] for run in runs.values()) + 2 * sum(BUDGETS)
    hours = total / 1.5e11 / 3600
    print(f"{len(recipes) + 2 * len(BUDGETS)} runs, {total:.2g} FLOP, at 1.5e11 FLOP/s {hours:.1f} hours")
    return made


def rates() -> dict[str, Any]:
    """Per depth: mean loss by factor, relative to the same seed's at 1, and the best factor."""
    found = {}
    missing = [run.name for run in rate_runs() if not records.record_path(HERE, run.name).exists()]
    for depth, all_seeds in RATE_SEEDS.items():
        if any(name.startswith(f"dial-depth-{depth}-") for name in missing):
            print(f"depth {depth} is not finished")
            continue
        means = {}
        for factor in FACTORS:
            seeds = all_seeds if 0.5 < factor < 2 else SEEDS[:1]
            names = [(f"dial-depth-{depth}-x{f:g}-seed-{s}" for f in (factor, 1.0)) for s in seeds]
            means[factor] = float(np.mean([loss(mine) - loss(own) for mine, own in names]))
        best = min(means, key=lambda factor: means[factor])
        near = sorted(FACTORS, key=lambda factor: abs(math.log(factor / best)))[:3]
        curve = np.polyfit(np.log(near), [means[factor] for factor in near], 2)
        lowest = math.exp(-curve[1] / 2 / curve[0]) if curve[0] > 0 else best
        lowest = min(max(lowest, min(near)), max(near))
        found[str(depth)] = {"difference": {f"{f:g}": v for f, v in means.items()}, "best": lowest}
        found[str(depth)]["within 1.5"] = 1 / 1.5 <= lowest <= 1.5
    return found


def ratio(budget: float, factor: float) -> dict[str, Any]:
    """Share of a budget at which the dial reaches the published recipe's loss, with its 95 % interval over seeds."""
    theirs = [loss(f"dial-published-{label(budget)}-x{factor:g}-seed-{seed}") for seed in SEEDS]
    values = []
    for seed, goal in zip(SEEDS, theirs, strict=True):
        names = [f"dial-dial-{label(budget)}-{share:g}-x1-seed-{seed}" for share in SHARES]
        used = [read_json(records.record_path(HERE, name))["flops"] / budget for name in names]
        slope, level = np.polyfit(np.log(used), [loss(name) for name in names], 1)
        values.append((goal - level) / slope)
    half = scipy.stats.t(len(SEEDS) - 1).isf(0.025) * np.std(values, ddof=1) / math.sqrt(len(SEEDS))
    low, middle, high = (float(np.exp(np.mean(values) + sign * half)) for sign in (-1, 0, 1))
    extrapolated = not min(SHARES) <= middle <= max(SHARES)
    return {"factor": factor, "losses": theirs, "ratio": middle, "interval": [low, high], "extrapolated": extrapolated}


def derived() -> dict[str, Any]:
    """The answer that follows from the records."""
    flops = {}
    for budget in BUDGETS:
        flops[label(budget)] = {
            "as published (goal 0.25)": ratio(budget, 1.0),
            "rate tuned (goal 0.4)": ratio(budget, best_factor(budget)),
        }
    return {"rates": rates(), "flops": flops}


def answer() -> None:
    """Write `answer.json` and `answer.png`."""
    found = derived()
    write_json(HERE / "answer.json", found)
    with plots.picture(HERE / "answer.png", 9, 4) as figure:
        left, right = figure.subplots(1, 2)
        for (depth, one), colour in zip(found["rates"].items(), plots.SERIES, strict=False):
            factors = [float(factor) for factor in one["difference"]]
            left.plot(factors, list(one["difference"].values()), "o-", color=colour, label=f"depth {depth}")
        left.set(xscale="log", xlabel="times the dial's rates", ylabel="bits per byte more")
        if found["rates"]:
            left.legend()
        for name, colour in zip(next(iter(found["flops"].values())), plots.SERIES, strict=False):
            rows = [(float(budget), one[name]) for budget, one in found["flops"].items()]
            middle = np.array([one["ratio"] for _, one in rows])
            low, high = np.array([one["interval"] for _, one in rows]).T
            bars = [middle - low, high - middle]
            right.errorbar([flops for flops, _ in rows], middle, bars, fmt="o-", color=colour, label=name)
        right.set(xscale="log", xlabel="budget (FLOP)", ylabel="share of it that the dial needs")
        right.legend()
        for axes, ticks in ((left, FACTORS), (right, BUDGETS)):
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
    for part in found.values():
        for name, one in part.items():
            print(name, one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("../dial_runs"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--plan", action="store_true", help="write the plan and stop")
    parser.add_argument("--answer", action="store_true", help="the answer alone, from the records")
    arguments = parser.parse_args()
    if not arguments.answer:
        plan()
        if arguments.plan:
            return
        for runs in (budget_runs, tuned_runs, rate_runs):
            make(runs(), arguments.runs, arguments.jobs)
    answer()  # of the depths that are finished


if __name__ == "__main__":
    main()
