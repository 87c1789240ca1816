"""Fixtures that any test may ask for."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs and golden vectors beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("needs the folder ../shared (photographs and golden vectors), which is not beside this checkout")
    return folder
