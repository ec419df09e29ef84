"""A loopback Hub: enough of the REST API that the real `huggingface_hub` client can push to it and load from it.

Repositories live in memory as commits over content-addressed files. `hub.cut(...)` drops the connection at a chosen
moment and stays silent until `hub.restore()`, as a failing network does; `hub.fail(...)` answers with an error.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import http.server
import json
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from nanophi.core.licenses import HUB_LICENSES

TOKEN = "hf_loopback"
LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".arrow", ".bin", ".gguf", ".zip")
LFS_SIZE = 10_000_000
GITATTRIBUTES = b"".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n".encode() for suffix in LFS_SUFFIXES)


class HubError(Exception):
    """An answer other than 2xx."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message or code)
        self.status, self.code, self.message = status, code, message or code


class Cut(Exception):  # noqa: N818
    """The connection ends here."""


class File:
    """A file of a commit: its bytes, stored as a git blob or as an LFS object."""

    def __init__(self, data: bytes, lfs: bool) -> None:
        self.data, self.lfs, self.sha256 = data, lfs, hashlib.sha256(data).hexdigest()
        version = "version https://git-lfs.github.com/spec/v1"
        self.pointer = f"{version}\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        blob = self.pointer if lfs else data
        self.oid = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
        self.etag = self.sha256 if lfs else self.oid


@dataclasses.dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str
    parent: Commit | None
    files: Mapping[str, File]
    title: str
    date: str

    def history(self) -> list[Commit]:
        """This commit and those before it, newest first."""
        return [self, *(self.parent.history() if self.parent else [])]


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Repository:
    """Branches and tags over commits. Begins with one commit that holds `.gitattributes`, as on the Hub."""

    def __init__(self, kind: str, name: str, private: bool) -> None:
        self.kind, self.name, self.private = kind, name, private
        self.branches: dict[str, Commit] = {}
        self.tags: dict[str, Commit] = {}
        self.commits: dict[str, Commit] = {}
        self.add("main", {".gitattributes": File(GITATTRIBUTES, lfs=False)}, "initial commit")

    def add(self, branch: str, files: Mapping[str, File], title: str) -> Commit:
        """Commit the whole tree `files` on a branch."""
        parent = self.branches.get(branch)
        tree = sorted((path, file.oid) for path, file in files.items())
        content = json.dumps([parent.oid if parent else None, title, tree, len(self.commits)])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = self.branches[branch] = Commit(oid, parent, dict(files), title, now())
        return self.commits[oid]

    def at(self, revision: str) -> Commit:
        """The commit that a branch, tag or commit hash names."""
        revision = urllib.parse.unquote(revision).removeprefix("refs/heads/")
        if (found := {**self.commits, **self.tags, **self.branches}.get(revision)) is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found


class HubServer:
    """The server, on a free port of 127.0.0.1; a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}  # by kind ("model", "dataset", "space") and id
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.collections: dict[str, dict[str, Any]] = {}  # by slug
        self.jobs: dict[str, dict[str, Any]] = {}  # by id: what was asked for, and its `log` and `stage`
        self.buckets: dict[str, dict[str, bytes]] = {}  # files by id and path; uploads need Xet, which is not here
        self.answer: list[str] = []  # the log of the next jobs
        self.requests: list[str] = []  # "METHOD path"
        self.lock = threading.RLock()
        self._cut: tuple[int, str] | None = None
        self._silent = False
        self._faults: list[list[Any]] = []
        server = self

        class Handler(_Handler):
            hub = server

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables under which a fresh process uses this server, with its own empty cache."""
        fixed = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"), "1")
        fixed |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "0")
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home), **fixed}

    def add_repository(
        self, kind: str, name: str, files: Mapping[str, bytes], private: bool = False, branch: str = "main"
    ) -> Repository:
        """Put a repository on the server, or a further commit into it."""
        repository = self.repositories.setdefault((kind, name), Repository(kind, name, private))
        tree = {path: File(data, is_lfs(path, len(data))) for path, data in files.items()}
        self.objects.update({file.sha256: file.data for file in tree.values() if file.lfs})
        repository.add(branch, {**repository.branches["main"].files, **tree}, "add files")
        return repository

    def cut(self, after: int, moment: str) -> None:
        """Fail at the request after `after` more ones, and from then on, until `restore`.

        `moment`: "before" the request is read, "during" its body, or "after" it had its effect, unanswered.
        """
        self._cut, self._silent = (len(self.requests) + after, moment), False

    def restore(self) -> None:
        """The network is back."""
        self._cut, self._silent = None, False

    def fail(self, request: str, status: int, times: int = 1, *, after: bool = False, **headers: str) -> None:
        """Answer the next `times` requests whose "METHOD path" matches the pattern with an error.

        With `after` the request has its effect before; `Retry_After="1"` becomes the answer's header `Retry-After: 1`.
        """
        self._faults.append([re.compile(request), status, times, after, headers])

    def fault(self, line: str) -> tuple[Answer, bool] | None:
        """The error with which a request is to be answered, if at all, and whether after its effect."""
        for fault in self._faults:
            pattern, status, times, after, headers = fault
            if times and pattern.search(line):
                fault[2] -= 1
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                return Answer({"error": f"injected {status}"}, named, status), after
        return None

    def moment(self, line: str) -> str | None:
        """Note a request; when its connection is to be cut, if at all."""
        with self.lock:
            if self._silent:
                return "before"
            self.requests.append(line)
            if self._cut is not None and len(self.requests) > self._cut[0]:
                self._silent = True
                return self._cut[1]
            return None

    def repository(self, kind: str, name: str, authorized: bool) -> Repository:
        """The repository; a private one does not exist for a stranger."""
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and not authorized):
            raise HubError(401 if not authorized else 404, "RepoNotFound", "Repository Not Found")
        return repository


