"""tars: WebDataset's members are read where they lie, and damage costs a sentence."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from aliprod.catalogue.decode import Unreadable
from aliprod.catalogue.sources import Reading, read
from aliprod.errors import Refused
from aliprod.ingest.check import check
from aliprod.ingest.prepare import PreparedCatalogue, Settings, prepare


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((32, 32), 20 + number).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> dict[str, bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return members


def samples(count: int, kind: str = "cls", start: int = 0) -> dict[str, bytes]:
    found = {}
    for number in range(start, start + count):
        label = str(number % 2)
        found[f"{number:04}.jpg"] = picture(number)
        found[f"{number:04}.{kind}"] = (json.dumps({"label": int(label)}) if kind == "json" else label + "\n").encode()
    return found


@pytest.mark.parametrize("kind", ["cls", "json", "txt"])
def test_pictures_labels_and_splits_are_those_of_the_members(tmp_path: Path, kind: str) -> None:
    members = tar(tmp_path / "shoes-train-000.tar", samples(4, kind))
    tar(tmp_path / "val" / "000.tar", samples(2, kind, 4))
    found = read(tmp_path)
    assert found.train.paths.to_pylist() == [f"shoes-train-000.tar/{n:04}.jpg" for n in range(4)]
    assert found.train.labels.tolist() == [0, 1, 0, 1]
    assert found.val.labels.tolist() == [0, 1]
    assert [found.train.take([2]).source(0), found.train.source(1)] == [members["0002.jpg"], members["0001.jpg"]]
    assert check(tmp_path, 1).readable == 6


def test_a_member_that_is_refused_changes_no_class_id(tmp_path: Path) -> None:
    tar(tmp_path / "train.tar", samples(4) | {"x\x07.jpg": picture(9), "x\x07.cls": b"unknown"})
    found = read(tmp_path)
    assert (found.classes.tolist(), found.names) == ([0, 1], ("", ""))
    assert [flaw.skipped for flaw in found.problems] == [True]


def test_tars_without_a_split_give_some_of_each_class_to_val_and_can_be_prepared(tmp_path: Path) -> None:
    tar(tmp_path / "tars" / "000.tar", samples(20))
    reading = Reading(val=0.2, kept=tmp_path / "held-out")
    found = read(tmp_path / "tars", reading)
    assert sorted(found.val.labels.tolist()) == [0, 0, 1, 1]
    *_, done = prepare(tmp_path / "tars", tmp_path / "out", Settings(), reading=reading)
    assert isinstance(done, PreparedCatalogue)
    again = read(tmp_path / "out")
    assert again.val.ids.to_pylist() == found.val.ids.to_pylist()
    assert again.val.source(1) == found.val.source(1)


def test_a_tar_that_is_compressed_cut_short_or_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.tar"
    tar(file, samples(2), "w:gz")
    with pytest.raises(Refused, match="no tar"):
        read(tmp_path)
    tar(file, samples(2))
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(Refused, match="no tar"):
        read(tmp_path)
    tar(file, {"a.jpg": picture(0)})
    with pytest.raises(Refused, match="blank"):
        read(tmp_path)


def test_a_tar_of_a_folder_as_dot_holds_the_same_pictures(tmp_path: Path) -> None:
    members = tar(tmp_path / "plain" / "train.tar", samples(4))
    tar(tmp_path / "dotted" / "train.tar", {f"./{name}": content for name, content in members.items()})
    plain, dotted = (read(tmp_path / name).train for name in ("plain", "dotted"))
    assert dotted.ids.to_pylist() == plain.ids.to_pylist()
    assert [dotted.source(row) for row in range(4)] == [plain.source(row) for row in range(4)]
    tar(tmp_path / "above" / "train.tar", {f"./../{name}": content for name, content in members.items()})
    with pytest.raises(Refused, match="lead out"):
        read(tmp_path / "above")


@pytest.mark.parametrize("name", ["train-0.tar.gz", "train/0.tgz"])
def test_a_packed_tar_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    tar(tmp_path / name, samples(2), "w:gz")
    with pytest.raises(Refused, match="compressed") as refused:
        read(tmp_path)
    assert (refused.value.where, "gunzip" in refused.value.advice) == (str(tmp_path / name), True)


def test_tars_may_lie_in_folders_of_their_splits(tmp_path: Path) -> None:
    tar(tmp_path / "train" / "0.tar", samples(4))
    tar(tmp_path / "val" / "0.tar", samples(2))
    found = read(tmp_path)
    assert (len(found.train), len(found.val)) == (4, 2)


def test_a_tar_that_shrinks_later_costs_the_picture(tmp_path: Path) -> None:
    tar(tmp_path / "train.tar", samples(4))
    found = read(tmp_path)
    (tmp_path / "train.tar").write_bytes(b"")
    with pytest.raises(Unreadable, match="cut short"):
        found.train.source(3)


def test_links_and_pipes_in_a_tar_are_no_pictures(tmp_path: Path) -> None:
    tar(tmp_path / "train.tar", samples(2))
    with tarfile.open(tmp_path / "train.tar", "a") as file:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("0009.jpg")
            info.type, info.linkname = kind, "/etc/hostname"
            file.addfile(info)
    assert len(read(tmp_path).train) == 2


def test_a_tar_that_a_link_brings_in_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    tar(tmp_path / "store" / "train.tar", samples(2))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "train.tar").symlink_to(tmp_path / "store" / "train.tar")
    with pytest.raises(Refused, match="link"):
        read(tmp_path / "photos")
    assert len(read(tmp_path / "photos", Reading(links=tmp_path / "store")).train) == 2
