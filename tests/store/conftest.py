"""A storage path of either kind."""

from pathlib import Path

import pytest


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder, and then the mirror of a bucket."""
    if request.param == "folder":
        return tmp_path
    mirrored: Path = request.getfixturevalue("machines")("a")
    return mirrored
