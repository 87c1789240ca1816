"""remote_folder: a catalogue is prepared from S3 and to S3 as from folder to folder; moto's server speaks S3 here."""

import logging
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from pyarrow import fs

from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.remote_folder import RemoteFolder, folder_at
from aliprod.catalogue.sources import read
from aliprod.cli import app
from aliprod.errors import Refused, Unreachable
from aliprod.inference.pictures import listed
from aliprod.ingest.prepare import PreparedCatalogue, Settings, prepare
from aliprod.store import commit, mirror
from aliprod.store.commit import MANIFEST
from tests.conftest import s3_environment

server = pytest.importorskip("moto.server", reason="needs moto, of the extra `test`")
boto3 = pytest.importorskip("boto3", reason="comes with moto")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIPROD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    yield running.get_host_and_port()[1]
    running.stop()


def uri(port: int, path: str, keys: str = "key:secret") -> str:
    return (
        f"s3://{keys}@{path}?endpoint_override=127.0.0.1%3A{port}&scheme=http&region=us-east-1&allow_delayed_open=true"
    )


@pytest.fixture(scope="module")
def bucket(port: int, packages: Catalogue) -> Callable[[str], str]:
    """The URI of a folder in a bucket, in which `packages` is at ``photos``."""
    system, _ = fs.FileSystem.from_uri(uri(port, "shop").replace("?", "?allow_bucket_creation=true&"))
    system.create_dir("shop")
    fs.copy_files(str(packages.root), "shop/photos", destination_filesystem=system)
    return lambda folder: uri(port, f"shop/{folder}")


