"""Tokens per second, MFU and peak memory of pretraining at the 115M shape: `Trainer`, a bare loop, and ours.

    python benchmarks/train_speed.py                  # about 12 minutes on two cores; a few on a GPU
    python benchmarks/train_speed.py --quick          # one round of one small step: does it run?
    python benchmarks/train_speed.py --profile        # a torch.profiler table of our step, beside the result file

The contestants, each in a process of its own, all with the model of `recipes/nano-phi-115m.yaml`:

    trainer            transformers' `Trainer` and `PhiForCausalLM`, default `TrainingArguments`
    trainer-tuned      the same with bf16, fused AdamW and torch.compile
    loop               a bare PyTorch loop around NanoPhi with our loss and attention: bf16, fused AdamW, no `Trainer`;
                       compiled too on a GPU
    nanophi            what `nanophi train` runs on the recipe named by `--recipe`

A processor that only emulates bf16 is slower in it than in float32; there all four compute in float32.

All warm up, then take turns: a turn is `--steps` optimizer steps. The median of the turns and their range are
reported. `loop` and `nanophi` keep packed documents from attending to each other, as the recipe says; the two stock
contestants, whose users rarely do, let them. Rows are synthetic tokens with document lengths of web text, or those of
`--tokens` (a run's `data/tokens`). Peak memory is that of the process (CPU) or of torch's allocator (GPU), above what
was held before the model was built. The result is added to benchmarks/train_speed.json under the device's name.

On a machine that has torch, transformers and accelerate but lacks the other requirements, carry them as wheels:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d wheels \\
        datasets dill multiprocess pydantic pydantic-core annotated-types typing-inspection
    pip install --no-index --no-deps --target site wheels/*.whl          # there
    ln -s REPOSITORY site/nanophi && PYTHONPATH=site python REPOSITORY/benchmarks/train_speed.py
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PhiConfig, PhiForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from nanophi import NanoPhiForCausalLM
from nanophi.core.environment import environment
from nanophi.core.files import read_json, write_json
from nanophi.core.recipe import Recipe, load_recipe
from nanophi.core.run import now
from nanophi.training import progress, trainer
from nanophi.training.arguments import has_bf16
from nanophi.training.attention import PACKED_DOCUMENTS
from nanophi.training.budget import DEVICES, device_named, flops_per_token
from nanophi.training.estimate import PUBLISHED_TOKENS
from nanophi.training.loss import use_chunked_loss
from nanophi.training.optimizer import ADAM_EPS
from nanophi.training.rows import PackedCollator, PackedRows

CONTESTANTS = ("trainer", "trainer-tuned", "loop", "nanophi")
WARM_UP = 2
DOCUMENT_TOKENS = 600
"""Mean length of a synthetic document; lengths are lognormal with a sigma of 1."""


class Turns(TrainerCallback):
    """Lets a process train only when told to, and times each turn; speaks through standard input and output."""

    def __init__(self, arguments: argparse.Namespace, baseline: int) -> None:
        self.steps, self.rounds, self.device = arguments.steps, arguments.rounds, arguments.device
        self.baseline = baseline
        self.began = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A turn ends with its last step and the next one begins there, with the fetching of its batch."""
        self.step_done(state.global_step)

    def step_done(self, step: int) -> None:
        turn, rest = divmod(step - WARM_UP, self.steps)
        if turn < 0 or rest:
            return
        if self.device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - self.began, "peak": peak(self) - self.baseline}), flush=True)
        if turn == self.rounds:
            os._exit(0)
        if self.device == "cuda":
            torch.cuda.empty_cache()  # leave the memory to whoever's turn it is
        sys.stdin.readline()
        self.began = time.perf_counter()


def peak(turns: Any) -> int:
    """Bytes that this process has held at most, on the device that it trains on."""
    if turns.device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def rows_of_tokens(folder: Path, rows: int, recipe: Recipe) -> None:
    """Write synthetic packed rows where `PackedRows` reads them: random tokens, documents of varying length."""
    import datasets

    config = recipe.model_config_for()
    generator = np.random.default_rng(0)
    size = rows * config.max_position_embeddings
    end = config.eos_token_id
    assert isinstance(end, int)
    tokens = generator.integers(0, end, size, dtype=np.int32)
    lengths = generator.lognormal(np.log(DOCUMENT_TOKENS) - 0.5, 1.0, size // 50) + 2
    ends = np.cumsum(lengths.astype(np.int64))
    tokens[ends[ends < size]] = end
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), config.max_position_embeddings)})
    datasets.disable_progress_bars()
    table = {"input_ids": list(tokens.reshape(rows, -1))}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(str(folder))


