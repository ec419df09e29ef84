"""Verification: a sound release passes, and each kind of tampering is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from nanophi.files import UserError, read_json, write_json
from nanophi.model_card import card, file_checks, loader, release, reproduce, shipped, verify
from nanophi.model_card.push import push


@pytest.fixture
def copied(built_release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built_release, tmp_path / "release"))


def failures(folder: Path, **options: Any) -> dict[str, str]:
    """Name -> detail of the checks that do not pass."""
    checks = verify.verify(str(folder), echo=lambda line: None, **options)
    return {check["name"]: check["detail"] for check in checks if not check["passed"]}


def sign_again(folder: Path) -> None:
    """What a forger would do: make the manifest fit the changed files."""
    provenance = read_json(folder / "MANIFEST.json")["provenance"]
    release.write_manifest(folder, provenance)


def test_a_sound_release_passes_every_check(
    built_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file named like a library, in the current folder and on PYTHONPATH, is not imported.
    (tmp_path / "transformers.py").write_text("raise RuntimeError('wrong transformers')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    relative = os.path.relpath(built_release, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loader, "subprocess", subprocess)  # processes of its own, as a user's are
    lines: list[str] = []
    checks = verify.verify(relative, echo=lines.append)
    assert [check["name"] for check in checks if not check["passed"]] == []
    assert {
        "checksums",
        "files",
        "card",
        "configuration",
        "stock Phi",
        "remote code",
        "loaders agree",
        "sample",
        "evaluation",
    } <= {check["name"] for check in checks}
    assert len(lines) == len(checks) and all("ok" in line for line in lines)


def flip_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def add(name: str, content: bytes) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return tamper


def add_torch_archive(folder: Path) -> None:
    import torch

    buffer = io.BytesIO()
    torch.save({"a": torch.ones(1)}, buffer)
    (folder / "figures" / "more.png").write_bytes(buffer.getvalue())


def add_other_weights(folder: Path) -> None:
    shutil.copyfile(folder / "model.safetensors", folder / "consolidated.safetensors")


def add_link(folder: Path) -> None:
    (folder / "figures" / "link.png").symlink_to("/etc/hostname")


def name_foreign_code(folder: Path) -> None:
    config = read_json(folder / "config.json")
    config["auto_map"]["AutoModelForCausalLM"] = "somebody/else--modeling.Model"
    write_json(folder / "config.json", config)


def name_tokenizer_code(folder: Path) -> None:
    config = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**config, "auto_map": {"AutoTokenizer": ["tok.Tok", None]}})


def drop_a_file(folder: Path) -> None:
    (folder / "generation_config.json").unlink()


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 64)


@pytest.mark.parametrize(
    ("tamper", "check", "named"),
    [
        (flip_a_byte, "checksums", "model.safetensors was changed"),
        (drop_a_file, "checksums", "generation_config.json is missing"),
        (add("extra.bin", pickle.dumps({"a": 1})), "files", "extra.bin is not a file that nanophi writes"),
        (add("weights.dat", pickle.dumps({"a": 1}, protocol=0)), "files", "weights.dat is not a file"),
        (add("tokenization_extra.py", b"import os"), "files", "tokenization_extra.py is not a file"),
        (add("install.bat", b"del *"), "files", "install.bat is not a file"),
        (add("records/setup", b"#!/bin/sh\nexit"), "files", "records/setup is not a file"),
        (add("model.onnx", b"\x08\x07"), "files", "model.onnx is not a file"),
        (add_other_weights, "files", "consolidated.safetensors is not a file"),
        (add_torch_archive, "files", "figures/more.png is not a file that nanophi writes"),
        (add_link, "files", "figures/link.png is a link"),
        (break_weights, "files", "model.safetensors is not a valid safetensors file"),
        (name_foreign_code, "code references", "somebody/else--modeling.Model"),
        (name_tokenizer_code, "code references", "tok.Tok"),
    ],
)
def test_tampered_files_are_named_and_nothing_is_loaded(
    copied: Path, tamper: Callable[[Path], None], check: str, named: str
) -> None:
    tamper(copied)
    failed = failures(copied)
    assert named in failed[check]
    assert "not tried" in failed["loaders"]
    if check != "checksums":
        # The manifest is no protection against who writes the manifest: the check stands on its own.
        sign_again(copied)
        also = ["provenance"] if tamper is break_weights else []
        assert list(failures(copied)) == [check, *also, "loaders"]


def test_a_result_for_the_hub_that_was_never_measured_is_named(copied: Path) -> None:
    (copied / ".eval_results").mkdir()
    (copied / ".eval_results" / "gsm8k.yaml").write_text("- dataset: {id: openai/gsm8k}\n  value: 91.5\n")
    sign_again(copied)
    records = shipped.read_records(copied / "records")
    assert verify.card_problems(copied, records) == [".eval_results/gsm8k.yaml is not what the records give"]


def test_a_number_edited_in_the_card_is_named(copied: Path) -> None:
    card = copied / "README.md"
    text = card.read_text()
    assert "| held-out continuation | accuracy, length-normalised | 41.00 |" in text
    card.write_text(text.replace("length-normalised | 41.00", "length-normalised | 61.00", 1))
    assert "README.md was changed" in failures(copied)["checksums"]
    wrong = verify.card_problems(copied, shipped.read_records(copied / "records"))
    assert len(wrong) == 1 and "61.00" in wrong[0] and "41.00" in wrong[0]


def test_a_card_of_another_version_is_checked_by_its_numbers(copied: Path) -> None:
    run = read_json(copied / "records" / "run.json")
    text = (copied / "README.md").read_text()
    for old, new in (("nanophi 0.1.0", "nanophi 0.0.9"), ("Greedy decoding with", "Decoded greedily with")):
        assert old in text
        text = text.replace(old, new)
    run["environment"]["nanophi"] = "0.0.9"
    records = shipped.read_records(copied / "records")
    records["run.json"] = run
    (copied / "README.md").write_text(text)
    assert verify.card_problems(copied, records) == []
    (copied / "README.md").write_text(text.replace("length-normalised | 41.00", "length-normalised | 61.37", 1))
    assert "61.37" in verify.card_problems(copied, records)[0]
    # Numbers of the card in another place: two rows change theirs.
    one, two = "| Layers | 2 |", "| Hidden size | 32 |"
    swapped = text.replace(one, "| Layers | 32 |").replace(two, "| Hidden size | 2 |")
    assert one in text and two in text
    (copied / "README.md").write_text(swapped)
    assert "'| Hidden size | 2 |'" in verify.card_problems(copied, records)[0]
    (copied / "README.md").write_text(text)
    shipped.write_records(records, copied / "records")
    provenance = read_json(copied / "MANIFEST.json")["provenance"]
    release.write_manifest(copied, {**provenance, "environment": records["run.json"]["environment"]})
    checks = {check["name"]: check for check in verify.verify(str(copied), echo=lambda line: None)}
    assert checks["card"]["passed"] and checks["provenance"]["passed"]
    assert checks["card"]["detail"].startswith("written by nanophi 0.0.9: only its numbers were compared, ")


def edit_json(name: str, **fields: Any) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / name, {**read_json(folder / name), **fields})


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (edit_json("config.json", max_position_embeddings=64), "config.json has max_position_embeddings 64, not 128"),
        (edit_json("config.json", layer_norm_eps=0.1), "config.json has layer_norm_eps 0.1, not 1e-05"),
        (edit_json("config.json", eos_token_id=7), "config.json has eos_token_id 7, not 0"),
        (edit_json("config.json", torch_dtype="bfloat16"), "config.json has torch_dtype 'bfloat16', not 'float32'"),
        (edit_json("generation_config.json", suppress_tokens=[5]), "generation_config.json is not the one"),
        (edit_json("generation_config.json", do_sample=None), "generation_config.json is not the one"),
        (edit_json("generation_config.json", pad_token_id=9), "generation_config.json is not the one"),
        (lambda folder: (folder / "generation_config.json").unlink(), "generation_config.json is missing"),
        (lambda folder: (folder / "LICENSE").write_text("All rights reserved"), "LICENSE is not that of the recipe"),
        (lambda folder: (folder / "chat_template.jinja").write_text("Obey: {{ messages }}"), "the chat template is"),
        (edit_json("tokenizer_config.json", chat_template="Obey: {{ messages }}"), "the chat template is not the one"),
    ],
)
def test_a_configuration_that_is_not_the_records_is_named(
    copied: Path, tamper: Callable[[Path], None], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "load", lambda *_: ({"error": "not tried"}, {"error": "not tried"}))
    tamper(copied)
    sign_again(copied)
    failed = failures(copied)
    assert list(failed) == ["configuration", "stock Phi", "remote code"] and named in failed["configuration"]
    assert ";" not in failed["configuration"]


def exchange_figures(folder: Path) -> None:
    loss, quality = (folder / "figures" / f"{name}.png" for name in ("loss", "quality"))
    content = loss.read_bytes()
    loss.write_bytes(quality.read_bytes())
    quality.write_bytes(content)


@pytest.mark.parametrize(
    ("tamper", "detail"),
    [
        (exchange_figures, "figures/loss.png does not show the records; figures/quality.png does not show the records"),
        (lambda folder: (folder / "figures/loss.png").write_text("<svg/>"), "figures/loss.png is not an image ("),
        (lambda folder: (folder / "figures/evaluation.png").unlink(), "figures/evaluation.png is missing"),
    ],
)
def test_figures_that_do_not_show_the_records_are_named(
    copied: Path, tamper: Callable[[Path], None], detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "load", lambda *_: ({"error": "not tried"}, {"error": "not tried"}))
    tamper(copied)
    sign_again(copied)
    failed = failures(copied)
    assert list(failed) == ["figures", "stock Phi", "remote code"] and failed["figures"].startswith(detail)


def test_a_tokenizer_from_elsewhere_may_bring_its_chat_template(copied: Path) -> None:
    edit_json("tokenizer_config.json", chat_template="Yes? {{ messages }}")(copied)
    records = shipped.read_records(copied / "records")
    records["recipe.yaml"]["tokenizer"]["path"] = "org/tokenizer"
    assert verify._configuration(copied, records) == []


def edit_record(name: str, **fields: Any) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / "records" / name, {**read_json(folder / "records" / name), **fields})


def edit_provenance(**fields: Any) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        release.write_manifest(folder, {**read_json(folder / "MANIFEST.json")["provenance"], **fields})

    return tamper


def forge_weights_record(folder: Path) -> None:
    summary = read_json(folder / "records" / "training.json")["summary"]
    edit_record("training.json", summary={**summary, "weights_sha256": "8" * 64})(folder)


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (edit_provenance(data_sha256={"train": "7" * 64, "heldout": "4" * 64}), "tokens.json has other tokens"),
        (edit_provenance(weights_sha256="7" * 64), "model.safetensors has other weights than the manifest"),
        (forge_weights_record, "model.safetensors has other weights than records/training.json"),
        (lambda folder: write_json(folder / "revisions.json", []), "revisions.json differs from records/revisions"),
        (lambda folder: (folder / "revisions.json").unlink(), "revisions.json is missing"),
    ],
)
def test_what_manifest_records_and_files_say_differently_is_named(
    copied: Path, tamper: Callable[[Path], None], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_load", lambda *_: None)  # takes seconds, and is not reached
    tamper(copied)
    sign_again(copied)
    failed = failures(copied)
    assert list(failed) == ["provenance"] and named in failed["provenance"]


def test_a_sample_or_documents_that_were_taken_away_are_missed(copied: Path) -> None:
    for name in ("sample.json", "heldout.json"):
        (copied / "records" / name).unlink()
    (copied / "README.md").write_text(card.render(shipped.read_records(copied / "records")))
    sign_again(copied)
    failed = failures(copied)
    assert list(failed) == ["sample", "evaluation"]
    assert failed["sample"] == "records/sample.json is missing"
    assert failed["evaluation"].startswith("records/heldout.json is missing")


def test_held_out_documents_that_are_all_too_long_to_ship(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "HELDOUT_ITEM_BYTES", 10)
    records = shipped.collect(finished_run, shipped.final_checkpoint(finished_run))
    assert records["heldout.json"] == []


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "records" / name).unlink()


def empty(name: str, content: Any) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / name, content)


def drop_key(name: str, key: str) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        record = read_json(folder / "records" / name)
        del record[key]
        write_json(folder / "records" / name, record)

    return tamper


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (drop("checkpoint.json"), "checkpoint.json is missing"),
        (drop("model.json"), "model.json is missing"),
        (empty("records/run.json", []), "run.json has another form"),
        (empty("records/evals/heldout.json", []), "evals/heldout.json has another form"),
        (lambda folder: (folder / "records/run.json").write_text(""), "run.json is not valid JSON (Expecting value"),
        (drop_key("run.json", "environment"), "the records are not complete (KeyError: 'environment')"),
        (drop_key("training.json", "log"), "the records are not complete (KeyError: 'log')"),
        (drop_key("evals/heldout.json", "n-samples"), "the records are not complete (KeyError: 'n-samples')"),
        (empty("records/heldout.json", [1]), "the records are not complete (TypeError"),
    ],
)
def test_records_that_are_not_complete_are_one_line(copied: Path, tamper: Callable[[Path], None], named: str) -> None:
    tamper(copied)
    sign_again(copied)
    failed = failures(copied)
    assert any(named in detail for detail in failed.values()), failed
    assert not any("run the stage again" in detail for detail in failed.values())
    if "held" not in named and "TypeError" not in named:
        with pytest.raises(UserError, match=r"complete|records of a release|not valid JSON"):
            push(copied, "org/demo", dry_run=True, echo=lambda line: None)


def test_a_published_run_without_its_environment_is_not_reproduced(copied: Path, tmp_path: Path) -> None:
    drop_key("run.json", "environment")(copied)
    sign_again(copied)
    with pytest.raises(UserError, match=r"the records are not complete \(KeyError: 'environment'\)"):
        reproduce.prepare(str(copied), tmp_path / "again", echo=lambda line: None)


def test_a_published_run_without_its_losses_is_not_compared(copied: Path, finished_run: Path) -> None:
    drop_key("checkpoint.json", "train_loss")(copied)
    drop_key("training.json", "summary")(copied)
    with pytest.raises(UserError, match=r"the records are not complete \(KeyError: 'summary'\)"):
        reproduce.compare(copied, finished_run, echo=lambda line: None)


def test_an_emptied_config_is_somebody_elses(copied: Path) -> None:
    (copied / "config.json").write_text("")
    write_json(copied / "tokenizer_config.json", {"auto_map": "tok.Tok"})
    sign_again(copied)
    wrong = failures(copied)["code references"]
    assert wrong == "config.json is not valid JSON; tokenizer_config.json: auto_map is not a mapping"


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


def test_a_forger_who_makes_the_manifest_fit_is_found_out(copied: Path) -> None:
    swap_tokenizer(copied)
    assert "tokenizer.json was changed" in failures(copied)["checksums"]
    edit_code(copied, "# harmless\n")
    edit_recipe(copied)
    sign_again(copied)
    failed = failures(copied)
    assert "--trust-remote-code" in failed["code"] and "not tried" in failed["loaders"]
    failed = failures(copied, trust_remote_code=True)
    assert list(failed) == ["card", "provenance", "sample", "evaluation"]
    assert "Seed" in failed["card"] and "not the recipe" in failed["provenance"]


def test_swapped_weights_and_code_that_does_not_load(copied: Path) -> None:
    swap_weights(copied)
    edit_code(copied, "raise RuntimeError('broken on purpose')\n")
    sign_again(copied)
    failed = failures(copied, trust_remote_code=True)
    assert [name for name in failed if name != "sample"] == ["provenance", "remote code", "evaluation"]
    assert failed["provenance"] == "model.safetensors has other weights than records/training.json"
    assert "broken on purpose" in failed["remote code"]
    assert "recomputed" in failed["evaluation"]


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"files": {"a": 3}}', "{not json"])
def test_bad_manifest_is_one_line(copied: Path, manifest: str) -> None:
    (copied / "MANIFEST.json").write_text(manifest)
    failed = failures(copied)
    assert "MANIFEST.json" in failed["checksums"]
    assert all("\n" not in detail for detail in failed.values())


@pytest.mark.parametrize("name", ["absent", "/absent/folder", "a/b/c", "../x/y"])
def test_what_is_no_release_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match="does not exist, and it is not a Hub id"):
        verify.verify(name)


def test_revision_of_a_folder_is_refused(built_release: Path) -> None:
    with pytest.raises(UserError, match="--revision"):
        verify.verify(str(built_release), "main")


# What people have: clones, caches, folders that an operating system has looked into


def test_what_systems_leave_behind_is_not_part_of_a_release(copied: Path) -> None:
    for name in (".DS_Store", "figures/.DS_Store", "._README.md", "records/Thumbs.db", ".git/config", ".gitattributes"):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("left behind")
    assert file_checks.file_problems(copied) == []


def test_a_clone_without_its_large_files_is_diagnosed(copied: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 137648\n"
    (copied / "model.safetensors").write_text(pointer)
    failed = failures(copied)
    assert failed["checksums"] == "model.safetensors is only a pointer of Git LFS; run `git lfs pull` in the clone"
    assert "files" not in failed


def test_a_snapshot_in_the_hubs_cache_may_be_named_by_its_path(copied: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--demo"
    snapshot = cache / "snapshots" / ("0" * 40)
    for number, name in enumerate(release.list_files(copied)):
        blob, link = cache / "blobs" / str(number), snapshot / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes((copied / name).read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert file_checks.file_problems(snapshot) == []
    with pytest.raises(UserError, match=rf"this is the Hub's cache, name one of its snapshots: .*{'0' * 40}"):
        verify.verify(str(cache))
    (snapshot / "figures" / "loss.png").unlink()
    (snapshot / "figures" / "loss.png").symlink_to("/etc/hostname")
    assert "figures/loss.png is a link" in file_checks.file_problems(snapshot)


def test_a_run_directory_is_told_from_its_release(built_release: Path) -> None:
    with pytest.raises(UserError, match=rf"did you mean {built_release}\?"):
        verify.verify(str(built_release.parent))
