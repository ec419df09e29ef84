"""GGUF files and other exports: what is written, what refused; where llama.cpp is installed, it computes the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PhiForCausalLM

from nanophi import NanoPhiConfig, NanoPhiForCausalLM
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_file
from nanophi.model_card import exports, gguf
from nanophi.model_card import release as releases
from nanophi.model_card.manifest import checksums, list_files
from nanophi.model_card.records import model_record

CONTEXT = 96
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n\treturn  x   if x else\t\t'none'  \n\n\n    # done ",
    "naïve café, Größe, Ωμέγα, 北京的狐狸, العربية, 🦊🦊 e\u0301 \u00a0 \u3000 \u200b|",
    "I'LL we'll they've 'twas 1234567 x=-1.5e10; <|endoftext|>after [PAD301] 3\u00bd \u0661\u0662\r\n \r\n",
    " leading, trailing ",
    "\x00\x01\x7f",
]


@pytest.fixture(scope="module")
def release(finished_run, tmp_path_factory):
    """Grouped heads, rows without a token, an added token that is not special, weights large enough to decide."""
    return make_release(tmp_path_factory.mktemp("gguf") / "tiny-model", finished_run / "data" / "tokenizer")


def make_release(folder: Path, tokenizer: Path, **fields: Any) -> Path:
    shape: dict[str, Any] = {"vocab_size": 320, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    shape |= {"layer_norm_eps": 1e-4, "bos_token_id": 0, "eos_token_id": 0}
    shape["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.75}
    torch.manual_seed(0)
    model = NanoPhiForCausalLM(NanoPhiConfig(**{**shape, **fields}))
    for name, parameter in model.named_parameters():  # biases and norms too: none may get lost unnoticed
        torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.15)
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken("    ", normalized=False), AddedToken("  ", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def metadata(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def edit(release: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of the release with other values in one of its JSON files."""
    shutil.copytree(release, target)
    (target / file).write_text(json.dumps({**read_json(target / file), **changes}))
    return target


