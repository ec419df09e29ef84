"""Verification: a sound release passes, and each kind of tampering is named."""

import json
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from command import nanophi  # type: ignore[import-not-found]
from forging import card_problems, edit_json, failures, sign_again  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json
from nanophi.core.version import __version__
from nanophi.model_card import loader, verify
from nanophi.model_card import records as shipped
from nanophi.model_card.manifest import file_problems, list_files, write_manifest


def test_a_sound_release_passes_every_check(built_release, tmp_path, monkeypatch):
    # A file named like a library, in the current folder and on PYTHONPATH, is not imported.
    (tmp_path / "transformers.py").write_text("raise RuntimeError('wrong transformers')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    relative = os.path.relpath(built_release, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loader, "subprocess", subprocess)  # processes of its own, as a user's are
    lines: list[str] = []
    checks = verify.check(relative, report=lines.append)
    assert [check["name"] for check in checks if not check["passed"]] == []
    names = ["checksums", "files", "code references", "code", "card", "provenance", "scores", "configuration"]
    names += ["figures", "stock Phi", "remote code", "loaders agree", "parameters", "sample", "evaluation"]
    assert [check["name"] for check in checks] == names
    assert len(lines) == len(checks) and all("ok" in line for line in lines)


def test_the_verb_prints_json_and_ends_with_status_1(copied, capsys):
    (copied / "LICENSE").write_text("none")
    assert "does not verify: checksums" in nanophi("verify", copied, "--json")
    printed = capsys.readouterr()
    found = {check["name"]: check for check in json.loads(printed.out)}
    assert found["checksums"] == {"name": "checksums", "passed": False, "detail": "LICENSE was changed"}
    assert found["card"]["passed"] and "FAILED  checksums" in printed.err


def flip_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def add(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def add_link(folder: Path) -> None:
    (folder / "figures" / "link.png").symlink_to("/etc/hostname")


def name_foreign_code(folder: Path) -> None:
    config = read_json(folder / "config.json")
    config["auto_map"]["AutoModelForCausalLM"] = "somebody/else--modeling.Model"
    write_json(folder / "config.json", config)


break_weights = add("model.safetensors", b"\x00" * 64)


@pytest.mark.parametrize(
    ("tamper", "check", "named"),
    [
        (flip_a_byte, "checksums", "model.safetensors was changed"),
        (lambda folder: (folder / "generation_config.json").unlink(), "checksums", "generation_config.json is missing"),
        (add("extra.bin", pickle.dumps({"a": 1})), "files", "extra.bin is not a file that nanophi writes"),
        (add("tokenization_extra.py", b"import os"), "files", "tokenization_extra.py is not a file"),
        (add("records/setup", b"#!/bin/sh\nexit"), "files", "records/setup is not a file"),
        (add("consolidated.safetensors", b"\x08\x07"), "files", "consolidated.safetensors is not a file"),
        (add("figures/more.png", b"\x80\x02"), "files", "figures/more.png is not a file that nanophi writes"),
        (add_link, "files", "figures/link.png is a link"),
        (break_weights, "files", "model.safetensors is not a valid safetensors file"),
        (name_foreign_code, "code references", "somebody/else--modeling.Model"),
        (edit_json("tokenizer_config.json", auto_map={"A": ["tok.Tok", None]}), "code references", "tok.Tok"),
    ],
)
def test_tampered_files_are_named_and_nothing_is_loaded(copied, tamper, check, named):
    tamper(copied)
    failed = failures(copied)
    assert named in failed[check]
    assert "not tried" in failed["loaders"]
    if check != "checksums":
        # The manifest is no protection against who writes the manifest: the check stands on its own.
        sign_again(copied)
        also = ["provenance"] if tamper is break_weights else []
        assert list(failures(copied)) == [check, *also, "loaders"]


def test_what_was_never_measured_is_named(copied):
    (copied / ".eval_results").mkdir()
    (copied / ".eval_results" / "gsm8k.yaml").write_text("- dataset: {id: openai/gsm8k}\n  value: 91.5\n")
    assert card_problems(copied) == [".eval_results/gsm8k.yaml is not what the records give"]
    card = copied / "README.md"
    text = card.read_text()
    assert "| held-out continuation | accuracy, length-normalised | 41.00 |" in text
    card.write_text(text.replace("length-normalised | 41.00", "length-normalised | 61.00", 1))
    assert "README.md was changed" in failures(copied)["checksums"]
    (wrong,) = card_problems(copied)[1:]
    assert "61.00" in wrong and "41.00" in wrong


def test_a_card_of_another_version_is_checked_by_its_numbers(copied):
    run = read_json(copied / "records" / "run.json")
    text = (copied / "README.md").read_text()
    for old, new in ((f"nanophi {__version__}", "nanophi 0.0.9"), ("Greedy decoding with", "Decoded greedily with")):
        assert old in text
        text = text.replace(old, new)
    run["environment"]["nanophi"] = "0.0.9"
    records = shipped.read_records(copied / "records")
    records["run.json"] = run
    (copied / "README.md").write_text(text)
    assert card_problems(copied, records) == []
    (copied / "README.md").write_text(text.replace("length-normalised | 41.00", "length-normalised | 61.37", 1))
    assert "61.37" in card_problems(copied, records)[0]
    # Numbers of the card in another place: two rows change theirs.
    one, two = "| Layers | 2 |", "| Hidden size | 32 |"
    swapped = text.replace(one, "| Layers | 32 |").replace(two, "| Hidden size | 2 |")
    assert one in text and two in text
    (copied / "README.md").write_text(swapped)
    assert "'| Hidden size | 2 |'" in card_problems(copied, records)[0]
    (copied / "README.md").write_text(text)
    shipped.write_records(records, copied / "records")
    provenance = read_json(copied / "MANIFEST.json")["provenance"]
    write_manifest(copied, {**provenance, "environment": records["run.json"]["environment"]})
    checks = {check["name"]: check for check in verify.check(str(copied), report=lambda line: None)}
    assert checks["card"]["passed"] and checks["provenance"]["passed"]
    assert checks["card"]["detail"].startswith("written by nanophi 0.0.9: only its numbers were compared, ")


def edit_code(folder: Path, text: str) -> None:
    path = folder / "modeling_nanophi.py"
    path.write_text(text + path.read_text())


def swap_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    names = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    mixed = [names[0], *names[1:][::-1]]
    tokenizer["model"]["vocab"] = {name: index for index, name in enumerate(mixed)}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))


