"""Load releases with one loader and write down what they compute; runs under any transformers, without nanophi.

    python -I load.py REQUEST.json

The request names the releases, whether to trust their code, the texts, and where the answers go: a JSON file, and per
release a safetensors file with the logits. The code uses only what transformers 4.37 to 5.x have in common.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

NEW_TOKENS = 32
MESSAGES = [{"role": "user", "content": "What does os.path.join do?"}]


def load(folder: str, trust: bool, texts: list, logits: str) -> dict:
    """What one release answers; logits are those of the first text, float32 [tokens, vocab_size]."""
    # `trust_remote_code=False`, not None: None would ask at the terminal in old versions.
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, output_loading_info=True)
    model, info = loaded
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    # A bfloat16 release is float32 under 4.x and bfloat16 under 5; the values are the same.
    model = model.float().eval()
    encoded = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    context = model.config.max_position_embeddings
    generated = []
    with torch.no_grad():
        save_file({"logits": model(encoded[0][:, :context]).logits[0].contiguous()}, logits)
        for ids in encoded[1:]:
            prompt = ids[:, : context - NEW_TOKENS]
            settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
            tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
            generated.append(tokens[0, prompt.shape[1] :].tolist())
    answer = None
    # Messages are promised from 4.57 on.
    if getattr(tokenizer, "chat_template", None) and not transformers.__version__.startswith("4.3"):
        ask: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)
        answer = ask(MESSAGES, max_new_tokens=NEW_TOKENS, do_sample=False)[0]["generated_text"][-1]
    frequencies = {name: value.tolist() for name, value in model.named_buffers() if name.endswith(".inv_freq")}
    return {
        "class": type(model).__name__,
        "module": type(model).__module__.split(".")[0],
        "loading": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "ids": [ids[0].tolist() for ids in encoded],
        "decoded": [tokenizer.decode(ids[0]) for ids in encoded],
        "generated": generated,
        "answer": answer,
        "frequencies": frequencies,
        "uses_nanophi": "nanophi" in sys.modules,
    }


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = {}
    for name, release in request["releases"].items():
        try:
            answers[name] = load(release["folder"], request["trust"], request["texts"], release["logits"])
        except Exception as error:  # whatever a version raises is its answer
            message = (str(error).strip() or "no message").splitlines()[0]
            answers[name] = {"error": f"{type(error).__name__}: {message}"}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    Path(request["answer"]).write_text(json.dumps({"versions": versions, "releases": answers}), encoding="utf-8")


if __name__ == "__main__":
    main()
