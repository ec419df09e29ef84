"""llama.cpp beside NanoPhi: tokens per second at the 115M shape, batch 1, 256 new tokens after 64, on the CPU.

    make gguf                                                       # builds llama.cpp
    PYTHONPATH=.venv/llama python benchmarks/llama_speed.py         # about 5 minutes on two cores
    PYTHONPATH=.venv/llama python benchmarks/llama_speed.py --quick # does it run?

All take turns, round by round, with the same random weights, prompt and number of threads; the median and the
interquartile range of the rounds are reported, and the fraction of what the memory bandwidth measured in the same run
allows, where every weight but the embedding is read once per token. The time includes the prompt. The result goes to
benchmarks/llama_speed.json (`--output`).
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp  # `make gguf` builds it
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CompileConfig
from transformers.utils.logging import disable_progress_bar

from nanophi.benchmarks.model_speed import PROMPT_TOKENS, bandwidth, build, in_turn
from nanophi.files import write_json
from nanophi.model_card import gguf
from nanophi.run import environment, now

KINDS = ("f32", "f16", "bf16", "q8_0")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_files(folder: Path) -> dict[str, Path]:
    """The 115M shape with random weights as GGUF files; its vocabulary is bytes, the other rows have no token."""
    model: Any = build("nanophi", torch.float32, "cpu")
    model.config.eos_token_id = model.config.bos_token_id  # a file needs one; generation here passes over it
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "Ġt"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "t")]))  # llama.cpp wants a merge
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {kind: folder / f"{kind}.gguf" for kind in KINDS}
    for kind, file in files.items():
        gguf.write(folder, file, kind)
    return files


def llama_generation(file: Path, threads: int, prompt: list[int], new_tokens: int) -> Callable[[], list[int]]:
    """A function that generates greedily under llama.cpp."""
    model = llama_cpp.Llama(
        str(file), n_ctx=len(prompt) + new_tokens, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def generate() -> list[int]:
        model.reset()
        model.eval(prompt)
        tokens: list[int] = []
        sampler = {"top_k": 1, "temp": 0.0, "repeat_penalty": 1.0}
        while len(tokens) < new_tokens:
            tokens.append(model.sample(**sampler))
            model.eval(tokens[-1:])
        return tokens

    return generate


def our_generation(dtype: torch.dtype, compiled: bool, prompt: list[int], new_tokens: int) -> Callable[[], list[int]]:
    """A function that generates greedily under NanoPhi, by default or with its step compiled over a static cache."""
    model: Any = build("nanophi", dtype, "cpu").eval()
    ids = torch.tensor([prompt])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, "do_sample": False}
    if compiled:
        compile_config = CompileConfig(mode="default", fullgraph=True)
        compile_config._compile_all_devices = True  # type: ignore[assignment]  # else accelerators only
        options |= {"cache_implementation": "static", "compile_config": compile_config}

    def generate() -> list[int]:
        return [int(token) for token in model.generate(ids, **options)[0, len(prompt) :]]

    return generate


def bytes_per_token(dtype: torch.dtype) -> int:
    """Bytes of all weights but the embedding, each of which is read for every token."""
    model: Any = build("nanophi", dtype, "cpu")
    return sum(parameter.nbytes for parameter in model.parameters()) - model.get_input_embeddings().weight.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="one round of 16 new tokens; writes nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.new_tokens, arguments.rounds = 16, 1
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    prompt = torch.randint(50000, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    with tempfile.TemporaryDirectory(prefix="nanophi-llama-") as folder:
        files = write_files(Path(folder))
        read = {name: bytes_per_token(dtype) for name, dtype in PRECISIONS.items()}
        # A block of q8_0 is 32 bytes and a float16 scale; the embedding is left out as above.
        per_kind = {"f32": read["fp32"], "f16": read["bf16"], "bf16": read["bf16"], "q8_0": read["bf16"] * 34 // 64}
        functions: dict[str, Callable[[], list[int]]] = {}
        sizes: dict[str, int] = {}
        for kind, file in files.items():
            name = f"llama.cpp {kind}"
            functions[name] = llama_generation(file, arguments.threads, prompt, arguments.new_tokens)
            sizes[name] = per_kind[kind]
        for precision, dtype in PRECISIONS.items():
            for compiled in (False, True):
                name = f"nanophi {precision}{' compiled' if compiled else ''}"
                functions[name] = our_generation(dtype, compiled, prompt, arguments.new_tokens)
                sizes[name] = read[precision]
        tokens: dict[str, list[int]] = {}

        def run(name: str) -> None:
            tokens[name] = functions[name]()

        bandwidths = [bandwidth("cpu")]
        measured = in_turn({name: functools.partial(run, name) for name in functions}, arguments.rounds, "cpu")
        bandwidths.append(bandwidth("cpu"))
    result: dict[str, Any] = {
        "command": "PYTHONPATH=.venv/llama python benchmarks/llama_speed.py " + " ".join(sys.argv[1:]),
        "environment": environment(),
        "llama_cpp_python": llama_cpp.__version__,
        "llama_cpp": llama_cpp.llama_print_system_info().decode(),
        "threads": arguments.threads,
        "shape": f"batch 1, {PROMPT_TOKENS} + {arguments.new_tokens} tokens",
        "bandwidth_bytes_per_second": [round(value) for value in bandwidths],
        "contestants": {},
    }
    for name, times in measured.items():
        speeds = sorted(arguments.new_tokens / elapsed for elapsed in times)
        low, _, high = statistics.quantiles(speeds, n=4) if len(speeds) > 1 else (speeds[0],) * 3
        median = statistics.median(speeds)
        reference = tokens["nanophi fp32"]
        result["contestants"][name] = {
            "tokens_per_second": round(median, 2),
            "interquartile_range": [round(low, 2), round(high, 2)],
            "rounds": len(speeds),
            "bytes_read_per_token": sizes[name],
            "fraction_of_bound": round(median * sizes[name] / max(bandwidths), 3),
            "first_tokens_as_nanophi_fp32": next(
                (n for n, pair in enumerate(zip(tokens[name], reference, strict=True)) if pair[0] != pair[1]),
                len(reference),
            ),
        }
        print(f"{name}: {json.dumps(result['contestants'][name])}", flush=True)
    result["finished"] = now()
    if not arguments.quick:
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()
