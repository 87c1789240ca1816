"""A plan, a catalogue and weights, and a path by which tests find what they share."""

import sys
from pathlib import Path

import pytest

from aliprod.synth.synth import synthesise

sys.path.append(str(Path(__file__).parent))

from shop import Shop, model


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "photos"
    synthesise(folder, classes=3, images=18, seed=0)
    return folder


@pytest.fixture
def shop(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    for variable in ("ALIPROD_STORAGE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    found = Shop(tmp_path)
    found.write()
    return found


@pytest.fixture
def weights_folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    model(tmp_path / "weights")
    return tmp_path / "weights"
