"""prepare: shards hold what the catalogue shows, whoever makes them and however often it is killed."""

import csv
import io
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.JpegImagePlugin import get_sampling

from aliprod.catalogue import shards
from aliprod.catalogue.catalogue import Catalogue, Flaw
from aliprod.catalogue.decode import decode
from aliprod.catalogue.sources import read
from aliprod.cli import app
from aliprod.data.loader import Feed, TrainBatches, squared_batches
from aliprod.data.training_set import training_set
from aliprod.errors import Failed, Refused
from aliprod.ingest.check import check
from aliprod.ingest.prepare import PreparedCatalogue, Settings, prepare, stored
from aliprod.processes import ReadProgress
from aliprod.recipe import Stage
from aliprod.store import commit

SPLITS = ("train", "val", "test")
DEFAULTS = Settings()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIPROD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prepared(path: Path, out: Path, settings: Settings = DEFAULTS, **how: Any) -> PreparedCatalogue:
    *_, done = prepare(path, out, settings, **how)
    assert isinstance(done, PreparedCatalogue)
    return done


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def record(out: Path) -> dict[str, Any]:
    says: dict[str, Any] = json.loads((out / "manifest.json").read_text())["record"]
    return says


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 8 rows in row groups of 4, in this process."""
    monkeypatch.setattr("aliprod.ingest.prepare.SHARD", 8)
    monkeypatch.setattr("aliprod.ingest.prepare.ROW_GROUP", 4)


def test_broken_ends_as_expected_says(shared: Path, tmp_path: Path) -> None:
    done = prepared(shared / "data/broken", tmp_path / "out")
    catalogue, says = read(tmp_path / "out"), record(tmp_path / "out")
    rows = {split: getattr(catalogue, split) for split in SPLITS}
    held = {
        (split, int(catalogue.classes[label]) if label >= 0 else None, image_id.split("/")[-1])
        for split, images in rows.items()
        for image_id, label in zip(images.ids.to_pylist(), images.labels.tolist(), strict=True)
    }
    skipped, problems = (" ".join(f"{path}: {why}" for path, why in says[key]) for key in ("skipped", "problems"))
    for case in json.loads((shared / "data/broken/expected.json").read_text())["cases"]:
        number = str(case["class_id"]).strip()
        row = (case["split"], int(number) if number.isdecimal() else None, case["image_id"])
        if case["expect"] in ("read", "predict"):
            assert row in held, case
        if case["expect"] == "skip":
            assert row not in held, case
            assert case["image_id"] in skipped, case
        if case["expect"] == "read or skip":
            assert (row in held) != (case["image_id"] in skipped), case
        if case["expect"] in ("predict", "ignore"):
            assert case["image_id"] in problems, case
        if case["expect"] == "report":
            assert case["class_id"] in problems, case
    assert done.skipped == len(says["skipped"])
    assert done.images == len(held)
    assert check(tmp_path / "out", 1).readable == done.images  # and every picture is one


def test_broken_takes_less_than_a_minute_and_a_gigabyte(shared: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys; from aliprod.cli import app; "
        "app(['data', 'prepare', *sys.argv[1:], '--json'], standalone_mode=False); "
        "own = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'));"  # ru_maxrss
        # would begin with the size of the process that started this one
        "print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    began = time.monotonic()
    command = [sys.executable, "-W", "error", "-c", code, str(shared / "data/broken"), str(tmp_path / "out")]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    answer, kilobytes = ended.stdout.splitlines()[-2:]
    assert set(json.loads(answer)) == {"path", "images", "skipped", "fingerprint", "bytes"}
    assert "s left" in ended.stderr
    assert time.monotonic() - began < 60
    assert sum(map(int, kilobytes.split())) < 1_000_000


@pytest.fixture(scope="session")
def odd(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs of grocery that are odd, and three that are not, in one class."""
    folder = tmp_path_factory.mktemp("odd")
    with (shared / "data/grocery/manifest.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    chosen = [line for line in lines if line["note"]] + [line for line in lines if not line["note"]][:3]
    (folder / "train/0").mkdir(parents=True)
    for line in chosen:
        shutil.copy(shared / "data/grocery" / line["path"], folder / "train/0" / Path(line["path"]).name)
    return folder


def test_grocerys_odd_pictures_become_upright_rgb_jpegs_of_bounded_size(odd: Path, tmp_path: Path) -> None:
    prepared(odd, tmp_path / "out", Settings(short_side=200))
    before, after = read(odd).train, read(tmp_path / "out").train
    assert before.ids == after.ids
    assert len(after) == 9
    for row in range(len(after)):
        jpeg, shown = after.source(row), decode(before.path(row))
        assert isinstance(jpeg, bytes)
        image = decode(jpeg)
        assert jpeg.startswith(b"\xff\xd8\xff")
        assert min(image.size) == min(200, *shown.size)  # never enlarged
        assert abs(image.width / image.height - shown.width / shown.height) < 0.01
        small = shown.resize(image.size, Image.Resampling.LANCZOS)
        assert (
            np.abs(np.asarray(image, float) - np.asarray(small, float)).mean() < 4
        )  # of 255: same way up, same colours


@pytest.mark.parametrize(
    ("options", "size", "kept"),
    [
        ({}, (300, 200), True),
        ({}, (300, 512), True),
        ({}, (600, 513), False),
        ({"exif": 3}, (300, 200), False),
        ({"exif": 1}, (300, 200), True),
        ({"mode": "L"}, (300, 200), False),
        ({"mode": "CMYK"}, (300, 200), False),
        ({"format": "PNG"}, (300, 200), False),
    ],
)
def test_only_a_jpeg_that_is_as_it_shall_be_is_kept_byte_for_byte(
    options: dict[str, Any], size: tuple[int, int], kept: bool, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = options.get("exif", 1)
    image = Image.linear_gradient("L").resize(size).convert(options.get("mode", "RGB"))
    image.save(tmp_path / "picture", options.get("format", "JPEG"), exif=exif, comment=b"private")
    before = (tmp_path / "picture").read_bytes()
    after = stored(before, decode(before), Settings())
    assert (after == before) is kept
    if not kept:
        assert b"private" not in after
        assert get_sampling(Image.open(io.BytesIO(after))) == 2, "4:2:0: a third more to decode without"
        assert min(decode(after).size) == min(512, *size)


@given(st.integers(8, 200), st.integers(8, 200), st.integers(8, 64))
def test_a_picture_is_never_enlarged_and_keeps_its_ratio(width: int, height: int, short_side: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    content = file.getvalue()
    image = decode(stored(content, decode(content), Settings(short_side=short_side)))
    assert min(image.size) == min(width, height, short_side)
    scale = min(image.size) / min(width, height)
    assert abs(max(image.size) - max(width, height) * scale) <= 0.5


def test_a_picture_that_no_jpeg_can_hold_is_made_smaller_still() -> None:
    file = io.BytesIO()
    Image.new("RGB", (70_000, 20)).save(file, "PNG")
    content = file.getvalue()
    assert decode(stored(content, decode(content), Settings())).size == (65_500, 19)


def test_a_catalogue_comes_back_as_it_went_in(packages: Catalogue, tmp_path: Path, small_shards: None) -> None:
    done = prepared(packages.root, tmp_path / "out")
    again = read(tmp_path / "out")
    assert done.images == 96
    assert done.skipped == 0
    for split in SPLITS:
        before, after = getattr(packages, split), getattr(again, split)
        assert before.ids == after.ids
        assert before.labels.tolist() == after.labels.tolist()
        for row in range(len(before)):
            assert after.source(row) == before.path(row).read_bytes()  # JPEGs of 96 x 96 stay as they are
    assert again.names == packages.names
    assert again.classes.tolist() == packages.classes.tolist()
    assert again.test_labels is not None
    assert packages.test_labels is not None
    assert again.test_labels.tolist() == packages.test_labels.tolist()
    assert again.ancestor is not None
    assert packages.ancestor is not None
    assert again.ancestor.tolist() == packages.ancestor.tolist()
    assert again.tree_fingerprint == packages.tree_fingerprint
    assert again.fingerprint == done.fingerprint != packages.fingerprint


def test_taken_rows_are_the_rows_that_were_taken(packages: Catalogue, tmp_path: Path) -> None:
    prepared(packages.root, tmp_path / "out")
    train = read(tmp_path / "out").train
    some = train.take(np.array([7, 3, 30])).take(np.array([2, 0]))
    assert [some.source(row) for row in (0, 1)] == [train.source(30), train.source(7)]
    assert some.ids.to_pylist() == [train.ids[30].as_py(), train.ids[7].as_py()]


def test_other_tools_open_the_shards(packages: Catalogue, tmp_path: Path, small_shards: None) -> None:
    prepared(packages.root, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("train-*.parquet"))
    assert [file.name for file in files] == [f"train-0000{number}.parquet" for number in range(4)]
    table = pa.concat_tables([pq.read_table(file, page_checksum_verification=True) for file in files])
    assert table.column_names == ["image_id", "class_id", "jpeg"]
    assert table.schema.types == [pa.string(), pa.int64(), pa.binary()]
    assert table["image_id"].to_pylist() == packages.train.ids.to_pylist()
    assert table["class_id"].to_pylist() == packages.classes[packages.train.labels].tolist()
    assert table["jpeg"][9].as_py() == packages.train.path(9).read_bytes()
    group = pq.ParquetFile(files[0]).metadata.row_group(0)
    assert group.num_rows == 4
    assert group.column(2).compression == "UNCOMPRESSED"
    assert pq.read_table(tmp_path / "out/test-00000.parquet")["class_id"].null_count == 8


def test_processes_change_no_byte(packages: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aliprod.ingest.prepare.SHARD", 24)  # train and test have two
    one = prepared(packages.root, tmp_path / "one", Settings(short_side=64), processes=1)
    two = prepared(packages.root, tmp_path / "two", Settings(short_side=64), processes=2)
    assert one.fingerprint == two.fingerprint
    assert content(tmp_path / "one") == content(tmp_path / "two")


KILLED = """
import os, sys
from pathlib import Path
from aliprod.ingest import prepare
prepare.SHARD = 8
for done, _ in enumerate(prepare.prepare(Path(sys.argv[1]), Path(sys.argv[2]), prepare.Settings()), 1):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("shards_done", [1, 7])
def test_a_killed_call_goes_on_to_the_same_bytes(
    packages: Catalogue, tmp_path: Path, small_shards: None, shards_done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(packages.root), str(out), str(shards_done)]
    assert subprocess.run(command, check=False).returncode == -9
    assert not out.exists()
    monkeypatch.setattr("aliprod.ingest.prepare.ROW_GROUP", 128)  # as in the process that was killed
    torn = tmp_path / ".out.preparing/train-00000/train-00000.parquet"
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")  # found, but not as it was left
    *progress, done = prepare(packages.root, out, Settings())
    assert isinstance(done, PreparedCatalogue)
    assert isinstance(progress[-1], ReadProgress)
    assert progress[-1].found == 8 * (shards_done - 1)
    prepared(packages.root, tmp_path / "undisturbed")
    assert content(out) == content(tmp_path / "undisturbed")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_process_that_dies_ends_the_call_in_one_sentence(shared: Path, tmp_path: Path, small_shards: None) -> None:
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(prepared, shared / "data/tiny", tmp_path / "out", processes=2)
        while len(children := multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        os.kill(children[0].pid or 0, 9)
        with pytest.raises(Failed, match="the same command goes on") as failed:
            call.result(timeout=60)
    assert failed.value.where.startswith(str((shared / "data/tiny/train").resolve()))


def test_the_same_call_again_reads_nothing_and_another_is_refused(packages: Catalogue, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = prepared(packages.root, out)
    (second,) = prepare(packages.root, out, Settings())
    assert second == first
    with pytest.raises(Refused, match="prepared otherwise"):
        prepared(packages.root, out, Settings(quality=80))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/letter").touch()
    with pytest.raises(Refused, match="something already"):
        prepared(packages.root, tmp_path / "taken")


def test_two_calls_do_not_work_on_one_folder(packages: Catalogue, tmp_path: Path) -> None:
    (tmp_path / ".out.preparing").mkdir()
    with shards.alone(tmp_path / ".out.preparing/lock", wait=False), pytest.raises(Refused, match="another process"):
        prepared(packages.root, tmp_path / "out")


@pytest.fixture
def copied(packages: Catalogue, tmp_path: Path) -> Catalogue:
    """A catalogue whose files may be broken."""
    shutil.copytree(packages.root, tmp_path / "packages")
    return read(tmp_path / "packages")


def test_too_much_that_is_unreadable_is_refused_with_its_number_and_leaves_nothing(
    copied: Catalogue, tmp_path: Path
) -> None:
    for row in range(10):
        copied.train.path(row).unlink()
    command = ["data", "prepare", str(copied.root), str(tmp_path / "out"), "--max-skipped", "0.1"]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 2
    assert "10 of 96 images cannot be used, and --max-skipped is 0.1" in ended.stderr
    assert "is not there" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packages"]
    assert prepared(copied.root, tmp_path / "out", max_skipped=0.11).skipped == 10


def test_a_class_that_loses_all_training_pictures_is_no_class(copied: Catalogue, tmp_path: Path) -> None:
    lost = 1
    for row in np.flatnonzero(copied.train.labels == lost):
        copied.train.path(int(row)).write_bytes(b"")
    prepared(copied.root, tmp_path / "out")
    left = read(tmp_path / "out")
    assert left.classes.tolist() == [0, 2, 3]
    for split in ("train", "val"):
        before, after = getattr(copied, split), getattr(left, split)
        kept = np.flatnonzero(before.labels != lost)
        assert after.ids.to_pylist() == before.ids.take(pa.array(kept)).to_pylist()
        assert left.classes[after.labels].tolist() == copied.classes[before.labels[kept]].tolist()
        for row in range(len(after)):
            assert after.source(row) == before.path(int(kept[row])).read_bytes()
    assert left.test_labels is not None
    assert copied.test_labels is not None
    assert np.flatnonzero(left.test_labels < 0).tolist() == np.flatnonzero(copied.test_labels == lost).tolist()
    assert left.ancestor is not None
    assert left.ancestor[-1].tolist() == [0, 1, 2]


def test_an_unreadable_test_picture_keeps_its_row(copied: Catalogue, tmp_path: Path) -> None:
    copied.test.path(3).write_bytes(copied.test.path(3).read_bytes()[:-200])
    copied.test.path(5).unlink()
    done = prepared(copied.root, tmp_path / "out")
    left = read(tmp_path / "out")
    assert left.test.ids == copied.test.ids
    assert done.skipped == 0
    assert [path for path, _ in record(tmp_path / "out")["problems"]] == [
        copied.test.paths[row].as_py() for row in (3, 5)
    ]
    seen = np.asarray(decode(left.test.source(3)), float)
    assert seen[:24].std() > 5  # the upper part is there
    assert np.abs(np.asarray(decode(left.test.source(5)), float) - 128).max() <= 1
    assert left.test.source(4) == copied.test.path(4).read_bytes()


def flips() -> list[float]:
    return [0.01, 0.3, 0.6, 0.9, 0.995, 1.0]  # where in the file: head, pictures, footer


@pytest.mark.parametrize("where", flips())
def test_a_flipped_byte_in_a_shard_is_noticed_when_it_is_laid_out(
    packages: Catalogue, tmp_path: Path, where: float
) -> None:
    prepared(packages.root, tmp_path / "out")
    flip(tmp_path / "out/train-00000.parquet", where)
    catalogue = read(tmp_path / "out")
    with pytest.raises(Failed, match=r"train-00000\.parquet: is damaged"):
        catalogue.train.source(0)
    assert isinstance(catalogue.val.source(0), bytes)


@pytest.mark.parametrize("where", flips())
def test_a_flipped_byte_in_the_rows_is_noticed_when_they_are_read(
    packages: Catalogue, tmp_path: Path, where: float
) -> None:
    prepared(packages.root, tmp_path / "out")
    flip(tmp_path / "out/val.arrow", where)
    with pytest.raises(Failed, match=r"val\.arrow: is damaged"):
        read(tmp_path / "out")


def flip(file: Path, where: float) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[int(where * (len(damaged) - 1))] ^= 1
    file.write_bytes(damaged)


@pytest.mark.parametrize("name", ["train-00000.parquet", "test.arrow", "manifest.json"])
def test_a_file_that_is_cut_short_or_gone_is_refused(packages: Catalogue, tmp_path: Path, name: str) -> None:
    prepared(packages.root, tmp_path / "out")
    os.truncate(tmp_path / "out" / name, 100)
    with pytest.raises(Refused, match="damaged"):
        read(tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    with pytest.raises(Refused):
        read(tmp_path / "out")


def test_a_picture_that_changed_changes_the_fingerprint_and_its_place_does_not(
    copied: Catalogue, tmp_path: Path
) -> None:
    first = prepared(copied.root, tmp_path / "first")
    shutil.copytree(copied.root, tmp_path / "elsewhere")
    plain = copied.fingerprint
    assert read(tmp_path / "elsewhere").fingerprint == plain
    assert prepared(tmp_path / "elsewhere", tmp_path / "second").fingerprint == first.fingerprint
    shutil.copy(copied.train.path(0), copied.train.path(1))
    changed = prepared(copied.root, tmp_path / "third")
    assert changed.fingerprint != first.fingerprint
    assert read(copied.root).fingerprint != plain  # the file has another size
    assert read(copied.root).annotation == copied.annotation


STAGE = Stage(
    resize=40, crop=32, batch_size=8, augmentation=("random_resized_crop", "flip", "auto_augment", "cutout"), seed=5
)
FEED = Feed(torch.device("cpu"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bicubic")


def test_what_is_trained_on_is_that_of_the_folder(packages: Catalogue, tmp_path: Path) -> None:
    prepared(packages.root, tmp_path / "out")
    both = (packages, read(tmp_path / "out"))
    epochs = [list(TrainBatches(training_set(c, STAGE), STAGE, FEED).epoch(1)) for c in both]
    for one, other in zip(*epochs, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_what_is_predicted_is_that_of_the_folder(packages: Catalogue, tmp_path: Path) -> None:
    prepared(packages.root, tmp_path / "out")
    squares = [list(squared_batches(c.test, 48, FEED, 16)) for c in (packages, read(tmp_path / "out"))]
    for (_, one), (_, other) in zip(*squares, strict=True):
        assert torch.equal(one, other)


def test_many_processes_lay_a_split_out_once_and_clear_what_a_killed_one_left(
    packages: Catalogue, tmp_path: Path, cache: Path
) -> None:
    done = prepared(packages.root, tmp_path / "out")
    folder = cache / "pictures" / done.fingerprint
    left = folder / ".train.0123.partial"
    left.mkdir(parents=True)
    train = read(tmp_path / "out").train
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jpegs = [pool.submit(train.source, 0) for _ in range(4)]
        assert {jpeg.result() for jpeg in jpegs} == {packages.train.path(0).read_bytes()}
    assert sorted(path.name for path in folder.iterdir()) == ["train", "train.lock"]
    assert commit.verify(folder / "train") == []


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_disk_without_room_for_all_pictures_keeps_some_and_what_is_seen_is_the_same(
    packages: Catalogue, tmp_path: Path, cache: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    prepared(packages.root, tmp_path / "out")
    sizes = [size for _, size in record(tmp_path / "out")["shards"]["train"]]
    monkeypatch.setenv("ALIPROD_CACHE_GB", str(share * sum(sizes) / 1e9))
    expected = next(iter(TrainBatches(training_set(packages, STAGE), STAGE, FEED).epoch(0)))
    found = read(tmp_path / "out")
    seen = next(iter(TrainBatches(training_set(found, STAGE), STAGE, FEED).epoch(0)))
    assert torch.equal(seen.images, expected.images)
    (kept,) = cache.glob("pictures/*/train/jpegs")
    assert kept.stat().st_size <= share * sum(sizes)
    assert (kept.stat().st_size > 0) == (share > 0)
    assert [found.train.source(row) for row in range(len(found.train))] == [
        path.read_bytes() for path in map(packages.train.path, range(len(found.train)))
    ]


def test_a_picture_that_is_read_from_its_shard_is_held_against_its_checksum(
    packages: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(packages.root, tmp_path / "out")
    monkeypatch.setenv("ALIPROD_CACHE_GB", "0")
    train = read(tmp_path / "out").train
    jpeg = train.source(3)
    shard = tmp_path / "out/train-00000.parquet"
    assert isinstance(jpeg, bytes)
    flip(shard, (shard.read_bytes().index(jpeg) + 100) / shard.stat().st_size)
    train.ask([2, 3])
    assert train.source(2) == packages.train.path(2).read_bytes()
    with pytest.raises(Failed, match=r"train-00000\.parquet: is damaged"):
        train.source(3)


@pytest.mark.parametrize("said", ["ten", "nan"])
def test_a_room_that_is_no_number_is_refused(
    said: str, packages: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(packages.root, tmp_path / "out")
    monkeypatch.setenv("ALIPROD_CACHE_GB", said)
    with pytest.raises(Refused, match=f"ALIPROD_CACHE_GB: is no number: '{said}'"):
        read(tmp_path / "out").train.source(0)


def test_a_cache_is_private_and_one_of_another_user_is_not_read(
    packages: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(packages.root, tmp_path / "out")
    monkeypatch.delenv("ALIPROD_CACHE")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    train = read(tmp_path / "out").train
    assert isinstance(train.source(0), bytes)
    (folder,) = tmp_path.glob("aliprod-cache-*")
    assert folder.stat().st_mode & 0o077 == 0
    if os.getuid() != 0:
        pytest.skip("only root gives folders away")
    os.chown(folder, 12345, 12345)
    with pytest.raises(Refused, match="another user"):
        read(tmp_path / "out").val.source(0)


def test_a_split_travels_to_loader_processes_as_its_columns_and_no_list(packages: Catalogue, tmp_path: Path) -> None:
    prepared(packages.root, tmp_path / "out")
    train = read(tmp_path / "out").train
    train.source(0)  # its files are open now
    many = train.take(np.tile(np.arange(len(train)), 10_000))
    columns = many.ids.nbytes + many.labels.nbytes + many.places.nbytes  # type: ignore[union-attr]
    assert len(pickle.dumps(many)) < columns + 10_000
    assert pickle.loads(pickle.dumps(train)).source(5) == train.source(5)


def test_a_prepared_catalogue_is_prepared_smaller(packages: Catalogue, tmp_path: Path) -> None:
    prepared(packages.root, tmp_path / "large")
    prepared(tmp_path / "large", tmp_path / "small", Settings(short_side=32))
    small = read(tmp_path / "small")
    assert small.train.ids == packages.train.ids
    assert min(decode(small.train.source(0)).size) == 32


def test_a_name_forges_no_line_of_what_is_told(tmp_path: Path) -> None:
    problems = (Flaw("train/a\nError: all is lost.jpg", "is damaged"),)
    told = PreparedCatalogue("out", images=3, skipped=1, fingerprint="", bytes=9, problems=problems).text()
    assert len(told.splitlines()) == 2