def test_metadata_tokens_and_merges(release, tmp_path):
    first, second = (gguf.write(release, tmp_path / f"{number}" / "x.gguf", "f16") for number in range(2))
    assert first == second
    found = metadata(tmp_path / "0" / "x.gguf")
    assert (found["general.architecture"], found["general.name"]) == ("phi2", "tiny-model")
    assert found["general.file_type"] == 1
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert found["tokenizer.ggml.bos_token_id"] == found["tokenizer.ggml.eos_token_id"] == 0
    assert found["tokenizer.ggml.add_bos_token"] is False
    tokenizer = Tokenizer.from_file(str(release / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 320
    assert tokens[:size] == [tokenizer.id_to_token(number) for number in range(size)]
    assert tokens[size:] == [f"[PAD{number}]" for number in range(size, 320)]
    normal, control, user_defined, unused = 1, 3, 4, 5
    assert types == [control] + [normal] * (size - 3) + [user_defined] * 2 + [unused] * (320 - size)
    merges = read_json(release / "tokenizer.json")["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)])
def test_every_weight_is_there(release, tmp_path, kind, tolerance):
    summary = gguf.write(release, tmp_path / "x.gguf", kind)
    assert summary["bytes"] == (tmp_path / "x.gguf").stat().st_size
    assert summary["sha256"] == sha256_of_file(tmp_path / "x.gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "x.gguf").tensors}
    weights = load_file(release / "model.safetensors")
    assert len(tensors) == len(weights) == summary["tensors"]
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.2.self_attn.k_proj.bias": "blk.2.attn_k.bias",
        "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v.weight",
        "model.layers.0.self_attn.dense.weight": "blk.0.attn_output.weight",
        "model.layers.0.mlp.fc1.weight": "blk.0.ffn_up.weight",
        "model.layers.1.input_layernorm.bias": "blk.1.attn_norm.bias",
        "lm_head.weight": "output.weight",
        "lm_head.bias": "output.bias",
    }
    for source, name in names.items():
        tensor, expected = tensors[name], weights[source].numpy()
        matrix = expected.ndim > 1
        assert tensor.tensor_type == (GGMLQuantizationType[kind.upper()] if matrix else GGMLQuantizationType.F32)
        found = dequantize(tensor.data, tensor.tensor_type).reshape(-1)
        flat = abs(expected.reshape(-1))
        scale = flat.reshape(-1, 32).max(1).repeat(32) if kind == "q8_0" and matrix else flat
        assert (abs(found - expected.reshape(-1)) <= (tolerance if matrix else 0) * scale + 1e-7).all()


def test_rows_too_short_for_blocks_stay_float16_and_tied_embeddings_become_a_head(finished_run, tmp_path):
    shape = {"intermediate_size": 100, "tie_word_embeddings": True}
    release = make_release(tmp_path / "odd", finished_run / "data" / "tokenizer", **shape)
    gguf.write(release, tmp_path / "x.gguf", "q8_0")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "x.gguf").tensors}
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"
    np.testing.assert_array_equal(tensors["output.weight"].data, tensors["token_embd.weight"].data)


def test_export_makes_a_repository(built_release, tmp_path):
    release = built_release
    before = {name: sha256_of_file(release / name) for name in list_files(release)}
    for _ in range(2):  # again, over what is there
        results = gguf.export(release, ["f16", "q8_0"], tmp_path / "gguf")
    assert [Path(result["path"]).name for result in results] == ["tiny-f16.gguf", "tiny-q8_0.gguf"]
    folder = tmp_path / "gguf"
    assert list_files(folder) == ["MANIFEST.json", "README.md", "tiny-f16.gguf", "tiny-q8_0.gguf"]
    assert not checksums(folder, list_files(folder))
    card = (folder / "README.md").read_text()
    assert all(f"| `{Path(r['path']).name}` | {r['kind']} | {r['bytes']:,} |" in card for r in results)
    assert "base_model" not in card  # Its name is not a Hub id.
    assert list(tmp_path.iterdir()) == [folder]
    assert before == {name: sha256_of_file(release / name) for name in list_files(release)}


def test_card_names_the_model_it_comes_from(release, tmp_path):
    copy = shutil.copytree(release, tmp_path / "copy")
    (copy / "records").mkdir()
    (copy / "records" / "run.json").write_text('{"repo_id": "org/nano-phi"}')
    (copy / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n\n# Card\n")
    (result,) = gguf.export(copy, ["f16"], tmp_path / "gguf")
    assert Path(result["path"]) == tmp_path / "gguf" / "nano-phi-f16.gguf"
    front = Path(result["path"]).with_name("README.md").read_text().split("---")[1]
    for line in ("base_model: org/nano-phi", "base_model_relation: quantized", "license: mit"):
        assert f"{line}\n" in front
    inside = metadata(Path(result["path"]))
    assert inside["general.license"] == "mit"
    assert inside["general.base_model.0.repo_url"] == "https://huggingface.co/org/nano-phi"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"eos_token_id": [0, 1]}, r"one bos_token_id and one eos_token_id"),
        ("config.json", {"num_key_value_heads": 4}, r"config.json is not a model's \(num_attention_heads \(6\) must"),
        ("config.json", {"vocab_size": 200}, r"token \d+ has no row in the model \(vocab_size 200\)"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, r"only plain byte-level BPE with GPT-2's words"),
        (
            "tokenizer.json",
            {"normalizer": {"type": "NFC"}},
            r"only plain byte-level BPE with GPT-2's words and no norm",
        ),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(release, tmp_path, file, changes, message):
    broken = edit(release, tmp_path / "broken", file, **changes)
    with pytest.raises(UserError, match=message):
        gguf.write(broken, tmp_path / "x.gguf", "f16")
    assert not list(tmp_path.glob("*.gguf*"))


