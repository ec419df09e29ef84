"""The command, in the process of the tests."""

import sys
from typing import Any

import pytest

from nanophi.cli import main


def nanophi(*arguments: object) -> Any:
    """What a command line ends with: a status, or its line of error."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["nanophi", *map(str, arguments)])
        main()
    return stopped.value.code