def test_a_training_reads_a_prepared_catalogue_from_a_bucket(
    port: int, bucket: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(bucket("photos"), bucket("for-training"))
    prepared(bucket("photos"), tmp_path / "prepared")
    plain = read(tmp_path / "prepared")
    for name, value in s3_environment(f"http://127.0.0.1:{port}").items():
        monkeypatch.setenv(name, value)
    for machine, room in (("one", "1"), ("two", "0")):
        monkeypatch.setenv("ALIPROD_CACHE", str(tmp_path / machine))
        monkeypatch.setenv("ALIPROD_CACHE_GB", room)
        place = mirror.local("s3://shop/for-training")
        assert not place.exists()
        commit.read(place)
        found = read(place)
        assert found.fingerprint == plain.fingerprint
        for split in ("train", "val", "test"):
            ours, theirs = getattr(found, split), getattr(plain, split)
            ours.ask(range(len(ours)))
            assert [ours.source(row) for row in range(len(ours))] == [theirs.source(row) for row in range(len(theirs))]
        assert not list(place.glob("*.parquet")), "what was laid out is kept twice"


def prepared(path: str | Path, out: str | Path, processes: int = 1) -> PreparedCatalogue:
    *_, done = prepare(path, out, Settings(), processes=processes)
    assert isinstance(done, PreparedCatalogue)
    return done


def files(folder: str) -> dict[str, bytes]:
    system, root = fs.FileSystem.from_uri(folder)
    found = system.get_file_info(fs.FileSelector(root, allow_not_found=True))
    return {info.base_name: system.open_input_file(info.path).read() for info in found}


def test_from_s3_and_to_s3_are_the_bytes_of_a_local_call(
    bucket: Callable[[str], str], packages: Catalogue, tmp_path: Path
) -> None:
    local = prepared(packages.root, tmp_path / "local")
    expected = {file.name: file.read_bytes() for file in (tmp_path / "local").iterdir()}
    there = prepared(bucket("photos"), bucket("prepared"), processes=2)
    assert (there.path, there.fingerprint, there.bytes) == ("s3://shop/prepared", local.fingerprint, local.bytes)
    found = files(bucket("prepared"))
    assert found == expected
    (tmp_path / "copy").mkdir()
    for name, content in found.items():
        (tmp_path / "copy" / name).write_bytes(content)
    assert read(tmp_path / "copy").fingerprint == local.fingerprint
    assert prepared(bucket("photos"), bucket("prepared")) == there  # found, by its manifest
    assert not list((tmp_path / "cache").rglob("*.parquet"))


def test_pictures_are_listed_there_and_read_from_there(bucket: Callable[[str], str], packages: Catalogue) -> None:
    found = listed([bucket("photos/test")])
    names = sorted(path.name for path in (packages.root / "test").iterdir())
    assert [picture.shown for picture in found] == [f"s3://shop/photos/test/{name}" for name in names]
    [one] = listed([bucket(f"photos/test/{names[3]}")])
    assert one.shown == found[3].shown
    assert one.source() == found[3].source() == (packages.root / "test" / names[3]).read_bytes()


def test_a_bucket_that_s3_does_not_find_is_told_in_a_sentence() -> None:
    with pytest.raises((Refused, Unreachable), match=r"cannot be reached|is not there"):  # without internet, and with
        folder_at("s3://no-such-bucket-of-aliprod/photos")


def test_an_upload_that_broke_off_is_no_catalogue_and_the_next_call_makes_it_one(
    bucket: Callable[[str], str], packages: Catalogue, tmp_path: Path
) -> None:
    prepared(packages.root, tmp_path / "local")
    whole = shutil.copytree(tmp_path / "local", tmp_path / "broken")
    (whole / "val.arrow").unlink()
    (whole / "val.arrow").mkdir()  # it cannot be read, as when the disk fails midway
    place_there = folder_at(bucket("half"))
    assert isinstance(place_there, RemoteFolder)
    with pytest.raises(Unreachable):
        place_there.upload(whole)
    assert files(bucket("half"))
    assert place_there.manifest() is None
    prepared(packages.root, bucket("half"))
    assert set(files(bucket("half"))) == {file.name for file in (tmp_path / "local").iterdir()}


def test_a_file_that_goes_up_in_parts_arrives_whole(bucket: Callable[[str], str], port: int, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(25 * 2**20)  # pyarrow sends parts of 10 MiB
    (tmp_path / "train.arrow").write_bytes(content)
    (tmp_path / MANIFEST).write_text("{}")
    place_there = folder_at(bucket("large"))
    assert isinstance(place_there, RemoteFolder)
    place_there.upload(tmp_path)
    assert files(bucket("large")) == {"train.arrow": content, MANIFEST: b"{}"}
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys)
    tag = client.head_object(Bucket="shop", Key="large/train.arrow")["ETag"]
    assert tag.endswith('-3"')  # S3 writes the number of parts there


def test_another_catalogue_there_is_left_as_it_is(bucket: Callable[[str], str], packages: Catalogue) -> None:
    prepared(packages.root, bucket("taken"))
    before = files(bucket("taken"))
    with pytest.raises(Refused, match="prepared otherwise"):
        list(prepare(packages.root, bucket("taken"), Settings(short_side=32)))
    assert files(bucket("taken")) == before


def test_a_folder_without_annotations_and_a_prepared_one(
    bucket: Callable[[str], str], packages: Catalogue, tmp_path: Path
) -> None:
    system, _ = fs.FileSystem.from_uri(bucket("plain"))
    for split in ("train", "val"):
        fs.copy_files(str(packages.root / split), f"shop/plain/{split}", destination_filesystem=system)
        shutil.copytree(packages.root / split, tmp_path / "plain" / split)
    assert (
        prepared(bucket("plain"), tmp_path / "a").fingerprint
        == prepared(tmp_path / "plain", tmp_path / "b").fingerprint
    )
    prepared(packages.root, bucket("ready"))
    with pytest.raises(Refused, match="prepared catalogue"):
        prepared(bucket("ready"), tmp_path / "c")


def test_a_file_uri_is_the_folder(packages: Catalogue, tmp_path: Path) -> None:
    assert folder_at(tmp_path.as_uri()) == tmp_path
    assert prepared(packages.root.as_uri(), (tmp_path / "out").as_uri()).path == str(tmp_path / "out")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("what", ["bucket", "folder", "endpoint", "scheme"])
def test_a_place_that_is_not_there_is_one_sentence_without_the_keys(port: int, tmp_path: Path, what: str) -> None:
    source, status = {
        "bucket": (uri(port, "nobody/photos"), 2),
        "folder": (uri(port, "shop/nothing"), 2),
        "endpoint": (uri(free_port(), "shop/photos"), 3),
        "scheme": ("xyz://key:secret@shop/photos", 2),
    }[what]
    result = CliRunner().invoke(app, ["data", "prepare", source, str(tmp_path / "out"), "--json"])
    assert result.exit_code == status, result.output
    assert "://" in result.stderr
    assert "secret" not in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


class _Refusing(BaseHTTPRequestHandler):
    """Answers as S3 does to keys that it does not know."""

    def do_GET(self) -> None:
        body = b"<Error><Code>InvalidAccessKeyId</Code><Message>no such key</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_keys_that_are_refused_are_said_to_be(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), _Refusing) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        with pytest.raises(Refused, match="keys"):
            prepared(uri(refusing.server_port, "shop/photos"), tmp_path / "out")
        refusing.shutdown()
