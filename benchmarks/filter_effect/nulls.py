"""Runs that differ in their seed alone, for the test of the ablation's false positives (null_items.json).

    python benchmarks/filter_effect/nulls.py

Small models are trained on random shares of Python's language reference, each with another seed (initialisation, order,
documents). What is kept is every held-out document's bits per byte under each of them: there is no effect to be found.
"""

import json
import pydoc_data.topics
import tempfile
from pathlib import Path

import yaml

from nanophi.core.files import write_text
from nanophi.core.names import step_name
from nanophi.core.recipe import load_recipe
from nanophi.eval.results import item_values, read_result, run_result_name
from nanophi.experiments.ablate import arm_of
from nanophi.experiments.records import HELDOUT
from nanophi.pipeline import Pipeline

RUNS, STEPS = 24, 40
OUTPUT = Path(__file__).parents[2] / "tests/experiments/null_items.json"
RECIPE = {
    "name": "null",
    "data": {"sources": [{"name": "reference"}], "heldout_fraction": 0.4, "workers": 1},
    "quality": {"scorer": "column:score", "share": 0.42},
    "tokenizer": {"vocab_size": 1024},
    "model": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
    "training": {"steps": STEPS, "batch_size": 8, "learning_rate": 0.003, "warmup_steps": 4, "save_steps": STEPS},
}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [part.strip() for text in pydoc_data.topics.topics.values() for part in text.split("\n\n\n")]
        lines = [json.dumps({"text": text[:2000], "score": 0.5}) for text in texts if len(text) > 300]
        (folder / "texts.jsonl").write_text("\n".join(lines))
        RECIPE["data"]["sources"][0]["files"] = str(folder / "texts.jsonl")  # type: ignore[index]
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        recipe = load_recipe(folder / "recipe.yaml")
        plan = {"share": 0.42, "tokens": {"random": 16_000}, "tasks": []}
        rows = []
        for seed in range(RUNS):
            pipeline = Pipeline(arm_of(recipe, plan, "random", seed, 0.003), folder / "runs")
            pipeline.make("evaluation")
            result = read_result(pipeline.path / "evals" / run_result_name(step_name(STEPS), HELDOUT))
            values = item_values(result, HELDOUT, "bits_per_byte")
            rows.append([[round(values[item][0], 2), values[item][1]] for item in sorted(values)])
    sizes = [size for _, size in rows[0]]
    nats = ",\n".join(json.dumps([value for value, _ in row], separators=(",", ":")) for row in rows)
    write_text(OUTPUT, f'{{"bytes": {json.dumps(sizes, separators=(",", ":"))},\n"nats": [\n{nats}\n]}}\n')


if __name__ == "__main__":
    main()
