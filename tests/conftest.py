"""For all tests: what every one of them would otherwise pay for again."""

import gc
from collections.abc import Iterator

import fresh
import pytest

from nanophi.model_card import loader

pytest_plugins = ["finished_run", "hub_client"]
LONGEST = [
    *("test_distributed", "test_readme", "test_push", "test_trainer", "test_ablate", "test_pipeline"),
    *("test_companions", "test_cli", "test_continuation", "test_evaluate", "test_space", "test_mirror", "test_receipt"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # With a worker per file (`--dist loadfile --no-loadscope-reorder`), a long file at the end leaves the others idle.
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    # What was imported until now stays. Accelerate collects garbage after each training, 0.4 s if all of it is visited.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def forked_loaders() -> Iterator[None]:
    """A release's two loaders run in forks of one fresh interpreter; a test of real processes takes this back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "subprocess", fresh)
        yield
