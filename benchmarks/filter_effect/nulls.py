"""Runs that differ in their seed alone, for the test of the ablation's false positives (tests/eval/null_items.json).

    python benchmarks/filter_effect/nulls.py --runs ../filter_effect_runs

Every run is the `random` arm of this experiment with a smaller model, fewer steps and another seed (initialisation,
order, documents); what is kept is the bits per byte of the right answers of the same ARC-Easy items.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nanophi.ablate import arm_of
from nanophi.eval.results import ANSWER_METRIC, item_values, read_result, run_result_name
from nanophi.files import write_text
from nanophi.pipeline import Pipeline
from nanophi.recipe import load_recipe
from nanophi.run import step_name

HERE = Path(__file__).parent
SETTINGS = [
    "model={hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, max_position_embeddings: 128}",
    "name=filter-null",
    "training.steps=40",
    "training.warmup_steps=4",
    "training.save_steps=40",
    "evaluation.limit=250",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "tests/eval/null_items.json")
    args = parser.parse_args()
    recipe = load_recipe(HERE / "recipe.yaml", SETTINGS)
    plan = {"share": 0.42, "tokens": {"random": 40_000}, "tasks": ["arc_easy"]}
    suite = "heldout_bits_per_byte,arc_easy"
    rows = []
    for seed in range(args.seeds):
        pipeline = Pipeline(arm_of(recipe, plan, "random", seed, recipe.training.learning_rate), args.runs)
        with pipeline.run.lock():
            pipeline.write_recipe()
            pipeline.evaluation()
        result = read_result(pipeline.path / "evals" / run_result_name(step_name(recipe.training.steps), suite))
        values = item_values(result, "arc_easy", ANSWER_METRIC)
        rows.append([round(values[item], 3) for item in sorted(values)])
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    write_text(args.output, f'{{"bits_per_byte": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
