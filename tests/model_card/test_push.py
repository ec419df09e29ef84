"""Pushing to a Hub, with the real client and the loopback server."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from command import nanophi  # type: ignore[import-not-found]
from forging import card_problems  # type: ignore[import-not-found]
from hub_client import is_whole, push, silent  # type: ignore[import-not-found]
from hub_server import HubServer  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_file, write_json
from nanophi.core.sample import generate
from nanophi.model_card import card, signature, upload
from nanophi.model_card import push as pushing
from nanophi.model_card.gguf import parse_kinds
from nanophi.model_card.manifest import file_problems, list_files, write_manifest
from nanophi.model_card.push import problems
from nanophi.model_card.records import read_records, write_records

REVISIONS = ["step-000010", "step-000020", "step-000030", "main"]


@pytest.fixture(scope="module")
def revisions(built_release, tmp_path_factory):
    """What a push of `built_release` builds before it sends anything."""
    return pushing._revisions(built_release, "org/demo", tmp_path_factory.mktemp("revisions"), silent, {})


@pytest.fixture
def hub(hub, revisions, built_release, monkeypatch):
    """A Hub to push to; the revisions of `built_release` are not built again, which takes a second or two."""
    build = pushing._revisions
    monkeypatch.setattr(pushing, "_revisions", lambda *given: revisions if given[0] == built_release else build(*given))
    return hub


@pytest.fixture
def run_copy(built_release, tmp_path):
    """A run with its release that a test may change."""
    return Path(shutil.copytree(built_release.parent, tmp_path / "runs" / "tiny"))


def assert_complete(hub: HubServer) -> None:
    repository = hub.repositories["model", "org/demo"]
    assert sorted(repository.branches) == sorted(REVISIONS)
    for name in REVISIONS:
        assert is_whole(repository.branches[name]), name
        described = json.loads(repository.branches[name].files["records/run.json"].data)["revision"]
        assert described == ("step-000030" if name == "main" else name)
    assert repository.tags["v1.0"] is repository.branches["main"]


def test_push_then_load_in_a_fresh_process(built_release, hub, tmp_path):
    (url,) = push(built_release, "org/demo")
    assert url == f"{hub.endpoint}/org/demo"
    assert_complete(hub)
    assert hub.repositories["model", "org/demo"].private
    sample = read_json(built_release / "records" / "sample.json")
    script = """
import json, sys
from transformers import pipeline
prompt, settings = json.loads(sys.argv[1])
for options in ({}, {"trust_remote_code": True}, {"revision": "step-000010"}, {"revision": "v1.0"}):
    made = pipeline("text-generation", model="org/demo", device="cpu", **options)
    print(json.dumps([type(made.model).__name__, made(prompt, **settings)[0]["generated_text"]]))