def work(name: str, arguments: argparse.Namespace) -> None:
    """Be one contestant: train for the warm-up and all turns."""
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(arguments.recipe)
    config = recipe.model_config_for()
    batch_size = arguments.rows * arguments.accumulation
    steps = WARM_UP + arguments.steps * arguments.rounds
    set_seed(0)
    data = PackedRows(Path(arguments.tokens), rows=steps * batch_size)
    baseline = {"cuda": 0, "cpu": 0}[arguments.device]
    if arguments.device == "cpu":
        baseline = peak(arguments)
    turns = Turns(arguments, baseline)
    plain = PackedCollator(config.eos_token_id, isolate_documents=False)  # type: ignore[arg-type]
    training = recipe.training.model_copy(
        update={
            "steps": steps,
            "batch_size": batch_size,
            "micro_batch_size": arguments.rows,
            "warmup_steps": 1,
            "save_steps": steps + 1,
            "keep_steps": [],
            "eval_steps": steps + 1,
            **({} if arguments.compile is None else {"compile": arguments.compile}),
        }
    )
    if name in ("trainer", "trainer-tuned"):
        fields = {key: value for key, value in config.to_dict().items() if key not in ("auto_map", "model_type")}
        tuned = (
            {"bf16": has_bf16(), "optim": "adamw_torch_fused", "torch_compile": True} if name == "trainer-tuned" else {}
        )
        with tempfile.TemporaryDirectory() as folder:
            Trainer(
                model=PhiForCausalLM(PhiConfig(**fields)),
                args=TrainingArguments(
                    output_dir=folder,
                    max_steps=steps,
                    per_device_train_batch_size=arguments.rows,
                    gradient_accumulation_steps=arguments.accumulation,
                    report_to=[],
                    disable_tqdm=True,
                    use_cpu=arguments.device == "cpu",
                    **tuned,  # type: ignore[arg-type]
                ),
                train_dataset=data,
                data_collator=plain,
                callbacks=[turns],
            ).train()
    elif name == "nanophi":
        # The turns take the progress line's place, so that all else is what users run.
        progress.ProgressLine = lambda label: turns  # type: ignore[assignment,misc,return-value]
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder)
            (run / "data/tokens").mkdir(parents=True)
            for split in ("train", "heldout"):
                (run / "data/tokens" / split).symlink_to(Path(arguments.tokens).resolve())
            counts = {"bytes_per_token": 1.0, "sha256": PackedRows(Path(arguments.tokens)).sha256(b"")}
            write_json(run / "data/tokens/tokens.json", {"train": counts, "heldout": counts})
            (run / "data/tokenizer").mkdir()
            trainer.train(run, training, config, 0)
    else:
        compiled = arguments.device == "cuda" if arguments.compile is None else arguments.compile
        step = bare_loop(config, arguments, data, training.isolate_documents, compiled)
        for number in itertools.count(1):
            step()
            turns.step_done(number)


def bare_loop(
    config: Any, arguments: argparse.Namespace, data: PackedRows, isolate: bool, compiled: bool
) -> Callable[[], None]:
    """A function that takes one optimizer step, with nothing around it that training does not need."""
    device = arguments.device
    model: Any = NanoPhiForCausalLM(config).to(device).train()
    use_chunked_loss(model)
    if device == "cpu" and not compiled:
        model.set_attn_implementation(PACKED_DOCUMENTS)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), eps=ADAM_EPS, fused=True)
    forward = torch.compile(model) if compiled else model
    bf16 = has_bf16()
    collate = PackedCollator(config.eos_token_id, isolate)
    position = itertools.count(0, arguments.rows)

    def step() -> None:
        for _ in range(arguments.accumulation):
            first = next(position)
            batch = collate(data.__getitems__(list(range(first, first + arguments.rows))))
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
                loss = forward(**batch).loss / arguments.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def profile(arguments: argparse.Namespace, output: Path) -> None:
    """Where the time of one of our steps goes: torch.profiler's table, under a line of shares by kind of work."""
    recipe = load_recipe(arguments.recipe)
    compiled = arguments.device == "cuda" if arguments.compile is None else arguments.compile
    data = PackedRows(Path(arguments.tokens), rows=4 * arguments.rows * arguments.accumulation)
    step = bare_loop(recipe.model_config_for(), arguments, data, recipe.training.isolate_documents, compiled)
    for _ in range(WARM_UP):
        step()
    with torch.profiler.profile() as profiler:
        step()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
    events = profiler.key_averages()
    kind = f"self_{'device' if arguments.device == 'cuda' else 'cpu'}_time_total"
    shares = {"matrix products": 0.0, "attention": 0.0, "the rest": 0.0}
    for event in events:
        key = event.key.lower()
        # On a GPU only kernels count: the operators that launched them have their time a second time.
        if arguments.device == "cuda" and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        if any(part in key for part in ("attention", "fmha", "flash")):
            shares["attention"] += getattr(event, kind)
        elif any(part in key for part in ("mm", "gemm", "cutlass", "nvjet", "linear")):
            shares["matrix products"] += getattr(event, kind)
        else:
            shares["the rest"] += getattr(event, kind)
    total = sum(shares.values())
    line = ", ".join(f"{name} {share / total:.0%}" for name, share in shares.items())
    output.write_text(f"{line}\n{events.table(sort_by=kind, row_limit=40)}\n", encoding="utf-8")
    print(f"{output}: {line}")


