"""The loopback Hub against the real client: what holds here holds for what is tested with it."""

import os
import subprocess
import sys

CLIENT = """
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
api, stranger = HfApi(), HfApi(token="hf_of_somebody_else")
def raises(error, call, *given, **options):
    try:
        call(*given, **options)
    except error as raised:
        return str(raised)
    raise AssertionError(f"{error.__name__} was not raised")

# Commits, branches, tags, downloads
api.create_repo("org/model", private=True)
raises(HfHubHTTPError, api.create_repo, "org/model")
api.create_repo("org/model", exist_ok=True)
first = api.list_repo_commits("org/model")[-1].commit_id
weights = bytes(range(256)) * 100
files = {"README.md": b"---\\nlicense: mit\\n---\\n# Model", "model.safetensors": weights, "figures/loss.png": b"png"}
made = api.create_commit("org/model", [CommitOperationAdd(*file) for file in files.items()], commit_message="all")
api.create_branch("org/model", branch="step-000010", revision=first)
raises(HfHubHTTPError, api.create_branch, "org/model", branch="step-000010")
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
raises(EntryNotFoundError, hf_hub_download, "org/model", "absent")
raises(RevisionNotFoundError, hf_hub_download, "org/model", "README.md", revision="absent")
raises(RepositoryNotFoundError, hf_hub_download, "org/absent", "README.md")

# What is there already, what has moved, what is private
same = [CommitOperationAdd("model.safetensors", weights)]
api.create_commit("org/model", same, commit_message="again")
late = [CommitOperationAdd("b", b"2")]
raises(HfHubHTTPError, api.create_commit, "org/model", late, commit_message="late", parent_commit=first)
raises(RepositoryNotFoundError, stranger.list_repo_files, "org/model")
api.update_repo_settings("org/model", private=False)
assert "model.safetensors" in stranger.list_repo_files("org/model")

# Metadata that the Hub refuses
refused = {
    "license: gpl-7": "gpl-7",
    "datasets: [/data/mine]": "/data/mine",
    "license: [": "YAML",
    "co2_eq_emissions: {source: a meter}": "number of grams",
    "model-index: [{name: m, results: [{task: {type: t}, dataset: {type: d}, metrics: []}]}]": "dataset.name",
}
for metadata, named in refused.items():
    card = [CommitOperationAdd("README.md", f"---\\n{metadata}\\n---\\n# Model".encode())]
    assert named in raises(ValueError, api.create_commit, "org/model", card, commit_message="card")
"""


def test_the_real_client_finds_what_it_finds_on_the_hub(hub, tmp_path):
    environment = {**os.environ, **hub.environment(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CLIENT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    history = hub.repositories["model", "org/model"].branches["main"].history()
    assert [commit.title for commit in history] == ["less", "all", "initial commit"]
    # One upload of each large file, though several commits hold it.
    assert sum(line.startswith("PUT /lfs/") for line in hub.requests) == 2
