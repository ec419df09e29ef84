"""A script for a fresh interpreter (`python -I`): loads a release as a stranger would and reports what that computes.

Its argument is a JSON file that `loader.py` wrote. Nobody who loads a release has nanophi: importing it fails here.
"""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any


def main(request: dict[str, Any]) -> None:
    """Write `request["answer"]` (JSON) and `request["logits"]` (safetensors)."""
    sys.path[:] = request["packages"]
    sys.modules["nanophi"] = None  # type: ignore[assignment]
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    from transformers.utils import logging as hub_logging

    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    hub_logging.get_logger("transformers").addHandler(Collect(logging.WARNING))
    warnings.showwarning = lambda message, *rest, **more: messages.append(str(message))
    hub_logging.disable_progress_bar()

    path, trust = request["path"], request["trust"]
    options = {"trust_remote_code": trust, "dtype": torch.float32, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    model, info = loaded
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    text = generator(request["prompt"], **request["settings"])[0]["generated_text"]
    context = model.config.max_position_embeddings
    ids = tokenizer(request["text"], return_tensors="pt").input_ids[:, :context]
    if ids.shape[1] < 8:
        ids = torch.arange(8)[None] % model.config.vocab_size
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
        scores = []
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        for document in request["documents"]:
            # lm-eval's rolling windows: each token is predicted once, a later window begins at the last one's end.
            row = [prefix, *tokenizer(document, add_special_tokens=False).input_ids]
            total, done = 0.0, 1
            while done < len(row):
                end = min(done + context, len(row))
                window = torch.tensor([row[max(0, end - context - 1) : end]])
                chosen = torch.log_softmax(model(input_ids=window[:, :-1]).logits, -1)[0, done - end :]
                total += chosen.gather(1, window[0, done - end :, None]).sum().item()
                done = end
            scores.append(total)
    save_file({"logits": logits}, request["logits"])
    answer = {
        "class": type(model).__module__.split(".")[0] + "." + type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loading": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "messages": messages,
        "text": text if isinstance(text, str) else text[-1]["content"],  # of messages, the answer
        "scores": scores,
    }
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
