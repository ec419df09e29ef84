"""A page in a real Chromium: it is served on 127.0.0.1, and a script of the test's drives it and reports."""

import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

import nanophi
from nanophi.model_card.space import PACKAGE

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT = Path(nanophi.__file__).parent / ".venv/npm"
DRIVER = """
<script type="module">
const byId = (id) => document.getElementById(id);
const until = async (done) => { while (!done()) await new Promise((wake) => setTimeout(wake, 20)); };
const set = (values) => Object.entries(values).forEach(([id, value]) => { byId(id).value = value; });
const generate = async () => { byId("go").click(); await until(() => !byId("go").disabled); };
const shown = () => [...document.querySelectorAll("section:not([hidden])")].map((box) => ({
  name: box.querySelector("h2").textContent, note: box.querySelector("p").textContent,
  error: box.querySelector("p").className === "error",
  text: [...box.querySelectorAll("pre")].map((pre) => pre.textContent),
}));
let answer;
try { answer = await (async () => { %s })(); } catch (error) { answer = {failed: String(error.stack)}; }
await fetch("%s", {method: "POST", mode: "no-cors", body: JSON.stringify(answer)});
</script></body>"""


def npm(*packages: str) -> Path:
    """The `node_modules` that holds these packages, installed once; the test is skipped where they cannot be had."""
    modules = ROOT / "node_modules"
    wanted = [package for package in packages if not (modules / package.rpartition("@")[0]).is_dir()]
    if wanted:
        if shutil.which("npm") is None:
            pytest.skip(f"npm is missing, from which {', '.join(wanted)} would come")
        ROOT.mkdir(parents=True, exist_ok=True)
        flags = ("--no-audit", "--no-fund", "--ignore-scripts", "--omit=optional", "--prefix", str(ROOT))
        done = subprocess.run(["npm", "install", *flags, *packages], capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"npm cannot install {', '.join(wanted)}: {done.stderr[-300:]}")
    return modules


def library() -> Path:
    """The package that the CDN would serve."""
    return npm(PACKAGE) / PACKAGE.rpartition("@")[0]


class Site:
    """Serves a page with a script of the test's, `/library/` from a folder, and other files from another."""

    def __init__(self, page: str, script: str, packages: Path, files: Path | None = None, port: int = 0) -> None:
        self.answer: Any = None
        self.answered = threading.Event()
        site = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path != "/":
                    return super().do_GET()
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(site.page.encode())

            def translate_path(self, path: str) -> str:
                path = path.partition("?")[0]
                if path.startswith("/library/"):
                    return str(packages / path.removeprefix("/library/"))
                return str((files or packages) / path.lstrip("/"))

            def do_POST(self) -> None:
                site.answer = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(204)
                self.end_headers()
                site.answered.set()

            def log_message(self, format: str, *values: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self.page = page.replace("</body>", DRIVER % (script, self.url))


def visit(site: Site, profile: Path, *options: str, url: str | None = None, seconds: float = 60) -> Any:
    """What the test's script returns in the browser; `url`: where else the site's `page` is served.

    Raises AssertionError if it fails, or does not end.
    """
    threading.Thread(target=site.server.serve_forever, args=(0.02,), daemon=True).start()
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", *options]
    output: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [*command, f"--user-data-dir={profile}", url or site.url], env=os.environ, **output
    ) as process:
        answered = site.answered.wait(seconds)
        process.terminate()
        complaints = process.communicate()[1]
    site.server.shutdown()
    site.server.server_close()
    assert answered, complaints[-3000:]
    assert not (isinstance(site.answer, dict) and "failed" in site.answer), site.answer
    return site.answer
