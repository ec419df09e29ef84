"""A release of each version that was published is kept whole in tests/releases, and verifies with this version."""

import shutil
from pathlib import Path

import pytest
from forging import failures, sign_again  # type: ignore[import-not-found]

RELEASES = Path(__file__).parents[1] / "releases"


@pytest.fixture(params=[path.name for path in sorted(RELEASES.iterdir())])
def release(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.unpack_archive(RELEASES / request.param, tmp_path)
    (folder,) = tmp_path.iterdir()
    return folder


def test_it_verifies_and_a_forged_figure_in_it_is_found(release: Path) -> None:
    assert failures(release, trust_remote_code=True) == {}
    card = release / "README.md"
    text = card.read_text()
    assert "2.1500" in text
    card.write_text(text.replace("2.1500", "2.0500"))
    sign_again(release)
    assert "2.0500" in failures(release)["card"]
