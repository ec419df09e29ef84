"""The run directory: stages run once per input, survive kills, share with siblings; one writer at a time."""

import shutil
import tempfile
from pathlib import Path

import pytest

from nanophi.core import run as run_module
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, replace_tree, sha256_of_tree, write_json, write_text
from nanophi.core.run import FORMATS, RunDirectory, differences


def builder(text, calls):
    def build(work: Path) -> dict:
        calls.append(text)
        (work / "out").mkdir()
        (work / "out/file.txt").write_text(text)
        return {"length": len(text)}

    return build


def test_runs_once_per_input_in_one_run_or_its_sibling(tmp_path):
    calls, lines = [], []
    run, sibling = (RunDirectory(tmp_path / name, lines.append) for name in "ab")
    for directory, told in ((run, "done in"), (run, "up to date"), (sibling, "shared with a")):
        assert directory.stage("s", {"x": 1}, ["out"], builder("one", calls)) == {"length": 3}
        assert calls == ["one"] and told in lines[-1]
    assert sha256_of_tree(tmp_path / "a/out") == sha256_of_tree(tmp_path / "b/out")
    sibling.stage("t", {"x": 1}, ["out"], builder("other", calls))  # same inputs, another stage
    run.stage("s", {"x": 2}, ["out"], builder("three", calls))
    assert (run.path / "out/file.txt").read_text() == "three"
    shutil.rmtree(run.path / "out")
    run.stage("s", {"x": 2}, ["out"], builder("three", calls))
    assert calls == ["one", "other", "three", "three"], "an output that is gone is made again"


def test_a_record_that_is_none_and_a_stage_that_has_not_run_are_named(tmp_path):
    with pytest.raises(UserError, match="stage 's' has not run for this recipe"):
        RunDirectory(tmp_path / "a").stage("s", {}, ["out"], None)
    with pytest.raises(UserError, match="stage 's' has not run yet"):
        RunDirectory(tmp_path / "a").key("s")
    for content in ("[]", '{"stages": []}', "{}"):
        write_text(tmp_path / "a/record.json", content)
        with pytest.raises(UserError, match=r"a/record\.json is not a record of a run"):
            RunDirectory(tmp_path / "a", str).stage("s", {}, ["out"], builder("one", []))
    write_text(tmp_path / "a/record.json", "{")
    with pytest.raises(UserError, match=r"record\.json is not valid JSON"):
        RunDirectory(tmp_path / "a").key("s")


def test_a_stage_that_fails_or_is_refused_changes_nothing_and_finds_its_work_again(tmp_path):
    run = RunDirectory(tmp_path / "a", str)
    run.stage("s", {"x": 1}, ["out"], builder("one", []))

    def fail(work):
        (work / "part").write_text("finished part")
        raise KeyboardInterrupt

    def refuse(work):
        assert (work / "out/file.txt").read_text() == "two"
        raise UserError("no")

    def go_on(work):
        assert (work / "part").read_text() == "finished part"
        return builder("three", [])(work)

    with pytest.raises(UserError):
        run.stage("s", {"x": 2}, ["out"], builder("two", []), accept=refuse)
    with pytest.raises(KeyboardInterrupt):
        run.stage("s", {"x": 3}, ["out"], fail)
    assert (run.path / "out/file.txt").read_text() == "one" and run.inputs_of("s") == {"x": 1}
    assert run.record["stages"]["s"]["summary"] == {"length": 3}
    run.stage("s", {"x": 3}, ["out"], go_on)
    assert (run.path / "out/file.txt").read_text() == "three"
    assert not list((run.path / ".work").iterdir())


def test_a_format_belongs_to_one_stage(tmp_path, monkeypatch):
    calls, run = [], RunDirectory(tmp_path / "a", str)
    for format_of_s in (1, 2):
        monkeypatch.setitem(FORMATS, "s", format_of_s)
        assert run.inputs_of("s") is None
        for name in ("s", "t"):
            run.stage(name, {"x": 1}, ["out"], builder(name, calls))
    assert run.inputs_of("t") == {"x": 1}
    assert calls == ["s", "t", "s"]


def test_differences_name_keys_and_both_values():
    then = {"a": {"b": 1, "c": [1, 2], "gone": 0}, "hash": "0" * 64, "same": None}
    now = {"a": {"b": 2, "c": [1, 2]}, "hash": "f" * 64, "same": None}
    assert differences(then, now) == ["a.b 1 -> 2", "a.gone 0 -> None", f"hash {'0' * 12} -> {'f' * 12}"]
    assert differences(now, now) == []


LONG = "a sentence that both of them have, " * 9


