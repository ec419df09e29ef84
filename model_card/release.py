"""The release folder: exactly what is pushed to the Hub, and nothing that depends on when or where it was built.

The model loads as PhiForCausalLM without remote code and as NanoPhi with it. The card is made in `card.py`, and sent to
the Hub in `push.py`.
"""

import shutil
from pathlib import Path
from typing import Any

from nanophi.core.errors import UserError
from nanophi.core.files import link_or_copy, permit, read_json, sha256_of_file, write_json, write_text
from nanophi.core.names import CODE_FILES, MODEL_FILES, TOKENIZER_FILES
from nanophi.core.version import __version__
from nanophi.data.stages import split_hashes
from nanophi.model_card import card as model_card
from nanophi.model_card import exports
from nanophi.model_card.manifest import MANIFEST, list_files, write_manifest
from nanophi.model_card.records import LATER_STAGES, ShippedRecords, read_records


def build(run: Path, checkpoint: Path, card: Path, output: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write the release of a checkpoint, with what `card.build` wrote for it. Two builds are byte-identical."""
    output.mkdir(parents=True, exist_ok=True)
    for name in (*MODEL_FILES, "tokenizer.json", "tokenizer_config.json", *CODE_FILES):
        if not (checkpoint / name).is_file():
            raise UserError(f"{checkpoint / name} is missing; the checkpoint is incomplete, train it again")
    config = _config(read_json(checkpoint / "config.json"), dtype, checkpoint)
    write_json(output / "config.json", config)
    generation = _generation_config(read_json(checkpoint / "generation_config.json"), config.get("eos_token_id"))
    write_json(output / "generation_config.json", generation)
    for source in (*(checkpoint / name for name in (*TOKENIZER_FILES, *CODE_FILES)), card / "README.md"):
        if source.is_file():
            shutil.copyfile(source, output / source.name)
    for part in ("figures", "records", ".eval_results"):
        if (card / part).is_dir():
            shutil.copytree(card / part, output / part, dirs_exist_ok=True, copy_function=shutil.copyfile)
    _complete_tokenizer(output, config["max_position_embeddings"])
    _write_weights(checkpoint, output / "model.safetensors", dtype)
    write_json(output / "revisions.json", read_json(card / "records" / "revisions.json"))
    write_text(output / "LICENSE", license_text(read_records(output / "records")))
    write_manifest(output, _provenance(run, output))
    files = read_json(output / MANIFEST)["files"]
    size = sum(entry["size"] for entry in files.values())
    return {"files": len(files), "bytes": size, "weights_sha256": files["model.safetensors"]["sha256"]}


def copy_for_repo(release: Path, repo_id: str, output: Path, links: dict[str, str]) -> None:
    """Copy a release as it will be on the Hub, its card naming `repo_id` and linking what is published beside it."""
    for name in list_files(release):  # not the folders' permissions: somebody else's release may be read-only
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(str(release / name), str(output / name))
    records = read_records(output / "records")
    records["run.json"] |= {"repo_id": repo_id, "folder": None, **({"links": links} if links else {})}
    # The copy holds links, and these replace what they write.
    write_json(output / "records" / "run.json", records["run.json"])
    model_card.write(records, output)
    write_manifest(output, read_json(output / MANIFEST)["provenance"])


def _config(config: dict[str, Any], dtype: str, checkpoint: Path) -> dict[str, Any]:
    """A config that transformers 4.37 to 5.x read alike: the older top-level keys as well as `rope_parameters`."""
    from nanophi.configuration_nanophi import AUTO_MAP

    if (found := config.get("model_type")) != "phi":
        raise UserError(f"{checkpoint / 'config.json'}: model_type is {found!r}, a release needs 'phi'")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") in exports.NOT_IN_PHI:
        raise UserError(f"{checkpoint / 'config.json'}: stock Phi cannot compute rope_type {rope['rope_type']!r}")
    config |= exports.older_keys(rope)
    config |= {"architectures": ["PhiForCausalLM"], "auto_map": dict(AUTO_MAP), "use_cache": True}
    config |= dict.fromkeys(("dtype", "torch_dtype"), dtype)
    return {key: config[key] for key in sorted(config) if key != "_name_or_path"}


def _generation_config(config: dict[str, Any], end: Any) -> dict[str, Any]:
    """Without lengths, which lm-eval would take over its own; greedy, as the card's sample is; padded with the end."""
    left_out = ("max_new_tokens", "max_length", "_from_model_config")
    kept = {key: value for key, value in sorted({**config, "do_sample": False}.items()) if key not in left_out}
    return {**kept, "pad_token_id": end} if kept.get("pad_token_id") is None and isinstance(end, int) else kept


def _complete_tokenizer(folder: Path, context: int) -> None:
    """What batched generation needs: a token to pad with, on the left, and a prompt's greatest length."""
    tokenizer = read_json(folder / "tokenizer_config.json")
    # `config.json` does not name it, the end of text: there it would keep the model from learning its embedding.
    tokenizer.setdefault("pad_token", tokenizer.get("eos_token"))
    tokenizer |= {"padding_side": "left", "model_max_length": context}
    write_json(folder / "tokenizer_config.json", tokenizer)
    if (special := folder / "special_tokens_map.json").is_file():
        write_json(special, {"pad_token": tokenizer["pad_token"], **read_json(special)})


def license_text(records: ShippedRecords) -> str:
    """The licence of the model, and that of the two Python files, which are nanophi's."""
    card = records["recipe.yaml"]["card"]
    code = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8").lstrip("\n")
    if card["license"] == "apache-2.0":
        return code
    if card["license"] == "mit":
        own = (Path(__file__).parent / "mit.md").read_text(encoding="utf-8")
        own = own.format(year=records["run.json"]["finished"][:4], holder=card["developers"])
    else:
        own = license_line(card)
    rule = "-" * 80
    return (
        f"The model (weights, tokenizer, card and records)\n\n{own}\n{rule}\n\n"
        f"{' and '.join(CODE_FILES)}, which are part of nanophi\n\n{code}"
    )


def license_line(card: dict[str, Any]) -> str:
    """A licence by its name, or where it is none of the Hub's by the recipe's name and link."""
    named = f"{card.get('license_name')}: {card.get('license_link')}"
    return f"License: {named if card['license'] == 'other' else card['license']}\n"


def _write_weights(checkpoint: Path, target: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    converted = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in sorted(tensors.items())}
    save_file(converted, target, metadata={"format": "pt"})
    permit(target)


def _provenance(run: Path, output: Path) -> dict[str, Any]:
    """Where the release comes from: recipe, data and code by hash, versions as recorded when the run was made."""
    record, tokens = read_json(run / "record.json"), read_json(run / "data" / "tokens" / "tokens.json")
    shipped = read_json(output / "records" / "run.json")  # without paths of this machine
    return {
        "nanophi": __version__,
        "recipe_sha256": sha256_of_file(output / "records" / "recipe.yaml"),
        "environment": shipped.get("environment"),
        "stages": {name: stage["key"] for name, stage in record["stages"].items() if name not in LATER_STAGES},
        # Of the token streams in the order of training, not of files: other versions of a library pack files otherwise.
        "data_sha256": split_hashes(tokens),
    }
