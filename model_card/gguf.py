"""GGUF files of a release, for llama.cpp and the programs built on it.

llama.cpp has Phi's function as the architecture `phi2`. Its own converter is wrong under grouped-query attention, so
the metadata is written here, from the release's config. The same release gives the same bytes.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, ModelCard
from safetensors.torch import load_file
from tokenizers import Tokenizer

from nanophi.configuration_nanophi import NanoPhiConfig
from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import atomic_folder, read_json, sha256_of_file
from nanophi.core.names import is_hub_id
from nanophi.model_card import exports
from nanophi.model_card.companions import Source
from nanophi.model_card.pages import write_page

try:
    import gguf
except ImportError:  # it is an extra
    gguf = None  # type: ignore[assignment]

# What the matrices are stored in (vectors stay float32), and gguf's name for a file of that kind.
KINDS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def build(source: Source, _: str, folder: Path) -> None:
    """`export` of what `main` will be: only there do the records name the repository that the files come from."""
    export(source.release, source.asked["gguf"], folder)


def export(release: Path, kinds: Sequence[str], output: Path) -> list[dict[str, Any]]:
    """Write a folder ready to be a Hub repository, in place of an earlier one; returns `write`'s facts and paths."""
    parse_kinds(",".join(kinds))
    if output.resolve().is_relative_to(release.resolve()):
        raise UserError(f"{output} lies inside the release {release}, which must stay as it is; choose another folder")
    repo_id, header = _repo_id(release), _front_matter(release)
    name, on_hub = repo_id.split("/")[-1], is_hub_id(repo_id)
    kept = ("license", "language", "pipeline_tag", "datasets")
    metadata: dict[str, Any] = {key: header[key] for key in kept if key in header}
    metadata |= {"base_model": repo_id, "base_model_relation": "quantized"} if on_hub else {}
    metadata |= {"library_name": "gguf", "tags": ["gguf", "phi"]}
    files = [f"{name}-{kind}.gguf" for kind in kinds]
    with atomic_folder(output) as work:
        results = [write(release, work / file, kind) for file, kind in zip(files, kinds, strict=True)]
        write_page(
            work,
            "gguf.md",
            CardData(**dict(sorted(metadata.items()))),
            {"model": repo_id, "weights_sha256": sha256_of_file(release / "model.safetensors")},
            name=name,
            repo_id=repo_id,
            on_hub=on_hub,
            files=[{"name": file, **result} for file, result in zip(files, results, strict=True)],
            chat=chat_template(release) is not None,
        )
    return [{**result, "path": str(output / file)} for file, result in zip(files, results, strict=True)]


def write(release: Path, output: Path, kind: str) -> dict[str, Any]:
    """Write one GGUF file; returns its kind, number of tensors, size and hash. `UserError`: phi2 cannot express it."""
    if gguf is None:
        raise UserError("GGUF files need the package gguf: pip install 'nanophi[gguf]'")
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (release / file).is_file():
            raise UserError(f"{release / file} is missing; is {release} a release folder?")
    with user_errors(f"{release / 'config.json'} is not a model's"):
        config = NanoPhiConfig.from_pretrained(release)
    if problem := exports.beyond_llama_cpp(config):
        raise UserError(f"{release / 'config.json'}: {problem}")
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.PHI2])
    _add_metadata(writer, release, config, kind)
    _add_tokenizer(writer, release, config)
    tensors = _tensors(release, config, kind)
    for name, (data, raw_dtype) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=raw_dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file(output)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size, sha256 = output.stat().st_size, sha256_of_file(output)
    return {"kind": kind, "tensors": len(tensors), "bytes": size, "sha256": sha256}


def parse_kinds(text: str | None) -> list[str]:
    """`f16, q8_0` as a list, each once. Raises `UserError` for an unknown kind."""
    kinds = list(dict.fromkeys(kind.strip() for kind in (text or "").split(",") if kind.strip()))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"unknown GGUF kind {unknown[0]!r}; allowed: {', '.join(KINDS)}")
    return kinds