def is_lfs(path: str, size: int) -> bool:
    """Whether the Hub stores a file as an LFS object."""
    return size > LFS_SIZE or path.endswith(LFS_SUFFIXES)


@dataclasses.dataclass
class Request:
    """One call; `rest` is its path split by its route."""

    hub: HubServer
    query: dict[str, str]
    body: bytes
    authorized: bool
    rest: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def repository(self) -> Repository:
        return self.hub.repository(self.rest.get("kind") or "model", self.rest["name"], self.authorized)


@dataclasses.dataclass
class Answer:
    """What goes back: JSON or bytes."""

    body: Any = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    status: int = 200


Route = Callable[[Request], Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
ANONYMOUS = re.compile(r"/api/validate-yaml|/lfs/.+|/api/.+/paths-info/.+")
"""Paths that need no token, though the method is not GET."""
NAMESPACE = r"(?P<name>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>model|dataset|space)s/{NAMESPACE}"


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Answer `method` calls of paths that match `pattern` with the decorated function."""

    def add(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return add


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> Answer:
    if not request.authorized:
        raise HubError(401, "", "Invalid username or password.")
    token = {"accessToken": {"displayName": "loopback", "role": "write"}, "type": "access_token"}
    return Answer({"type": "user", "name": "org", "fullname": "Loopback", "orgs": [], "auth": token})


SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "n>1T")
COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def metadata_errors(content: str) -> list[str]:
    """What the Hub refuses in a card, by its specification (hub-docs, modelcard.md, datasetcard.md, Spaces)."""
    parts = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        metadata = yaml.safe_load(parts[1]) if parts else {}  # without a header the Hub only warns
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["the metadata is not a mapping"]

    def listed(key: str) -> list[Any]:
        value = metadata.get(key, [])
        return value if isinstance(value, list) else [value]

    errors = []
    known = {"license": HUB_LICENSES.__contains__, "size_categories": SIZES.__contains__}
    known |= dict.fromkeys(("datasets", "base_model", "models", "new_version"), HUB_ID.fullmatch)
    known |= {"sdk": ("gradio", "docker", "static").__contains__}
    known |= dict.fromkeys(("colorFrom", "colorTo"), COLOURS.__contains__)
    for key, accepted in known.items():
        errors += [f'"{key}" {value!r} is none that the Hub knows' for value in listed(key) if not accepted(str(value))]
    for number, config in enumerate(listed("configs")):
        if not config.get("config_name") or not config.get("data_files"):
            errors.append(f'"configs[{number}]" needs "config_name" and "data_files"')
    emissions = metadata.get("co2_eq_emissions", 0)
    grams = emissions.get("emissions") if isinstance(emissions, dict) else emissions
    if not isinstance(grams, int | float):
        errors.append('"co2_eq_emissions" must be a number of grams, or hold one as "emissions"')
    for model in listed("model-index"):
        errors += [] if model.get("name") else ['"model-index[0].name" is required']
        for number, result in enumerate(model.get("results", [])):
            where = f"model-index[0].results[{number}]"
            required = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            errors += [f'"{where}.{a}.{b}" is required' for a, b in required if not result.get(a, {}).get(b)]
            for metric in result.get("metrics") or [{}]:
                errors += [f'"{where}.metrics.{key}" is required' for key in ("type", "value") if key not in metric]
    return errors


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> Answer:
    body = request.json
    errors = metadata_errors(body["content"])
    if body["repoType"] == "space" and "\nsdk: " not in body["content"]:
        errors.append('"sdk" is required')
    return Answer({"errors": [{"message": error} for error in errors], "warnings": []}, status=400 if errors else 200)


@route("POST", "/api/repos/create")
def create_repository(request: Request) -> Answer:
    body = request.json
    kind = body.get("type") or "model"
    name = f"{body.get('organization') or 'org'}/{body['name']}"
    url = f"{request.hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"
    if (kind, name) in request.hub.repositories:
        return Answer({"error": "You already created this repo", "url": url}, status=409)
    if kind == "space" and body.get("sdk") != "static":
        raise HubError(400, "", "a Space needs an sdk; of these, only static ones are free")
    private = body.get("visibility") == "private" or body.get("private") is True
    request.hub.repositories[kind, name] = Repository(kind, name, private)
    return Answer({"url": url, "name": name, "id": name})


@route("PUT", API + "/settings")
def settings(request: Request) -> Answer:
    body = request.json
    request.repository.private = body["visibility"] == "private" if "visibility" in body else body["private"]
    return Answer({})


@route("POST", API + r"/preupload/(?P<revision>[^/]+)")
def preupload(request: Request) -> Answer:
    files = request.repository.at(request.rest["revision"]).files
    answers = []
    for entry in request.json["files"]:
        mode = "lfs" if is_lfs(entry["path"], entry["size"]) else "regular"
        known = {"oid": files[entry["path"]].etag} if entry["path"] in files else {}
        answers.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, **known})
    return Answer({"files": answers})


@route("POST", rf"/(?:(?P<kind>model|dataset|space)s/)?{NAMESPACE}\.git/info/lfs/objects/batch")
def lfs_batch(request: Request) -> Answer:
    objects = []
    for entry in request.json["objects"]:
        answer: dict[str, Any] = {"oid": entry["oid"], "size": entry["size"]}
        if entry["oid"] not in request.hub.objects:
            upload = f"{request.hub.endpoint}/lfs/{entry['oid']}"
            answer["actions"] = {"upload": {"href": upload}, "verify": {"href": f"{upload}/verify"}}
        objects.append(answer)
    return Answer({"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})


@route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_upload(request: Request) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != request.rest["oid"]:
        raise HubError(422, "", "the bytes do not have the announced SHA-256")
    request.hub.objects[request.rest["oid"]] = request.body
    return Answer({})


@route("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify")
def lfs_verify(request: Request) -> Answer:
    stored = request.hub.objects.get(request.json["oid"])
    if stored is None or len(stored) != request.json["size"]:
        raise HubError(404, "", "object is not stored")
    return Answer({})


@route("POST", API + r"/commit/(?P<revision>[^/]+)")
def commit(request: Request) -> Answer:
    repository, branch = request.repository, urllib.parse.unquote(request.rest["revision"])
    if branch not in repository.branches:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
    head = repository.branches[branch]
    files, title = dict(head.files), ""
    for line in request.body.decode().splitlines():
        entry = json.loads(line)
        key, value = entry["key"], entry["value"]
        if key == "header":
            title = value["summary"]
            if value.get("parentCommit") not in (None, head.oid):
                raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in request.hub.objects:
                raise HubError(400, "", f"LFS object {value['oid']} of {value['path']} was not uploaded")
            files[value["path"]] = File(request.hub.objects[value["oid"]], lfs=True)
        elif key == "deletedFile":
            files.pop(value["path"], None)
        elif key == "deletedFolder":
            files = {path: file for path, file in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
        else:
            raise HubError(400, "", f"unknown operation {key}")
    made = repository.add(branch, files, title)
    url = f"{request.hub.endpoint}/{repository.name}/commit/{made.oid}"
    return Answer({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})


@route("POST", API + r"/branch/(?P<branch>.+)")
def create_branch(request: Request) -> Answer:
    repository, branch = request.repository, urllib.parse.unquote(request.rest["branch"])
    if branch in repository.branches:
        raise HubError(409, "", f"Reference already exists: {branch}")
    start = (request.json if request.body else {}).get("startingPoint") or "main"
    repository.branches[branch] = repository.at(start)
    return Answer({})


@route("POST", API + r"/tag/(?P<revision>[^/]+)")
def create_tag(request: Request) -> Answer:
    repository, tag = request.repository, request.json["tag"]
    if tag in repository.tags:
        raise HubError(409, "", f"Tag already exists: {tag}")
    repository.tags[tag] = repository.at(request.rest["revision"])
    return Answer({})


@route("GET", API + r"(?:/revision/(?P<revision>[^/]+))?")
def information(request: Request) -> Answer:
    repository = request.repository
    at = repository.at(request.rest.get("revision") or "main")
    siblings = [{"rfilename": path} for path in sorted(at.files)]
    found = {"id": repository.name, "sha": at.oid, "private": repository.private, "siblings": siblings}
    return Answer({**found, "createdAt": at.history()[-1].date, "lastModified": at.date, "tags": []})


@route("GET", API + "/refs")
def references(request: Request) -> Answer:
    def entries(kind: str, refs: Mapping[str, Commit]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit.oid} for n, commit in refs.items()]

    branches, tags = request.repository.branches, request.repository.tags
    return Answer({"branches": entries("heads", branches), "tags": entries("tags", tags), "converts": []})


@route("GET", API + r"/commits/(?P<revision>[^/]+)")
def commits(request: Request) -> Answer:
    history = request.repository.at(request.rest["revision"]).history()
    rest = {"message": "", "authors": [{"user": "org"}]}
    return Answer([{"id": made.oid, "title": made.title, "date": made.date, **rest} for made in history])


@route("GET", "/api/collections")
def list_collections(request: Request) -> Answer:
    owner, entries = request.query.get("owner"), request.hub.collections.values()
    seen = [entry for entry in entries if request.authorized or not entry["private"]]
    found = [{**entry, "items": entry["items"][:4]} for entry in seen if owner in (None, entry["owner"]["name"])]
    return Answer([{key: entry[key] for key in entry if key != "position"} for entry in found])  # four items of each


@route("POST", "/api/collections")
def create_collection(request: Request) -> Answer:
    body, number = request.json, len(request.hub.collections)
    if not 0 < len(body["title"]) < 60:
        raise HubError(400, "", '"title" length must be less than 60 characters')
    slug = f"{body['namespace']}/{re.sub('[^a-z0-9]+', '-', body['title'].lower()).strip('-')}-{number:024x}"
    owner = {"name": body["namespace"], "type": "org"}
    made = {"slug": slug, "title": body["title"], "owner": owner, "items": [], "private": body["private"]}
    request.hub.collections[slug] = made | {"lastUpdated": now(), "position": number, "theme": "green", "upvotes": 0}
    return Answer(request.hub.collections[slug])


COLLECTION = r"/api/collections/(?P<slug>[\w.-]+/[\w.-]+)"


def find_collection(request: Request) -> dict[str, Any]:
    """The collection that a request names; a private one does not exist for a stranger."""
    found = request.hub.collections.get(request.rest["slug"])
    if found is None or (found["private"] and not request.authorized):
        raise HubError(404, "", "Collection not found")
    return found


@route("GET", COLLECTION)
def get_collection(request: Request) -> Answer:
    return Answer(find_collection(request))


@route("PATCH", COLLECTION)
def change_collection(request: Request) -> Answer:
    found = find_collection(request)
    found.update(request.json)
    return Answer({"success": True, "data": found})


@route("POST", COLLECTION + "/items")
def add_collection_item(request: Request) -> Answer:
    found, item = find_collection(request), request.json["item"]
    request.hub.repository(item["type"], item["id"], request.authorized)
    if any((item["type"], item["id"]) == (other["type"], other["id"]) for other in found["items"]):
        raise HubError(409, "", "This item is already in the collection")
    number = len(found["items"])
    note = {"note": {"text": request.json["note"]}} if "note" in request.json else {}
    found["items"].append({"_id": f"{number:024x}", "position": number, **item, **note})
    return Answer(found)


BUCKET = rf"/api/buckets/{NAMESPACE}"


def find_bucket(request: Request) -> dict[str, bytes]:
    if not request.authorized or request.rest["name"] not in request.hub.buckets:
        raise HubError(404, "RepoNotFound", "Bucket Not Found")
    return request.hub.buckets[request.rest["name"]]


@route("GET", BUCKET)
def bucket_information(request: Request) -> Answer:
    files = find_bucket(request)
    told = {"id": request.rest["name"], "private": True, "createdAt": now(), "totalFiles": len(files)}
    return Answer({**told, "size": sum(map(len, files.values()))})


@route("GET", BUCKET + r"/tree(?:/(?P<prefix>.*))?")
def bucket_tree(request: Request) -> Answer:
    prefix, entries = urllib.parse.unquote(request.rest.get("prefix") or ""), {}
    for path, data in find_bucket(request).items():
        inside, slash, _ = path.removeprefix(prefix).lstrip("/").partition("/")
        folder = f"{prefix}/{inside}".lstrip("/")
        if path.startswith(prefix) and slash and request.query.get("recursive", "").lower() != "true":
            entries[folder] = {"type": "directory", "path": folder}
        elif path.startswith(prefix):
            entries[path] = {"type": "file", "path": path, "size": len(data), "xetHash": "0" * 64}
    return Answer(list(entries.values()))


@route("GET", rf"/buckets/{NAMESPACE}/resolve/(?P<path>.+)")
def bucket_file(request: Request) -> Answer:
    files, path = find_bucket(request), urllib.parse.unquote(request.rest["path"])
    if path not in files:
        raise HubError(404, "EntryNotFound", "Entry not found")
    return Answer(files[path], {"Content-Type": "application/octet-stream"})


HARDWARE = [
    {"name": name, "prettyName": pretty, "cpu": cpu, "ram": ram, "unitCostMicroUSD": cost, "unitCostUSD": cost / 1e6}
    | {"unitLabel": "minute", "accelerator": gpu}
    for name, pretty, cpu, ram, cost, gpu in (
        ("cpu-basic", "CPU Basic", "2 vCPU", "16 GB", 167, None),
        ("h200", "Nvidia H200", "23 vCPU", "256 GB", 83333, {"model": "H200", "quantity": "1", "vram": "141 GB"}),
        ("a100x4", "4x Nvidia A100", "48 vCPU", "568 GB", 166667, {"model": "A100", "quantity": "4", "vram": "320 GB"}),
    )
]
for machine in HARDWARE:
    if machine["accelerator"]:
        machine["accelerator"] |= {"type": "gpu", "manufacturer": "Nvidia"}


@route("GET", "/api/jobs/hardware")
def jobs_hardware(request: Request) -> Answer:
    return Answer(HARDWARE)


@route("POST", r"/api/jobs/(?P<namespace>[\w.-]+)")
def run_job(request: Request) -> Answer:
    asked, number = request.json, len(request.hub.jobs)
    if asked["flavor"] not in {machine["name"] for machine in HARDWARE}:
        raise HubError(400, "", f"unknown flavor {asked['flavor']}")
    job = {**asked, "id": f"{number:024x}", "createdAt": now(), "owner": {"id": "1", "name": "org", "type": "user"}}
    request.hub.jobs[job["id"]] = job | {"log": request.hub.answer, "stage": "COMPLETED"}
    return show_job(job | {"stage": "SCHEDULING"})


def show_job(job: Mapping[str, Any]) -> Answer:
    """A job as the Hub tells it: the names of its secrets, not their values."""
    told = {key: value for key, value in job.items() if key not in ("log", "stage", "secrets")}
    secrets = dict.fromkeys(job.get("secrets") or {})
    return Answer({**told, "secrets": secrets, "status": {"stage": job["stage"], "message": None}})


def find_job(request: Request) -> dict[str, Any]:
    if not request.authorized or request.rest["id"] not in request.hub.jobs:
        raise HubError(404, "", "Job not found")
    return request.hub.jobs[request.rest["id"]]


JOB = r"/api/jobs/[\w.-]+/(?P<id>[0-9a-f]{24})"


@route("GET", JOB)
def inspect_job(request: Request) -> Answer:
    return show_job(find_job(request))


@route("GET", JOB + "/logs")
def job_log(request: Request) -> Answer:
    events = ["===== Job started", *find_job(request)["log"]]
    lines = [f"data: {json.dumps({'data': line, 'timestamp': now()})}\n\n" for line in events]
    return Answer("".join(lines).encode(), {"Content-Type": "text/event-stream"})


def describe(path: str, file: File | None) -> dict[str, Any]:
    """A file, or a folder (None), as the tree and paths-info calls tell it."""
    if file is None:
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    lfs = {"lfs": {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}} if file.lfs else {}
    return {"type": "file", "path": path, "size": len(file.data), "oid": file.oid, **lfs}


@route("GET", API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
def tree(request: Request) -> Answer:
    files = request.repository.at(request.rest["revision"]).files
    folder = urllib.parse.unquote(request.rest.get("path") or "").strip("/")
    prefix = f"{folder}/" if folder else ""
    below = {path: file for path, file in files.items() if path.startswith(prefix)}
    if prefix and not below:
        raise HubError(404, "EntryNotFound", f"{folder} does not exist")
    recursive = request.query.get("recursive", "false").lower() in ("true", "1")
    entries: dict[str, dict[str, Any]] = {}
    for path, file in sorted(below.items()):
        parts = path.removeprefix(prefix).split("/")
        parents = [prefix + "/".join(parts[:depth]) for depth in range(1, len(parts))]
        entries |= {parent: describe(parent, None) for parent in (parents if recursive else parents[:1])}
        if recursive or len(parts) == 1:
            entries[path] = describe(path, file)
    return Answer(list(entries.values()))


@route("POST", API + r"/paths-info/(?P<revision>[^/]+)")
def paths_info(request: Request) -> Answer:
    files = request.repository.at(request.rest["revision"]).files
    if request.body.lstrip().startswith(b"{"):
        wanted = request.json["paths"]
    else:
        wanted = urllib.parse.parse_qs(request.body.decode()).get("paths", [])
    paths = [path.strip("/") for path in wanted]
    there = [path for path in paths if path in files or any(name.startswith(f"{path}/") for name in files)]
    return Answer([describe(path, files.get(path)) for path in there])


@route("GET", rf"/(?:(?P<kind>dataset|space)s/)?{NAMESPACE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request: Request) -> Answer:
    at = request.repository.at(request.rest["revision"])
    file = at.files.get(urllib.parse.unquote(request.rest["path"]))
    if file is None:
        raise HubError(404, "EntryNotFound", "Entry not found")
    headers = {"X-Repo-Commit": at.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    headers |= {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": "*"}
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
    return Answer(file.data, {**headers, "Content-Type": "application/octet-stream"})


class _Handler(http.server.BaseHTTPRequestHandler):
    """Reads a request, lets its route answer, writes the answer; all under the server's lock."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        moment = self.hub.moment(f"{self.command} {self.path}")
        try:
            if moment == "before":
                raise Cut
            body = self._read(half=moment == "during")
            with self.hub.lock:
                fault = self.hub.fault(f"{self.command} {self.path}")
                answer = fault[0] if fault and not fault[1] else self._answer(body)
                answer = fault[0] if fault else answer
            if moment == "after":
                raise Cut
            self._send(answer)
        except (Cut, ConnectionError):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815

    def _read(self, half: bool) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if half:
                    raise Cut
            self.rfile.readline()
        else:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length // 2 if half else length)
        if half:
            raise Cut
        return body

    def _answer(self, body: bytes) -> Answer:
        url = urllib.parse.urlsplit(self.path)
        method = "GET" if self.command == "HEAD" else self.command
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        for wanted, pattern, function in ROUTES:
            match = pattern.fullmatch(url.path)
            if match and wanted == method:
                query = dict(urllib.parse.parse_qsl(url.query))
                try:
                    if not authorized and method != "GET" and not ANONYMOUS.fullmatch(url.path):
                        raise HubError(401, "", "Invalid username or password.")
                    return function(Request(self.hub, query, body, authorized, match.groupdict()))
                except HubError as error:
                    headers = {"X-Error-Code": error.code, "X-Error-Message": error.message} if error.code else {}
                    return Answer({"error": error.message}, headers, error.status)
        return Answer({"error": f"{method} {url.path} is not part of the loopback Hub"}, status=404)

    def _send(self, answer: Answer) -> None:
        raw = isinstance(answer.body, bytes)
        data = answer.body if raw else json.dumps(answer.body).encode()
        status, headers = answer.status, dict(answer.headers)
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")) if raw else None
        if asked and any(asked.groups()):
            first, last = asked.groups()
            start = int(first) if first else max(0, len(data) - int(last))
            end = min(int(last), len(data) - 1) if first and last else len(data) - 1
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            status, data = (416, b"") if start >= len(data) else (206, data[start : end + 1])
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
