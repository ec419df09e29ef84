"""The run directory: where every stage reads its inputs, writes its part, and leaves a record.

    runs/<name>/recipe.yaml      the resolved recipe
    runs/<name>/record.json      per stage: key, inputs, outputs, seconds, summary; and the environment
    runs/<name>/data/ checkpoints/ evals/ release/ ...   what the stages wrote

A stage is keyed by the hash of its inputs and by the format of what it writes (`FORMATS`). It builds in a private
folder under `.work/` and its outputs are renamed into place, so a process killed at any moment leaves either the old
outputs or the new ones. Training alone writes in place; nothing here removes what it wrote.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanophi.core.errors import UserError
from nanophi.core.files import copy_tree, read_json, replace_tree, sha256_of, write_json
from nanophi.core.lock import HeldError, hold
from nanophi.core.names import step_folders

FORMATS = {"documents": 2, "conversations": 2, "comparison": 2, "card": 2}
"""Stage -> format of its outputs, 1 by default. Raise it when the same inputs give other outputs."""


def now() -> str:
    """Current time, UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def differences(then: Any, now: Any, key: str = "", whole: bool = True) -> list[str]:
    """`training.batch_size 4 -> 8` for every value that differs between two JSON values.

    Without `whole`, what `now` leaves out is no difference.
    """
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        names = [*now, *(name for name in then if whole and name not in now)]
        pairs = [(then.get(name), now.get(name), f"{key}.{name}" if key else name) for name in names]
    elif not whole and isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        pairs = [(*pair, key) for pair in zip(then, now, strict=True)]
    elif then == now:
        return []
    else:
        short = [value[:12] if isinstance(value, str) and len(value) == 64 else value for value in (then, now)]
        short = [text if len(text := str(value)) <= 80 else f"{text[:60]}..." for value in short]
        return [f"{key} {short[0]} -> {short[1]}"]
    return [line for pair in pairs for line in differences(*pair, whole=whole)]


def _sizes(root: Path, outputs: Sequence[str]) -> dict[str, int]:
    """Bytes of the files of outputs below `data/`, by path: who reads shards would not miss one that was lost since."""
    folders = [root / output for output in outputs if output.startswith("data/")]
    files = [file for folder in folders for file in (folder, *folder.rglob("*")) if file.is_file()]
    return {file.relative_to(root).as_posix(): file.stat().st_size for file in files}