def test_unknown_tensors_overflow_and_missing_files_are_refused(release, tmp_path):
    broken = shutil.copytree(release, tmp_path / "broken")
    weights = load_file(release / "model.safetensors")
    save_file({**weights, "model.layers.0.self_attn.q_layernorm.weight": torch.ones(16)}, broken / "model.safetensors")
    with pytest.raises(UserError, match=r"has no tensor model.layers.0.self_attn.q_layernorm.weight"):
        gguf.write(broken, tmp_path / "x.gguf", "f16")
    save_file({**weights, "lm_head.weight": weights["lm_head.weight"] * 1e6}, broken / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight exceeds float16; choose bf16 or f32"):
        gguf.write(broken, tmp_path / "x.gguf", "f16")
    (broken / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json is missing; is .*broken a release folder\?"):
        gguf.write(broken, tmp_path / "x.gguf", "f16")
    with pytest.raises(UserError, match=r"unknown GGUF kind 'q4'; allowed: f32, f16, bf16, q8_0"):
        gguf.export(release, ["f16", "q4"], tmp_path / "gguf")
    with pytest.raises(UserError, match="lies inside the release"):
        gguf.export(release, ["f16"], release / "gguf")
    assert not (tmp_path / "gguf").exists()


# Each field of the configuration in each export: computed there, refused, or without a meaning for inference

ROPE = {"rope_theta": 5000.0, "partial_rotary_factor": 0.75}
LINEAR = {"rope_type": "linear", "factor": 4, **ROPE}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 48, **ROPE}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STOPS = {"rope_theta": None}
"""Older versions have no base for the frequencies then and end with an error, instead of computing another function."""

FIELDS: list[tuple[dict[str, Any], str, dict[str, Any], Any]] = [
    # field, oldest transformers, what its config.json has beside the default's, keys in GGUF or the reason of refusal
    ({"num_hidden_layers": 2}, "4.37.2", {}, {"block_count": 2}),
    ({"hidden_size": 48}, "4.37.2", {}, {"embedding_length": 48}),
    ({"intermediate_size": 64}, "4.37.2", {}, {"feed_forward_length": 64}),
    ({"num_attention_heads": 12}, "4.37.2", {}, {"attention.head_count": 12, "rope.dimension_count": 6}),
    ({"num_key_value_heads": 3}, "4.37.2", {}, {"attention.head_count_kv": 3}),
    ({"max_position_embeddings": 80}, "4.37.2", {}, {"context_length": 80}),
    ({"layer_norm_eps": 0.25}, "4.37.2", {}, {"attention.layer_norm_epsilon": 0.25}),
    ({"tie_word_embeddings": True}, "4.37.2", {}, {}),
    ({"hidden_act": "gelu_pytorch_tanh"}, "4.37.2", {}, {}),
    ({"hidden_act": "silu"}, "4.37.2", {}, "not hidden_act 'silu'"),
    ({"hidden_act": "hardswish"}, "5.23", {}, "not hidden_act 'hardswish'"),
    ({"qk_layernorm": True}, "4.48", {}, "no LayerNorm on queries and keys"),
    ({"rope_parameters": {**ROPE, "rope_theta": 700.0}}, "4.37.2", {"rope_theta": 700.0}, {"rope.freq_base": 700.0}),
    (
        {"rope_parameters": LINEAR},
        "4.37.2",
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    (
        {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}},
        "4.37.2",
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
        "rope_type default and linear, not dynamic",
    ),
    ({"rope_parameters": {**LINEAR, "factor": 1.0}}, "5.4", STOPS, "rope_type default and linear, not linear"),
    ({"rope_parameters": YARN}, "5.4", STOPS, "rope_type default and linear, not yarn"),
    ({"rope_parameters": LLAMA3}, "5.4", STOPS, "rope_type default and linear, not llama3"),
]
OF_TRAINING = {"resid_pdrop", "embd_pdrop", "attention_dropout", "initializer_range", "use_cache", "pad_token_id"}
ELSEWHERE = {"vocab_size", "bos_token_id", "eos_token_id"}
"""In test_gguf.py, with the tokenizer."""


def test_every_field_is_in_the_table():
    fields = {name for name in NanoPhiConfig.__annotations__ if not name.startswith("base_")}
    left = fields - OF_TRAINING - ELSEWHERE - {name for row in FIELDS for name in row[0]}
    assert left <= {"model_type", "keys_to_ignore_at_inference"}


@pytest.mark.parametrize(("fields", "oldest", "older", "in_gguf"), FIELDS, ids=lambda value: str(value)[:40])
def test_each_field_survives_or_is_refused(finished_run, tmp_path, fields, oldest, older, in_gguf):
    folder = make_release(tmp_path / "model", finished_run / "data" / "tokenizer", **fields)
    ours = NanoPhiForCausalLM.from_pretrained(folder).eval()
    config = releases._config(json.loads((folder / "config.json").read_text()), "float32", folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert exports.oldest_transformers(model_record(folder)["config"]) == oldest
    expected = {**ROPE, "rope_scaling": None, **older}
    assert {key: config.get(key) for key in expected} == expected
    ids = torch.arange(100)[None]
    with torch.no_grad():  # Stock Phi reads the older keys first.
        stock = PhiForCausalLM.from_pretrained(folder).eval()(ids).logits
        assert torch.allclose(stock, ours(ids).logits, atol=1e-4)
        assert torch.equal(NanoPhiForCausalLM.from_pretrained(folder).eval()(ids).logits, ours(ids).logits)
    if isinstance(in_gguf, str):
        with pytest.raises(UserError, match=in_gguf):
            gguf.write(folder, tmp_path / "x.gguf", "f32")
        return
    gguf.write(folder, tmp_path / "x.gguf", "f32")
    found = metadata(tmp_path / "x.gguf")
    assert {key: found[f"phi2.{key}"] for key in in_gguf} == in_gguf
    assert len(GGUFReader(tmp_path / "x.gguf").tensors) == len(ours.state_dict())


def test_a_type_that_stock_phi_does_not_compute_is_refused():
    config = {"model_type": "phi", "rope_parameters": {"rope_type": "proportional", **ROPE}}
    with pytest.raises(UserError, match="stock Phi cannot compute rope_type 'proportional'"):
        releases._config(config, "float32", Path("step-000010"))


# llama.cpp itself, where it is installed (`make gguf`)


def llama(release: Path, folder: Path, kind: str, **options: Any) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed; `make gguf` builds it")
    gguf.write(release, folder / f"{kind}.gguf", kind)
    return llama_cpp.Llama(str(folder / f"{kind}.gguf"), n_ctx=CONTEXT, n_threads=1, verbose=False, **options)


def test_llama_cpp_cuts_text_into_the_same_tokens(release, tmp_path):
    model = llama(release, tmp_path, "f16")
    tokenizer = AutoTokenizer.from_pretrained(release)
    for text in TEXTS:
        ids = model.tokenize(text.encode(), add_bos=True, special=True)
        assert ids == tokenizer(text).input_ids, text
        assert model.detokenize(ids, special=True).decode(errors="replace") == tokenizer.decode(ids), text


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_key_value_heads": 1, "rope_parameters": {}},
        {"num_key_value_heads": 6, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.75}},
    ],
    ids=["grouped", "one-key-value-head", "all-heads-tied", "linear"],
)
def test_llama_cpp_computes_the_same(finished_run, tmp_path, fields):
    release = make_release(tmp_path / "model", finished_run / "data" / "tokenizer", **fields)
    ours = NanoPhiForCausalLM.from_pretrained(release).eval()
    ids = torch.randint(320, (1, CONTEXT), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = ours(ids).logits[0]
    for kind, tolerance in (("f32", 2e-3), ("f16", 4e-3), ("q8_0", 0.05)):
        model = llama(release, tmp_path, kind, logits_all=True)
        model.eval(ids[0].tolist())
        difference = (torch.tensor(model.scores[:CONTEXT]) - expected).abs().mean() / expected.std()
        assert difference < tolerance, kind


def test_llama_cpp_continues_alike(release, tmp_path):
    """The likeliest token is the same at every step, but for near-ties within the difference of logits elsewhere."""
    model = llama(release, tmp_path, "f16", logits_all=True)
    ours = NanoPhiForCausalLM.from_pretrained(release).eval()
    ours.generation_config.eos_token_id = None

    def logits(row):
        model.reset()
        model.eval(row)
        with torch.no_grad():
            return ours(torch.tensor([row])).logits[0], torch.tensor(model.scores[: len(row)])

    expected, found = logits(torch.randint(320, (CONTEXT,), generator=torch.Generator().manual_seed(3)).tolist())
    noise = (expected - found).abs().max()
    for text in ("The quick", "A module holds", " the lazy dog"):
        ids = model.tokenize(text.encode(), add_bos=False)
        row = ours.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0].tolist()
        expected, found = (values[len(ids) - 1 : -1] for values in logits(row))
        assert expected.argmax(-1).tolist() == row[len(ids) :]
        best = expected.topk(2).values
        differs = expected.argmax(-1) != found.argmax(-1)
        assert not (differs & (best[:, 0] - best[:, 1] > noise)).any()
