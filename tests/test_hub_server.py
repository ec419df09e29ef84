"""The loopback Hub against the real client: what holds here holds for what is tested with it."""

import os
import subprocess
import sys
from pathlib import Path

from hub_server import HubServer  # type: ignore[import-not-found]

CLIENT = """
import sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
api = HfApi()
def raises(error, call):
    try:
        call()
    except error:
        return True
    raise AssertionError(f"{error.__name__} was not raised")
"""


def run_client(hub: HubServer, home: Path, script: str) -> None:
    environment = {**os.environ, **hub.environment(home)}
    command = [sys.executable, "-c", CLIENT + script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_commit_branch_tag_and_download(hub: HubServer, tmp_path: Path) -> None:
    script = """
api.create_repo("org/model", private=True)
assert raises(HfHubHTTPError, lambda: api.create_repo("org/model"))
api.create_repo("org/model", exist_ok=True)
first = api.list_repo_commits("org/model")[-1].commit_id
weights = bytes(range(256)) * 100
made = api.create_commit("org/model", [
    CommitOperationAdd("README.md", b"---\\nlicense: mit\\n---\\n# Model"),
    CommitOperationAdd("model.safetensors", weights),
    CommitOperationAdd("figures/loss.png", b"png"),
], commit_message="all")
api.create_branch("org/model", branch="step-000010", revision=first)
assert raises(HfHubHTTPError, lambda: api.create_branch("org/model", branch="step-000010"))
api.create_tag("org/model", tag="v1.0")
refs = api.list_repo_refs("org/model")
assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": made.oid, "step-000010": first}
assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1.0", made.oid)]
api.create_commit("org/model", [CommitOperationDelete("figures/", is_folder=True)], commit_message="less")
assert api.list_repo_files("org/model") == [".gitattributes", "README.md", "model.safetensors"]
assert "figures/loss.png" in api.list_repo_files("org/model", revision="v1.0")
tree = {entry.path: entry for entry in api.list_repo_tree("org/model", recursive=True)}
assert tree["model.safetensors"].lfs.size == len(weights)
folder = snapshot_download("org/model", revision="v1.0")
assert open(folder + "/model.safetensors", "rb").read() == weights
assert raises(EntryNotFoundError, lambda: hf_hub_download("org/model", "absent"))
assert raises(RevisionNotFoundError, lambda: hf_hub_download("org/model", "README.md", revision="absent"))
assert raises(RepositoryNotFoundError, lambda: hf_hub_download("org/absent", "README.md"))
"""
    run_client(hub, tmp_path, script)
    # One upload of the large file, though two commits hold it.
    assert sum(line.startswith("PUT /lfs/") for line in hub.requests) == 2


def test_metadata_that_the_hub_refuses(hub: HubServer, tmp_path: Path) -> None:
    script = """
refused = {
    "license: gpl-7": "gpl-7",
    "datasets: [/data/mine]": "/data/mine",
    "license: [": "YAML",
    "co2_eq_emissions: {source: a meter}": "number of grams",
    "model-index: [{name: m, results: [{task: {type: t}, dataset: {type: d}, metrics: []}]}]": "dataset.name",
}
api.create_repo("org/model")
for metadata, named in refused.items():
    card = CommitOperationAdd("README.md", f"---\\n{metadata}\\n---\\n# Model".encode())
    try:
        api.create_commit("org/model", [card], commit_message="all")
    except ValueError as error:
        assert named in str(error), error
"""
    run_client(hub, tmp_path, script)
    assert len(hub.repositories["model", "org/model"].commits) == 1


def test_what_is_there_already_what_is_private_and_what_has_moved(hub: HubServer, tmp_path: Path) -> None:
    script = """
api.create_repo("org/model", private=True)
first = api.list_repo_commits("org/model")[0].commit_id
for title in ("one", "two"):
    api.create_commit("org/model", [CommitOperationAdd("model.safetensors", b"weights")], commit_message=title)
late = lambda: api.create_commit(
    "org/model", [CommitOperationAdd("b", b"2")], commit_message="late", parent_commit=first
)
assert raises(HfHubHTTPError, late)
stranger = HfApi(token="hf_of_somebody_else")
assert raises(RepositoryNotFoundError, lambda: stranger.list_repo_files("org/model"))
api.update_repo_settings("org/model", private=False)
assert stranger.list_repo_files("org/model") == [".gitattributes", "model.safetensors"]
"""
    run_client(hub, tmp_path, script)
    assert sum(line.startswith("PUT /lfs/") for line in hub.requests) == 1
    history = hub.repositories["model", "org/model"].branches["main"].history()
    assert [commit.title for commit in history] == ["one", "initial commit"]
