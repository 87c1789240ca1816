"""A storage path of each kind."""

import base64
import email.utils
import hashlib
import hmac
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import store_server

# of every Azurite: https://learn.microsoft.com/azure/storage/common/storage-use-azurite
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder, and then the mirror of a bucket."""
    if request.param == "folder":
        return tmp_path
    mirrored: Path = request.getfixturevalue("machines")("a")
    return mirrored


@pytest.fixture(scope="session")
def az() -> Iterator[dict[str, str]]:
    """What reaches Azurite, Microsoft's own stand-in for Azure."""
    if (program := shutil.which("azurite-blob")) is None:
        pytest.skip("needs Azurite: npm install --global azurite")
    options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--blobPort"]
    with store_server([program, *options]) as address:
        _make_container(f"{address}/{ACCOUNT}")
        yield {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": f"{address}/{ACCOUNT}",
        }


def _make_container(address: str) -> None:
    """Ask for the container ``team``, signed as Azure wants it; obstore makes none."""
    headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    said = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
    signed = f"PUT{chr(10) * 12}{said}/{ACCOUNT}/{ACCOUNT}/team\nrestype:container"
    digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    url = f"{address}/team?restype=container"
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)).close()