class RunDirectory:
    """One run's folder and its `record.json`.

    Args:
        path: the folder; made on first write.
        report: called with one line for each thing worth telling a person (default: print).
    """

    def __init__(self, path: str | Path, report: Callable[[str], None] = print) -> None:
        self.path = Path(path)
        self.report = report

    @property
    def record(self) -> dict[str, Any]:
        """The contents of `record.json`; `{"stages": {}}` before anything was written."""
        path = self.path / "record.json"
        record = read_json(path) if path.exists() else {"stages": {}}
        if not isinstance(record, dict) or not isinstance(record.get("stages"), dict):
            raise UserError(f"{path} is not a record of a run; restore it, or name another run")
        return record

    def update_record(self, **fields: Any) -> None:
        """Set top-level fields of `record.json`."""
        write_json(self.path / "record.json", {**self.record, **fields})

    def stage_key(self, name: str) -> str:
        """Key of a finished stage: what later stages name as their input. Raises `UserError` if it has not run."""
        stage = self.record["stages"].get(name)
        if stage is None:
            raise UserError(f"{self.path}: stage '{name}' has not run yet; run `nanophi run` on its recipe")
        return stage["key"]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for writing. Raises `UserError` at once if another process holds it."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(hold(self.path))
            except HeldError as held:
                raise UserError(
                    f"{self.path} is being written by another process ({held}); wait for it or use another name"
                ) from None
            except OSError as error:
                raise UserError(f"{self.path} cannot be written ({error.strerror}); choose another --runs") from None
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
        """Run one stage unless its outputs are there for these inputs already, and return its summary.

        Args:
            name: the stage's name in `record.json` and on screen.
            inputs: JSON-able; everything that the outputs depend on. Its hash is the stage's key.
            outputs: paths relative to the run directory that `build` writes.
            build: gets the folder to write in, writes every output there under its relative path, and returns a
                JSON-able summary. It may find finished parts of a killed attempt with the same key in that folder.
                None: the outputs must be there already, or `UserError` says so.
            in_place, shared: see `stages.Stage`.
            accept: gets the folder with the new outputs before they replace the old ones; raises `UserError` if they
                must not.
        """
        key = self._key(name, inputs)
        if self._has(name, key, outputs):
            self.report(f"{self.path.name}: {name:<14} up to date")
            return self.record["stages"][name]["summary"]
        if build is None:
            raise UserError(
                f"{self.path}: stage '{name}' has not run for this recipe; run `nanophi run` or its own verb"
            )
        work = self.path if in_place else self.path / ".work" / f"{name}-{key[:16]}"
        entry = {"key": key, "format": FORMATS.get(name, 1), "inputs": inputs}
        started = time.monotonic()
        sibling = self._take_from_sibling(name, key, outputs, work) if shared and not in_place else None
        if sibling is None:
            self._remove_stale_work(name, keep=work)
            work.mkdir(parents=True, exist_ok=True)
            summary = build(work)
        else:
            summary = sibling["summary"]
        if not in_place:
            accept(work)
            self.forget(name)
            for output in outputs:
                replace_tree(work / output, self.path / output)
            shutil.rmtree(work)
        seconds = time.monotonic() - started
        entry |= {"outputs": list(outputs), "finished": now(), "summary": summary}
        # A shared stage keeps the time that it took to make, not the time that it took to link.
        entry["seconds"] = sibling["seconds"] if sibling else round(seconds, 3)
        if sizes := _sizes(self.path, outputs):
            entry["sizes"] = sizes
        in_progress = {k: v for k, v in self.record.get("in_progress", {}).items() if k != name}
        self.update_record(stages={**self.record["stages"], name: entry}, in_progress=in_progress)
        done = f"shared with {sibling['run']}" if sibling else f"done in {seconds:.0f} s"
        self.report(f"{self.path.name}: {name:<14} {done}")
        return summary

    def begin(self, name: str, inputs: dict[str, Any]) -> None:
        """Record what a stage that writes in place is made from, before its first output is there."""
        attempt = {"key": self._key(name, inputs), "format": FORMATS.get(name, 1), "inputs": inputs}
        in_progress = self.record.get("in_progress", {})
        if in_progress.get(name) != attempt:
            self.update_record(in_progress={**in_progress, name: attempt})

    def up_to_date(self, name: str, inputs: dict[str, Any], outputs: Sequence[str]) -> bool:
        """Whether `stage` would find that stage's outputs there for these inputs."""
        return self._has(name, self._key(name, inputs), outputs)

    def inputs_of(self, name: str) -> dict[str, Any] | None:
        """Inputs of a stage's newest attempt, finished or not; None if there is none in today's format."""
        record = self.record
        for entry in (record.get("in_progress", {}).get(name), record["stages"].get(name)):
            if isinstance(entry, dict) and entry.get("format") == FORMATS.get(name, 1):
                return entry["inputs"]
        return None

    def forget(self, name: str) -> None:
        """Drop a stage's entry before its outputs change, so that no record ever describes the wrong outputs."""
        record = self.record
        kept = {
            field: {key: value for key, value in record.get(field, {}).items() if key != name}
            for field in ("stages", "in_progress")
        }
        if any(kept[field] != record.get(field, {}) for field in kept):
            self.update_record(**kept)

    @staticmethod
    def _key(name: str, inputs: dict[str, Any]) -> str:
        return sha256_of({"format": FORMATS.get(name, 1), "stage": name, "inputs": inputs})

    def _has(self, name: str, key: str, outputs: Sequence[str]) -> bool:
        done = self.record["stages"].get(name, {})
        if done.get("key") != key or not all((self.path / output).exists() for output in outputs):
            return False
        there = _sizes(self.path, outputs)
        return all(there.get(file) == size for file, size in done.get("sizes", {}).items())

    def _remove_stale_work(self, name: str, keep: Path) -> None:
        for folder in (self.path / ".work").glob(f"{name}-*"):
            if folder != keep:
                shutil.rmtree(folder)

    def _take_from_sibling(self, name: str, key: str, outputs: Sequence[str], work: Path) -> dict[str, Any] | None:
        """Copy a stage's outputs from another run into `work`: its entry, and `run`, its name; None: no run has them.

        The other may be replacing them meanwhile, and may be somebody else's, whose files cannot be read.
        """
        for path in sorted(self.path.parent.glob("*/record.json")):
            if path.parent == self.path:
                continue
            with contextlib.suppress(UserError, OSError):
                sibling = RunDirectory(path.parent, self.report)
                if not sibling._has(name, key, outputs):
                    continue
                entry = sibling.record["stages"][name]
                shutil.rmtree(work, ignore_errors=True)
                with contextlib.suppress(OSError):
                    for output in outputs:
                        copy_tree(sibling.path / output, work / output)
                    if sibling._has(name, key, outputs) and sibling.record["stages"][name] == entry:
                        return {**entry, "run": path.parent.name}
                shutil.rmtree(work, ignore_errors=True)
        return None
