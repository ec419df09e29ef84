"""Text that a model writes after a prompt, or its answer to a message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanophi.core.errors import UserError, user_errors
from nanophi.core.names import resolve, split_revision


def generate(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    chat: bool = False,
    report: Callable[[str], None] = print,
) -> str:
    """The prompt and its continuation, or with `chat` the answer alone.

    Args:
        model: folder, or `ORG/NAME` or `ORG/NAME@revision` on the Hub.
        prompt: text to continue, or the user's message.
        max_new_tokens: fewer, with a line to `report`, where the model's context is shorter.
        temperature: 0 always takes the most likely token.
        seed: of the sampling.
        chat: put the message into the model's chat template.

    Raises:
        UserError: for a model that cannot be loaded or has no chat template, or a prompt that is too long or not UTF-8.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:  # the shell passes on any bytes
        raise UserError("the prompt is not valid UTF-8") from None
    folder = resolve(model).folder  # a mistyped name, before anything slow is imported
    if folder is not None and not (folder / "config.json").is_file():
        inside = folder / "release"
        hint = f"; did you mean {inside}?" if (inside / "config.json").is_file() else ""
        raise UserError(f"{model} is not a model (no config.json){hint}")
    from transformers import pipeline, set_seed

    repo_id, revision = split_revision(model)
    with user_errors(f"{model} cannot be loaded"):
        generator: Any = pipeline("text-generation", model=repo_id, revision=revision)
    asked: Any = prompt
    if chat:
        if not generator.tokenizer.chat_template:
            raise UserError(f"{model} has no chat template; leave out --chat")
        asked = [{"role": "user", "content": prompt}]
        prompt = generator.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    length = len(generator.tokenizer(prompt).input_ids)
    context = getattr(generator.model.config, "max_position_embeddings", None) or length + max_new_tokens
    if length >= context:
        raise UserError(f"the prompt has {length} tokens, the model's context is {context}; shorten it")
    if length + max_new_tokens > context:
        max_new_tokens = context - length
        report(f"only {max_new_tokens} more tokens fit into the model's context of {context}")
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    text = generator(asked, max_new_tokens=max_new_tokens, **sampling)[0]["generated_text"]
    return str(text[-1]["content"] if chat else text)
