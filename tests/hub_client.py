"""The real client in this process, talking to the loopback Hub, and what a pushed revision must be."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
from hub_server import Commit, HubServer  # type: ignore[import-not-found]

from nanophi.model_card import push as pushing
from nanophi.model_card.push import Options, Report, publish
from nanophi.model_card.release import copy_for_repo


def talk_to(server: HubServer, home: Path, patch: pytest.MonkeyPatch) -> None:
    """The client of this very process uses the server, without waiting between its retries."""
    for key, value in server.environment(home).items():
        patch.setenv(key, value)
    patch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    patch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A loopback Hub that this process talks to."""
    with HubServer() as server:
        talk_to(server, tmp_path / "home", monkeypatch)
        yield server


@pytest.fixture
def no_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A push sends `main` alone: branches of checkpoints take seconds to build, and are tested elsewhere."""

    def only_main(release: Path, repo_id: str, scratch: Path, report: Any, links: dict[str, str]) -> dict[str, Path]:
        copy_for_repo(release, repo_id, scratch / "main", links)
        return {"main": scratch / "main"}

    monkeypatch.setattr(pushing, "_revisions", only_main)


def is_whole(commit: Commit) -> bool:
    """Whether a commit holds exactly the files of its manifest."""
    if "MANIFEST.json" not in commit.files:
        return False
    listed = json.loads(commit.files["MANIFEST.json"].data)["files"]
    there = {name for name in commit.files if name not in (".gitattributes", "MANIFEST.json")}
    return there == set(listed) and all(
        hashlib.sha256(commit.files[name].data).hexdigest() == entry["sha256"] for name, entry in listed.items()
    )


def silent(line: str) -> None:
    pass


def push(release: Path, repo_id: str, report: Report = silent, **options: Any) -> list[str]:
    """`nanophi push` with the options of the verb by their names."""
    asked = {part: options.pop(part) for part in ("scorer", "data", "gguf", "space") if part in options}
    return publish(release, Options(repo_id, asked=asked, **options), report)
