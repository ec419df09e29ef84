"""The run directory: where every stage reads its inputs, writes its part, and leaves a record.

    runs/<name>/recipe.yaml      the resolved recipe
    runs/<name>/record.json      per stage: key, inputs, outputs, seconds, summary; and the environment
    runs/<name>/data/ checkpoints/ evals/ release/ ...   what the stages wrote

A stage builds in a folder under `.work/`, and its outputs are renamed into place: a process killed at any moment leaves
the old outputs or the new ones. Training alone writes in place; nothing here removes what it wrote.
"""

import contextlib
import datetime
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanophi.core import mirror
from nanophi.core.environment import environment
from nanophi.core.errors import UserError
from nanophi.core.files import copy_tree, read_json, replace_tree, sha256_of, write_json
from nanophi.core.lock import hold
from nanophi.core.names import step_folders

FORMATS = {"documents": 2, "conversations": 2, "comparison": 2, "card": 2}
"""Stage -> format of its outputs, 1 by default. Raise it when the same inputs give other outputs."""


Report = Callable[[str], None]


def now() -> str:
    """Current time, UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


SHOWN = 80  # characters of a value in a list of differences


def differences(then: Any, now: Any, key: str = "", whole: bool = True) -> list[str]:
    """`training.batch_size 4 -> 8` for each value that differs; without `whole`, what `now` leaves out does not."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        names = [*now, *(name for name in then if whole and name not in now)]
        pairs = [(then.get(name), now.get(name), f"{key}.{name}" if key else name) for name in names]
    elif _of_mappings(then) and _of_mappings(now) and len(then) == len(now):
        pairs = [(old, new, f"{key}.{number}") for number, (old, new) in enumerate(zip(then, now, strict=True))]
    elif then == now:
        return []
    else:
        old, new = _text(then), _text(now)
        return [f"{key} {' -> '.join(_shown(old, new) if old != new else (repr(then), repr(now)))}"]
    return [line for pair in pairs for line in differences(*pair, whole=whole)]


def _of_mappings(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, Mapping) for one in value)


def _text(value: Any) -> str:
    """A value on one line: lists, mappings and text that cannot be printed as it is in JSON."""
    plain = not isinstance(value, list | Mapping) and str(value).isprintable()
    return str(value) if plain else json.dumps(value, ensure_ascii=False)


