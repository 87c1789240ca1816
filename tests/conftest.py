"""Fixtures that any test may ask for."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.sources import read
from aliprod.synth.synth import synthesise

settings.register_profile("ours", deadline=None)  # a busy machine makes no test fail
settings.load_profile("ours")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take minutes: whichever process ends first has short ones left."""
    items.sort(key=lambda item: "system" not in item.path.parts)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs and golden vectors beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("needs the folder ../shared (photographs and golden vectors), which is not beside this checkout")
    return folder


@pytest.fixture(scope="module")
def torch_as_before() -> Iterator[None]:
    """What a training changes in torch ends with the module."""
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def _attended() -> Iterator[None]:
    """Signals as in a terminal: whatever a script starts in its background, or nohup, ignores some from its birth."""
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


attended = pytest.fixture(_attended)
attended_module = pytest.fixture(scope="module")(_attended)


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """A rendered catalogue of 4 classes: 32 training, 24 validation and 40 test images. Not to be changed."""
    folder = tmp_path_factory.mktemp("catalogues") / "packages"
    synthesise(folder, classes=4, images=32, seed=0)
    return read(folder)