"""
    command = [sys.executable, "-I", "-c", script, json.dumps([sample["prompt"], sample["settings"]])]
    place: Any = {"env": {**os.environ, **hub.environment(tmp_path / "empty")}, "cwd": tmp_path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **place)
    assert done.returncode == 0, done.stderr
    texts = [*[sample["text"]] * 2, sample["checkpoints"]["step-000010"], sample["text"]]
    classes = ["PhiForCausalLM", "NanoPhiForCausalLM", "PhiForCausalLM", "PhiForCausalLM"]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [list(pair) for pair in zip(classes, texts, strict=True)]
    assert "newly initialized" not in done.stderr and "to instantiate a model of type" not in done.stderr

    cache = tmp_path / "another"
    folder = Path(huggingface_hub.snapshot_download("org/demo", revision="step-000020", cache_dir=cache))
    assert file_problems(folder) == []
    assert card_problems(folder) == []


def test_dry_run_lists_everything_and_sends_nothing(built_release, hub):
    lines: list[str] = []
    (planned,) = push(built_release, "org/demo", dry_run=True, report=lines.append)
    assert all(line.startswith(("GET", "HEAD")) for line in hub.requests)
    heads = [line.removeprefix("org/demo ") for line in lines if line.startswith("org/demo ")]
    assert [head.partition(":")[0] for head in heads] == REVISIONS
    assert sum("model.safetensors" in line for line in lines) == len(REVISIONS)
    assert f"main: {len(list_files(built_release))} files, " in heads[-1]
    assert (planned["name"], planned["kind"], planned["tag"], planned["refused"]) == ("org/demo", "model", "v1.0", None)
    assert list(planned["branches"]) == REVISIONS
    weights = {"bytes": (built_release / "model.safetensors").stat().st_size, "change": "new"}
    assert planned["branches"]["main"]["model.safetensors"] == weights


def test_the_verb_prints_a_dry_run_as_json(built_release, hub, capsys):
    hub.add_repository("model", "org/demo", FOREIGN)
    assert not nanophi("push", built_release, "--repo-id", "org/demo", "--dry-run", "--json")
    printed = capsys.readouterr()
    (planned,) = json.loads(printed.out)
    assert "nothing was sent (dry run)" in printed.err
    assert "holds files that no push of ours put there" in planned["refused"]
    assert planned["branches"]["main"]["optimizer.bin"] == {"bytes": None, "change": "deleted"}
    assert planned["branches"]["main"]["README.md"]["change"] == "replaced"


def test_second_push_sends_nothing_and_public_comes_last(built_release, hub):
    push(built_release, "org/demo")
    assert hub.repositories["model", "org/demo"].private
    before = len(hub.requests)
    lines: list[str] = []
    push(built_release, "org/demo", public=True, report=lines.append)
    assert not [line for line in hub.requests[before:-1] if "/commit/" in line or line.startswith("PUT")]
    assert lines[:-1] == [f"{name}: up to date" for name in REVISIONS]
    assert not hub.repositories["model", "org/demo"].private and hub.requests[-1].endswith("/settings")


def test_a_new_signature_alone_is_not_sent(built_release, revisions, hub, monkeypatch):
    def sign(folder: Path, key: Path) -> None:
        (folder / "model.sig").write_bytes(os.urandom(8))

    monkeypatch.setattr(signature, "sign", sign)
    try:
        push(built_release, "org/demo", signing_key=Path("key.pem"))
        before = len(hub.requests)
        push(built_release, "org/demo", signing_key=Path("key.pem"))
        assert not [line for line in hub.requests[before:] if "/commit/" in line]
    finally:
        for folder in set(revisions.values()):
            (folder / "model.sig").unlink(missing_ok=True)


def assert_loads(revision: str, cache: Path, sample: dict) -> None:
    """A revision, downloaded by the real client, is the model it says it is."""
    folder = Path(huggingface_hub.snapshot_download("org/demo", revision=revision, cache_dir=cache))
    described = read_json(folder / "records" / "run.json")["revision"]
    assert generate(folder, [sample["prompt"]]) == [sample["checkpoints"][described]]


@pytest.mark.parametrize("tenth", range(10))
def test_a_push_cut_at_any_moment_is_finished_by_the_next(built_release, hub, tmp_path, tenth):
    """A random moment of each tenth of a push: before, during or after a request."""
    push(built_release, "org/demo")
    draw, requests = random.Random(tenth), len(hub.requests)
    hub.repositories.clear()
    hub.objects.clear()
    after = draw.randrange(requests * tenth // 10, requests * (tenth + 1) // 10)
    hub.cut(after, draw.choice(["before", "during", "after"]))
    with pytest.raises(UserError, match="run the same command to resume"):
        push(built_release, "org/demo")
    hub.restore()
    sample = read_json(built_release / "records" / "sample.json")
    repository = hub.repositories.get(("model", "org/demo"))
    if repository is not None:
        assert repository.private
        for name, head in repository.branches.items():
            # Empty, as a new repository is, or whole: never in between, on any branch.
            if set(head.files) != {".gitattributes"}:
                assert is_whole(head), name
                assert_loads(name, tmp_path / "cache", sample)
    stored = set(hub.objects)
    before = len(hub.requests)
    push(built_release, "org/demo")
    assert_complete(hub)
    assert_loads("main", tmp_path / "cache", sample)
    sent = {line.removeprefix("PUT /lfs/") for line in hub.requests[before:] if line.startswith("PUT /lfs/")}
    assert not sent & stored, "what had arrived was sent again"
    for commit in hub.repositories["model", "org/demo"].branches["main"].history():
        assert set(commit.files) == {".gitattributes"} or is_whole(commit)


FOREIGN = {"README.md": b"Trainer's own card", "optimizer.bin": b"old", "model.safetensors": b"another model"}


def test_another_models_repository_is_left_alone(built_release, hub):
    hub.add_repository("model", "org/demo", FOREIGN)
    lines: list[str] = []
    push(built_release, "org/demo", dry_run=True, report=lines.append)
    assert any("deleted" in line and "optimizer.bin" in line for line in lines)
    assert any("replaced" in line and "model.safetensors" in line for line in lines)
    assert any(line.startswith("refused without --force: org/demo holds files that no push") for line in lines)
    before = hub.repositories["model", "org/demo"].branches["main"]
    with pytest.raises(UserError, match=r"optimizer\.bin \(there is no MANIFEST\.json of ours\).*--force"):
        push(built_release, "org/demo")
    assert hub.repositories["model", "org/demo"].branches == {"main": before}
    assert all(line.startswith(("GET", "HEAD")) for line in hub.requests)
    lines.clear()
    push(built_release, "org/demo", force=True, report=lines.append)
    assert_complete(hub)
    assert any(line.startswith("main: replaces README.md, model.safetensors; deletes optimizer.bin") for line in lines)
    assert b'model="org/demo"' in hub.repositories["model", "org/demo"].branches["main"].files["README.md"].data


def test_what_was_edited_on_the_hub_is_not_lost(built_release, hub):
    push(built_release, "org/demo")
    hub.repositories["model", "org/demo"].tags.clear()
    edited = {"README.md": b"A card that was improved by hand", "model.safetensors": b"other weights"}
    hub.add_repository("model", "org/demo", {**edited, "notes.md": b"notes of somebody"})
    with pytest.raises(UserError) as caught:
        push(built_release, "org/demo")
    for named in ("README.md (changed there)", "notes.md (added there)", "model.safetensors (changed there)"):
        assert named in str(caught.value)
    push(built_release, "org/demo", force=True)
    assert_complete(hub)


def test_another_run_is_not_replaced_unasked(built_release, hub, tmp_path):
    """Its manifest is as good as ours, and its version another."""
    alone = [Path(shutil.copytree(built_release, tmp_path / name / "release")) for name in ("tiny", "ctl")]
    push(alone[0], "org/demo")
    records = read_records(alone[1] / "records")
    records["recipe.yaml"]["name"], records["run.json"]["tag"] = "ctl", "v2.0"
    write_records(records, alone[1] / "records")
    (alone[1] / "README.md").write_text(card.render(records))
    provenance = read_json(alone[1] / "MANIFEST.json")["provenance"]
    recipe_sha256 = sha256_of_file(alone[1] / "records" / "recipe.yaml")
    write_manifest(alone[1], {**provenance, "recipe_sha256": recipe_sha256})
    before = dict(hub.repositories["model", "org/demo"].branches)
    message = r"^org/demo holds the run 'tiny', this is 'ctl'; choose another --repo-id, or .* --force$"
    with pytest.raises(UserError, match=message):
        push(alone[1], "org/demo")
    assert hub.repositories["model", "org/demo"].branches == before
    push(alone[1], "org/demo", force=True)
    assert hub.repositories["model", "org/demo"].branches["main"] is not before["main"]
    # The next version of the same run is its successor.
    records["run.json"]["tag"] = "v3.0"
    write_records(records, alone[1] / "records")
    write_manifest(alone[1], {**provenance, "recipe_sha256": recipe_sha256})
    push(alone[1], "org/demo")


def test_a_release_without_its_own_checkpoints_is_published_without_branches(run_copy, hub):
    record = read_json(run_copy / "record.json")
    record["stages"]["training"]["key"] = "trained again since"
    write_json(run_copy / "record.json", record)
    lines: list[str] = []
    push(run_copy / "release", "org/demo", report=lines.append)
    assert sorted(hub.repositories["model", "org/demo"].branches) == ["main", "step-000030"]
    assert any(line.startswith("step-000010: its checkpoint is not in the run directory") for line in lines)


def test_a_dry_run_needs_no_network(built_release, hub):
    hub.cut(0, "before")
    lines: list[str] = []
    push(built_release, "org/demo", dry_run=True, report=lines.append)
    assert any(line.startswith("org/demo: the Hub cannot be reached") for line in lines)
    assert sum("model.safetensors" in line for line in lines) == len(REVISIONS)


BUSY = [(429, {"Retry_After": "7"}), (429, {"RateLimit": '"api";r=0;t=6'}), (503, {})]


@pytest.mark.parametrize(("status", "headers"), BUSY)
def test_a_busy_hub_is_asked_again(built_release, hub, monkeypatch, status, headers):
    waits: list[float] = []
    monkeypatch.setattr("nanophi.model_card.upload.time.sleep", waits.append)
    hub.fail("POST .*/commit/main", status, 2, **headers)
    push(built_release, "org/demo")
    assert_complete(hub)
    assert waits == ([7, 7] if headers else [1, 2])


def test_a_new_repository_and_a_commit_that_was_made_before_the_answer_failed(built_release, hub):
    # What the Hub writes when a licence is chosen for a new repository is nobody's work.
    hub.add_repository("model", "org/demo", {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    hub.fail("POST .*/commit/main", 502, after=True)
    push(built_release, "org/demo")
    assert_complete(hub)
    assert len(hub.repositories["model", "org/demo"].branches["main"].history()) == 3


@pytest.mark.parametrize(
    ("request_line", "status", "said"),
    [
        ("commit/", 429, r"the Hub is busy \(429: injected 429\); run the same command to resume"),
        ("commit/", 500, r"the Hub is busy \(500: .*; run the same command to resume"),
        ("repos/create", 403, r"the Hub refuses: 403 .*token has the correct permissions\. injected 403"),
        ("commit/", 412, r"somebody else committed there"),
        ("repos/create", 401, r"the Hub does not accept the token, .*; run `hf auth login`"),
        ("validate-yaml", 400, r"the Hub refuses the card's metadata: .*injected 400"),
    ],
)
def test_the_hubs_errors_are_one_line_with_a_remedy(built_release, hub, request_line, status, said):
    hub.fail(f"POST .*/{request_line}", status, 99 if said.startswith("the Hub is busy") else 1)
    with pytest.raises(UserError, match=rf"^org/demo: {said}") as caught:
        push(built_release, "org/demo")
    assert "\n" not in str(caught.value)
    assert bool(hub.repositories) == (request_line == "commit/")


def test_a_tag_is_never_moved(built_release, run_copy, hub):
    push(built_release, "org/demo")
    generation = read_json(run_copy / "release" / "generation_config.json")
    write_json(run_copy / "release" / "generation_config.json", {**generation, "temperature": 0.5})
    provenance = read_json(run_copy / "release" / "MANIFEST.json")["provenance"]
    write_manifest(run_copy / "release", provenance)
    before = dict(hub.repositories["model", "org/demo"].branches)
    message = r"tag v1\.0 of another release; .*raise card\.version .*choose another --repo-id"
    with pytest.raises(UserError, match=message):
        push(run_copy / "release", "org/demo")
    assert hub.repositories["model", "org/demo"].branches == before


def assert_companion_is_complete(hub: HubServer) -> None:
    repository = hub.repositories["model", "org/demo-GGUF"]
    head = repository.branches["main"]
    assert is_whole(head) and set(repository.branches) == {"main"} and repository.tags["v1.0"] is head
    assert {name for name in head.files if name.endswith(".gguf")} == {"demo-f16.gguf", "demo-q8_0.gguf"}
    assert b"\nbase_model: org/demo\nbase_model_relation: quantized\n" in head.files["README.md"].data


def test_gguf_files_go_to_a_companion(built_release, hub, tmp_path):
    from gguf import GGUFReader

    urls = push(built_release, "org/demo", gguf=["f16", "q8_0"])
    assert_complete(hub)
    assert_companion_is_complete(hub)
    assert urls[1].endswith("org/demo-GGUF")
    assert hub.repositories["model", "org/demo-GGUF"].private
    file = huggingface_hub.hf_hub_download("org/demo-GGUF", "demo-q8_0.gguf", cache_dir=tmp_path / "cache")
    assert GGUFReader(file).fields["general.base_model.0.repo_url"].contents() == "https://huggingface.co/org/demo"
    before = len(hub.requests)
    push(built_release, "org/demo", gguf=["f16", "q8_0"], public=True)
    assert not [line for line in hub.requests[before:] if "/commit/" in line or line.startswith("PUT /lfs")]
    assert not any(repository.private for repository in hub.repositories.values())


def plant(name: str, content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(path.read_text() + content if path.exists() else content)

    return change


def name_a_path_in_the_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "from": str(folder.parent / "checkpoints")})


SECRET = "hf_" + "a1B2" * 9


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (plant("README.md", f"\ntoken: {SECRET}\n"), "README.md holds a Hugging Face token"),
        (plant("notes.txt", "-----BEGIN OPENSSH PRIVATE KEY-----"), "notes.txt holds a private key"),
        (plant("notes.txt", "correct-horse-battery"), "notes.txt holds a secret of this machine's environment"),
        (plant("notes.txt", f"see {Path.cwd()}/x"), "notes.txt names a path of this machine"),
        (name_a_path_in_the_weights, "model.safetensors names a path"),
        (plant("training_state/step-000030/x.json", "{}"), "x.json is not a file that nanophi writes"),
        (plant("README.md", "\n[More Information Needed]\n"), "README.md has '[More Information Needed]', the"),
    ],
)
def test_what_must_not_be_published_is_named(run_copy, hub, monkeypatch, change, named):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "correct-horse-battery")
    folder = run_copy / "release"
    change(folder)
    wrong = problems(folder)
    assert any(named in line for line in wrong), wrong
    assert not any(SECRET in line or "correct-horse" in line for line in wrong)
    with pytest.raises(UserError, match="not fit to publish"):
        push(folder, "org/demo")
    assert hub.requests == []


def test_bad_input_is_one_line(built_release, hub, tmp_path):
    for repo_id in ("demo", "a/b/c", "../x", "", "org/" + "n" * 97, "org/" + "n" * 92):
        with pytest.raises(UserError, match="ORG/NAME"):
            push(built_release, repo_id, gguf=["f16"])
    with pytest.raises(UserError, match="is not a release"):
        push(tmp_path, "org/demo")
    assert hub.requests == []
    assert parse_kinds("f16, q8_0,f16,") == ["f16", "q8_0"] and parse_kinds(None) == []


def test_a_branch_that_needed_nothing_gets_nothing_though_it_changes_meanwhile(built_release, hub, monkeypatch):
    """Somebody edits the card after the changes were planned and shown: that is theirs to keep."""
    push(built_release, "org/demo")
    check = upload.check_metadata

    def edit_meanwhile(repository: upload.Repository, report: Any) -> None:
        check(repository, report)
        hub.add_repository("model", "org/demo", {"README.md": b"theirs", "eval.md": b"added"})

    monkeypatch.setattr(upload, "check_metadata", edit_meanwhile)
    push(built_release, "org/demo")
    assert hub.repositories["model", "org/demo"].branches["main"].files["README.md"].data == b"theirs"
