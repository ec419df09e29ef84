"""The release folder: complete, the same every time, and what training wrote."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiForCausalLM

from nanophi.core import sample
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_file, sha256_of_tree, write_json
from nanophi.model_card import card, figures, release
from nanophi.model_card.manifest import list_files

LAST = "checkpoints/step-000030"


def build(run: Path, output: Path, dtype: str = "float32") -> Path:
    card.build(run, output / "card")
    release.build(run, run / LAST, output / "card", output / "release", dtype)
    return output / "release"


def test_two_builds_are_byte_identical(built_release, finished_run, tmp_path):
    again = build(finished_run, tmp_path)
    assert list_files(again) == list_files(built_release)
    assert sha256_of_tree(again) == sha256_of_tree(built_release)


def test_figures_show_something_where_there_is_something(built_release, records):
    from matplotlib.image import imread

    for name in ("loss", "quality", "evaluation"):
        pixels = imread(built_release / "figures" / f"{name}.png")
        assert pixels.shape[1] > 1000
        assert 0.02 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.8
    assert figures.names(records) == ["loss", "quality", "evaluation"]
    without = {name: record for name, record in records.items() if not name.startswith("evals/")}
    assert figures.names(without) == ["loss", "quality"]
    assert "figures/evaluation.png" not in card.render(without)


def test_config_suits_old_and_new_transformers(built_release):
    tokenizer = AutoTokenizer.from_pretrained(built_release)
    assert tokenizer.model_max_length == 128 and tokenizer.pad_token == tokenizer.eos_token
    config = read_json(built_release / "config.json")
    assert config.get("pad_token_id") is None
    assert (config["model_type"], config["architectures"]) == ("phi", ["PhiForCausalLM"])
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["partial_rotary_factor"] == config["rope_parameters"]["partial_rotary_factor"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["use_cache"] is True
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_nanophi.NanoPhiForCausalLM"
    merges = read_json(built_release / "tokenizer.json")["model"]["merges"]
    assert merges and all(isinstance(merge, str) for merge in merges)


def test_config_is_repaired_after_training_switched_the_cache_off(finished_run, tmp_path):
    checkpoint = Path(shutil.copytree(finished_run / LAST, tmp_path / "step-000030"))
    config = read_json(checkpoint / "config.json")
    write_json(checkpoint / "config.json", {**config, "use_cache": False, "_name_or_path": "/somewhere"})
    generation = read_json(checkpoint / "generation_config.json")
    write_json(checkpoint / "generation_config.json", {**generation, "max_new_tokens": 20, "max_length": 20})
    card.build(finished_run, tmp_path / "card")
    release.build(finished_run, checkpoint, tmp_path / "card", tmp_path / "release")
    config = read_json(tmp_path / "release" / "config.json")
    assert config["use_cache"] is True and "_name_or_path" not in config
    generation = read_json(tmp_path / "release" / "generation_config.json")
    assert not {"max_new_tokens", "max_length"} & set(generation)


@pytest.mark.parametrize("trust", [False, True])
def test_batches_of_unequal_prompts_are_continued_as_each_alone(built_release, trust):
    from transformers import pipeline

    loading = {"device": "cpu", "trust_remote_code": trust, "dtype": torch.float32}
    generator = pipeline("text-generation", model=str(built_release), **loading)
    prompts = ["The quick brown fox", "A", "A module holds definitions; a package"]
    options = {"max_new_tokens": 12, "do_sample": False}
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
    together = [made[0]["generated_text"] for made in generator(prompts, batch_size=3, **options)]
    assert together == alone


def test_a_prompt_that_fills_the_context_is_refused_and_a_long_one_gets_fewer_tokens(finished_run):
    tokenizer = finished_run / "data" / "tokenizer"
    length = len(AutoTokenizer.from_pretrained(tokenizer)("The quick brown fox " * 4).input_ids)
    settings = sample.sample_settings(tokenizer, "The quick brown fox " * 4, length + 7)
    assert settings == {**sample.SAMPLE_SETTINGS, "max_new_tokens": 7}
    with pytest.raises(UserError, match=rf"card.prompt has {length} tokens, the model's context is {length}; shorten"):
        sample.sample_settings(tokenizer, "The quick brown fox " * 4, length)


@pytest.mark.parametrize(
    ("license_id", "own"),
    [
        ("mit", "Copyright (c) 2026 Somebody"),
        ("cc-by-4.0", "License: cc-by-4.0"),
        ("other", "License: Mine: https://x"),
    ],
)
def test_licence_of_the_model_and_of_its_code(built_release, changed, license_id, own):
    ours = (Path(release.__file__).parents[1] / "LICENSE").read_text().strip()
    assert (built_release / "LICENSE").read_text().strip() == ours
    named = {"license_name": "Mine", "license_link": "https://x"} if license_id == "other" else {}
    changed["recipe.yaml"]["card"] |= {"license": license_id, "developers": "Somebody", **named}
    text = release.license_text(changed)
    assert own in text and ours in text and "modeling_nanophi.py" in text


def test_native_logits_are_those_of_the_checkpoint(built_release, finished_run):
    ids = torch.arange(40)[None]
    released = AutoModelForCausalLM.from_pretrained(built_release)
    assert type(released) is PhiForCausalLM
    trained = AutoModelForCausalLM.from_pretrained(finished_run / LAST)
    with torch.no_grad():
        assert torch.equal(released(ids).logits, trained(ids).logits)


def test_bfloat16_release(finished_run, built_release, tmp_path):
    half = build(finished_run, tmp_path, "bfloat16")
    config = read_json(half / "config.json")
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    ours, full = load_file(half / "model.safetensors"), load_file(built_release / "model.safetensors")
    assert ours.keys() == full.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, full[name].bfloat16())


def test_sample_of_a_bfloat16_release_comes_from_rounded_weights(finished_run, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(finished_run / LAST).bfloat16()
    rounded = tmp_path / "rounded"
    shutil.copytree(finished_run / LAST, rounded)
    model.float().save_pretrained(rounded)
    assert sample.generate(finished_run / LAST, ["A package "], "bfloat16") == sample.generate(rounded, ["A package "])


def test_sample_has_every_checkpoint(finished_run):
    written = read_json(finished_run / "sample.json")
    assert list(written["checkpoints"]) == ["step-000010", "step-000020", "step-000030"]
    assert written["text"] == written["checkpoints"]["step-000030"]
    assert written["text"].startswith("The module ")
    assert len(set(written["checkpoints"].values())) == 3


def test_manifest_lists_every_file_and_where_it_came_from(built_release, finished_run):
    manifest = read_json(built_release / "MANIFEST.json")
    assert sorted([*manifest["files"], "MANIFEST.json"]) == list_files(built_release)
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == sha256_of_file(built_release / name)
    modes = {(built_release / name).stat().st_mode for name in manifest["files"]}
    assert len(modes) == 1  # as the umask says
    provenance = manifest["provenance"]
    assert provenance["environment"]["commit"] == "0123456789abcdef"
    assert provenance["data_sha256"] == {"train": "3" * 64, "heldout": "4" * 64}
    assert provenance["stages"]["training"] == read_json(finished_run / "record.json")["stages"]["training"]["key"]
    assert not [name for name in manifest["files"] if re.search(r"optimizer|\.pt$|\.bin$|training_state", name)]


def test_revisions_are_the_kept_checkpoints(built_release):
    entries = read_json(built_release / "revisions.json")
    assert [entry["revision"] for entry in entries] == ["step-000010", "step-000020", "step-000030"]
    assert entries[0]["tokens_seen"] == 10 * 4 * 128
    assert entries[0]["scores"] == pytest.approx(
        {"heldout_bits_per_byte/bits_per_byte": 2.65, "heldout_continuation/acc_norm": 0.31}
    )


def test_what_cannot_be_released_is_refused(finished_run, tmp_path):
    card.build(finished_run, tmp_path / "card")
    checkpoint = Path(shutil.copytree(finished_run / LAST, tmp_path / "step-000030"))

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            release.build(finished_run, checkpoint, tmp_path / "card", tmp_path / "release")

    for name in ("config.json", "model.safetensors", "tokenizer.json", "modeling_nanophi.py"):
        (checkpoint / name).unlink()
        refused("incomplete")
        shutil.copyfile(finished_run / LAST / name, checkpoint / name)
    config = read_json(checkpoint / "config.json")
    write_json(checkpoint / "config.json", {**config, "model_type": "nanophi"})
    refused("model_type is 'nanophi'")


def test_retarget_changes_the_name_and_nothing_else(built_release, tmp_path):
    read_only = Path(shutil.copytree(built_release, tmp_path / "read-only"))
    for path in (read_only, *read_only.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    names = list_files(read_only)
    release.copy_for_repo(read_only, "org/demo", tmp_path / "there", {})
    folders = [path for path in ((tmp_path / "there"), *(tmp_path / "there").rglob("*")) if path.is_dir()]
    assert all(path.stat().st_mode & 0o200 for path in folders)
    both = {name: [(folder / name).read_bytes() for folder in (built_release, tmp_path / "there")] for name in names}
    changed = [name for name, (old, new) in both.items() if old != new]
    assert changed == ["MANIFEST.json", "README.md", "records/run.json"]
    assert 'model="org/demo"' in (tmp_path / "there" / "README.md").read_text()
    record = read_json(tmp_path / "there" / "records" / "run.json")
    assert (record["repo_id"], record["folder"]) == ("org/demo", None)