def edit_recipe(folder: Path) -> None:
    recipe = folder / "records" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 7", "seed: 8"))


def swap_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.bias"] = weights["lm_head.bias"] + 0.5 * weights["lm_head.weight"][:, 0]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_forger_who_makes_the_manifest_fit_is_found_out(copied):
    swap_tokenizer(copied)
    assert "tokenizer.json was changed" in failures(copied)["checksums"]
    edit_code(copied, "# harmless\n")
    edit_recipe(copied)
    sign_again(copied)
    failed = failures(copied)
    assert "--trust-remote-code" in failed["code"] and "not tried" in failed["loaders"]
    failed = failures(copied, trust_remote_code=True)
    assert list(failed) == ["card", "provenance", "sample", "evaluation"], failed
    assert "Seed" in failed["card"] and "not the recipe" in failed["provenance"]


def test_swapped_weights_and_code_that_does_not_load(copied):
    swap_weights(copied)
    edit_code(copied, "raise RuntimeError('broken on purpose')\n")
    sign_again(copied)
    failed = failures(copied, trust_remote_code=True)
    assert [name for name in failed if name != "sample"] == ["provenance", "remote code", "evaluation"]
    assert failed["provenance"] == "model.safetensors has other weights than records/training.json"
    assert "broken on purpose" in failed["remote code"]
    assert "recomputed" in failed["evaluation"]


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"files": {"a": 3}}', "{not json"])
def test_bad_manifest_is_one_line(copied, manifest):
    (copied / "MANIFEST.json").write_text(manifest)
    failed = failures(copied)
    assert "MANIFEST.json" in failed["checksums"]
    assert all("\n" not in detail for detail in failed.values())


def test_what_is_no_release_is_one_line(built_release):
    for name in ("absent", "/absent/folder", "a/b/c", "../x/y"):
        with pytest.raises(UserError, match="does not exist, and it is not a Hub id"):
            verify.check(name)
    with pytest.raises(UserError, match="--revision"):
        verify.check(str(built_release), "main")
    with pytest.raises(UserError, match=rf"did you mean {built_release}\?"):
        verify.check(str(built_release.parent))


# What people have: clones, caches, folders that an operating system has looked into


def test_what_systems_leave_behind_is_not_part_of_a_release(copied):
    for name in (".DS_Store", "figures/.DS_Store", "._README.md", "records/Thumbs.db", ".git/config", ".gitattributes"):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("left behind")
    assert file_problems(copied) == []


def test_a_clone_without_its_large_files_is_diagnosed(copied):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 137648\n"
    (copied / "model.safetensors").write_text(pointer)
    failed = failures(copied)
    assert failed["checksums"] == "model.safetensors is only a pointer of Git LFS; run `git lfs pull` in the clone"
    assert "files" not in failed


def test_a_snapshot_in_the_hubs_cache_may_be_named_by_its_path(copied, tmp_path):
    cache = tmp_path / "models--org--demo"
    snapshot = cache / "snapshots" / ("0" * 40)
    for number, name in enumerate(list_files(copied)):
        blob, link = cache / "blobs" / str(number), snapshot / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes((copied / name).read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert file_problems(snapshot) == []
    (snapshot / "figures" / "loss.png").unlink()
    (snapshot / "figures" / "loss.png").symlink_to("/etc/hostname")
    assert "figures/loss.png is a link" in file_problems(snapshot)
