"""A copy of a run directory at a URL, from which any machine resumes: `--mirror` of `run`, `prepare` and `train`.

    URL/NAME/objects/SHA256          the run's files, each named by its contents
    URL/NAME/manifests/000012.json   which of them make up the run; written once all of them are there
    URL/NAME/lease                   which process writes there

What the run directory holds when a stage or a save is finished is noted at once, by hard links, and copied by a thread.
A mirror that fails is tried again, and never stops a training; a command that ends without a whole copy fails.
Files that are hidden here (locks, what is unfinished) are not copied, and only what is named as above is removed there.
Whether a copied state can be resumed is decided by `training/checkpoints.py`, as on a disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nanophi.core.errors import UserError, one_line, printable, user_errors
from nanophi.core.files import link_or_copy, read_json, remove, sha256_of_file
from nanophi.core.jobs import end_like_ctrl_c, world_size
from nanophi.core.names import local, walk

LEASE_SECONDS, RENEW_SECONDS, LONGEST_PAUSE = 60.0, 15.0, 60.0
LAST_ATTEMPTS = 6  # at the end, within a minute; what is missing then is left to the next run of the same command
BATCH = 16  # files per call
LEASE, OBJECTS, MANIFESTS = "lease", "objects/", "manifests/"
OURS = re.compile(r"objects/[0-9a-f]{64}|manifests/\d{6,}\.json(\.[0-9a-f]{16}\.part)?")
GROWING = "tensorboard"  # the folder of a run whose files are appended to
REACHED = "step {}, {} stages"

_url: str | None = None
_kept: dict[Path, Mirror] = {}


@contextlib.contextmanager
def mirrored(url: str | None, must_arrive: bool = True) -> Iterator[None]:
    """Keep a mirror below a URL (None: none) of every run directory that is locked within the body; at the end wait.

    Raises `UserError` if a mirror lacks what was finished, unless another process copies it after this one.
    """
    global _url
    before, _url = _url, url
    if url is not None:
        end_like_ctrl_c(signal.SIGTERM)  # so that what is finished is still copied
    try:
        yield
    except BaseException:
        must_arrive = False  # the error that there is, is the one to tell
        raise
    finally:
        _url = before
        if (lacking := let_go()) and must_arrive:
            remedy = "run the same command to copy it"
            raise UserError(f"{', '.join(lacking)}: the mirror lacks what was finished last; {remedy}")


def mirror_url() -> str | None:
    """The URL within the body of `mirrored`."""
    return _url


def keep(run: Path, record: Mapping[str, Any], report: Callable[[str], None]) -> None:
    """Begin to keep the mirror of a directory that the caller has locked: what is further there is fetched.

    `record`: of the run. Raises `UserError` for a mirror that cannot be used, or that another process or training uses.
    """
    if _url is not None and run.resolve() not in _kept:
        mirror = _kept[run.resolve()] = Mirror(run, _url, report)
        mirror.begin(record)
        mirror.note()


def saved(run: Path) -> None:
    """A stage or a save in a run directory is finished: its mirror, if this process keeps one, gets what is new."""
    if mirror := _kept.get(run.resolve()):
        mirror.note()


def let_go(wait: bool = True) -> list[str]:
    """End the mirrors of this process, and return the names of runs whose mirrors lack what was finished last.

    Without `wait`, what is not copied yet is left to other processes.
    """
    lacking = []
    while _kept:
        mirror = _kept.popitem()[1]
        mirror.end(wait)
        lacking += [mirror.run.name] * mirror.lacking
    return lacking


def connect(url: str) -> tuple[Any, str]:
    """The file system of a URL or folder, and the path in it. Raises `UserError` if there is none."""
    import fsspec

    if not url.strip():
        raise UserError("--mirror is empty; name a folder or a URL, or leave it out")
    scheme, _, rest = url.rpartition("://")
    if scheme and re.match("[^/]*(:.*@|[?])|.*[?].*=", rest):
        raise UserError("--mirror: the URL holds a password, which would be printed; set it where its service looks")
    options = {"auto_mkdir": True} if scheme in ("", "file") else {}
    with user_errors(f"--mirror {url} cannot be used"):
        files, path = fsspec.url_to_fs(url if scheme else str(local(url)), **options)
    if path.startswith("buckets/") and path.count("/") < 2:
        raise UserError(f"--mirror {url} names no bucket; name it as hf://buckets/ORG/BUCKET")
    if options and not Path(path).is_dir():
        raise UserError(f"--mirror: there is no folder {path}; make it, or mount the drive that holds it")
    return files, path.rstrip("/")


def put(files: Any, path: str, sources: Mapping[str, Path]) -> None:
    """Copy local files to names below a path of a file system."""
    if path.startswith("buckets/"):  # in one call; the Hub's file system makes one, and a copy, of each file
        _, owner, bucket, *folder = path.split("/")
        add = [(str(source), "/".join([*folder, name])) for name, source in sources.items()]
        files._api.batch_bucket_files(f"{owner}/{bucket}", add=add)
    else:
        files.put([str(source) for source in sources.values()], [f"{path}/{name}" for name in sources])


def reached(names: Iterable[str], record: Mapping[str, Any]) -> tuple[int, int]:
    """How far a run is: its newest saved step, and its number of finished stages."""
    steps = (re.match(r"training_state/step-(\d+)/", name) for name in names)
    return max((int(step[1]) for step in steps if step), default=0), len(record["stages"])


def training_of(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the weights of a run are made from, but for the number of steps; None: not begun, or not known."""
    entry = record.get("in_progress", {}).get("training") or record["stages"].get("training")
    inputs = entry.get("inputs") if isinstance(entry, dict) else None
    if not isinstance(inputs, dict) or not isinstance(inputs.get("training"), dict):
        return None
    return {**inputs, "training": {**inputs["training"], "steps": None}}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links here, or a file of another disk
        target.symlink_to(source)


