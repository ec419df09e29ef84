"""The mirror: a run that lost its machine ends with the same weights, and no mirror's failure reaches the training."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import fsspec
import pytest
import requests
from fsspec.implementations.local import LocalFileSystem
from hub_client import talk_to
from hub_server import HubServer
from tiny_run import make_run, train

from nanophi.core import mirror
from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_tree, write_json
from nanophi.core.mirror import mirrored
from nanophi.core.names import step_of
from nanophi.core.run import RunDirectory
from nanophi.training import checkpoints

TESTS = str(Path(__file__).parents[1])
LOCAL = fsspec.filesystem("file", auto_mkdir=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("LEASE_SECONDS", 0.6), ("RENEW_SECONDS", 0.1), ("LONGEST_PAUSE", 0.05)):
        monkeypatch.setattr(mirror, name, seconds)


def make(path: Path) -> Path:
    """A run that is ready to train, with a record."""
    make_run(path)
    write_json(path / "record.json", {"stages": {"tokens": {}}})
    return path


def go(run: Path, url: object, lines: list[str] | None = None, **changes: object) -> dict:
    """Train in a run directory with a mirror."""
    with mirrored(str(url)), RunDirectory(run, (lines if lines is not None else []).append).lock():
        summary = train(run, **changes)
        mirror.saved(run)  # as the end of a stage does
        return summary


def meet(run: Path, url: object) -> list[str]:
    """Open a run directory with a mirror, and copy what is new; returns what was said."""
    lines: list[str] = []
    with mirrored(str(url)), RunDirectory(run, lines.append).lock():
        return lines


def contents(folder: Path) -> dict[str, str]:
    """Hash of everything that is not hidden, by name."""
    return {path.name: sha256_of_tree(path) for path in folder.iterdir() if path.name[0] != "."}


def manifest(folder: Path) -> dict:
    (path,) = (folder / "manifests").iterdir()
    return read_json(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and its mirror, in a folder. Do not change them."""
    folder = tmp_path_factory.mktemp("mirrored")
    (folder / "mirror").mkdir()
    go(make(folder / "here/tiny"), folder / "mirror")
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_a_finished_run_is_all_there_and_old_states_are_not(finished):
    run, there = finished / "here/tiny", finished / "mirror/tiny"
    made = manifest(there)
    assert made["reached"] == [24, 1]
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert set(made["files"]) == {name for name in files if not name.startswith(".")}
    objects = {path.name: path for path in (there / "objects").iterdir()}
    assert set(objects) == {sha256 for _, sha256 in made["files"].values()}  # of the two states that are kept here
    assert all(sha256_of_tree(path) == name for name, path in objects.items())
    assert not (there / "lease").exists() and not list(run.glob(".work/*"))


def test_another_machine_goes_on_where_the_mirror_ends(copy, tmp_path, monkeypatch):
    elsewhere = tmp_path / "other/machine/tiny"
    (elsewhere / "tensorboard").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    lines = meet(Path("other/machine/tiny"), copy / "mirror")
    assert contents(elsewhere) == contents(copy / "here/tiny")
    assert lines == [f"tiny: fetched from {copy}/mirror/tiny: step 24, 1 stages"]


