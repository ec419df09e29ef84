"""Prints the oldest versions that pyproject.toml allows of the packages that training stands on, for pip.

The others (numpy, pyarrow, ...) are used through what they have had for years.
"""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PACKAGES = ("accelerate", "datasets", "safetensors", "tokenizers", "transformers")

project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
for requirement in map(Requirement, project["dependencies"]):
    if requirement.name in PACKAGES:
        (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
        print(f"{requirement.name}=={bound}")
