"""The board's checks: a sound release passes all, and each fault fails its own check with a remedy."""

import json
import shutil
from pathlib import Path

import pytest
from hub_client import talk_to
from hub_server import HubServer

from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.eval.submission import CHECKS, FIRST, SECOND, Submission, submit

NAMES = [name for name, *_ in CHECKS]
CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# nano\n\n" + "It was trained from scratch. " * 10


@pytest.fixture
def release(make_model, tmp_path):
    folder = tmp_path / "release"
    shutil.copytree(make_model(0), folder)
    (folder / "README.md").write_text(CARD)
    record(folder, conversations=[], method="sft", base=None)
    return folder


def record(folder, conversations, method, base, repo_id=None):
    """What a release of nanophi says of how its model was made."""
    (folder / "records").mkdir(exist_ok=True)
    recipe = {"conversations": conversations, "method": method, "base": base}
    (folder / "records" / "recipe.yaml").write_text(json.dumps(recipe))
    if conversations:
        (folder / "records" / "conversations.json").write_text(json.dumps({"repo_id": repo_id}))


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(monkeypatch, release, tmp_path):
    """A Hub that has the release's files as ORG/nano."""
    with HubServer() as server:
        talk_to(server, tmp_path / "home", monkeypatch)
        server.add_repository("model", "ORG/nano", files_of(release))
        yield server


def check(folder, **options):
    return Submission(folder, **options).checks()


def failed(checks):
    return [entry.name for entry in checks if not entry.passed]


def test_sound_release_passes_in_order_and_both_requests_are_written(release, hub, tmp_path, capsys):
    checks = check(release, repo_id="ORG/nano")
    assert [entry.name for entry in checks] == NAMES
    assert failed(checks) == []
    submit(str(release), output=tmp_path / "requests", repo_id="ORG/nano", sender="me")
    lines = capsys.readouterr().out.splitlines()
    files = [Path(line.removeprefix("written: ")) for line in lines[-2:]]
    assert [path.relative_to(tmp_path / "requests").as_posix() for path in files] == [
        "v1/ORG/nano_eval_request_False_bfloat16_Original.json",
        "v2/ORG/nano_eval_request_False_bfloat16_Original.json",
    ]
    first, second = map(read_json, files)
    assert (" ".join(first), " ".join(second)) == (FIRST, SECOND)
    commit = hub.repositories["model", "ORG/nano"].branches["main"].oid
    assert (first["revision"], second["revision"]) == ("main", commit)
    assert (first["likes"], first["license"], first["status"]) == (0, "apache-2.0", "PENDING")
    assert (second["architectures"], second["job_id"], second["sender"]) == ("PhiForCausalLM", -1, "me")
    assert len(lines) == 13 and lines[0].startswith(" 1 passed  model type")


def test_the_same_is_not_requested_twice(release, hub, tmp_path):
    submit(str(release), output=tmp_path, repo_id="ORG/nano")
    with pytest.raises(UserError, match=r"1 of 11 checks failed \(first of its kind\)"):
        submit(str(release), output=tmp_path, repo_id="ORG/nano")
    submit(str(release), output=tmp_path, repo_id="ORG/nano", precision="float16")
    assert len(list(tmp_path.glob("v?/ORG/*.json"))) == 4


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
def test_each_fault_fails_its_check(damage, name, release, hub, tmp_path, capsys):
    damage(release)
    checks = check(release, repo_id="ORG/nano")
    assert name in failed(checks) and set(failed(checks)) <= {name, "tokenizer", "same model on the Hub"}
    with pytest.raises(UserError, match="no request written"):
        submit(str(release), output=tmp_path / "requests", repo_id="ORG/nano")
    line = next(line for line in capsys.readouterr().out.splitlines() if f"FAILED  {name}" in line)
    assert next(entry for entry in checks if entry.name == name).remedy in line
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


@pytest.mark.parametrize("change", ["weights", "another file", "configuration"])
def test_a_folder_against_another_models_repository(change, release, hub, make_model):
    """What a board would read from the Hub is not what was checked here; the card may differ."""
    (release / "README.md").write_text(CARD + "A later word.")
    assert failed(check(release, repo_id="ORG/nano")) == []
    if change == "weights":
        shutil.copy(make_model(1) / "model.safetensors", release)
    elif change == "another file":
        (release / "model.safetensors").rename(release / "model-00001-of-00001.safetensors")
    else:
        edit(release / "config.json", rope_theta=123.0)
    checks = check(release, repo_id="ORG/nano")
    assert failed(checks) == ["same model on the Hub"]
    assert "differ from ORG/nano" in next(entry.found for entry in checks if not entry.passed)


CHAT = [{"files": "talks.jsonl"}]


@pytest.mark.parametrize(
    ("recorded", "options", "model_type", "base_model", "template"),
    [
        ((CHAT, "sft", "runs/base", "ORG/base"), {}, "fine-tuned", "ORG/base", True),
        ((CHAT, "dpo", "runs/base", "ORG/base"), {}, "chat", "ORG/base", True),
        # The template is its tokenizer's.
        (([], "sft", None), {}, "pretrained", "", False),
        (([], "sft", "ORG/base@v2"), {}, "continuously pretrained", "ORG/base", False),
        ((CHAT, "sft", "runs/base"), {"base_model": "ORG/x"}, "fine-tuned", "ORG/x", True),
        (None, {"model_type": "chat", "base_model": "ORG/y", "precision": "float16"}, "chat", "ORG/y", True),
    ],
)
def test_a_model_is_what_records_and_options_say(
    recorded, options, model_type, base_model, template, release, hub, tmp_path
):
    edit(release / "tokenizer_config.json", chat_template="{{ messages }}")
    shutil.rmtree(release / "records")
    if recorded:
        record(release, *recorded)
    if "base_model" in options:
        (line,) = [entry for entry in check(release, repo_id="ORG/nano") if not entry.passed]
        assert line.name == "model type" and ("--base-model" if recorded else "--model-type") in line.remedy
    submit(str(release), output=tmp_path / "requests", repo_id="ORG/nano", **options)
    first, second = map(read_json, sorted(tmp_path.glob("requests/v?/ORG/*.json")))
    for request in (first, second):
        assert (request["model_type"], request["base_model"]) == (model_type, base_model)
    assert second["use_chat_template"] is template


def test_a_private_repository_is_told_how_to_become_public(release, hub):
    hub.repositories["model", "ORG/nano"].private = True
    (line,) = [entry for entry in check(release, repo_id="ORG/nano") if not entry.passed]
    assert (line.name, line.found) == ("model information", "private")
    assert line.remedy.endswith(f"nanophi push {release} --repo-id ORG/nano --public")


def test_every_check_of_a_repository_reads_the_revision_that_was_named(release, hub, tmp_path):
    hub.add_repository("model", "ORG/steps", files_of(release), branch="step-000010")
    # What `main` has must not be read.
    hub.add_repository("model", "ORG/steps", {"config.json": b"{}", "README.md": b"none"})
    for name, options in (("ORG/steps@step-000010", {}), ("ORG/steps", {"revision": "step-000010"})):
        assert failed(check(name, **options)) == []
    submit("ORG/steps@step-000010", output=tmp_path / "requests")
    first = read_json(next(tmp_path.glob("requests/v1/ORG/*.json")))
    assert (first["model"], first["revision"], first["model_type"]) == ("ORG/steps", "step-000010", "pretrained")
    assert "configuration without remote code" in failed(check("ORG/steps"))
