"""Fresh interpreters without the seconds that torch takes to import, for tests of what runs in its own process.

One isolated interpreter (`python -I`) imports the large libraries below transformers, and none of Hugging Face's, which
read the environment when they are imported. Each process is a fork of it, with its own folder and environment.
"""

import atexit
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

__all__ = ["PIPE", "STDOUT", "Popen"]

SERVER = r"""
import json, os, sys, traceback
for name in ("torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "scipy.optimize",
             "sklearn.metrics", "pandas", "safetensors.torch"):
    __import__(name)
assert not {"transformers", "huggingface_hub", "nanophi"} & set(sys.modules)

def run(request):
    log = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = ["-c", *request["arguments"]]
    status = 0
    try:
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-I", "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.kill)
    return server


class Popen:
    """`subprocess.Popen` of `[python, -I, -c, code, *arguments]`; the process has ended when this returns."""

    def __init__(self, command: list[str], cwd: Path, env: dict[str, str], **options: Any) -> None:
        assert command[:3] == [sys.executable, "-I", "-c"]
        server = _server()
        with tempfile.NamedTemporaryFile("r") as output:
            request = {"code": command[3], "arguments": command[4:], "cwd": str(cwd), "env": env, "output": output.name}
            server.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
            server.stdin.flush()  # type: ignore[union-attr]
            self.returncode = int(server.stdout.readline())  # type: ignore[union-attr]
            self.output = output.read()

    def communicate(self) -> tuple[str, None]:
        return self.output, None