class Killed:
    """Trainings in forks of one interpreter that has imported torch, each killed by SIGKILL at a moment of ours."""

    SERVER = """
import os, sys
sys.path[:0] = [sys.argv[1]]
from pathlib import Path
import tiny_run
from nanophi.core import mirror
from nanophi.core.run import RunDirectory
mirror.LEASE_SECONDS, mirror.RENEW_SECONDS = 0.6, 0.1
for line in sys.stdin:
    run, url = line.split()
    if not (child := os.fork()):
        os.dup2(2, 1)
        try:
            with mirror.mirrored(url), RunDirectory(run, lambda line: print(line, file=sys.stderr, flush=True)).lock():
                print("began", file=sys.stderr, flush=True)
                tiny_run.train(Path(run), steps=160, save_steps=2, eval_steps=40, keep_steps=[10], logging_steps=5)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

    def __init__(self, log: Path, **environment: str) -> None:
        self.log = log
        command = [sys.executable, "-c", self.SERVER, TESTS]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log.open("w"), "text": True}
        self.server = subprocess.Popen(command, env={**os.environ, **environment}, **pipes)

    def run(self, run: Path, url: str, seconds: float | None) -> int:
        """Exit status of a training that is killed so long after it began."""
        assert self.server.stdin and self.server.stdout
        began = self.log.read_text().count("began")
        print(run, url, file=self.server.stdin, flush=True)
        child = int(self.server.stdout.readline())
        if seconds is not None:
            for _ in range(2000):
                if self.log.read_text().count("began") > began:
                    break
                time.sleep(0.01)
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(self.server.stdout.readline())


def kill_ten_times(folder: Path, url: str, killed: Killed, files, path: str) -> None:
    """Kill a mirrored training ten times and lose its disk each time; then compare with one that was left alone."""
    plain = make(folder / "plain/tiny")
    whole = train(plain, steps=160, save_steps=2, eval_steps=40, keep_steps=[10], logging_steps=5)
    moments, kills, reached = random.Random(0), 0, []
    make(folder / "0/tiny")
    while kills < 10:
        run = folder / f"{kills}/tiny"
        status = killed.run(run, url, moments.uniform(0, 1.2))
        assert status == -signal.SIGKILL, killed.log.read_text()[-2000:]
        on_disk = max(map(step_of, checkpoints.states(run)), default=0)
        files.invalidate_cache()
        names = [name for name in files.find(f"{path}/tiny/manifests") if name.endswith(".json")]
        mirrored_step = json.loads(files.cat_file(max(names)))["reached"][0] if names else 0
        assert (reached or [0])[-1] <= mirrored_step <= on_disk
        reached.append(mirrored_step)
        kills += 1
        if names:
            shutil.rmtree(folder / f"{kills - 1}")
        else:  # killed before the first copy: nothing was finished but what the user began with
            (folder / f"{kills - 1}").rename(folder / f"{kills}")
    last = folder / "10/tiny"
    assert killed.run(last, url, None) == 0, killed.log.read_text()[-2000:]
    assert killed.log.read_text().count("fetched from") >= 5
    again = read_json(last / "training.json")
    assert again["summary"]["weights_sha256"] == whole["weights_sha256"]
    assert again["evaluations"] == read_json(plain / "training.json")["evaluations"]
    losses = [[entry["loss"] for entry in known["log"]] for known in (again, read_json(plain / "training.json"))]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_ten_kills_and_ten_lost_disks_leave_the_same_weights(tmp_path):
    (tmp_path / "mirror").mkdir()
    url = str(tmp_path / "mirror")
    kill_ten_times(tmp_path, url, Killed(tmp_path / "log"), LOCAL, url)


class Unreliable(LocalFileSystem):
    """A folder behind a service: before every call something may happen."""

    cachable = False

    def __init__(self, happens: Callable[[str, str], None]) -> None:
        super().__init__(auto_mkdir=True)
        self.happens = happens

    def cp_file(self, path1, path2, **kwargs):
        self.happens("put" if "/objects/" in path2 else "get", path2)
        super().cp_file(path1, path2, **kwargs)


for call in ("pipe_file", "cat_file", "find", "rm_file", "mv"):

    def wrapped(self, path, *args, call=call, **kwargs):
        self.happens(call, path)
        return getattr(LocalFileSystem, call)(self, path, *args, **kwargs)

    setattr(Unreliable, call, wrapped)


@pytest.fixture
def service(tmp_path, monkeypatch):
    """Let `happens(call, path)` be called before every call to the mirror; gives its URL."""
    (tmp_path / "mirror").mkdir()

    def begin(happens: Callable[[str, str], None]) -> str:
        monkeypatch.setattr(mirror, "connect", lambda url: (Unreliable(happens), str(tmp_path / "mirror")))
        return str(tmp_path / "mirror")

    return begin


@pytest.fixture(scope="module")
def weights(finished):
    return read_json(finished / "here/tiny/training.json")["summary"]["weights_sha256"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError("Access Denied"), "Access Denied"),
        (TimeoutError("https://x/y?X-Amz-Signature=secret timed out"), "https://x/y timed out"),
    ],
)
def test_a_mirror_that_fails_is_told_once_tried_again_and_harms_nothing(tmp_path, service, weights, error, told):
    left, lines = [7], []

    def fail(call: str, path: str) -> None:
        if call == "put" and left[0] and left.append(left.pop() - 1) is None:
            raise error

    url = service(fail)
    assert go(make(tmp_path / "here/tiny"), url, lines)["weights_sha256"] == weights
    assert len(lines) == 2, lines
    failing, works = lines
    assert failing == f"tiny: the mirror {url}/tiny fails, and is tried again while the run continues ({told})"
    assert works == f"tiny: the mirror {url}/tiny works again, and has everything"
    assert manifest(tmp_path / "mirror/tiny")["reached"] == [24, 1]


def test_what_is_missing_at_the_end_is_said_and_copied_by_the_next_run(tmp_path, service, weights):
    broken, lines = [True], []

    def fail(call: str, path: str) -> None:
        if call == "put" and broken:
            raise OSError(errno.EROFS, "Read-only file system")

    url, run = service(fail), make(tmp_path / "here/tiny")
    (run / ".work/mirror-1/left").mkdir(parents=True)  # by a process that was killed
    (run / "gone").symlink_to("nowhere")
    with pytest.raises(
        UserError, match="tiny: the mirror lacks what was finished last; run the same command to copy it"
    ):
        go(run, url, lines)
    assert read_json(run / "training.json")["summary"]["weights_sha256"] == weights
    assert lines[-1] == f"tiny: {url}/tiny lacks what was finished last; run the same command to copy it"
    assert not list((tmp_path / "mirror").glob("tiny/manifests/*.json"))
    broken.clear()
    meet(run, url)
    assert manifest(tmp_path / "mirror/tiny")["reached"] == [24, 1]


def test_training_does_not_wait_for_a_mirror_until_its_end(tmp_path, service, weights):
    trained, waited = threading.Event(), []

    def wait(call: str, path: str) -> None:
        if call == "put":
            waited.append(trained.wait(120))

    run, lines = make(tmp_path / "here/tiny"), []
    with mirrored(service(wait)), RunDirectory(run, lines.append).lock():
        assert train(run)["weights_sha256"] == weights  # though not one file could be copied
        assert not list((tmp_path / "mirror").glob("tiny/objects/*"))
        trained.set()
    assert all(waited) and not lines
    assert manifest(tmp_path / "mirror/tiny")["reached"] == [24, 1]


@pytest.mark.parametrize("silent", [True, False])
def test_a_torn_upload_is_never_named(tmp_path, service, weights, silent):
    torn, lines = [], []

    def tear(call: str, path: str) -> None:
        if call == "mv" and "manifests" in path:
            objects = tmp_path / "mirror/tiny/objects"
            assert all(sha256_of_tree(path) == path.name for path in objects.iterdir()), "named before it is whole"

    class Torn(Unreliable):
        def cp_file(self, path1, path2, **kwargs):
            super().cp_file(path1, path2, **kwargs)
            if "/objects/" in path2 and len(torn) < 3:
                torn.append(path2)
                os.truncate(path2, Path(path2).stat().st_size // 2)
                if not silent:
                    raise ConnectionResetError("cut")

    url = service(tear)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror, "connect", lambda url: (Torn(tear), url))
        assert go(make(tmp_path / "here/tiny"), url, lines)["weights_sha256"] == weights
    assert len(torn) == 3 and len(lines) == 2
    assert ("files did not arrive whole" if silent else "(cut)") in lines[0]
    assert manifest(tmp_path / "mirror/tiny")["reached"] == [24, 1]


@pytest.mark.parametrize("error", [PermissionError("Forbidden"), FileNotFoundError("no such bucket")])
def test_a_mirror_that_cannot_be_used_is_refused_before_anything(tmp_path, service, error):
    def fail(call: str, path: str) -> None:
        if call == "pipe_file":
            raise error

    run = make(tmp_path / "here/tiny")
    with pytest.raises(UserError, match=f"--mirror .*/mirror/tiny cannot be used; check it.*{error}"):
        go(run, service(fail))
    assert not (run / "checkpoints").exists()


def test_urls_that_cannot_be_meant(tmp_path):
    run = make_run(tmp_path / "tiny")
    for url, why in (
        (str(tmp_path / "drive"), "there is no folder .*drive; make it, or mount the drive"),
        ("sftp://me:secret@host/runs", "the URL holds a password"),
        ("s3://key:sec/ret-of-mine@bucket", "the URL holds a password"),
        ("memory://bucket/runs?sig=secret", "the URL holds a password"),
        ("nosuch://bucket/x", "cannot be used"),
        ("http://[x", "cannot be used"),
        ("hf://buckets/org", "names no bucket"),
        (" ", "--mirror is empty"),
        (str(tmp_path), "it would be in the run .* itself"),
        (str(tmp_path / "tiny"), "it would be in the run .* itself"),
    ):
        with pytest.raises(UserError, match=why) as refused:
            go(run, url)
        assert "secret" not in str(refused.value) and "ret-of-mine" not in str(refused.value)


def test_a_state_that_was_damaged_on_the_mirror_is_not_used(copy, tmp_path, weights):
    there = copy / "mirror/tiny"
    files = manifest(there)["files"]
    damaged = there / "objects" / files["training_state/step-000024/optimizer.pt"][1]
    damaged.write_bytes(damaged.read_bytes()[::-1])
    lines: list[str] = []
    run = tmp_path / "elsewhere/tiny"
    assert go(run, copy / "mirror", lines)["weights_sha256"] == weights
    assert lines[0] == "tiny: training_state/step-000024 is damaged on the mirror, and is left out"
    assert checkpoints.find_corruption(run / "training_state/step-000024") is None  # made again
    meet(tmp_path / "third/tiny", copy / "mirror")
    assert checkpoints.find_corruption(tmp_path / "third/tiny/training_state/step-000024") is None


def test_a_mirror_without_a_usable_record_is_left_as_it_is(copy, tmp_path):
    there = copy / "mirror/tiny"
    (path,) = (there / "manifests").iterdir()
    known = read_json(path)
    (there / "objects" / known["files"]["record.json"][1]).unlink()
    for content, why in (
        (json.dumps(known), r"is damaged \(record.json\)"),
        ("{", "000...json is damaged"),
        (json.dumps(known | {"files": {"../x": [1, "0" * 64]}}), "is damaged"),
        (json.dumps(known | {"files": {"x": [1, "../../x"]}}), "is damaged"),
    ):
        path.write_text(content)
        before = contents(there)
        with pytest.raises(UserError, match=why + ".*left as it is; use another --mirror"):
            go(tmp_path / "elsewhere/tiny", copy / "mirror")
        assert contents(there) == before
        assert not contents(tmp_path / "elsewhere/tiny")


def test_the_newer_of_disk_and_mirror_is_used(copy, tmp_path):
    url = copy / "mirror"
    older = Path(shutil.copytree(copy / "here/tiny", tmp_path / "older/tiny"))
    for folder in ("training_state", "checkpoints"):
        shutil.rmtree(older / folder / "step-000024")
    (older / "note.txt").write_text("of the user")
    lines = meet(older, url)
    assert contents(older) == contents(copy / "here/tiny")
    assert (older / ".replaced/note.txt").read_text() == "of the user"
    assert lines[0].endswith(f"step 24, 1 stages; what was here was not as far, and is in {older}/.replaced")
    shutil.rmtree(older / "training_state")
    lines = meet(older, url)  # a second time: what the first has set aside stays
    assert lines[0].endswith(f"and is in {older}/.replaced-2") and contents(older) == contents(copy / "here/tiny")
    assert (older / ".replaced/note.txt").read_text() == "of the user"
    write_json(older / "record.json", {"stages": {"tokens": {}, "training": {}}})
    further = "step 24, 2 stages against step 24, 1 stages"
    assert meet(older, url) == [f"tiny: the run here is further than its mirror ({further}), and is used"]
    assert manifest(copy / "mirror/tiny")["reached"] == [24, 2]


def test_only_what_a_mirror_wrote_is_removed_from_it(copy):
    there = copy / "mirror/tiny"
    (old := there / "objects" / ("0" * 64)).write_text("of a manifest that is gone")
    (there / "objects/thesis.txt").write_text("of the user")
    (there / "manifests/notes.json").write_text("of the user")
    meet(copy / "here/tiny", copy / "mirror")
    assert not old.exists() and len(list((there / "manifests").iterdir())) == 2
    assert (there / "objects/thesis.txt").exists() and (there / "manifests/notes.json").exists()


def test_a_folder_that_is_a_link_is_copied_and_a_file_that_grows_is_not_linked(copy, tmp_path, monkeypatch):
    run, url = copy / "here/tiny", tmp_path / "other"
    url.mkdir()
    (run / "data").rename(copy / "elsewhere")
    (run / "data").symlink_to("../../elsewhere")
    (run / "tensorboard").mkdir()
    (log := run / "tensorboard/events").write_text("step 1")
    pushed = mirror.Mirror._push

    def grow(self, folder):
        with log.open("a") as file:
            file.write(", step 2")
        pushed(self, folder)

    monkeypatch.setattr(mirror.Mirror, "_push", grow)
    monkeypatch.chdir(tmp_path)
    assert meet(run, url) == []
    files = manifest(url / "tiny")["files"]
    assert files["tensorboard/events"][0] == len("step 1")
    there = {name for name in files if name.startswith("data/")}
    assert there == {name for name in manifest(copy / "mirror/tiny")["files"] if name.startswith("data/")} != set()


def test_the_weights_of_another_recipe_are_not_replaced_on_either_side(copy, tmp_path):
    def train_on(run: Path, rate: float, steps: int) -> None:
        inputs = {"data": {"train_sha256": "0"}, "training": {"learning_rate": rate, "steps": steps}}
        write_json(run / "record.json", {"stages": {"training": {"key": f"{rate} {steps}", "inputs": inputs}}})

    run, other = copy / "here/tiny", Path(shutil.copytree(copy / "here/tiny", tmp_path / "other/tiny"))
    train_on(run, 0.1, 24)
    meet(run, copy / "mirror")
    train_on(run, 0.1, 48)  # a longer training of the same weights
    assert meet(run, copy / "mirror") == []
    train_on(other, 0.2, 48)
    before = contents(other), manifest(copy / "mirror/tiny")
    (other / "training_state/step-000048").mkdir()
    (other / "training_state/step-000048/state.json").write_text("{}")
    refused = pytest.raises(UserError, match=r"mirror/tiny holds the weights of another recipe than .*; use another")
    with refused:
        meet(other, copy / "mirror")
    shutil.rmtree(other / "training_state/step-000048")
    shutil.rmtree(other / "training_state/step-000024")
    with refused:
        meet(other, copy / "mirror")
    assert manifest(copy / "mirror/tiny") == before[1] and not list(other.glob(".replaced*"))


def test_what_a_crash_has_cut_short_is_fetched_and_the_rest_is_not(copy, monkeypatch):
    run, got = copy / "here/tiny", []
    whole = contents(run)
    state = run / "training_state/step-000024/optimizer.pt"
    state.unlink()  # not written through: its link in the other copy stays
    state.write_bytes(b"")

    def cut(self, remote, *rest, **options):
        got.append(remote)
        raise ConnectionError("cut")

    monkeypatch.setattr(LocalFileSystem, "get_file", cut)
    with pytest.raises(UserError, match=r"cannot be used; check it.*cut"):
        meet(run, copy / "mirror")
    assert len(got) == 1
    monkeypatch.undo()
    lines = meet(run, copy / "mirror")
    assert lines[0].endswith(f"what was here was not whole, and is in {run}/.replaced") and contents(run) == whole


def test_a_mirror_that_is_away_for_a_moment_is_used_again(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "RENEW_SECONDS", 0.02)
    run, lines = copy / "here/tiny", []
    with mirrored(str(copy / "mirror")), RunDirectory(run, lines.append).lock():
        (copy / "mirror").rename(copy / "away")
        for _ in range(500):
            if lines:
                break
            time.sleep(0.01)
        (run / "made meanwhile").write_text("x")
        mirror.saved(run)
        shutil.rmtree(copy / "mirror", ignore_errors=True)  # the empty folder that a mount leaves, or none
        (copy / "away").rename(copy / "mirror")
    assert "fails, and is tried again" in lines[0] and "works again" in lines[-1] and "taken" not in "".join(lines)
    assert "made meanwhile" in manifest(copy / "mirror/tiny")["files"]


def test_a_second_machine_is_refused_while_the_first_lives(copy, tmp_path):
    url = str(copy / "mirror")
    used = pytest.raises(UserError, match=rf"mirror/tiny is in use by process {os.getpid()} on .*; wait for it")
    with mirrored(url), RunDirectory(copy / "here/tiny").lock(), used:
        go(tmp_path / "elsewhere/tiny", url)
    (copy / "mirror/tiny/lease").write_text("0123456789abcdef 7 process 12 on a machine that is gone")
    first = meet(tmp_path / "elsewhere/tiny", url)[0]
    assert "may be in use by process 12 on a machine that is gone; waiting" in first


def test_who_has_lost_the_mirror_trains_on_without_it(tmp_path, service, weights, monkeypatch):
    monkeypatch.setattr(mirror, "RENEW_SECONDS", 1000.0)
    lines: list[str] = []
    lease = tmp_path / "mirror/tiny/lease"

    def take(call: str, path: str) -> None:
        if call == "put" and "elsewhere" not in lease.read_text():
            lease.write_text("0123456789abcdef 1 process 12 on elsewhere")

    assert go(make(tmp_path / "here/tiny"), service(take), lines)["weights_sha256"] == weights
    assert len(lines) == 1 and lines[0].startswith("tiny: process 12 on elsewhere has taken ")
    assert lease.read_text().endswith("elsewhere") and not list((tmp_path / "mirror").glob("tiny/manifests/*"))


def test_a_lease_that_is_being_renewed_at_the_end_is_given_back(tmp_path, service):
    renewing, ending = threading.Event(), threading.Event()

    def slow(call: str, path: str) -> None:
        if threading.current_thread() is threading.main_thread():
            if call == "cat_file" and renewing.is_set():
                ending.set()
        elif call == "pipe_file" and "/lease." in path:
            renewing.set()
            ending.wait(1)
            time.sleep(0.2)  # in which what has ended would remove the lease

    with mirrored(service(slow)), RunDirectory(make(tmp_path / "here/tiny")).lock():
        assert renewing.wait(60)
    time.sleep(0.5)
    assert (tmp_path / "mirror/tiny").is_dir() and not (tmp_path / "mirror/tiny/lease").exists()


@pytest.fixture
def s3(tmp_path, monkeypatch):
    """A server of S3's protocol on this machine, with a bucket, that checks keys and signatures."""
    pytest.importorskip("moto")
    boto3, s3fs = pytest.importorskip("boto3"), pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

    def use(key: str, secret: str) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        s3fs.S3FileSystem.clear_instance_cache()

    for name, value in {"AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(300):
                with contextlib.suppress(OSError):
                    requests.get(f"{url}/moto-api/")
                    break
                time.sleep(0.1)
            use("anybody", "until keys are checked")
            iam, everything = boto3.client("iam"), {"Effect": "Allow", "Action": "*", "Resource": "*"}
            policy = json.dumps({"Version": "2012-10-17", "Statement": [everything]})
            iam.create_user(UserName="user")
            iam.put_user_policy(UserName="user", PolicyName="all", PolicyDocument=policy)
            key = iam.create_access_key(UserName="user")["AccessKey"]
            requests.post(f"{url}/moto-api/reset-auth", data="0")
            use(key["AccessKeyId"], key["SecretAccessKey"])
            files = s3fs.S3FileSystem(skip_instance_cache=True)
            files.mkdir("bucket")
            files.use = use
            yield files
        finally:
            server.kill()


@pytest.mark.slow
def test_ten_kills_with_an_s3_server(tmp_path, s3):
    kill_ten_times(tmp_path, "s3://bucket/runs", Killed(tmp_path / "log"), s3, "bucket/runs")


@pytest.mark.slow
def test_an_s3_bucket_that_is_missing_or_closed_is_one_line(tmp_path, s3):
    run = make(tmp_path / "here/tiny")
    with pytest.raises(UserError, match="--mirror s3://absent/runs/tiny cannot be used; check it and your credentials"):
        go(run, "s3://absent/runs")
    assert s3.ls("") == ["bucket"]
    key = os.environ["AWS_ACCESS_KEY_ID"]
    for wrong in ((key, "a-wrong-secret"), ("AKIAOFNOBODY", "a-wrong-secret")):
        s3.use(*wrong)
        with pytest.raises(UserError, match="s3://bucket/runs/tiny cannot be used; check it and your cred") as refused:
            go(run, "s3://bucket/runs")
        assert len(str(refused.value).splitlines()) == 1 and "a-wrong-secret" not in str(refused.value)
    assert not (run / "checkpoints").exists() and not s3.find("bucket")


def test_a_bucket_of_the_hub(finished, tmp_path, monkeypatch):
    """By the real client, but for the uploads: they go to a store that is not simulated."""
    from huggingface_hub import HfApi

    def batch(self, bucket_id, *, add=(), copy=(), delete=(), token=None):
        for source, path in add or ():
            server.buckets[bucket_id][path] = Path(source).read_bytes()
        for path in delete or ():
            del server.buckets[bucket_id][path]

    run, elsewhere, url = Path(shutil.copytree(finished / "here", tmp_path / "here")) / "tiny", tmp_path / "2/tiny", ""
    with HubServer() as server:
        talk_to(server, tmp_path / "home", monkeypatch)
        monkeypatch.setattr(HfApi, "batch_bucket_files", batch)
        server.buckets["org/bucket"] = {"other/file": b"of somebody else"}
        for url, path in (("hf://buckets/org/bucket/a/b", elsewhere), ("hf://buckets/org/bucket", tmp_path / "3/tiny")):
            for folder in (run, path):
                meet(folder, url)
            assert contents(path) == contents(run)
        names = {name.rpartition("/")[0] for name in server.buckets["org/bucket"]}
        assert names == {"other", *(f"{top}tiny/{part}" for top in ("a/b/", "") for part in ("objects", "manifests"))}
        with pytest.raises(UserError, match="--mirror hf://buckets/org/absent/tiny cannot be used"):
            go(run, "hf://buckets/org/absent")
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_stranger")
        with pytest.raises(UserError, match="cannot be used; check it and your credentials") as refused:
            go(run, "hf://buckets/org/bucket")
        assert "hf_of_a_stranger" not in str(refused.value)


RECIPE = """
name: {name}
data: {{sources: [{{files: "{folder}/a.jsonl"}}], heldout_fraction: 0.1, workers: 1}}
quality: {{scorer: "column:score", threshold: {threshold}}}
tokenizer: {{vocab_size: 400}}
model:
  {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 8, max_position_embeddings: 256}}
training: {{steps: 6, batch_size: 2, learning_rate: 0.01, save_steps: 2, eval_steps: 6, logging_steps: 1}}
evaluation: {{suites: [heldout], limit: 8}}
"""


@pytest.mark.slow
def test_the_verbs_with_a_mirror_on_two_machines(tmp_path):
    """Prepared here, trained there, and on a third machine the rest of two runs side by side."""
    texts = [text[start : start + 2000] for text in topics.values() for start in range(0, len(text), 2000)][:150]
    lines = [json.dumps({"text": text, "score": 0.9 if n % 3 else 0.1}) for n, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "mirror").mkdir()
    for name, threshold in (("one", 0.5), ("two", "null")):
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(name=name, folder=tmp_path, threshold=threshold))

    def nanophi(machine: str, *arguments: str) -> str:
        (tmp_path / machine).mkdir()
        command = [sys.executable, "-m", "nanophi", *arguments]
        environment = {**os.environ, "NANOPHI_MIRROR": str(tmp_path / "mirror")}
        done = subprocess.run(command, cwd=tmp_path / machine, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert "fails" not in done.stdout
        return done.stdout

    assert "fetched" not in nanophi("first", "prepare", "../one.yaml")
    assert "step 0, 5 stages" in nanophi("second", "train", "../one.yaml")
    trained = read_json(tmp_path / "second/runs/one/training.json")["summary"]
    out = nanophi("third", "run", "../one.yaml", "../two.yaml", "--jobs", "2")
    assert "step 6, 6 stages" in out and out.count("fetched from") == 1 and "waiting" not in out
    assert "one: training       up to date" in out
    assert read_json(tmp_path / "third/runs/one/training.json")["summary"] == trained
    for name in ("one", "two"):
        run = tmp_path / "third/runs" / name
        known = manifest(tmp_path / "mirror" / name)
        assert known["reached"] == [6, len(read_json(run / "record.json")["stages"])]
        assert "release/model.safetensors" in known["files"] and "comparison.json" in known["files"]
        assert not list(tmp_path.glob("mirror/*/lease*"))
