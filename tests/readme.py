"""The commands of README.md, run as they stand in a folder where `make demo` has run.

    python tests/readme.py FOLDER

The Hub is a loopback one. Exit status 1 and the end of the output for each command that fails.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hub_server import HubServer  # type: ignore[import-not-found]

import nanophi

ROOT = Path(nanophi.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, section: str = "") -> list[str]:
    """Code blocks of a language, under one heading or anywhere."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0] if section else README
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(section: str) -> list[list[str]]:
    """The arguments of every `nanophi` command in a section's blocks."""
    lines = [shlex.split(line, comments=True) for block in blocks("bash", section) for line in block.splitlines()]
    return [line[1:] for line in lines if line and line[0] == "nanophi"]


def run(line: list[str], folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """One command, to its end; `show` is ended by Ctrl-C once its page was fetched."""
    place: Any = {"cwd": folder, "env": environment, "text": True}
    if line[2:3] != ["show"]:
        return subprocess.run([sys.executable, *line], capture_output=True, timeout=1800, **place)
    output: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # A process that is started in the background may ignore SIGINT, and then so do its children.
    output["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([sys.executable, *line], **place, **output) as process:
        first = process.stdout.readline()
        if first.startswith("http://"):
            for name in ("", "report.html", "0.gguf", "1.gguf"):
                urllib.request.urlopen(first.split()[0] + name, timeout=60).close()  # unread, as when a reader leaves
            process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
    return subprocess.CompletedProcess(line, process.returncode, first + rest, "")


def main() -> None:
    folder = Path(sys.argv[1])
    lines = [["-m", "nanophi", *arguments] for arguments in commands("The command")]
    lines += [["-c", code] for code in blocks("python")]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="nanophi-readme-") as scratch, HubServer() as hub:
        environment = {**os.environ, **hub.environment(Path(scratch))}
        for line in lines:
            start = time.monotonic()
            done = run(line, folder, environment)
            shown = shlex.join(line[1:] if line[0] == "-m" else ["python"])
            print(f"{'FAILED' if done.returncode else 'ok    '} {time.monotonic() - start:5.1f} s  {shown}", flush=True)
            if done.returncode:
                failed += 1
                print(done.stdout[-2000:] + done.stderr[-4000:], file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
