"""Decays that differ by chance alone: false positives of `ablate --at decay`, and the variance that a trunk takes out.

    python benchmarks/decay_filter/nulls.py

A filter with random scores is tested on Python's language reference, so that its shares differ by chance: as decays of
one trunk for each seed, and as full runs. Every held-out document's bits per byte under each decay go into
tests/experiments/null_decays.json, what both say of the power into power.json beside this file.
"""

import json
import pydoc_data.topics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nanophi.core.files import read_json, write_json, write_text
from nanophi.core.recipe import load_recipe
from nanophi.experiments import ablation
from nanophi.experiments.ablate import Ablation

HERE, SEEDS, RATE, DECAY = Path(__file__).parent, 12, 0.003, 0.25
OUTPUT = HERE.parents[1] / "tests/experiments/null_decays.json"
RECIPE: dict[str, Any] = {
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
    "training": {
        "steps": 80,
        "batch_size": 8,
        "learning_rate": RATE,
        "warmup_steps": 4,
        "schedule": "wsd",
        "decay_fraction": DECAY,
        "save_steps": 80,
        "precision": "fp32",
    },
}

Runs = Mapping[ablation.Key, Sequence[ablation.Items]]


def measure(recipe: Path, folder: Path, at: str | None) -> Runs:
    """Held-out text under every run of an experiment without an effect."""
    # As many passes over a share as over all the text: the shares differ in their documents alone.
    question: dict[str, Any] = {"seeds": list(range(SEEDS)), "learning_rates": [RATE], "epochs_asked": 2 if at else 8}
    question |= {"tasks": [], "at": at, "candidates": None}
    experiment = Ablation(load_recipe(recipe), folder / "runs", folder / f"output-{at}", question)
    plan = experiment.plan()
    experiment.run(plan)
    files = sorted((experiment.output / "records").glob("*.json"))
    return ablation.targets(plan, read_json(experiment.output / "items.json"), [*map(read_json, files)])["heldout"].runs


def power(runs: Runs, cost: float) -> dict[str, float]:
    """What pairing takes out, the deviation of a seed's contrast, and the compute of its four arms, in full runs."""
    value = {key: ablation.value(items) for key, items in runs.items()}
    contrasts = [value["best", seed, RATE] - value["random", seed, RATE] for seed in range(SEEDS)]
    contrasts += [value["worst", seed, RATE] - value["random", seed, RATE] for seed in range(SEEDS)]
    deviation = float(np.sqrt(np.mean([np.var(part, ddof=1) for part in np.split(np.array(contrasts), 2)])))
    alike = {key: items for key, items in runs.items() if key[0] != "all"}
    draws = ablation.item_draws(runs["best", 0, RATE], np.random.default_rng(0))
    paired = ablation.contrast(alike, "best", "random", RATE, draws)["paired"]
    return {"paired": paired, "contrast_deviation": deviation, "runs_per_seed": cost}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, generator = Path(name), np.random.default_rng(0)
        texts = [part.strip() for text in pydoc_data.topics.topics.values() for part in text.split("\n\n\n")]
        rows = [{"text": text[:2000], "score": generator.random()} for text in texts if len(text) > 300]
        (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        RECIPE["data"]["sources"][0]["files"] = str(folder / "texts.jsonl")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        decays, full = (measure(folder / "recipe.yaml", folder, at) for at in ("decay", None))
    sizes = decays["best", 0, RATE][0][1].astype(int).tolist()
    arms = {arm: [np.round(decays[arm, s, RATE][0][0], 2).tolist() for s in range(SEEDS)] for arm in ablation.ARMS}
    lines = [f'"{arm}": {json.dumps(nats, separators=(",", ":"))}' for arm, nats in arms.items()]
    write_text(OUTPUT, "{" + ",\n".join([f'"bytes": {json.dumps(sizes, separators=(",", ":"))}', *lines]) + "}\n")
    found = {"decays": power(decays, 1 + 3 * DECAY), "full": power(full, 4.0)}
    # A contrast's error falls with the root of the seeds, of which the same compute pays for so many more.
    seeds = found["full"]["runs_per_seed"] / found["decays"]["runs_per_seed"]
    ratio = found["decays"]["contrast_deviation"] / found["full"]["contrast_deviation"] / seeds**0.5
    write_json(HERE / "power.json", found | {"detectable_at_the_same_compute": ratio})


if __name__ == "__main__":
    main()
