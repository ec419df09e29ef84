"""A release's GGUF files under llama.cpp against the release under NanoPhi: tokens, logits, perplexity.

    make gguf RELEASE=runs/demo/release

Text is cut into the same tokens; at f16 the likeliest token is the same at each of 64 greedy steps after each of ten
prompts, except where our two likeliest tokens are nearer to each other than the largest difference of logits on the
held-out text; a chat model answers the questions of its card as transformers does, with the same exception; perplexity
on 20,000 held-out tokens differs by at most 0.5 % at f16 and 2 % at q8_0. Exit status 1 if
not. The result goes to
benchmarks/gguf_check.json (`--output`).
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from llama_cpp import Llama  # `make gguf` builds it
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from nanophi import NanoPhiForCausalLM
from nanophi.core.environment import environment
from nanophi.core.files import read_json, sha256_of_file, write_json
from nanophi.core.run import now
from nanophi.model_card import gguf

LIMITS = {"f16": 0.005, "q8_0": 0.02}
"""Largest relative difference of perplexity."""
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 10, 16, 64


def llama_logits(model: Llama, row: list[int]) -> torch.Tensor:
    """Logits after every token of a row: float32 [tokens, vocab_size]."""
    model.reset()
    model.eval(row)
    return torch.from_numpy(model.scores[: len(row)].copy())


def our_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """NanoPhi's next `count` tokens, each the likeliest; the token that ends a text does not end it."""
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return [int(token) for token in tokens[0, len(prompt) :]]


def other_choices(ours: torch.Tensor, theirs: torch.Tensor, noise: float) -> tuple[int, int]:
    """Where the likeliest token differs: positions in all, and those where that is no near-tie.

    Args:
        ours, theirs: logits [positions, vocab_size] after the same tokens.
        noise: the difference of logits that was measured elsewhere; where our two likeliest tokens lie within it,
            either may come out first.
    """
    best = ours.topk(2).values
    differs = ours.argmax(-1) != theirs.argmax(-1)
    return int(differs.sum()), int((differs & (best[:, 0] - best[:, 1] > noise)).sum())


def other_answers(
    ours: Any, theirs: Llama, tokenizer: Any, conversations: list[list[dict[str, str]]], noise: float
) -> int:
    """How many conversations llama.cpp answers otherwise than transformers, greedily, through the chat template.

    Args:
        noise: as in `other_choices`, for the first token that differs.
    """
    different = 0
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, return_tensors="pt").input_ids
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
        tokens = ours.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        expected = tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
        answer = theirs.create_chat_completion(messages, max_tokens=NEW_TOKENS, temperature=0.0, repeat_penalty=1.0)
        found = answer["choices"][0]["message"]["content"]
        if found == expected:
            continue
        others, own = tokenizer(found).input_ids, tokens[0, prompt.shape[1] :].tolist()
        first = next((i for i, pair in enumerate(zip(others, own, strict=False)) if pair[0] != pair[1]), len(others))
        with torch.no_grad():
            best = ours(tokens[:, : prompt.shape[1] + first]).logits[0, -1].topk(2).values
        different += (best[0] - best[1]).item() > noise
    return different


def cross_entropy(logits: torch.Tensor, row: list[int]) -> float:
    """Summed over all tokens of a row but the first, in nats."""
    return torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(row[1:]), reduction="sum").item()


