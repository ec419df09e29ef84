"""Loading a model to be measured, and what identifies it: a hash of its files, or its commit on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanophi.core.errors import UserError, one_line
from nanophi.core.files import read_json, sha256_of, sha256_of_file
from nanophi.core.names import Named, resolve, step_folders

if TYPE_CHECKING:
    import transformers

DTYPES = ("auto", "float32", "bfloat16", "float16")
GENERIC_NAMES = ("release", "model", "checkpoint", "main", "final", "best", "last")  # of folders, that tell nothing


def checkpoints_of(model: str | Path) -> list[str | Path]:
    """The checkpoints of a run directory, by step; any other model is itself."""
    return list(step_folders(Path(model) / "checkpoints")) or [model]


def model_name(named: Named) -> str:
    """What a person calls a model: its Hub id, or the end of its path that tells something: `demo/step-000600`."""
    if named.folder is None:
        return named.name
    folder = named.folder.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):  # the Hub's cache
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    if folder.parent.name == "checkpoints":
        return f"{folder.parent.parent.name}/{folder.name}"
    return f"{folder.parent.name}/{folder.name}" if folder.name in GENERIC_NAMES else folder.name


def model_sha256(folder: Path) -> str:
    """Hex SHA-256 of what a model computes: its weights, configuration and tokenizer."""
    files = [path for pattern in ("*.safetensors", "config.json", "tokenizer*.json") for path in folder.glob(pattern)]
    return sha256_of({path.name: sha256_of_file(path) for path in files})


def model_key(identity: dict[str, Any]) -> str:
    """What makes two models the same one, from how `load_model` describes them: the hash or commit, and the dtype."""
    return sha256_of([identity.get("sha256"), identity.get("revision"), identity.get("dtype")])


def load_model(
    model: str | Path, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, dict[str, Any]]:
    """A causal language model in evaluation mode, on the GPU if there is one, its tokenizer, and what identifies it.

    That is `name`, `sha256` of a folder's files or `revision` (the commit) of a Hub id, `parameters`, `dtype` (`auto`
    is bfloat16 on a GPU and float32 on a CPU), `architecture`, and `step` and `tokens_seen` of a run's checkpoint.
    Raises `UserError` if it cannot be loaded, is not a causal language model, or does not fit its tokenizer.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is not one of {', '.join(DTYPES)}")
    named = resolve(model)
    folder = named.model() if named.folder else None
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    source = str(folder.resolve() if folder else named.repo_id)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": named.revision or "main"}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **common)
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=getattr(torch, dtype), use_safetensors=True, **common
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **common)
    except UserError:
        raise
    except Exception as error:
        reason = one_line(error)
        if "Unrecognized configuration class" in reason:
            reason = f"model type '{config.model_type}' is not a causal language model"
        if folder is None:
            reason = f"no such folder, and from the Hub: {reason}"
        raise UserError(f"cannot load {model}: {reason}") from error
    if len(tokenizer) > (rows := network.get_input_embeddings().num_embeddings):
        sizes = f"the tokenizer has {len(tokenizer)} tokens but the weights only {rows} rows"
        raise UserError(f"{model}: {sizes}; the tokenizer belongs to another model")
    commit = {"revision": getattr(config, "_commit_hash", None) or str(model)}
    identity: dict[str, Any] = {
        "name": model_name(named),
        **({"sha256": model_sha256(folder)} if folder else commit),
        "architecture": type(network).__name__,
        "parameters": network.num_parameters(),
        "dtype": dtype,
    }
    if folder is not None and (folder / "checkpoint.json").is_file():
        checkpoint = read_json(folder / "checkpoint.json")
        identity |= {key: checkpoint[key] for key in ("step", "tokens_seen") if key in checkpoint}
    return network.to(device).eval(), tokenizer, identity
