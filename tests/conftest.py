"""Fixtures that any test may ask for."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: threads that wait for cores burn them

import pytest
import torch
from hypothesis import settings

from aliprod.build.graph import targets
from aliprod.build.target import Site, lacking
from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.sources import read
from aliprod.plan.load import load
from aliprod.plan.open import Opened, Request, open_plan
from aliprod.plan.places import resolve
from aliprod.store import mirror
from aliprod.store.bucket import opened
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


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of an S3 server, a process of its own, with the bucket ``team``."""
    pytest.importorskip("moto.server", reason="needs moto, of the extra `test`")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p"]
    with store_server(command) as address:
        urllib.request.urlopen(urllib.request.Request(f"{address}/team", method="PUT")).close()
        yield address


@pytest.fixture
def machines(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """The mirror of one storage path in a bucket, as each machine has it: of S3, or of the kind that is asked for."""
    kind = getattr(request, "param", os.environ.get("ALIPROD_STORE", "s3"))
    environment = s3_environment(request.getfixturevalue("s3")) if kind == "s3" else request.getfixturevalue(kind)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    opened.cache_clear()  # the bucket of another server
    prefix = f"{kind}://team/{uuid.uuid4().hex}"

    def machine(name: str) -> Path:
        monkeypatch.setenv("ALIPROD_CACHE", str(tmp_path / name))
        mirrored = mirror.place(prefix)
        assert mirrored is not None
        return mirrored

    return machine


def open_file(file: Path, storage: Path, sets: Sequence[str] = ()) -> Opened:
    """A plan's file, with the jobs of its catalogue."""
    plan = load(file, sets)
    return open_plan(Request(plan, file.read_text(), resolve(plan, storage, None, None)))


def make_all(opened: Opened) -> list[str]:
    """Make what is missing without Ray, the first that has all it needs; the names in order."""
    site = Site.of(opened)
    made = []
    while todo := lacking(targets(opened, False), site.storage):
        target = next(t for t in todo.values() if not any(need.name in todo for need in t.needed()))
        assert target.folder(site.storage).parent  # known by now
        target.make(target, site)
        assert target.record(site.storage) is not None, f"{target.name} is there"
        made.append(target.name)
    return made


@contextmanager
def store_server(command: Sequence[str | Path]) -> Iterator[str]:
    """A server of objects on a free port, which is its command's last word; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < until, f"{command[0]} does not start"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        server.kill()


@pytest.fixture(scope="session")
def gs() -> Iterator[dict[str, str]]:
    """What reaches a server that answers as Google's does."""
    with store_server([sys.executable, Path(__file__).with_name("google_store.py")]) as address:
        nobody = {"client_email": "", "private_key": "", "private_key_id": "", "disable_oauth": True}
        yield {"GOOGLE_BASE_URL": address, "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(nobody)}


def s3_environment(address: str) -> dict[str, str]:
    """What reaches the server at an address."""
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    return keys | {"AWS_ENDPOINT_URL": address}
