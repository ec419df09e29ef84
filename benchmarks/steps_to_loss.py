"""How many steps does the fast recipe need to reach the AdamW recipe's loss? Muon and WSD against AdamW and cosine.

    python benchmarks/steps_to_loss.py --corpus FOLDER             # about 45 minutes on one core with bf16
    python benchmarks/steps_to_loss.py --corpus FOLDER --quick     # a few steps of everything: does it run?

A small NanoPhi with grouped queries is trained through `nanophi.training.trainer.train`, with the training section of
`recipes/nano-phi-115m.yaml` but for its length, on one file of the corpus (`data/train-*.parquet`); the loss is that
of its validation split. Both recipes are tuned in the same way, on one seed: a search along one setting at a time, on
a ladder of values, that ends when the best value of each has a worse one on either side. AdamW is tuned, and run, at
`--steps`; Muon with WSD at 60 % of them, with its own full schedule. The best of each then runs with every seed, and
so do the settings of `recipes/nano-phi-115m-fast.yaml`, which are more cautious. The search computes in bf16 where the
machine does, what follows it in float32 on any.

Every run is written to the result file as it ends and is not repeated: a killed benchmark resumes. The result goes to
benchmarks/steps_to_loss.json (`--output`), the plot beside it.
"""

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nanophi import NanoPhiConfig
from nanophi.core.environment import environment
from nanophi.core.files import read_json, remove, write_json
from nanophi.core.recipe import Data, Source, Tokenizer, Training, load_recipe
from nanophi.core.run import now
from nanophi.data import gather, packing, tokenizer
from nanophi.data.documents import shards
from nanophi.training.trainer import train

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
BATCH_SIZE = 16
SHARES = (0.6, 0.4)
"""Of the AdamW recipe's steps, that the fast recipe gets; tuned at the first."""

RATES = [0.00025 * 2**power for power in range(12)]
# Where the search begins, and the ladders it climbs.
ADAMW: dict[str, Any] = {"optimizer": "adamw", "schedule": "cosine", "learning_rate": 0.004, "weight_decay": 0.1}
ADAMW_LADDERS: dict[str, list[float]] = {"learning_rate": RATES, "weight_decay": [0.01, 0.1]}
FAST: dict[str, Any] = {
    "optimizer": "muon",
    "schedule": "wsd",
    "muon_learning_rate": 0.02,
    "learning_rate": 0.004,
    "decay_fraction": 0.8,
    "weight_decay": 0.1,
}
FAST_LADDERS: dict[str, list[float]] = {
    "muon_learning_rate": [0.0025 * 2**power for power in range(7)],
    "learning_rate": RATES,
    "decay_fraction": [0.2, 0.4, 0.6, 0.8, 0.95],
    "weight_decay": [0.01, 0.1],
}


def prepare(source: Path, work: Path) -> dict[str, Any]:
    """Tokens of one training file, held-out tokens of a tenth of the validation split; both as `nanophi prepare` does.

    Returns `tokens.json` of `work/data/tokens`.
    """
    done = work / "data/tokens/tokens.json"
    if done.exists():
        return read_json(done)
    documents, validation = work / "documents", work / "validation"
    file = sorted((source / "data").glob("train-*.parquet"))[0]
    data = {
        name: Data(
            sources=[Source(files=str(files))],
            heldout_fraction=0.1,
            deduplication={"near": False},  # type: ignore[arg-type]
            workers=1,
        )
        for name, files in (("train", file), ("validation", source / "data/validation-*.parquet"))
    }
    gather.gather(data["train"], documents)
    gather.gather(data["validation"], validation)
    for heldout in documents.glob("heldout-*.parquet"):
        heldout.unlink()
    for heldout in validation.glob("heldout-*.parquet"):
        heldout.rename(documents / heldout.name)
    kept = pa.concat_tables([pq.read_table(path, columns=["id"]) for path in shards(documents, "train")])
    pq.write_table(kept, documents / "kept.parquet")
    tokenizer.build(documents, Tokenizer(vocab_size=SHAPE["vocab_size"]), 0, work / "data/tokenizer")
    tokens = packing.pack(
        documents,
        documents,
        work / "data/tokenizer",
        SHAPE["max_position_embeddings"],
        data["train"],
        0,
        work / "data/tokens",
    )
    remove(documents)
    remove(validation)
    return tokens


def name_of(settings: dict[str, Any], steps: int, seed: int) -> str:
    """A run's key in the result file."""
    return " ".join(f"{key}={value}" for key, value in {**settings, "steps": steps, "seed": seed}.items())