def _add_metadata(writer: Any, release: Path, config: NanoPhiConfig, kind: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    repo_id = _repo_id(release)
    organization, _, name = repo_id.rpartition("/")
    writer.add_name(name)
    if is_hub_id(repo_id):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{repo_id}")
    values = {
        "license": _front_matter(release).get("license"),
        "file_type": gguf.LlamaFileType[KINDS[kind]],
        "quantization_version": gguf.GGML_QUANT_VERSION,
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_eps": config.layer_norm_eps,
        "rope_dimension_count": config.rotary_ndims,
        "rope_freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if scaled := exports.scaling(config.rope_parameters):
        values |= {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": float(scaled["factor"])}
    for key, value in values.items():
        if value is not None:
            getattr(writer, f"add_{key}")(value)


def _add_tokenizer(writer: Any, release: Path, config: NanoPhiConfig) -> None:
    """GPT-2's byte-level BPE, which llama.cpp implements; with any other tokenizer its tokens would differ."""
    vocab_size, path = config.vocab_size, release / "tokenizer.json"
    ends: dict[str, Any] = {"bos": config.bos_token_id, "eos": config.eos_token_id}
    content = read_json(path)
    model, splitter = content["model"], content["pre_tokenizer"] or {}
    byte_level = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    byte_level &= not splitter.get("add_prefix_space") and content["normalizer"] is None
    extras = [model.get(key) for key in ("dropout", "byte_fallback", "ignore_merges", "end_of_word_suffix")]
    extras += [token[key] for token in content["added_tokens"] for key in ("single_word", "lstrip", "rstrip")]
    if model["type"] != "BPE" or not byte_level or any(extras):
        raise UserError(f"{path}: a GGUF file takes only plain byte-level BPE with GPT-2's words and no normalizer")
    backend = Tokenizer.from_file(str(path))
    bare = backend.encode("a", add_special_tokens=False).ids
    around = [token for token in backend.encode("a").ids if token not in bare]
    if around not in ([], [ends["bos"]]):
        raise UserError(f"{path}: adds the tokens {around} to a text; llama.cpp adds bos_token_id or nothing")

    ids = {**model["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    if (last := max(ids.values())) >= vocab_size:
        raise UserError(f"{path}: token {last} has no row in the model (vocab_size {vocab_size})")
    # Rows without a token (phi-2 has 905 of them) still need a name, which no text is split into.
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, number in ids.items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(ends["bos"])
    writer.add_eos_token_id(ends["eos"])
    writer.add_add_bos_token(bool(around))
    writer.add_add_eos_token(False)
    if template := chat_template(release):
        writer.add_chat_template(template)


def chat_template(release: Path) -> str | None:
    """The tokenizer's chat template, in whichever of its files it is, without marks that transformers alone reads."""
    file, config = release / "chat_template.jinja", release / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None
    template = file.read_text(encoding="utf-8") if file.is_file() else template
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template) if isinstance(template, str) else None


def _tensors(release: Path, config: NanoPhiConfig, kind: str) -> dict[str, tuple[Any, Any]]:
    """Arrays by GGUF name, with the type that they are stored in."""
    weights = load_file(release / "model.safetensors")
    if config.tie_word_embeddings:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])  # phi2 has no other way to say it
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI2, config.num_hidden_layers)
    wanted = gguf.GGMLQuantizationType[kind.upper()]
    tensors = {}
    for source, tensor in sorted(weights.items()):
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"{release / 'model.safetensors'}: llama.cpp's phi2 has no tensor {source}")
        data = tensor.float().numpy()
        dtype = wanted if data.ndim > 1 else gguf.GGMLQuantizationType.F32
        # Rows of no multiple of 32 stay in float16.
        if dtype == gguf.GGMLQuantizationType.Q8_0 and data.shape[-1] % gguf.GGML_QUANT_SIZES[dtype][0]:
            dtype = gguf.GGMLQuantizationType.F16
        if dtype == gguf.GGMLQuantizationType.F16 and abs(data).max() > 65504:
            raise UserError(f"{release / 'model.safetensors'}: {source} exceeds float16; choose bf16 or f32")
        tensors[name] = (gguf.quants.quantize(data, dtype), dtype)
    return tensors


def _repo_id(release: Path) -> str:
    """The name that the release's records give it, else its folder's."""
    record = release / "records" / "run.json"
    return str(read_json(record)["repo_id"]) if record.is_file() else release.resolve().name


def _front_matter(release: Path) -> dict[str, Any]:
    path = release / "README.md"
    return ModelCard.load(path).data.to_dict() if path.is_file() else {}
