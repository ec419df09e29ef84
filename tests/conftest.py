"""For all tests: a release's two loaders run in forks of one fresh interpreter, unless a test wants real ones."""

from collections.abc import Iterator

import fresh
import pytest

from nanophi.model_card import loader


@pytest.fixture(scope="session", autouse=True)
def forked_loaders() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "subprocess", fresh)
        yield