class Runs:
    """The runs done so far, in the result file, and the next one."""

    def __init__(self, work: Path, output: Path, protocol: dict[str, Any]) -> None:
        self.work, self.output = work, output
        self.result = read_json(output) if output.exists() else {}
        if self.result.get("protocol") != protocol:
            self.result = {"protocol": protocol, "environment": environment(), "runs": {}}
        self.base = load_recipe("nano-phi-115m").training.model_dump()

    def run(self, settings: dict[str, Any], steps: int, seed: int) -> float:
        """Validation loss in nats per token at the end of one run."""
        name = name_of(settings, steps, seed)
        if name not in self.result["runs"]:
            changes = {
                "steps": steps,
                "batch_size": BATCH_SIZE,
                "micro_batch_size": None,
                "warmup_steps": max(1, steps // 20),
                "save_steps": steps,
                "keep_steps": [],
                "eval_steps": max(1, steps // 6),
                "logging_steps": max(1, steps // 30),
                "spike_threshold": None,  # a rate that is too high shows by its loss
                **settings,
            }
            run = self.work / "run"
            remove(run)
            run.mkdir()
            (run / "data").symlink_to((self.work / "data").resolve())
            eos_token_id = read_json(self.work / "data/eos.json")
            config = NanoPhiConfig(**SHAPE, bos_token_id=eos_token_id, eos_token_id=eos_token_id)
            summary = train(run, Training(**{**self.base, **changes}), config, seed)
            history = read_json(run / "training.json")
            self.result["runs"][name] = {
                "settings": settings,
                "steps": steps,
                "seed": seed,
                "loss": history["evaluations"][-1]["loss"],
                "seconds": round(summary["seconds"], 1),
                "precision": summary["precision"],
                "parameters": summary["parameters"],
                "log": [[entry["step"], round(entry["loss"], 4)] for entry in history["log"]],
                "evaluations": [[entry["step"], round(entry["loss"], 5)] for entry in history["evaluations"]],
            }
            write_json(self.output, self.result)
        loss = self.result["runs"][name]["loss"]
        print(f"{loss:.4f}  {name}", flush=True)
        return float(loss)

    def search(self, settings: dict[str, Any], ladders: dict[str, list[float]], steps: int, seed: int) -> Any:
        """Settings whose neighbours on every ladder have a higher loss."""
        best, loss = settings, self.run(settings, steps, seed)
        while True:
            begun_with = best
            for key, ladder in ladders.items():
                for direction in (-1, 1):
                    place = ladder.index(best[key]) + direction
                    while 0 <= place < len(ladder):
                        candidate = {**best, key: ladder[place]}
                        if (found := self.run(candidate, steps, seed)) >= loss:
                            break
                        best, loss = candidate, found
                        place += direction
            if best == begun_with:
                return best


def plot(result: dict[str, Any], path: Path) -> None:
    """Validation loss against step, for the runs over all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for (name, final), colour in zip(
        result["final"].items(), ("black", "tab:red", "tab:orange", "tab:blue"), strict=False
    ):
        for number, run in enumerate(final["runs"]):
            curve = result["runs"][run]["evaluations"]
            label = f"{name}: {final['mean']:.4f} after {final['steps']} steps" if number == 0 else None
            axes.plot(*zip(*curve, strict=True), color=colour, linewidth=1, marker=".", label=label)
    axes.axhline(result["final"]["adamw"]["mean"], color="black", linewidth=0.5, linestyle=":")
    axes.set(xlabel="step", ylabel="validation loss (nats per token)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with data/train-*.parquet and validation")
    parser.add_argument("--steps", type=int, default=400, help="of the AdamW recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/steps-to-loss"), help="folder for tokens and runs")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--quick", action="store_true", help="10 steps, one seed, no search; writes into --work")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        arguments.steps, arguments.seeds, arguments.output = 10, 1, arguments.work / "quick.json"
    tokens = prepare(arguments.corpus, arguments.work)
    eos = tokenizer.Encoder(arguments.work / "data/tokenizer").eos_token_id
    write_json(arguments.work / "data/eos.json", eos)
    protocol = {
        "steps": arguments.steps,
        "batch_size": BATCH_SIZE,
        "model": SHAPE,
        "tokens": {split: {key: tokens[split][key] for key in ("tokens", "sha256")} for split in ("train", "heldout")},
    }
    runs = Runs(arguments.work, arguments.output, protocol)
    tuned_at = round(arguments.steps * SHARES[0])
    adamw, fast = ADAMW, FAST
    if not arguments.quick:
        adamw = runs.search(ADAMW, ADAMW_LADDERS, arguments.steps, seed=0)
        fast = runs.search(FAST, FAST_LADDERS, tuned_at, seed=0)
    section = load_recipe("nano-phi-115m-fast").training
    adamw, fast = ({**settings, "precision": "fp32"} for settings in (adamw, fast))
    plans = {"adamw": (adamw, arguments.steps)}
    plans |= {f"tuned, {share:.0%}": (fast, round(arguments.steps * share)) for share in SHARES}
    plans[f"nano-phi-115m-fast, {SHARES[0]:.0%}"] = (
        {key: getattr(section, key) for key in fast} | {"precision": "fp32"},
        tuned_at,
    )
    final: dict[str, Any] = {}
    for seed, (name, (settings, steps)) in itertools.product(range(arguments.seeds), plans.items()):
        entry = final.setdefault(name, {"settings": settings, "steps": steps, "losses": [], "runs": []})
        entry["losses"].append(round(runs.run(settings, steps, seed), 5))
        entry["runs"].append(name_of(settings, steps, seed))
    for entry in final.values():
        entry["mean"] = round(statistics.mean(entry["losses"]), 5)
    runs.result.update(final=final, command=f"python benchmarks/{Path(__file__).name} --corpus FOLDER", finished=now())
    write_json(arguments.output, runs.result)
    plot(runs.result, arguments.output.with_suffix(".png"))
    for name, entry in final.items():
        print(f"{name}: {entry['steps']} steps, {entry['losses']}, mean {entry['mean']:.4f}, {entry['settings']}")
    # What does each half of the fast recipe give, and what do fewer steps cost AdamW?
    cosine = {key: value for key, value in fast.items() if key != "decay_fraction"} | {"schedule": "cosine"}
    wsd = adamw | {"schedule": "wsd", "decay_fraction": fast["decay_fraction"]}
    for settings, steps in ((cosine, tuned_at), (wsd, arguments.steps), (adamw, tuned_at)):
        runs.run(settings, steps, seed=0)


if __name__ == "__main__":
    main()
