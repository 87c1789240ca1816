"""Predictions of many pictures: where they come from, what is written, and what a killed one leaves to do."""

import json
from collections.abc import Sequence
from pathlib import Path
from threading import Barrier

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv

from aliprod.catalogue.annotations import UNREAD
from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.remote_folder import RemoteFolder
from aliprod.data.loader import Feed
from aliprod.errors import Refused
from aliprod.inference.classify import CHUNK, Answered, Recogniser, classify, write_answers
from aliprod.inference.pictures import Picture, listed, read
from aliprod.inference.predict import Ready
from aliprod.models import weights
from aliprod.models.classifier import Classifier
from aliprod.processes import ReadProgress
from aliprod.store.lineage import Voice

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> Recogniser:
    folder = tmp_path_factory.mktemp("weights")
    (folder / weights.MODEL).write_bytes(b"only its checksum counts")
    torch.manual_seed(0)
    model = Classifier("test_resnet", num_classes=4)
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    model.train()(torch.randn(16, 3, 32, 32))
    config = weights.Config("test_resnet", MEAN, STD, "bicubic", resize=36, crop=32)
    classes = weights.Classes((10, 11, 12, 13), ("", "b", "c", "d"))
    member = Ready(model.eval(), config, classes, Feed(torch.device("cpu"), MEAN, STD, "bicubic"))
    return Recogniser([Voice(folder)], [member], "center", 2)


@pytest.fixture
def many(packages: Catalogue, tmp_path: Path) -> list[Picture]:
    """Three chunks and a bit: each of 40 pictures under several names, and one that is none."""
    files = [packages.test.path(row) for row in range(len(packages.test))]
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(3 * CHUNK + 5):
        (folder / f"{number:03d}.jfif").symlink_to(files[number % len(files)])
    (folder / "040.jfif").unlink()
    (folder / "040.jfif").write_text("this is no picture")
    for name in ("notes.txt", "._000.jfif"):
        (folder / name).write_text("nor is this")
    return listed([str(folder)])


def done(out: Path, recogniser: Recogniser, pictures: Sequence[Picture]) -> int:
    """Write all answers; how many were asked for."""
    *progress, last = write_answers(out, recogniser, pictures, 1)
    assert last == Answered(str(out), len(pictures), 1)
    seen = [one.images for one in progress if isinstance(one, ReadProgress)]
    assert seen == list(range(len(pictures) - len(seen) + 1, len(pictures) + 1))
    return len(seen)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_each_format_holds_a_row_for_each_picture_in_order(
    recogniser: Recogniser, many: list[Picture], tmp_path: Path, ending: str
) -> None:
    out = tmp_path / f"new/answers{ending}"
    done(out, recogniser, many)
    expected = list(classify(recogniser, many, 1))
    if ending == ".jsonl":
        assert [json.loads(line) for line in out.read_text().splitlines()] == expected
        return
    nulls = csv.ConvertOptions(strings_can_be_null=True)
    table = csv.read_csv(out, convert_options=nulls) if ending == ".csv" else pq.read_table(out)
    top = ["class_id", "name", "probability", "class_id_2", "name_2", "probability_2"]
    assert table.column_names == ["path", *top, "error"]
    for row, answer in zip(table.to_pylist(), expected, strict=True):
        assert row["path"] == answer["path"]
        if "error" in answer:
            assert (row["error"], row["class_id"]) == (answer["error"], None)
        else:
            first, second = answer["top"]
            assert (row["class_id"], row["probability"], row["class_id_2"]) == (
                first["class_id"], first["probability"], second["class_id"],
            )  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_killed_prediction_goes_on_behind_its_last_whole_chunk_and_ends_with_the_same_bytes(
    recogniser: Recogniser, many: list[Picture], tmp_path: Path
) -> None:
    done(tmp_path / "undisturbed.csv", recogniser, many)
    out = tmp_path / "killed.csv"
    running = write_answers(out, recogniser, many, 1)
    for _ in range(2 * CHUNK + 3):
        next(running)
    running.close()
    with (tmp_path / ".killed.csv.unfinished").open("ab") as file:
        file.write(b'{"path": "half a li')
    assert not out.exists()
    assert done(out, recogniser, many) == CHUNK + 5
    assert out.read_bytes() == (tmp_path / "undisturbed.csv").read_bytes()


def test_answers_of_another_model_or_of_other_pictures_are_not_kept(
    recogniser: Recogniser, many: list[Picture], tmp_path: Path
) -> None:
    def killed(pictures: Sequence[Picture], top: int) -> None:
        other = Recogniser(recogniser.voices, recogniser.members, "center", top)
        running = write_answers(tmp_path / "a.csv", other, pictures, 1)
        for _ in range(2 * CHUNK):
            next(running)
        running.close()

    killed(many, top=1)
    assert done(tmp_path / "a.csv", recogniser, many) == len(many)
    killed([*many[:CHUNK], *many[CHUNK + 1 :]], top=2)
    assert done(tmp_path / "a.csv", recogniser, many) == len(many) - CHUNK


def test_processes_change_no_answer(recogniser: Recogniser, many: list[Picture]) -> None:
    assert list(classify(recogniser, many, 2)) == list(classify(recogniser, many, 1))


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_table_gives_its_paths_from_its_folder_on_and_keeps_how_it_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    names = ["b/2.jpg", "a/1.jpg", "/else/3.jpg", "~/4.jpg"]
    table = tmp_path / f"list{ending}"
    columns = pa.table({"label": ["x", "y", "z", "z"], "file_name": names})
    csv.write_csv(columns, table) if ending == ".csv" else pq.write_table(columns, table)
    found = listed([str(table)])
    assert [picture.shown for picture in found] == names
    assert [picture.source() for picture in found] == [
        tmp_path / "b/2.jpg", tmp_path / "a/1.jpg", Path("/else/3.jpg"), tmp_path / "home/4.jpg",
    ]  # fmt: skip


def test_a_table_without_paths_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("colour\nred\n")
    with pytest.raises(Refused, match="has no column path"):
        listed([str(tmp_path / "list.csv")])


def test_home_folders_and_uris_of_this_machine_are_found(
    packages: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").symlink_to(packages.root / "test")
    monkeypatch.setenv("HOME", str(tmp_path))
    home, uri = listed(["~/photos"]), listed([(tmp_path / "photos").as_uri()])
    assert [picture.source() for picture in home] == [picture.source() for picture in uri]
    assert len(home) == len(packages.test)


def test_a_photograph_that_no_decoder_opens_is_a_row_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    assert read({(32, "bicubic")}, listed([str(tmp_path)])) == [UNREAD]


def test_pictures_of_a_bucket_are_read_side_by_side(packages: Catalogue) -> None:
    content, together = packages.test.path(0).read_bytes(), Barrier(8)

    class Bucket(RemoteFolder):
        def content(self, path: str) -> bytes:
            together.wait(timeout=60)  # of one after another, none would ever answer
            return content if path.endswith("7.jpg") else b"no picture"

    found = read({(32, "bicubic")}, [Picture(Bucket("s3://team/photos"), f"{number}.jpg") for number in range(8)])
    assert [isinstance(one, str) for one in found] == [True] * 7 + [False]
