"""The board's checks: a sound release passes all, and each fault fails its own check with a remedy."""

import hashlib
import json
import shutil
import types

import pytest
from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from nanophi.eval.submission import check, render, submit
from nanophi.files import UserError, read_json

NAMES = [
    "model type",
    "revision",
    "configuration without remote code",
    "tokenizer",
    "model information",
    "license",
    "card",
    "safetensors",
    "same model on the Hub",
    "first of its kind",
    "chat template in tokenizer_config.json",
]
CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# nano\n\n" + "It was trained from scratch. " * 10


@pytest.fixture
def release(make_model, tmp_path):
    folder = tmp_path / "release"
    shutil.copytree(make_model(0), folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def hub(monkeypatch, release):
    """A Hub that knows ORG/nano at revision main, with the files that the release has."""

    def model_info(self, repo_id, revision=None, **_):
        if (repo_id, revision) != ("ORG/nano", "main"):
            raise OSError(f"404: {repo_id} at {revision}")
        return types.SimpleNamespace(sha="c0ffee", private=False, likes=3, siblings=[])

    files = {path.name: path.read_bytes() for path in release.iterdir()}

    def list_repo_tree(self, repo_id, revision=None, **_):
        model_info(self, repo_id, revision)
        for name, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            lfs = {"size": len(content), "oid": sha256, "pointerSize": 100} if name.endswith(".safetensors") else None
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            yield RepoFile(path=name, size=len(content), oid=oid, lfs=lfs)

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(HfApi, "list_repo_tree", list_repo_tree)


def failed(checks):
    return [entry.name for entry in checks if not entry.passed]


def test_sound_release_passes_in_order_and_both_requests_are_written(release, hub, tmp_path):
    checks = check(release, repo_id="ORG/nano")
    assert [entry.name for entry in checks] == NAMES
    assert failed(checks) == []
    lines: list[str] = []
    files = submit(release, tmp_path / "requests", repo_id="ORG/nano", sender="me", report=lines.append)
    assert [path.relative_to(tmp_path / "requests").as_posix() for path in files] == [
        "v1/ORG/nano_eval_request_False_bfloat16_Original.json",
        "v2/ORG/nano_eval_request_False_bfloat16_Original.json",
    ]
    first, second = map(read_json, files)
    assert " ".join(first) == (
        "model base_model revision private precision weight_type status submitted_time model_type likes params license"
    )
    assert " ".join(second) == (
        "model base_model revision precision params architectures weight_type status submitted_time model_type "
        "job_id job_start_time use_chat_template sender"
    )
    assert (first["revision"], second["revision"]) == ("main", "c0ffee")
    assert (first["likes"], first["license"], first["status"]) == (3, "apache-2.0", "PENDING")
    assert (second["architectures"], second["job_id"], second["sender"]) == ("PhiForCausalLM", -1, "me")
    assert len(lines) == 13 and lines[0].startswith(" 1 passed  model type")


def test_the_same_is_not_requested_twice(release, hub, tmp_path):
    submit(release, tmp_path, repo_id="ORG/nano", report=lambda line: None)
    with pytest.raises(UserError, match=r"1 of 11 checks failed \(first of its kind\)"):
        submit(release, tmp_path, repo_id="ORG/nano", report=lambda line: None)
    assert len(submit(release, tmp_path, repo_id="ORG/nano", precision="float16", report=lambda line: None)) == 2


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lambda folder: (folder / "README.md").write_text("---\nlicense: mit\n---\nshort"), "card"),
        (lambda folder: (folder / "README.md").write_text(CARD.replace("license: apache-2.0\n", "")), "license"),
        (lambda folder: (folder / "README.md").write_text(CARD.replace("apache-2.0", "other")), "license"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"), NAMES[-1]),
        (lambda folder: edit(folder / "config.json", model_type="nobody_knows"), "configuration without remote code"),
    ],
)
def test_each_fault_fails_its_check(damage, name, release, hub, tmp_path):
    damage(release)
    checks = check(release, repo_id="ORG/nano")
    assert name in failed(checks) and set(failed(checks)) <= {name, "tokenizer", "same model on the Hub"}
    line = next(line for line in render(checks).splitlines() if f"FAILED  {name}" in line)
    assert next(entry for entry in checks if entry.name == name).remedy in line
    with pytest.raises(UserError, match="no request written"):
        submit(release, tmp_path / "requests", repo_id="ORG/nano", report=lambda line: None)
    assert not (tmp_path / "requests").exists()


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_what_the_hub_does_not_know(release, hub):
    unknown = ["revision", "model information", "same model on the Hub"]
    assert failed(check(release, repo_id="ORG/other")) == unknown
    assert failed(check(release, repo_id="ORG/nano", revision="v9")) == unknown
    unnamed = check(release)
    assert failed(unnamed) == unknown
    assert {entry.found for entry in unnamed if entry.name in unknown[::2]} == {"no repository was named"}
    assert failed(check(release, repo_id="ORG/nano", model_type="gold")) == ["model type"]
    with pytest.raises(UserError, match="folder nowhere does not exist, and it is not a Hub id"):
        check("nowhere")
    with pytest.raises(UserError, match="'nano' is not a Hub id"):
        check(release, repo_id="nano")


@pytest.mark.parametrize("change", ["weights", "another file", "configuration", "nothing but the card"])
def test_a_folder_against_another_models_repository(change, release, hub, make_model, tmp_path):
    """What a board would read from the Hub is not what was checked here."""
    if change == "weights":
        shutil.copy(make_model(1) / "model.safetensors", release)
    elif change == "another file":
        (release / "model.safetensors").rename(release / "model-00001-of-00001.safetensors")
    elif change == "configuration":
        edit(release / "config.json", rope_theta=123.0)
    else:
        (release / "README.md").write_text(CARD + "A later word.")
        assert failed(check(release, repo_id="ORG/nano")) == []
        return
    checks = check(release, repo_id="ORG/nano")
    assert failed(checks) == ["same model on the Hub"]
    assert "differ from ORG/nano" in render(checks)
    with pytest.raises(UserError, match="1 of 11 checks failed"):
        submit(release, tmp_path / "requests", repo_id="ORG/nano", report=lambda line: None)