def check(release: Path, rows: list[list[int]], kinds: dict[str, float], threads: int) -> dict[str, Any]:
    """Figures per kind, and `failures`: one line each."""
    ours = NanoPhiForCausalLM.from_pretrained(release).float().eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(release)
    texts = [tokenizer.decode(row) for row in rows]
    prompts = [row[:PROMPT_TOKENS] for row in rows[:: max(1, len(rows) // PROMPTS)][:PROMPTS]]
    continuations = [our_greedy(ours, prompt, NEW_TOKENS) for prompt in prompts]
    sample = release / "records" / "sample.json"
    asked = [row["messages"] for row in read_json(sample).get("conversations", [])] if sample.is_file() else []
    scored = sum(len(row) - 1 for row in rows)
    loss = 0.0
    for row in rows:
        with torch.no_grad():
            loss += cross_entropy(ours(torch.tensor([row])).logits[0], row)
    perplexity = math.exp(loss / scored)
    result: dict[str, Any] = {"tokens": scored, "perplexity": round(perplexity, 5), "kinds": {}}
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="nanophi-gguf-") as folder:
        for kind, limit in kinds.items():
            written = gguf.write(release, Path(folder) / f"{kind}.gguf", kind)
            theirs = Llama(
                str(Path(folder) / f"{kind}.gguf"),
                n_ctx=max(map(len, rows)),
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=True,
                verbose=False,
            )
            same_text = sum(
                theirs.tokenize(text.encode(), add_bos=False, special=True) == tokenizer(text).input_ids
                for text in texts
            )
            loss, total, largest = 0.0, 0.0, 0.0
            for row in rows:
                logits = llama_logits(theirs, row)
                with torch.no_grad():
                    difference = (logits - ours(torch.tensor([row])).logits[0]).abs()
                total, largest = total + difference.mean().item(), max(largest, difference.max().item())
                loss += cross_entropy(logits, row)
            near_ties = wrong = 0
            for prompt, tokens in zip(prompts, continuations, strict=True):
                # Both read NanoPhi's continuation, so that a near-tie does not change everything after it.
                row = prompt + tokens
                with torch.no_grad():
                    expected = ours(torch.tensor([row])).logits[0]
                positions = slice(len(prompt) - 1, -1)
                different, counted = other_choices(expected[positions], llama_logits(theirs, row)[positions], largest)
                near_ties, wrong = near_ties + different - counted, wrong + counted
            answered = other_answers(ours, theirs, tokenizer, asked, largest) if kind == "f16" else 0
            theirs.close()
            relative = math.exp(loss / scored) / perplexity - 1
            result["kinds"][kind] = {
                "bytes": written["bytes"],
                "texts_cut_into_the_same_tokens": f"{same_text} of {len(texts)}",
                "tokens_chosen_otherwise": f"{wrong} of {len(prompts) * NEW_TOKENS}",
                "near_ties_chosen_otherwise": near_ties,
                "conversations_answered_otherwise": f"{answered} of {len(asked)}",
                "mean_logit_difference": round(total / len(rows), 6),
                "largest_logit_difference": round(largest, 5),
                "perplexity": round(math.exp(loss / scored), 5),
                "perplexity_difference": round(relative, 8),
            }
            print(kind, result["kinds"][kind], flush=True)
            if same_text < len(texts):
                failures.append(f"{kind}: {len(texts) - same_text} texts are cut into other tokens")
            if answered:
                failures.append(f"{kind}: {answered} of {len(asked)} conversations are answered otherwise")
            if kind == "f16" and wrong:
                failures.append(f"{kind}: {wrong} tokens are chosen otherwise, by more than {largest:.3g} of logits")
            if not abs(relative) <= limit:
                failures.append(f"{kind}: perplexity differs by {relative:.3%}, allowed {limit:.1%}")
    result["failures"] = failures
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path)
    parser.add_argument("--heldout", type=Path, help="packed rows; default: those of the run around the release")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    run = arguments.release.parent
    if (run / "data" / "conversations").is_dir():  # a chat model is checked on its base's rows
        run = run.parent / Path(yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["base"]).name
    heldout = arguments.heldout or run / "data" / "tokens" / "heldout"
    if not heldout.is_dir():
        sys.exit(f"gguf_check: {heldout} is missing; name a folder of packed rows with --heldout")
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    dataset = datasets.load_from_disk(str(heldout))
    length = len(dataset[0]["input_ids"])
    count = min(len(dataset), -(-arguments.tokens // (length - 1)))
    rows = np.array(dataset[:count]["input_ids"]).tolist()
    named = [Path(argument).name for argument in sys.argv[1:]]  # without the folders of the machine
    result = {
        "command": " ".join(["PYTHONPATH=.venv/llama python benchmarks/gguf_check.py", *named]),
        "environment": environment(),
        "weights_sha256": sha256_of_file(arguments.release / "model.safetensors"),
        **check(arguments.release, rows, LIMITS, arguments.threads),
        "finished": now(),
    }
    write_json(arguments.output, result)
    for failure in result["failures"]:
        print(f"gguf_check: {failure}", file=sys.stderr)
    sys.exit(bool(result["failures"]))


if __name__ == "__main__":
    main()
