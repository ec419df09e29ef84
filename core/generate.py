"""The verb `generate`: text that a model writes after a prompt, or its answer to a message."""

from typing import Annotated, Any

import typer
from typer import Argument, Option

from nanophi.core.errors import UserError, user_errors
from nanophi.core.names import resolve
from nanophi.core.sample import check_text, fitting_tokens


def generate(
    model: Annotated[str, Argument(help="Folder, or id on the Hub.")],
    prompt: Annotated[str, Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, Option(min=1, help="Length of the continuation.")] = 100,
    temperature: Annotated[float, Option(min=0, help="0 always takes the most likely token.")] = 0.8,
    seed: Annotated[int, Option(min=0, help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, Option("--chat", help="Ask a chat model: the prompt is the user's message.")] = False,
) -> None:
    """Generate text from a prompt.

    Example: nanophi generate runs/demo/release "The function returns"

    With a chat model: nanophi generate --chat runs/demo-chat/release "What does os.path.join do?"
    """
    check_text(prompt)
    named = resolve(model)  # a mistyped name, before anything slow is imported
    source = str(named.model()) if named.folder else named.repo_id
    import torch
    from transformers import pipeline

    with user_errors(f"{model} cannot be loaded"):
        generator: Any = pipeline("text-generation", model=source, revision=named.revision)
    asked: Any = prompt
    if chat:
        if not generator.tokenizer.chat_template:
            raise UserError(f"{model} has no chat template; leave out --chat")
        asked = [{"role": "user", "content": prompt}]
        prompt = generator.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    length = len(generator.tokenizer(prompt).input_ids)
    context = getattr(generator.model.config, "max_position_embeddings", None) or length + max_new_tokens
    fitting = fitting_tokens(length, context, max_new_tokens)
    if fitting < max_new_tokens:
        typer.echo(f"only {fitting} more tokens fit into the model's context of {context}", err=True)
    with user_errors(f"--seed {seed} cannot be used"):
        torch.manual_seed(seed)
    # Logits divided by less may be infinite; the most likely token is drawn from there on, whatever the seed.
    sampling = {"do_sample": True, "temperature": temperature} if temperature >= 1e-6 else {"do_sample": False}
    text = generator(asked, max_new_tokens=fitting, **sampling)[0]["generated_text"]
    typer.echo(str(text[-1]["content"] if chat else text))
