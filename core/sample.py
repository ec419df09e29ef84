"""Text that a model generates: its settings, what fits into the context, and the sample that a card shows.

The verb is in `generate.py`; nothing is scored.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json
from nanophi.core.names import step_folders

SAMPLE_SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 50, "repetition_penalty": 10.0}
"""Greedy, so that anyone can regenerate it. The penalty is the one of the nano-phi-115M-v0.1 card."""
ANSWER_TOKENS = 60
"""Tokens of an answer at most; a held-out question must leave as many of the context."""
CHAT_SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": ANSWER_TOKENS}
TRAINING_TOKENS = 40
"""New tokens of the samples that are written during training."""


def fitting_tokens(length: int, context: int, wanted: int, what: str = "the prompt") -> int:
    """How many of the `wanted` new tokens fit into the context after a prompt of `length`. `UserError` if none does."""
    if length >= context:
        raise UserError(f"{what} has {length} tokens, the model's context is {context}; shorten it")
    return min(wanted, context - length)


def check_text(text: str, what: str = "the prompt") -> None:
    """Raise `UserError` for text of a command line that is not UTF-8: the shell passes on any bytes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{what} is not valid UTF-8")


def sample_settings(tokenizer: Path, prompt: str, context: int, what: str = "card.prompt") -> dict[str, Any]:
    """`SAMPLE_SETTINGS`, with no more new tokens than fit; `tokenizer` is a folder, `what` the prompt's name."""
    from tokenizers import Tokenizer

    length = len(Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode(prompt).ids)
    fitting = fitting_tokens(length, context, SAMPLE_SETTINGS["max_new_tokens"], what)
    return {**SAMPLE_SETTINGS, "max_new_tokens": fitting}


def continue_prompt(model: Any, tokenizer: Any, prompt: str) -> str:
    """The prompt and up to `TRAINING_TOKENS` more by a model in training: greedy, so the random state stays."""
    import torch

    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    input_ids = torch.tensor([ids], device=next(model.parameters()).device)
    training = model.training
    model.eval()
    settings = {"do_sample": False, "max_new_tokens": TRAINING_TOKENS, "pad_token_id": tokenizer.eos_token_id}
    try:
        with torch.no_grad():
            output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **settings)
    finally:
        model.train(training)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def generate(checkpoint: Path, prompts: Iterable[Any], dtype: str = "float32", what: str = "card.prompt") -> list[str]:
    """Greedy continuations of prompts, each with its prompt in front, or answers to messages, on the CPU in float32.

    `dtype` is what the weights are rounded to first, as a release in that type has them.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).float()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = []
    for prompt in prompts:
        context = model.config.max_position_embeddings
        settings = sample_settings(checkpoint, prompt, context, what) if isinstance(prompt, str) else CHAT_SETTINGS
        text = generator(prompt, **settings)[0]["generated_text"]
        texts.append(text if isinstance(text, str) else text[-1]["content"])
    return texts


def write_sample(checkpoint: Path, prompt: Any, output: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write the sample texts that the card shows, and return them: `checkpoint`'s and the run's other checkpoints'.

    `prompt` is where the text begins; or conversations, `{"messages", "answer"}`, of which the first is the sample.
    """
    chat = None if isinstance(prompt, str) else prompt
    first = prompt if chat is None else chat[0]["messages"]
    texts = {folder.name: generate(folder, [first], dtype)[0] for folder in step_folders(checkpoint.parent)}
    text = texts[checkpoint.name] if checkpoint.name in texts else generate(checkpoint, [first], dtype)[0]
    context = read_json(checkpoint / "config.json")["max_position_embeddings"]
    settings = CHAT_SETTINGS if chat is not None else sample_settings(checkpoint, first, context)
    sample = {"prompt": first, "text": text, "settings": settings, "checkpoints": texts}
    if chat is not None:
        answers = generate(checkpoint, [row["messages"] for row in chat], dtype)
        sample["conversations"] = [{**row, "text": answer} for row, answer in zip(chat, answers, strict=True)]
    write_json(output, sample)
    return sample
