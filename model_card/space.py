"""The page that runs a model in the reader's browser: a static Space on the Hub, and the verb `show` for files here.

The page is `space.html`; this module tells it what to load and what the records say. llama.cpp, compiled to WebAssembly
by the wllama project, computes the model's q8_0 file on the reader's machine; no server computes anything.
"""

import contextlib
import http.server
import re
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import constants
from typer import Argument

from nanophi.core import formatting
from nanophi.core.errors import user_errors
from nanophi.core.files import link_or_copy, read_json, write_text
from nanophi.core.jobs import end_like_ctrl_c
from nanophi.core.names import RUN
from nanophi.core.version import __version__
from nanophi.eval.models import model_sha256
from nanophi.model_card import gguf, pages
from nanophi.model_card.companions import Source
from nanophi.model_card.manifest import MANIFEST, write_manifest
from nanophi.model_card.records import complete_records, read_records, results
from nanophi.model_card.verify import find_release

PACKAGE = "@wllama/wllama@3.13.0"
LIBRARY = f"https://cdn.jsdelivr.net/npm/{PACKAGE}"


def build(source: Source, repo_id: str, folder: Path) -> None:
    """Write the folder of the static Space `ORG/NAME-demo`, which loads the files of `ORG/NAME-GGUF`."""
    records, hub, own = read_records(source.release / "records"), constants.ENDPOINT, source.model_id
    beside = source.links.get("control") or records.get("conversations.json", {}).get("repo_id")
    revisions = {own: records["run.json"]["tag"], **({beside: "main"} if beside else {})}
    models = {
        name: f"{hub}/{name}-GGUF/resolve/{revision}/{name.partition('/')[2]}-q8_0.gguf"
        for name, revision in revisions.items()
    }
    linked = {"card": own, "files": f"{own}-GGUF"} | {x: y for x, y in source.links.items() if x != "space"}
    links = {part: f"{hub}/{'datasets/' if part == 'data' else ''}{name}" for part, name in linked.items()}
    write_text(folder / "index.html", page(source.release, models, links, LIBRARY))
    values = {"repo_id": repo_id, "models": list(models), "license": records["recipe.yaml"]["card"]["license"]}
    write_text(folder / "README.md", pages.render("space.md", **values))
    write_manifest(folder, {"nanophi": __version__, "model": own})


def page(release: Path, models: Mapping[str, str], links: Mapping[str, str], library: str) -> str:
    """The page of a release. `models`, its own first, and `links` are addresses by name; `PACKAGE` is at `library`."""
    records = read_records(release / "records")
    recipe, chat = records["recipe.yaml"], "conversations.json" in records
    held = [found["nanophi"]["heldout"] for found in results(records) if "heldout" in found["nanophi"]]
    kept = records["quality.json"].get("kept_bytes_fraction")
    data = {
        "name": recipe["card"]["title"] or recipe["name"],
        "facts": {
            "parameters": formatting.size(records["model.json"]["parameters"]),
            "tokens seen": formatting.size(records["checkpoint.json"]["tokens_seen"]),
            **({} if kept is None else {"text kept by the filter": formatting.percent(kept)}),
            **({"held-out bits per byte": pages.bits_per_byte(held[0])} if held else {}),
        },
        "links": dict(links),
        "models": [{"name": name, "url": url} for name, url in models.items()],
        "library": library,
        "package": PACKAGE,
        "context": records["model.json"]["config"]["max_position_embeddings"],
        "prompt": records["sample.json"]["prompt"][-1]["content"] if chat else recipe["card"]["prompt"],
        "template": gguf.chat_template(release) if chat else None,
    }
    return pages.html("space.html", data)


def show(
    what: Annotated[str, Argument(metavar="[RELEASE|RUN]", help="Folder, or id on the Hub.")] = "runs/demo",
) -> None:
    """Try a release in the browser, with its report, on this machine alone.

    Example: nanophi show runs/demo
    """
    inside = Path(what) / "release"
    release = find_release(str(inside) if inside.is_dir() else what)
    end_like_ctrl_c(signal.SIGTERM, signal.SIGHUP)  # so that its copies are removed
    with tempfile.TemporaryDirectory(prefix="nanophi-show-") as scratch:
        write_site(release, Path(scratch))
        with serve(Path(scratch)) as server, contextlib.suppress(KeyboardInterrupt):
            typer.echo(f"http://127.0.0.1:{server.server_port}/ until Ctrl-C")
            server.serve_forever()


def write_site(release: Path, folder: Path) -> None:
    """Write the page of a release into a folder, with all that it loads; beside it the baseline of its comparison."""
    run, records = release.parent, read_records(release / "records")
    own, comparison = records["recipe.yaml"]["name"], records.get("comparison.json", {})
    beside = {} if comparison.get("baseline") in (None, own) else _baseline(run, comparison)
    releases = {own: release, **beside}
    models = {name: f"{number}.gguf" for number, name in enumerate(releases)}
    for name, file in models.items():
        gguf.write(releases[name], folder / file, "q8_0")
    links = {"report": "report.html"} if (run / "report.html").is_file() else {}
    for file in links.values():
        link_or_copy(str(run / file), str(folder / file))
    if (local := _installed()) is not None:
        (folder / "wllama").symlink_to(local)
    write_text(folder / "index.html", page(release, models, links, "wllama" if local else LIBRARY))


def _baseline(run: Path, comparison: Mapping[str, Any]) -> dict[str, Path]:
    """The release of a comparison's baseline by name, if its run lies beside this one and has the weights compared."""
    name = comparison["baseline"]
    if isinstance(name, str) and re.fullmatch(RUN, name) and (run.parent / name / "release" / MANIFEST).is_file():
        release = run.parent / name / "release"
        with complete_records():
            revision = read_records(release / "records")["run.json"]["revision"]
            compared = [model.get("sha256") for model in comparison["models"][name]]
        if model_sha256(run.parent / name / "checkpoints" / revision) in compared:
            return {name: release}
    typer.echo(f"the baseline {name!r} is left out: no run beside {run} has released the weights compared")
    return {}


def _installed() -> Path | None:
    """The nearest installed `PACKAGE`, if it has that version."""
    folders = (parent / "node_modules/@wllama/wllama" for parent in (Path.cwd(), *Path.cwd().parents))
    if (local := next((folder for folder in folders if folder.is_dir()), None)) is None:
        return None
    with user_errors(f"{local} is not an npm package; run `npm install {PACKAGE}`"):
        version = read_json(local / "package.json")["version"]
    if PACKAGE.endswith(f"@{version}"):
        return local
    typer.echo(f"{local} has version {version}, so the page loads {LIBRARY}; run `npm install {PACKAGE}` to use it")
    return None


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    """A server of a folder on a free port of 127.0.0.1, whose pages may use threads and no other site can read."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self) -> Any:
            name = self.headers.get("Host", "").partition(":")[0]
            if name not in ("127.0.0.1", "localhost"):  # another name that leads here
                return self.send_error(403)
            return super().send_head()

        def copyfile(self, source: Any, outputfile: Any) -> None:
            with contextlib.suppress(ConnectionError):  # the reader has left the page
                super().copyfile(source, outputfile)

        def end_headers(self) -> None:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            super().end_headers()

        def log_message(self, format: str, *values: Any) -> None:
            """Nothing: what a person wants to see is in the browser."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: Handler(*given, directory=str(folder)))
    return server