@pytest.mark.parametrize(
    ("then", "now", "lines"),
    [
        ([{"files": "a", "x": 1}], [{"files": "b", "x": 1}], ["sources.0.files a -> b"]),
        (
            [{"x": {"y": [1, 2]}}, {}],
            [{"x": {"y": [1, 3]}}, {"z": 1}],
            ["sources.0.x.y [1, 2] -> [1, 3]", "sources.1.z None -> 1"],
        ),
        ([1.0, 5], [1.0, 4], ["sources [1.0, 5] -> [1.0, 4]"]),
        (["a", "b"], ["a"], ['sources ["a", "b"] -> ["a"]']),
        ([{"hub": "a"}], [{"hub": "a"}, {"hub": "ä"}], ['sources [{"hub": "a"}] -> [{"hub": "a"}, {"hub": "ä"}]']),
        ("one\nline", "one line", ['sources "one\\nline" -> one line']),
        ("5", 5, ["sources '5' -> 5"]),
        ("0" * 63 + "1", "p" * 64, [f"sources {'0' * 12} -> {'p' * 64}"]),
    ],
)
def test_differences_are_where_they_are(then, now, lines):
    assert differences({"sources": then}, {"sources": now}) == lines


@pytest.mark.parametrize(
    ("then", "now"), [(LONG + "x" + LONG, LONG + "y" + LONG), (LONG, LONG + "y"), ("x" + LONG, LONG)]
)
def test_of_long_text_the_part_that_differs_is_shown(then, now):
    (line,) = differences({"notes": then}, {"notes": now})
    old, new = line.removeprefix("notes ").split(" -> ")
    assert old != new and max(map(len, (old, new))) <= 86
    assert old.strip(".") in then and new.strip(".") in now
    assert ("x" in old, "y" in new) == ("x" in then, "y" in now)


def shards(texts, calls=None):
    """Builds `data/s`: one file for each text."""

    def build(work: Path) -> dict:
        if calls is not None:
            calls.append(texts)
        (work / "data/s").mkdir(parents=True)
        for number, text in enumerate(texts):
            (work / f"data/s/{number}").write_text(text)
        return {"shards": len(texts)}

    return build


def test_a_shard_that_was_lost_or_cut_short_is_made_again(tmp_path):
    calls = []
    run, sibling = (RunDirectory(tmp_path / name, lambda line: None) for name in "ab")
    build = shards(["one", "two"], calls)
    for harm in (Path.unlink, lambda path: path.write_text("o"), lambda path: path.rename(path.with_name("2"))):
        run.stage("s", {"x": 1}, ["data/s"], build)
        before = len(calls)
        harm(run.path / "data/s/0")
        assert not run.up_to_date("s", {"x": 1}, ["data/s"])
        if before == 1:
            sibling.stage("s", {"x": 1}, ["data/s"], build)
            assert len(calls) == 2, "what is not whole is not shared"
        run.stage("s", {"x": 1}, ["data/s"], build)
        assert (run.path / "data/s/0").read_text() == "one"
        shutil.rmtree(sibling.path, ignore_errors=True)
    (run.path / "data/s/notes.txt").write_text("mine")
    assert run.up_to_date("s", {"x": 1}, ["data/s"]), "what was added is no reason"


def test_a_sibling_that_changes_meanwhile_or_cannot_be_read_is_not_shared(tmp_path, monkeypatch):
    sibling, run = (RunDirectory(tmp_path / name, lambda line: None) for name in "ab")
    sibling.stage("s", {"x": 1}, ["data/s"], shards(["one", "two"]))
    calls, copy = [], run_module.copy_tree

    def slow_copy(source, target):
        copy(source, target)
        sibling.stage("s", {"x": 2}, ["data/s"], shards(["other"]))

    monkeypatch.setattr(run_module, "copy_tree", slow_copy)
    assert run.stage("s", {"x": 1}, ["data/s"], shards(["three"], calls)) == {"shards": 1}
    assert calls and sorted(path.name for path in (run.path / "data/s").iterdir()) == ["0"]

    def no_copy(source, target):
        target.parent.mkdir(parents=True)
        target.write_text("half")
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr(run_module, "copy_tree", no_copy)
    assert run.stage("s", {"x": 2}, ["data/s"], shards(["four"], calls)) == {"shards": 1}
    assert (run.path / "data/s/0").read_text() == "four"


def test_data_may_be_a_link_to_another_disk(tmp_path):
    other = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        run = RunDirectory(tmp_path / "a", lambda line: None)
        run.path.mkdir()
        (run.path / "data").symlink_to(other)
        for texts in (["one", "two"], ["three"]):
            run.stage("s", {"x": texts}, ["data/s"], shards(texts))
            assert [path.read_text() for path in sorted((other / "s").iterdir())] == texts
        (other / "kept").mkdir()
        (other / "s").rename(other / "kept/s")
        (other / "s").symlink_to(other / "kept/s")
        run.stage("s", {"x": 3}, ["data/s"], shards(["four"]))
        assert (other / "s").is_symlink() and (other / "kept/s/0").read_text() == "four"
    finally:
        shutil.rmtree(other)


def test_writes_are_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert read_json(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_what_a_killed_replacement_left_is_removed(tmp_path):
    for name in ("new", ".out.77.old", ".out.78.new", ".out.mine", ".outer.77.old"):
        (tmp_path / name).mkdir()
    replace_tree(tmp_path / "new", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.mine", ".outer.77.old", "out"]