def compete(arguments: argparse.Namespace) -> dict[str, Any]:
    """All contestants in turn. Returns their speeds and peaks."""
    flags = [
        *("--tokens", str(arguments.tokens), "--recipe", arguments.recipe, "--device", arguments.device),
        *("--rows", str(arguments.rows), "--accumulation", str(arguments.accumulation)),
        *("--steps", str(arguments.steps), "--rounds", str(arguments.rounds), "--threads", str(arguments.threads)),
        *([] if arguments.compile is None else ["--compile" if arguments.compile else "--no-compile"]),
    ]
    seconds: dict[str, list[float]] = {name: [] for name in arguments.only}
    peaks: dict[str, int] = {}
    workers: dict[str, Any] = {}

    def hear(name: str) -> dict[str, Any]:
        for line in workers[name].stdout:
            if line.startswith('{"seconds"'):
                return json.loads(line)
        raise SystemExit(f"{name} ended early")

    for name in arguments.only:
        command = [sys.executable, __file__, "--work", name, *flags]
        workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        hear(name)
    for _ in range(arguments.rounds):
        for name in arguments.only:
            workers[name].stdin.write("go\n")
            workers[name].stdin.flush()
            turn = hear(name)
            seconds[name].append(turn["seconds"])
            peaks[name] = turn["peak"]
    tokens = arguments.steps * arguments.accumulation * arguments.rows * arguments.context
    return {
        name: {
            "tokens_per_second": round(statistics.median(tokens / turn for turn in times), 1),
            "range": [round(tokens / max(times), 1), round(tokens / min(times), 1)],
            "peak_bytes": peaks[name],
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--recipe", default="nano-phi-115m", help="whose model and training section are measured")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rows", type=int, default=32 if cuda else 4, help="of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=16 if cuda else 1, help="micro-batches per step")
    parser.add_argument("--steps", type=int, default=4 if cuda else 2, help="optimizer steps per turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="loop and nanophi; default: the recipe's"
    )
    parser.add_argument("--tokens", help="a run's data/tokens/train, in place of synthetic rows")
    parser.add_argument("--quick", action="store_true", help="one turn of 1 x 1 row; writes nothing")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--work", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments)
        return
    if arguments.quick:
        arguments.rows = arguments.accumulation = arguments.steps = arguments.rounds = 1
    recipe = load_recipe(arguments.recipe)
    config = recipe.model_config_for()
    arguments.context = config.max_position_embeddings
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else environment()["processor"]
    key = f"{device}, {arguments.threads} threads" if arguments.device == "cpu" else device
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tokens is None:
            arguments.tokens = str(Path(folder) / "tokens")
            rows_of_tokens(Path(arguments.tokens), 2 * arguments.rows * arguments.accumulation, recipe)
        if arguments.profile:
            profile(arguments, arguments.output.with_suffix(".profile.txt"))
            return
        measured = compete(arguments)
    flops, known = flops_per_token(config, arguments.context), device_named(device)
    for name, contestant in measured.items():
        if known is not None:
            contestant["mfu"] = round(contestant["tokens_per_second"] * flops / known.bf16_flops, 4)
        print(name, json.dumps(contestant))
    result = {
        "command": "python benchmarks/train_speed.py " + " ".join(sys.argv[1:]),
        "finished": now(),
        "environment": environment(),
        "recipe": arguments.recipe,
        "precision": "bf16" if has_bf16() else "fp32",
        "step": f"{arguments.accumulation} x {arguments.rows} x {arguments.context} tokens",
        "turns": f"{arguments.rounds} of {arguments.steps} steps",
        "contestants": measured,
    }
    if "nanophi" in measured:
        ours = measured["nanophi"]
        result["ratios"] = {
            name: {
                "speed": round(ours["tokens_per_second"] / other["tokens_per_second"], 3),
                "peak_memory": round(ours["peak_bytes"] / other["peak_bytes"], 3),
            }
            for name, other in measured.items()
            if name != "nanophi"
        }
        print("nanophi against", json.dumps(result["ratios"]))
        hours = PUBLISHED_TOKENS / ours["tokens_per_second"] / 3600
        listed = next((entry for entry in DEVICES.values() if entry.cuda_name in device), None)
        price = f" for ${hours * listed.dollars_per_hour:,.2f}" if listed else ""
        print(f"the published run's {PUBLISHED_TOKENS / 1e9:.1f}B tokens in {hours:,.1f} hours{price}")
    if not arguments.quick and set(arguments.only) == set(CONTESTANTS):
        results = read_json(arguments.output) if arguments.output.exists() else {}
        write_json(arguments.output, {**results, key: result})


if __name__ == "__main__":
    main()
