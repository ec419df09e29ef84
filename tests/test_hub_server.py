"""The loopback Hub against the real client: what holds here holds for what is tested with it."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hub_server import TOKEN, HubServer  # type: ignore[import-not-found]

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


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def run_client(hub: HubServer, home: Path, script: str, **variables: str) -> str:
    environment = {**os.environ, **hub.environment(home), **variables}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT + script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commit_branch_tag_and_download(hub, tmp_path):
    run_client(
        hub,
        tmp_path,
        """
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
late = [CommitOperationAdd("b", b"2")]
raises(HfHubHTTPError, lambda: api.create_commit("org/model", late, commit_message="late", parent_commit=first))
api.create_commit("org/model", [CommitOperationAdd("model.safetensors", weights)], commit_message="the same")
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
""",
    )
    # One upload of each large file, though two commits hold one of them.
    assert sum(line.startswith("PUT /lfs/") for line in hub.requests) == 2


def test_metadata_that_the_hub_refuses(hub, tmp_path):
    refused = {
        "license: gpl-7": "gpl-7",
        "datasets: [/data/mine]": "/data/mine",
        "license: [": "YAML",
        "co2_eq_emissions: {source: a meter}": "number of grams",
        "model-index: [{name: m, results: [{task: {type: t}, dataset: {type: d}, metrics: []}]}]": "dataset.name",
    }
    script = f"""
api.create_repo("org/model")
for metadata, named in {refused!r}.items():
    card = CommitOperationAdd("README.md", f"---\\n{{metadata}}\\n---\\n# Model".encode())
    try:
        api.create_commit("org/model", [card], commit_message="all")
    except ValueError as error:
        assert named in str(error), error
    else:
        raise AssertionError(metadata)
"""
    run_client(hub, tmp_path, script)
    assert len(hub.repositories["model", "org/model"].commits) == 1


def test_private_repository_is_hidden_from_strangers(hub, tmp_path):
    hub.add_repository("model", "org/secret", {"config.json": b"{}"}, private=True)
    run_client(hub, tmp_path / "a", 'hf_hub_download("org/secret", "config.json")')
    script = 'raises(RepositoryNotFoundError, lambda: hf_hub_download("org/secret", "config.json"))'
    run_client(hub, tmp_path / "b", script, HF_TOKEN="hf_of_somebody_else")
    run_client(hub, tmp_path / "c", 'api.update_repo_settings("org/secret", private=False)')
    run_client(hub, tmp_path / "d", 'hf_hub_download("org/secret", "config.json")', HF_TOKEN="hf_of_somebody_else")


def test_load_dataset(hub, tmp_path):
    frame = pd.DataFrame({"text": ["one", "two", "three"], "quality_score_v1": [0.1, 0.6, 0.9]})
    frame.to_parquet(tmp_path / "part.parquet")
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.parquet\n---\n"
    parts = {"README.md": card, "data/train-00000.parquet": (tmp_path / "part.parquet").read_bytes()}
    hub.add_repository("dataset", "org/texts", parts)
    out = run_client(
        hub,
        tmp_path / "home",
        """
import datasets
plain = datasets.load_dataset("org/texts", split="train")
streamed = datasets.load_dataset("org/texts", split="train", streaming=True)
assert [row["text"] for row in streamed] == plain["text"][:]
print(plain["quality_score_v1"][:])
""",
    )
    assert out.strip() == "[0.1, 0.6, 0.9]"


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_cut_connection_stays_cut_until_restored(hub, moment):
    import http.client

    hub.add_repository("model", "org/model", {"a": b"1"})
    host = hub.endpoint.removeprefix("http://")

    def ask() -> int:
        connection = http.client.HTTPConnection(host, timeout=5)
        body = b'{"tag": "v1"}'
        headers = {"Authorization": f"Bearer {TOKEN}"}
        connection.request("POST", "/api/models/org/model/tag/main", body, headers)
        return connection.getresponse().status

    hub.cut(0, moment)
    for _ in range(2):
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            ask()
    had_effect = "v1" in hub.repositories["model", "org/model"].tags
    assert had_effect == (moment == "after")
    hub.restore()
    assert ask() == (409 if had_effect else 200)
