"""remote_folder: a catalogue is prepared from a bucket and to one as from folder to folder."""

import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.remote_folder import RemoteFolder, folder_at
from aliprod.catalogue.sources import read
from aliprod.cli import app
from aliprod.errors import Refused, Unreachable
from aliprod.inference.pictures import listed
from aliprod.ingest.prepare import PreparedCatalogue, Settings, prepare
from aliprod.store import bucket as buckets
from aliprod.store import commit, mirror
from tests.conftest import s3_environment

EACH = pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
Bucket = Callable[[str], str]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ALIPROD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(buckets, "_RETRIES", (1, 1))
    buckets.opened.cache_clear()
    yield
    buckets.opened.cache_clear()


@pytest.fixture
def bucket(request: pytest.FixtureRequest, packages: Catalogue, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The URI of a folder in a bucket, in which `packages` is at ``photos``."""
    kind = getattr(request, "param", "s3")
    found = request.getfixturevalue(kind)
    for name, value in (s3_environment(found) if kind == "s3" else found).items():
        monkeypatch.setenv(name, value)
    root = uuid.uuid4().hex
    put(f"{kind}://team/{root}/photos", packages.root)
    return lambda folder: f"{kind}://team/{root}/{folder}"


def put(uri: str, folder: Path) -> None:
    """Copy a folder there."""
    parts = urlsplit(uri)
    for file in folder.rglob("*"):
        if file.is_file():
            key = f"{parts.path[1:]}/{file.relative_to(folder).as_posix()}"
            buckets.opened(f"{parts.scheme}://{parts.netloc}").put(key, file.read_bytes())


def files(uri: str) -> dict[str, bytes]:
    """What lies there, by its name."""
    parts = urlsplit(uri)
    store, prefix = buckets.opened(f"{parts.scheme}://{parts.netloc}"), parts.path[1:]
    return {key.removeprefix(f"{prefix}/"): store.get(key)[0] for key in store.list(prefix)}


@EACH
def test_a_training_reads_a_prepared_catalogue_from_a_bucket(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(bucket("photos"), bucket("for-training"))
    prepared(bucket("photos"), tmp_path / "prepared")
    plain = read(tmp_path / "prepared")
    for machine, room in (("one", "1"), ("two", "0")):
        monkeypatch.setenv("ALIPROD_CACHE", str(tmp_path / machine))
        monkeypatch.setenv("ALIPROD_CACHE_GB", room)
        place = mirror.local(bucket("for-training"))
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


@EACH
def test_from_a_bucket_and_to_one_are_the_bytes_of_a_local_call(
    bucket: Bucket, packages: Catalogue, tmp_path: Path
) -> None:
    local = prepared(packages.root, tmp_path / "local")
    expected = {file.name: file.read_bytes() for file in (tmp_path / "local").iterdir()}
    there = prepared(bucket("photos"), bucket("prepared"), processes=2)
    assert (there.path, there.fingerprint, there.bytes) == (bucket("prepared"), local.fingerprint, local.bytes)
    found = files(bucket("prepared"))
    assert found == expected
    (tmp_path / "copy").mkdir()
    for name, content in found.items():
        (tmp_path / "copy" / name).write_bytes(content)
    assert read(tmp_path / "copy").fingerprint == local.fingerprint
    assert prepared(bucket("photos"), bucket("prepared")) == there  # found, by its manifest
    assert not list((tmp_path / "cache").rglob("*.parquet"))


def test_pictures_are_listed_there_and_read_from_there(bucket: Bucket, packages: Catalogue) -> None:
    found = listed([bucket("photos/test")])
    names = sorted(path.name for path in (packages.root / "test").iterdir())
    assert [picture.shown for picture in found] == [bucket(f"photos/test/{name}") for name in names]
    [one] = listed([bucket(f"photos/test/{names[3]}")])
    assert one.shown == found[3].shown
    assert one.source() == found[3].source() == (packages.root / "test" / names[3]).read_bytes()


def test_an_upload_that_broke_off_is_no_catalogue_and_the_next_call_makes_it_one(
    bucket: Bucket, packages: Catalogue, tmp_path: Path
) -> None:
    prepared(packages.root, tmp_path / "local")
    whole = shutil.copytree(tmp_path / "local", tmp_path / "broken")
    (whole / "val.arrow").unlink()
    (whole / "val.arrow").mkdir()  # it cannot be read, as when the disk fails midway
    place_there = folder_at(bucket("half"))
    assert isinstance(place_there, RemoteFolder)
    with pytest.raises(IsADirectoryError):
        place_there.upload(whole)
    assert files(bucket("half"))
    assert place_there.manifest() is None
    prepared(packages.root, bucket("half"))
    assert set(files(bucket("half"))) == {file.name for file in (tmp_path / "local").iterdir()}


def test_another_catalogue_there_is_left_as_it_is(bucket: Bucket, packages: Catalogue) -> None:
    prepared(packages.root, bucket("taken"))
    before = files(bucket("taken"))
    with pytest.raises(Refused, match="prepared otherwise"):
        list(prepare(packages.root, bucket("taken"), Settings(short_side=32)))
    assert files(bucket("taken")) == before


def test_a_folder_without_annotations_and_a_prepared_one(bucket: Bucket, packages: Catalogue, tmp_path: Path) -> None:
    for split in ("train", "val"):
        put(bucket(f"plain/{split}"), packages.root / split)
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


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        ("s3://nobody/photos", 3, "s3://nobody/photos: does not answer"),
        ("s3://team/nothing", 2, "s3://team/nothing: holds nothing"),
        ("xyz://key:secret@team/photos", 2, "xyz://team/photos: names no bucket"),
        ("s3://key:secret@team/photos", 2, "s3://team/photos: holds keys or options"),
        ("s3://team/photos?secret=1", 2, "s3://team/photos: holds keys or options"),
        ("s3://", 2, "names no bucket"),
    ],
)
def test_a_place_that_is_not_there_is_one_sentence_without_the_keys(
    bucket: Bucket, tmp_path: Path, source: str, status: int, said: str
) -> None:
    result = CliRunner().invoke(app, ["data", "prepare", source, str(tmp_path / "out"), "--json"])
    assert result.exit_code == status, result.output
    assert said in result.stderr
    assert "secret" not in result.output
    assert not list(tmp_path.iterdir())


def test_a_server_that_does_not_answer_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_environment(f"http://127.0.0.1:{free_port()}").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unreachable, match="s3://team/photos: does not answer"):
        prepared("s3://team/photos", tmp_path / "out")


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


def test_keys_that_are_refused_are_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), _Refusing) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        for name, value in s3_environment(f"http://127.0.0.1:{refusing.server_port}").items():
            monkeypatch.setenv(name, value)
        with pytest.raises(Unreachable, match=r"403 Forbidden.*\n.*the credentials"):
            prepared("s3://team/photos", tmp_path / "out")
        refusing.shutdown()
