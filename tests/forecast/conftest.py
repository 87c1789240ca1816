"""A catalogue to forecast the trainings on."""

from pathlib import Path

import pytest

from aliprod.synth.synth import synthesise


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 training images of two classes. Not to be changed."""
    folder = tmp_path_factory.mktemp("catalogues") / "photos"
    synthesise(folder, classes=2, images=20, seed=0)
    return folder