class Mirror:
    """The mirror of one run directory while a process keeps it."""

    def __init__(self, run: Path, url: str, report: Callable[[str], None]) -> None:
        self.files, path = connect(url)
        self.run, self.path, self.url = run, f"{path}/{run.name}", f"{url.rstrip('/')}/{run.name}"
        self.report = lambda line: report(f"{run.name}: {line}")
        if "file" in self.files.protocol and Path(self.path).resolve().is_relative_to(run.resolve()):
            raise UserError(f"--mirror {url}: it would be in the run {run} itself; name a folder of another disk")
        self.owner, self.told = secrets.token_hex(8), set[str]()
        self.serial = self.renewals = self.notes = 0
        self.hashes: dict[Any, tuple[int, str]] = {}  # bytes and SHA-256 of files that were read once
        self.noted: Path | None = None
        self.ending = self.over = False  # over: nothing more is copied from here
        self.lacking = False  # what was noted last, at the end
        self.changed, self.ended = threading.Condition(), threading.Event()
        self.copier = threading.Thread(target=self._copy, daemon=True)
        self.renewer = threading.Thread(target=self._renew, daemon=True)

    def begin(self, record: Mapping[str, Any]) -> None:
        """Take the lease, fetch what is further than the disk, and begin to copy."""
        problem = f"--mirror {self.url} cannot be used; check it and your credentials, or leave it out"
        with user_errors(problem):
            try:
                self._take_lease()
            except OSError as error:  # a full disk among them, which is not this machine's
                raise UserError(f"{problem} ({one_line(error)})") from error
            self.renewer.start()
            self._fetch_newer(record)
        self.copier.start()

    def end(self, wait: bool = True) -> None:
        """Copy what is noted, unless it is left to the next process, and give the lease back."""
        with self.changed:
            self.ending, self.over = True, self.over or not wait
            self.changed.notify_all()
        if self.copier.ident:
            self.copier.join()
        self.ended.set()
        if self.renewer.ident:
            self.renewer.join()  # or it might write the lease after it is given back
        with contextlib.suppress(Exception):
            if self.owner in str(self._read(LEASE)):
                self.files.rm_file(f"{self.path}/{LEASE}")
        for folder in (self.run / ".work").glob("mirror-*"):
            remove(folder)

    def _take_lease(self) -> None:
        """Wait until nobody renews the lease: clocks of machines differ, but that it changes can be seen on any."""
        if lease := self._read(LEASE):
            self.report(f"{self.url} may be in use by {_holder(lease)}; waiting {LEASE_SECONDS:.0f} s to see")
        end = time.monotonic() + LEASE_SECONDS
        while lease and time.monotonic() < end:
            time.sleep(LEASE_SECONDS / 20)
            if (now := self._read(LEASE)) not in (lease, None):
                remedy = "wait for it, or use another name or --mirror"
                raise UserError(f"--mirror {self.url} is in use by {_holder(now)}; {remedy}")
            lease = now
        self._write_lease()
        self._check_lease()

    def _write_lease(self) -> None:
        self.renewals += 1
        lease = f"{self.owner} {self.renewals} process {os.getpid()} on {socket.gethostname()}"
        self._write(LEASE, lease.encode())

    def _check_lease(self) -> None:
        lease = self._read(LEASE)
        taken = lease and self.owner not in str(lease)
        if lease is None:  # the place may be away for a moment, or another process was there and has ended
            newest = self._newest_serial(self._listing())
            taken = newest > self.serial
            if newest < self.serial:
                raise OSError("its files are not there")
        if taken and not self.over:
            self.over = True
            self.report(f"{_holder(lease)} has taken {self.url}: nothing more is copied there from here")
        if self.over:
            raise OSError("the mirror is another process's")

    def _renew(self) -> None:
        """A thread."""
        while not self.ended.wait(RENEW_SECONDS) and not self.over:
            try:
                self._check_lease()
                self._write_lease()
            except Exception as error:
                self._tell(error)

    def _read(self, name: str) -> bytes | None:
        self.files.invalidate_cache()
        try:
            return bytes(self.files.cat_file(f"{self.path}/{name}"))
        except FileNotFoundError:
            return None

    def _write(self, name: str, content: bytes) -> None:
        """Write a small file at once: object stores do, and a folder by renaming."""
        folder, path = "file" in self.files.protocol, f"{self.path}/{name}"
        partial = f"{path}.{self.owner}.part" if folder else path
        self.files.pipe_file(partial, content)
        if folder:
            self.files.mv(partial, path)

    def _listing(self) -> dict[str, int]:
        """Bytes of every object and manifest there, by its name."""
        self.files.invalidate_cache()
        found = self.files.find(self.path, detail=True)
        sizes = {name.removeprefix(f"{self.path}/"): info["size"] for name, info in found.items()}
        return {name: size for name, size in sizes.items() if OURS.fullmatch(name)}

    def _newest_serial(self, names: Iterable[str]) -> int:
        """The number of the newest manifest; 0 if there is none."""
        return max((int(name[len(MANIFESTS) : -5]) for name in names if name.endswith(".json")), default=0)

    def _newest(self) -> tuple[dict[str, tuple[int, str]], dict[str, Any], tuple[int, int]]:
        """Files, record and progress of the newest manifest. Raises `UserError` if it is not as it was written."""
        name = f"{MANIFESTS}{self.serial:06d}.json"
        with user_errors(f"{self.url}/{name} is damaged, and is left as it is; use another --mirror"):
            manifest = json.loads(self._read(name) or b"")
            for file, (size, sha256) in manifest["files"].items():
                if re.search(r"(^|/)(\.|/|$)", file) or not re.fullmatch("[0-9a-f]{64}", sha256) or size < 0:
                    raise ValueError(file)  # `..` among them
            step, stages = map(int, manifest["reached"])
        with user_errors(f"{self.url} is damaged (record.json), and is left as it is; use another --mirror"):
            sha256 = manifest["files"]["record.json"][1]
            content = self._read(OBJECTS + sha256) or b""
            if hashlib.sha256(content).hexdigest() != sha256:
                raise ValueError("not the file that was copied")
            record = json.loads(content)
            _keys(record), training_of(record)  # or it is no record
            return manifest["files"], record, (step, stages)

    def _fetch_newer(self, record: Mapping[str, Any]) -> None:
        """Fetch the run unless the one on the disk is as far."""
        there = self._listing()
        self.serial = self._newest_serial(there)
        if not self.serial:
            return
        files, their_record, theirs = self._newest()
        here = {path.relative_to(self.run).as_posix(): path for path in walk(self.run) if path.is_file()}
        if None not in (known := (training_of(record), training_of(their_record))) and known[0] != known[1]:
            remedy = f"use another name or --mirror, or remove {self.url}"
            raise UserError(f"--mirror {self.url} holds the weights of another recipe than {self.run}; {remedy}")
        mine = reached(here, record) if "record.json" in here else (-1, 0)
        # What a crash of the machine has cut short here may be whole there.
        needed = (f"training_state/step-{theirs[0]:06d}/", "data/")
        cut = [name for name in files if name.startswith(needed) and _size(here.get(name)) < files[name][0]]
        if mine > theirs:
            further = f"{REACHED.format(*mine)} against {REACHED.format(*theirs)}"
            self.report(f"the run here is further than its mirror ({further}), and is used")
        elif mine < theirs or (cut and _keys(record) == _keys(their_record)):
            if world_size() > 1:
                raise UserError(f"{self.url} is further than {self.run}; run `nanophi prepare` with --mirror first")
            replaced = self._fetch(files, there)
            kept = f"; what was here was not {'whole' if mine == theirs else 'as far'}, and is in {replaced}"
            self.report(f"fetched from {self.url}: {REACHED.format(*theirs)}{kept if here else ''}")

    def _fetch(self, files: Mapping[str, tuple[int, str]], there: Mapping[str, int]) -> Path:
        """Put a manifest's files in the place of the run directory's, and return the folder to which those go.

        What is here already, in the run or from a fetch that was interrupted, is not fetched again.
        """
        new = self.run.resolve() / ".work" / "fetched"
        names = (self.run / f".replaced{suffix}" for suffix in ("", *(f"-{number}" for number in range(2, 10**6))))
        replaced = next(path for path in names if not path.exists())
        whole: dict[str, Path] = {}
        first: dict[str, Path] = {}
        for left in walk(new) if new.exists() else ():
            if left.relative_to(new).as_posix() not in files:
                left.unlink()
        for name, (size, sha256) in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            for known in (new / name, self.run / name):
                if sha256 not in whole and _size(known) == size and sha256_of_file(known) == sha256:
                    whole[sha256] = known.resolve()
            if there.get(OBJECTS + sha256) == size:
                first.setdefault(sha256, new / name)
        wanted = {sha256: path for sha256, path in first.items() if sha256 not in whole}
        for path in wanted.values():
            remove(path)
        self.files.get([f"{self.path}/{OBJECTS}{sha256}" for sha256 in wanted], list(map(str, wanted.values())))
        whole |= {sha256: path for sha256, path in wanted.items() if sha256_of_file(path) == sha256}
        # What a stage or a save made is used as a whole or not at all.
        damaged = {"/".join(name.split("/")[:2]) for name, (_, sha256) in files.items() if sha256 not in whole}
        for name, (_, sha256) in files.items():
            if sha256 in whole and whole[sha256] != new / name:
                remove(new / name)
                link_or_copy(str(whole[sha256]), str(new / name))
        for name in sorted(damaged):
            self.report(f"{name} is damaged on the mirror, and is left out")
            remove(new / name)
        # The record goes first and comes last: a run without one is fetched again.
        for entry in sorted(self.run.iterdir(), key=lambda entry: entry.name != "record.json"):
            if not entry.name.startswith("."):
                replaced.mkdir(exist_ok=True)
                entry.rename(replaced / entry.name)
        for entry in sorted(new.iterdir(), key=lambda entry: entry.name == "record.json"):
            entry.rename(self.run / entry.name)
        return replaced

    def note(self) -> None:
        """Note what the run directory holds now; nothing is written there meanwhile."""
        self.notes += 1
        folder = self.run / ".work" / f"mirror-{self.notes}"
        if self.over or not (self.run / "record.json").exists():
            return
        try:
            remove(folder)  # of a process that was killed
            for source in filter(Path.is_file, walk(self.run)):  # no broken links
                target = folder / (name := source.relative_to(self.run))
                target.parent.mkdir(parents=True, exist_ok=True)
                if name.parts[0] == GROWING:  # a hard link would grow with its file
                    shutil.copyfile(source, target)
                else:
                    _link(source.resolve(), target)
        except OSError as error:
            self._tell(error)
            return
        with self.changed:
            self.noted, before = folder, self.noted
            self.changed.notify_all()
        if before:
            remove(before)

    def _copy(self) -> None:
        """A thread: copy whatever is noted last."""
        noted: Path | None = None
        failures = last = 0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.noted or noted or self.ending)  # noqa: B023
                if noted and self.noted:
                    remove(noted)
                noted, self.noted = self.noted or noted, None
            if noted is None or self.over:
                return
            try:
                self._push(noted)
            except Exception as error:  # each file system has errors of its own
                failures, last = failures + 1, last + self.ending
                self._tell(error)
                if last == LAST_ATTEMPTS:
                    self.lacking = True
                    self.report(f"{self.url} lacks what was finished last; run the same command to copy it")
                    return
                if last:
                    time.sleep(min(2.0**last, LONGEST_PAUSE))
                    continue
                with self.changed:
                    self.changed.wait_for(lambda: self.ending, min(2.0**failures, LONGEST_PAUSE))
                continue
            remove(noted)
            noted, failures = None, 0
            if self.told:
                self.told.clear()
                self.report(f"the mirror {self.url} works again, and has everything")

    def _tell(self, error: Exception) -> None:
        if (line := one_line(error)) not in self.told and not self.over:
            self.told.add(line)
            self.report(f"the mirror {self.url} fails, and is tried again while the run continues ({line})")

    def _push(self, folder: Path) -> None:
        """Copy what is missing, check that it is there, name it, and remove what is not named any more."""
        self._check_lease()
        files, sizes, sources = {}, {}, {}
        for source in walk(folder):
            state = source.stat()
            key = state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
            if key not in self.hashes:
                self.hashes[key] = state.st_size, sha256_of_file(source)
            files[source.relative_to(folder).as_posix()] = size, sha256 = self.hashes[key]
            sizes[OBJECTS + sha256], sources[OBJECTS + sha256] = size, source
        there = self._listing()
        new = [name for name in sizes if there.get(name) != sizes[name]]
        for batch in (new[start : start + BATCH] for start in range(0, len(new), BATCH)):
            if self.over:
                return
            put(self.files, self.path, {name: sources[name] for name in batch})
        there = self._listing()
        if missing := [name for name in sizes if there.get(name) != sizes[name]]:
            raise OSError(f"{len(missing)} of {len(sizes)} files did not arrive whole")
        self._check_lease()
        self.serial += 1
        name, how_far = f"{MANIFESTS}{self.serial:06d}.json", reached(files, read_json(folder / "record.json"))
        content = json.dumps({"serial": self.serial, "reached": how_far, "files": files}).encode()
        self._write(name, content)
        if self._read(name) != content:
            raise OSError(f"{name} did not arrive whole")
        for old in sorted(there, key=lambda old: old.startswith(OBJECTS)):  # manifests before their objects
            if old not in sizes and old != name:
                self.files.rm_file(f"{self.path}/{old}")


def _holder(lease: bytes | None) -> str:
    return printable(lease.decode(errors="replace").split(" ", 2)[-1]) if lease else "another process"


def _size(path: Path | None) -> int:
    return path.stat().st_size if path is not None and path.is_file() else -1


def _keys(record: Mapping[str, Any]) -> dict[str, Any]:
    """The key of each stage, by its name."""
    stages = {**record["stages"], **record.get("in_progress", {})}
    return {name: entry.get("key") if isinstance(entry, dict) else entry for name, entry in stages.items()}
