"""NanoPhi against transformers' PhiForCausalLM: training step, peak memory, and generation, at the 115M shape.

    python benchmarks/model_speed.py              # the full run: about 15 minutes on two cores
    python benchmarks/model_speed.py --quick      # one round of small batches: does it run?

The two take turns, round by round, with the same weights, dtype and number of threads; the median and the
interquartile range of the rounds are reported. Peak memory is that of a fresh process per contestant, above what the
process held before it built the model. Generation is also set against the machine's memory bandwidth, measured in
the same run by reading a gigabyte: with a batch of one, every weight but the embedding is read once per token.

The result goes to benchmarks/model_speed.json (`--output`); on a GPU to model_speed_<gpu>.json.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, PhiConfig, PhiForCausalLM

from nanophi import NanoPhiConfig, NanoPhiForCausalLM
from nanophi.files import write_json
from nanophi.run import environment, now

Models = dict[str, torch.nn.Module]
PROMPT_TOKENS = 64
NEW_TOKENS = 256
CONTEXT = 1024


def build(name: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """One contestant, "phi" or "nanophi", at the 115M shape with random weights from a fixed seed."""
    config = NanoPhiConfig(eos_token_id=None)  # no end token: each generation has the same length
    torch.manual_seed(0)
    model: Any
    if name == "nanophi":
        model = NanoPhiForCausalLM(config)
    else:
        fields = {key: value for key, value in config.to_dict().items() if key not in ("auto_map", "model_type")}
        model = PhiForCausalLM(PhiConfig(**fields))
    return model.to(device=device, dtype=dtype)


def pair(dtype: torch.dtype, device: str) -> Models:
    """Both contestants with the same weights."""
    models = {name: build(name, dtype, device) for name in ("phi", "nanophi")}
    models["nanophi"].load_state_dict(models["phi"].state_dict())
    return models


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], device: str) -> float:
    """Wall-clock seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def in_turn(functions: Mapping[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds per round for each contestant, the two in alternation after one call of each to warm up."""
    for function in functions.values():
        function()
    measured: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            measured[name].append(seconds(function, device))
    return measured


def rates(measured: dict[str, list[float]], items: int) -> dict[str, Any]:
    """Items per second: median and interquartile range per contestant, and the medians' ratios to Phi's."""
    result: dict[str, Any] = {}
    for name, times in measured.items():
        speeds = sorted(items / elapsed for elapsed in times)
        low, _, high = statistics.quantiles(speeds, n=4) if len(speeds) > 1 else (speeds[0],) * 3
        result[name] = {
            "tokens_per_second": round(statistics.median(speeds), 2),
            "interquartile_range": [round(low, 2), round(high, 2)],
            "rounds": len(speeds),
        }
    for contestant in result.values():
        contestant["ratio"] = round(contestant["tokens_per_second"] / result["phi"]["tokens_per_second"], 3)
    return result


def training_step(model: Any, rows: int, tokens: int, device: str, bf16: bool) -> Callable[[], None]:
    """A function that runs forward and backward once; weights float32, under bf16 autocast if asked for."""
    ids = torch.randint(50000, (rows, tokens), generator=torch.Generator().manual_seed(1)).to(device)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def training(arguments: argparse.Namespace, bf16: bool, compiled: bool) -> dict[str, Any]:
    """Forward and backward, tokens per second."""
    models = pair(torch.float32, arguments.device)
    steps = {}
    for name, model in models.items():
        model.train()
        contestant: Any = torch.compile(model) if compiled else model
        steps[name] = training_step(contestant, arguments.rows, arguments.tokens, arguments.device, bf16)
    measured = in_turn(steps, arguments.rounds, arguments.device)
    return rates(measured, arguments.rows * arguments.tokens)


def resident_peak() -> int:
    """Bytes of memory that this process has held at most since it started."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held when it forked
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(name: str, arguments: argparse.Namespace, bf16: bool) -> int:
    """Bytes that two training steps need at their peak, above what the process holds before the model is built."""
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        baseline = torch.cuda.memory_allocated()
    else:
        baseline = resident_peak()
    model = build(name, torch.float32, arguments.device).train()
    step = training_step(model, arguments.rows, arguments.tokens, arguments.device, bf16)
    step()
    step()
    if arguments.device == "cuda":
        return torch.cuda.max_memory_allocated() - baseline
    return resident_peak() - baseline


def memory(arguments: argparse.Namespace, bf16: bool) -> dict[str, Any]:
    """Peak memory of each contestant in a process of its own."""
    result: dict[str, Any] = {}
    for name in ("phi", "nanophi"):
        command = [sys.executable, __file__, "--memory-of", name, "--rows", str(arguments.rows)]
        command += ["--tokens", str(arguments.tokens), "--threads", str(arguments.threads)]
        command += ["--device", arguments.device, *(["--bf16"] if bf16 else [])]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result[name] = {"peak_bytes": int(output.split()[-1])}
    result["ratio"] = round(result["nanophi"]["peak_bytes"] / result["phi"]["peak_bytes"], 3)
    return result


def bandwidth(device: str) -> float:
    """Bytes per second that the device reads from memory: the best of twelve sums over a gigabyte of float32."""
    values = torch.ones(2**28, device=device)
    values.sum()
    return values.nbytes / min(seconds(values.sum, device) for _ in range(12))


def generation(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Greedy `generate` with a batch of one: each model's default, and NanoPhi's step compiled over a static cache."""
    models: dict[str, Any] = dict(pair(dtype, arguments.device))
    prompt = torch.randint(50000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1)).to(arguments.device)
    compile_config = CompileConfig(mode="default", fullgraph=True)
    compile_config._compile_all_devices = True  # type: ignore[assignment]  # transformers compiles on accelerators only, unless told so
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        "phi": ("phi", {}),
        "nanophi": ("nanophi", {}),
        "nanophi_compiled": ("nanophi", {"cache_implementation": "static", "compile_config": compile_config}),
    }
    tokens: dict[str, torch.Tensor] = {}

    def generate(contestant: str) -> None:
        name, options = settings[contestant]
        tokens[contestant] = models[name].generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=arguments.new_tokens,
            do_sample=False,
            **options,
        )

    for model in models.values():
        model.eval()
    bandwidths = [bandwidth(arguments.device)]
    functions = {name: functools.partial(generate, name) for name in settings}
    measured = in_turn(functions, arguments.rounds, arguments.device)
    bandwidths.append(bandwidth(arguments.device))
    result = rates(measured, arguments.new_tokens)
    embedding = models["nanophi"].get_input_embeddings().weight
    weights = sum(parameter.nbytes for parameter in models["nanophi"].parameters()) - embedding.nbytes
    bound = max(bandwidths) / weights
    for name, contestant in result.items():
        contestant["fraction_of_bound"] = round(contestant["tokens_per_second"] / bound, 3)
        contestant["same_tokens"] = torch.equal(tokens[name], tokens["phi"])
    result["bytes_read_per_token"] = weights
    result["bandwidth_bytes_per_second"] = [round(value) for value in bandwidths]
    result["bound_tokens_per_second"] = round(bound, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=CONTEXT)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="also train both under torch.compile")
    parser.add_argument(
        "--quick", action="store_true", help="one round of 1 x 128 tokens, 16 new tokens; writes nothing"
    )
    parser.add_argument("--only", choices=["training", "memory", "generation"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", choices=["phi", "nanophi"], help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(peak_memory(arguments.memory_of, arguments, arguments.bf16))
        return
    if arguments.quick:
        arguments.rows, arguments.tokens, arguments.new_tokens, arguments.rounds = 1, 128, 16, 1
    result: dict[str, Any] = {
        "command": "python benchmarks/model_speed.py " + " ".join(sys.argv[1:]),
        "finished": None,
        "environment": environment(),
        "threads": arguments.threads,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "shape": f"{arguments.rows} x {arguments.tokens} tokens; {PROMPT_TOKENS} + {arguments.new_tokens} generated",
    }
    half = arguments.device == "cuda" or bool(torch.backends.mkldnn.is_available())

    def measure(key: str, function: Callable[[], dict[str, Any]]) -> None:
        if arguments.only in (None, key.split("_")[0]):
            result[key] = function()
            print(f"{key}: {json.dumps(result[key])}", flush=True)

    for bf16 in (False, True) if half else (False,):
        suffix = "bf16" if bf16 else "fp32"
        dtype = torch.bfloat16 if bf16 else torch.float32
        measure(f"generation_{suffix}", lambda dtype=dtype: generation(arguments, dtype))  # type: ignore[misc]
        measure(f"memory_{suffix}", lambda bf16=bf16: memory(arguments, bf16))  # type: ignore[misc]
        measure(f"training_{suffix}", lambda bf16=bf16: training(arguments, bf16, False))  # type: ignore[misc]
        if arguments.compile:
            measure(
                f"training_{suffix}_compiled",
                lambda bf16=bf16: training(arguments, bf16, True),  # type: ignore[misc]
            )
    result["finished"] = now()
    if not arguments.quick and arguments.only is None:
        suffix = "_" + result["device"].lower().replace(" ", "-") if arguments.device == "cuda" else ""
        write_json(arguments.output or Path(__file__).with_name(f"model_speed{suffix}.json"), result)


if __name__ == "__main__":
    main()