def _shown(*texts: str) -> Iterator[str]:
    """Two texts, shortened where they are long: hashes to their beginning, others to the part that differs first."""
    start = max(0, len(os.path.commonprefix(texts)) - SHOWN // 2)  # noqa: RUF071 (of characters)
    for text in texts:
        if re.fullmatch("[0-9a-f]{64}", text):
            yield text[:12]
        elif max(map(len, texts)) <= SHOWN:
            yield text
        else:
            yield f"{'...' * bool(start)}{text[start : start + SHOWN]}{'...' * (len(text) > start + SHOWN)}"


def _sizes(root: Path, outputs: Sequence[str]) -> dict[str, int]:
    """Bytes of the files of outputs below `data/`, by path: who reads shards would not miss one that was lost since."""
    folders = [root / output for output in outputs if output.startswith("data/")]
    files = [file for folder in folders for file in (folder, *folder.rglob("*")) if file.is_file()]
    return {file.relative_to(root).as_posix(): file.stat().st_size for file in files}


class RunDirectory:
    """One run's folder, made on first write, and its `record.json`; `report` gets each line for a person."""

    def __init__(self, path: str | Path, report: Report = print) -> None:
        self.path = Path(path)
        self.report = report

    @property
    def record(self) -> dict[str, Any]:
        """The contents of `record.json`, whose stages are none before anything was written."""
        path = self.path / "record.json"
        record = read_json(path) if path.exists() else {"stages": {}}
        if not isinstance(record, dict) or not isinstance(record.get("stages"), dict):
            raise UserError(f"{path} is not a record of a run; restore it, or name another run")
        record.setdefault("in_progress", {})
        return record

    def update_record(self, **fields: Any) -> None:
        """Set top-level fields of `record.json`."""
        write_json(self.path / "record.json", {**self.record, **fields})

    def key(self, name: str) -> str:
        """Key of a finished stage: what later stages name as their input. Raises `UserError` if it has not run."""
        stage = self.record["stages"].get(name)
        if stage is None:
            raise UserError(f"{self.path}: stage '{name}' has not run yet; run `nanophi run` on its recipe")
        return stage["key"]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for writing, with its mirror. Raises `UserError` if another process holds one of them."""
        with hold(self.path):
            mirror.keep(self.path, self.record, self.report)
            yield

    def weights(self) -> list[str]:
        """The steps whose weights or states it holds: `["step-000010", "step-000020"]`."""
        folders = (self.path / "checkpoints", self.path / "training_state")
        return sorted({path.name for folder in folders for path in step_folders(folder)})

    def keeps_weights(self, problem: str, remedy: str = "put it back") -> UserError:
        """The refusal of whatever would replace weights, or leave them without what they were made from."""
        return UserError(
            f"{self.path}: {problem}; the weights here ({', '.join(self.weights())}) are kept: {remedy}, use another "
            "name, or start over with --restart, which removes them"
        )

    def stage(
        self,
        name: str,
        inputs: dict[str, Any],
        outputs: Sequence[str],
        build: Callable[[Path], dict[str, Any]] | None,
        *,
        in_place: bool = False,
        shared: bool = True,
        accept: Callable[[Path], None] = lambda work: None,
    ) -> dict[str, Any]:
        """Run one stage (see `stages.Stage`) unless its outputs are there for these inputs, and return its summary.

        In its folder `build` may find finished parts of a killed attempt with the same key; if it is None, outputs that
        are not there are a `UserError`. `accept` raises one if the folder's outputs must not replace the old ones.
        """
        if self.up_to_date(name, inputs, outputs):
            self.report(f"{self.path.name}: {name:<14} up to date")
            return self.record["stages"][name]["summary"]
        if build is None:
            raise UserError(f"{self.path}: stage '{name}' has not run for this recipe; run `nanophi run` on it")
        work = self.path if in_place else self.path / ".work" / f"{name}-{self._key(name, inputs)[:16]}"
        started = time.monotonic()
        made = self._take_from_sibling(name, inputs, outputs, work) if shared and not in_place else None
        if made is None:
            for stale in (self.path / ".work").glob(f"{name}-*"):
                if stale != work:
                    shutil.rmtree(stale)
            work.mkdir(parents=True, exist_ok=True)
            made = {"summary": build(work), "seconds": round(time.monotonic() - started, 3)}
        if not in_place:
            accept(work)
            self.forget(name)
            for output in outputs:
                replace_tree(work / output, self.path / output)
            shutil.rmtree(work)
        entry = self._attempt(name, inputs) | {"outputs": list(outputs), "finished": now()}
        entry |= {"summary": made["summary"], "seconds": made["seconds"]}  # to make, not to link
        if sizes := _sizes(self.path, outputs):
            entry["sizes"] = sizes
        record = self.record
        record["stages"][name] = entry
        record["in_progress"].pop(name, None)
        self.update_record(**record)
        mirror.saved(self.path)
        done = f"shared with {made['run']}" if "run" in made else f"done in {made['seconds']:.0f} s"
        self.report(f"{self.path.name}: {name:<14} {done}")
        return entry["summary"]

    def begin(self, name: str, inputs: dict[str, Any]) -> None:
        """Record what a stage that writes in place is made from, and where, before its first output is there."""
        in_progress = {**self.record["in_progress"], name: self._attempt(name, inputs)}
        self.update_record(in_progress=in_progress, environment=environment())
        mirror.saved(self.path)

    def up_to_date(self, name: str, inputs: dict[str, Any], outputs: Sequence[str]) -> bool:
        """Whether that stage's outputs are there for these inputs."""
        done = self.record["stages"].get(name, {})
        if done.get("key") != self._key(name, inputs) or not all((self.path / output).exists() for output in outputs):
            return False
        there = _sizes(self.path, outputs)
        return all(there.get(file) == size for file, size in done.get("sizes", {}).items())

    def inputs_of(self, name: str) -> dict[str, Any] | None:
        """Inputs of a stage's newest attempt, finished or not; None if there is none in today's format."""
        record = self.record
        entry = record["in_progress"].get(name) or record["stages"].get(name)
        known = isinstance(entry, dict)  # of a training in progress early versions kept the key alone
        return entry["inputs"] if known and entry.get("format") == FORMATS.get(name, 1) else None

    def forget(self, name: str) -> None:
        """Drop a stage's entry before its outputs change, so that no record ever describes the wrong outputs."""
        record = self.record
        if name in record["stages"] or name in record["in_progress"]:
            record["stages"].pop(name, None)
            record["in_progress"].pop(name, None)
            self.update_record(**record)

    def _attempt(self, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"key": self._key(name, inputs), "format": FORMATS.get(name, 1), "inputs": inputs}

    @staticmethod
    def _key(name: str, inputs: dict[str, Any]) -> str:
        return sha256_of({"format": FORMATS.get(name, 1), "stage": name, "inputs": inputs})

    def _take_from_sibling(
        self, name: str, inputs: dict[str, Any], outputs: Sequence[str], work: Path
    ) -> dict[str, Any] | None:
        """Copy a stage's outputs from another run into `work`, and return its entry with its name as `run`.

        The other may be replacing them meanwhile, and may be somebody else's, whose files cannot be read.
        """
        for path in sorted(self.path.parent.glob("*/record.json")):
            with contextlib.suppress(UserError, OSError):
                sibling = RunDirectory(path.parent)
                if path.parent == self.path or not sibling.up_to_date(name, inputs, outputs):
                    continue
                entry = sibling.record["stages"][name]
                shutil.rmtree(work, ignore_errors=True)
                with contextlib.suppress(OSError):
                    for output in outputs:
                        copy_tree(sibling.path / output, work / output)
                    if sibling.up_to_date(name, inputs, outputs) and sibling.record["stages"][name] == entry:
                        return {**entry, "run": path.parent.name}
                shutil.rmtree(work, ignore_errors=True)
        return None
