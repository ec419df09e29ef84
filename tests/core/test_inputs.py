"""Inputs are identified by their contents: those of local paths, commits of repositories on the Hub."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from nanophi.core import inputs
from nanophi.core.errors import UserError
from nanophi.core.inputs import Contents, Inputs, resolve_commit
from nanophi.core.names import resolve, shown
from nanophi.core.run import RunDirectory


def test_contents_decide_not_times_or_names_of_what_is_hidden(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.json").write_text("1")
    (folder / "inner" / "b.json").write_text("2")
    before = Contents().of(folder)
    os.utime(folder / "a.json", (1, 1))
    (folder / ".DS_Store").write_text("x")
    (folder / "weights.safetensors").write_text("x")
    assert Contents().of(folder, ignore=(".safetensors",)) == before
    assert Contents().of(folder) != before
    (folder / "a.json").write_text("3")
    changed = Contents().of(folder, ignore=(".safetensors",))
    assert changed != before
    (folder / "a.json").rename(folder / "c.json")
    assert Contents().of(folder, ignore=(".safetensors",)) != changed
    with pytest.raises(UserError, match="no such file or folder"):
        Contents().of(tmp_path / "nowhere")


def test_a_file_is_read_again_only_if_it_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, memory = tmp_path / "a.txt", tmp_path / "memory.json"
    path.write_text("one")
    just_written = Contents(memory)
    just_written.of(path)
    just_written.save()
    assert not memory.exists(), "what was just written is not remembered"
    now = inputs.time.time
    monkeypatch.setattr(inputs.time, "time", lambda: now() + 100)
    hashed = []
    hash_file = inputs.sha256_of_file
    monkeypatch.setattr(inputs, "sha256_of_file", lambda path: hashed.append(path) or hash_file(path))
    contents = Contents(memory)
    first = contents.of(path)
    contents.save()
    assert Contents(memory).of(path) == first and len(hashed) == 1
    # The same size, and the time set back: only the contents tell.
    state = path.stat()
    path.write_text("two")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert Contents(memory).of(path) != first
    memory.write_text("{broken")
    assert Contents(memory).of(path) == Contents().of(path)


def test_a_revision_is_looked_up_once_in_the_life_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(repo_id: str, revision: str | None, kind: str) -> str:
        asked.append((repo_id, revision, kind))
        return f"{len(asked):040x}"

    monkeypatch.setattr("nanophi.core.inputs.resolve_commit", resolve)
    run = RunDirectory(tmp_path / "run", report=lambda line: None)
    first = Inputs(run).commit_of("org/name", None, "dataset")
    assert Inputs(RunDirectory(tmp_path / "run")).commit_of("org/name", None, "dataset") == first == f"{1:040x}"
    assert run.record["hub"] == {"dataset org/name@main": first}
    assert Inputs(run).model("org/name") == {"hub": "org/name", "commit": f"{2:040x}"}, "a model, not the dataset"
    assert Inputs(run, write=False).commit_of("org/name", "v2", "dataset") == f"{3:040x}"
    assert len(run.record["hub"]) == 2, "only the process that writes records it"
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert set(Inputs(run).model("org/name")) == {"path", "sha256"}, "a folder comes first"
    with pytest.raises(UserError, match="no such file or folder, and not a Hub id"):
        Inputs(run).model("./nothing")


def test_commits_with_and_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    resolve_commit.cache_clear()
    commit = "0123456789abcdef" * 2 + "01234567"
    assert resolve_commit("org/name", commit, "model") == commit, "a commit is asked of nobody"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def unreachable(self: object, *args: object, **kwargs: object) -> object:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    with pytest.raises(UserError, match=r"cannot be looked up on the Hub \(Name or service not known\)"):
        resolve_commit("org/name", None, "dataset")
    refs = tmp_path / "datasets--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(commit)
    assert resolve_commit("org/name", None, "dataset") == commit, "what was last downloaded"
    info = types.SimpleNamespace(sha="1" * 40)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *args, **kwargs: info)
    assert resolve_commit("org/name", "v1", "model") == "1" * 40
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    assert resolve_commit("org/name", "v1", "model") == "1" * 40, "once looked up, the same for the whole command"
    resolve_commit.cache_clear()


def test_paths_that_are_not_utf8_or_one_line_can_be_shown() -> None:
    assert shown(os.fsdecode(b"caf\xe9\n.txt")) == "caf\\xe9\\n.txt"
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "from nanophi.core.names import shown; assert shown('caf\\xe9') == 'caf\\xe9'"
    subprocess.run([sys.executable, "-c", code], env=ascii_only, check=True)
    assert str(UserError("a\nb \udc80 \x1b[31m")) == "a\\nb \\udc80 \\x1b[31m"


def test_a_mistyped_run_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("demo", "mine"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "recipe.yaml").touch()
    (tmp_path / "org").mkdir()
    with pytest.raises(UserError, match="folder runs/dmeo does not exist; runs holds demo, mine"):
        resolve("runs/dmeo")
    assert resolve("runs/demo").folder == Path("runs/demo")
    assert resolve("org/name").folder is None, "a folder of something else says nothing"
    assert resolve("other/name@v1").folder is None
