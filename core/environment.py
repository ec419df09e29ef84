"""What this process runs on: versions, commit, processor and devices, as `record.json` keeps them."""

import contextlib
import functools
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from nanophi.core.version import __version__

PACKAGES = (
    *("torch", "transformers", "huggingface_hub", "tokenizers", "accelerate", "datasets", "lm_eval", "evaluate"),
    "matplotlib",
)


def git_commit() -> str | None:
    """The checkout's commit, with `+changes` if the tree differs from it; None outside a checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    ask = functools.partial(subprocess.check_output, cwd=root, text=True, stderr=subprocess.DEVNULL)
    try:
        commit = ask(["git", "rev-parse", "HEAD"]).strip()
        changes = ask(["git", "status", "--porcelain", "--untracked-files=no"]).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")


def environment() -> dict[str, Any]:
    """What this process runs on: versions of Python and the packages that matter, commit, processor, devices."""
    import torch

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        processor = names[0].strip() if names else processor
    return {
        "nanophi": __version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.system().lower() + "-" + platform.machine(),
        "packages": versions,
        "processor": processor,
        "cpu_threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }
