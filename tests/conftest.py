"""Fixtures that any test may ask for."""

from pathlib import Path

import pytest

from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.sources import read
from aliprod.synth.synth import synthesise


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs and golden vectors beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("needs the folder ../shared (photographs and golden vectors), which is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """A rendered catalogue of 4 classes: 32 training, 24 validation and 40 test images. Not to be changed."""
    folder = tmp_path_factory.mktemp("catalogues") / "packages"
    synthesise(folder, classes=4, images=32, seed=0)
    return read(folder)
