"""tables: columns by any name, three delimiters, Parquet, and whatever is wrong is said with its line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aliprod.catalogue.sources import Reading, read
from aliprod.errors import Refused
from aliprod.ingest.check import check


def table(root: Path, text: str, name: str = "train.csv", folder: str = "") -> Path:
    """A table, and an empty file for what its lines name first."""
    (root / folder).mkdir(exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")
    for line in text.splitlines()[1:]:
        (root / folder / line.replace(";", ",").replace("\t", ",").partition(",")[0]).touch()
    return root


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("header", [("path", "class"), ("image", "label"), ("File_Name", "Category")])
def test_a_delimiter_and_usual_names_need_not_be_said(tmp_path: Path, delimiter: str, header: tuple[str, str]) -> None:
    lines = [header, ("a.jpg", "pear"), ("b.jpg", "apple")]
    found = read(table(tmp_path, "\n".join(delimiter.join(line) for line in lines)))
    assert found.names == ("apple", "pear")
    assert found.train.paths.to_pylist() == ["a.jpg", "b.jpg"]
    said = " ".join(found.notes)
    assert all(name in said for name in header) == (header != ("path", "class"))


def test_a_plan_says_which_columns_are_meant(tmp_path: Path) -> None:
    root = table(
        tmp_path, "path,class,what,set\na.jpg,1,pear,train\nb.jpg,1,apple,train\nc.jpg,1,pear,val\n", "all.csv"
    )
    found = read(root, Reading({"class": "what", "split": "set"}))
    assert (found.names, len(found.train), len(found.val)) == (("apple", "pear"), 2, 1)
    with pytest.raises(Refused, match="Did you mean what") as refused:
        read(root, Reading({"class": "wat"}))
    assert refused.value.where.endswith("all.csv, line 1")


def test_json_lines_are_a_table_too(tmp_path: Path) -> None:
    for split, lines in (
        ("train", ['{"file_name": "a.jpg", "label": 7, "n": []}', "", '{"label": 8, "file_name": "b.jpg"}']),
        ("validation", ['{"file_name": "c.jpg", "label": 8}']),
    ):
        (tmp_path / split).mkdir()
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    found = read(tmp_path)
    assert found.train.paths.to_pylist() == ["train/a.jpg", "train/b.jpg"]
    assert (found.classes.tolist(), found.val.labels.tolist()) == ([7, 8], [1])


def test_a_key_that_the_first_line_of_json_lacks_is_a_column_too(tmp_path: Path) -> None:
    lines = ['{"path": "a.jpg", "class": "pear"}', '{"path": "b.jpg", "class": "pear", "split": "test"}']
    file = tmp_path / "all.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(Refused, match=r"the split of 'a\.jpg' is ''") as refused:
        read(file)
    assert refused.value.where.endswith("all.jsonl, line 1")
    file.write_text("\n".join([lines[0].replace("}", ', "split": "train"}'), lines[1]]))
    assert [images.ids.to_pylist() for images in read(file).splits] == [["a.jpg"], [], ["b.jpg"]]
    file.write_text("\n".join([lines[0].replace("class", "what"), lines[0]]))
    with pytest.raises(Refused, match=r"the class of 'a\.jpg' is blank"):
        read(file)


@pytest.mark.parametrize("key", ["path", "class", "split"])
def test_a_list_where_json_should_say_a_text_is_refused_with_its_line(tmp_path: Path, key: str) -> None:
    row = {"path": "a.jpg", "class": "pear", "split": "train"}
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, [row, row | {key: ["x"]}])))
    with pytest.raises(Refused, match=rf'has \["x"\] under {key}') as refused:
        read(tmp_path)
    assert refused.value.where.endswith("all.jsonl, line 2")


@pytest.mark.parametrize(
    ("line", "what"), [("[1]", "no JSON object"), ("{", "no JSON object"), ('{"file_name": "b"}', "blank")]
)
def test_a_line_of_json_that_is_no_row_is_refused(tmp_path: Path, line: str, what: str) -> None:
    (tmp_path / "train.jsonl").write_text('{"file_name": "a.jpg", "label": "\\ud800"}\n' + line)
    with pytest.raises(Refused, match=what) as refused:
        read(tmp_path)
    assert refused.value.where.endswith("train.jsonl, line 2")


def test_absolute_paths_lead_below_the_table_or_to_where_the_user_allows(tmp_path: Path) -> None:
    shelf, table = tmp_path / "shelf", tmp_path / "lists" / "all.csv"
    table.parent.mkdir()
    rows = [(shelf / "train" / "a.jpg", "apple", "train"), (shelf / "val" / "b.jpg", "apple", "val")]
    rows += [(table.parent / "own" / "c.jpg", "pear", "train")]
    table.write_text("\n".join(";".join(map(str, row)) for row in [("image", "label", "split"), *rows]))
    for path, *_ in rows:
        path.parent.mkdir(parents=True)
        Image.effect_noise((32, 32), 20).save(path)
    with pytest.raises(Refused, match="absolute") as refused:
        read(table)
    assert f"--links {shelf} " in refused.value.advice
    assert refused.value.where.endswith("all.csv, line 2")
    found = read(table, Reading(links=shelf))
    assert found.train.paths.to_pylist() == [str(rows[0][0]), "own/c.jpg"]
    assert [found.train.path(0), found.train.path(1), found.val.path(0)] == [rows[0][0], rows[2][0], rows[1][0]]
    told = check(table, 1, Reading(links=shelf))
    assert (told.readable, [flaw for flaw in told.problems if "not listed" in flaw.problem]) == (3, [])
    table.write_text(f"image;label\n{shelf}/../own/c.jpg;pear\n")
    with pytest.raises(Refused, match="no row that can be trained on"):
        read(table, Reading(links=shelf))


@pytest.mark.parametrize("links", ["linked/img", "real", "/", ""])
def test_absolute_paths_may_lead_through_links(tmp_path: Path, links: str) -> None:
    (tmp_path / "real" / "img").mkdir(parents=True)
    (tmp_path / "lists").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    Image.effect_noise((32, 32), 20).save(tmp_path / "real" / "img" / "a.jpg")
    table = tmp_path / ("lists" if links else "linked") / "all.csv"  # "": the table is beside its pictures
    table.write_text(f"path,class\n{tmp_path}/linked/img/a.jpg,pear\n")
    if links:
        with pytest.raises(Refused, match=r"linked/img/a\.jpg' is absolute") as refused:
            read(table)
        advised = refused.value.advice.partition("--links ")[2].partition(" ")[0]
        assert len(read(table, Reading(links=Path(advised))).train) == 1
    found = read(table, Reading(links=tmp_path / links if links else None)).train
    assert found.path(0) == tmp_path / "real" / "img" / "a.jpg"
    assert (found.paths[0].as_py() == "img/a.jpg") == (not links)


def test_train_without_val_says_that_nothing_is_held_out(tmp_path: Path) -> None:
    table(tmp_path, "path,class\na.jpg,1\nb.jpg,2\n")
    assert ["no val" in note for note in read(tmp_path).notes] == [True]
    assert read(tmp_path, Reading(val=0)).notes == ()


def test_paths_count_from_the_folder_that_has_the_files(tmp_path: Path) -> None:
    (tmp_path / "another").mkdir()
    found = read(table(tmp_path, "image,label\na.jpg,1\nb.jpg,2\n", folder="pictures"))
    assert found.train.paths.to_pylist() == ["pictures/a.jpg", "pictures/b.jpg"]
    assert found.train.ids.to_pylist() == ["a.jpg", "b.jpg"]
    assert any("pictures/" in note for note in found.notes)


def test_a_row_with_more_cells_than_the_header_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="has 3 cells, where the header has 2") as refused:
        read(table(tmp_path, 'path,class\na.jpg,"salt\ncoarse"\nb.jpg,salt, fine\n'))
    assert refused.value.where.endswith("train.csv, line 4")
    assert "Quote" in refused.value.advice
    assert read(table(tmp_path, "path,class\na.jpg,salt,\nb.jpg,sugar,\n")).names == ("salt", "sugar")


@pytest.mark.parametrize("after", ["c.jpg,1\nd.jpg,1\n", 'c.jpg,"1"\n'])
def test_a_quote_that_is_not_closed_is_named_where_it_begins(tmp_path: Path, after: str) -> None:
    with pytest.raises(Refused, match="is not CSV") as refused:
        read(table(tmp_path, f'path,class\na.jpg,1\nb.jpg,"1\n{after}'))
    assert refused.value.where.endswith("train.csv, line 3")


def test_a_path_as_find_writes_it_is_the_path_without_its_dots(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    lines = "./img/a.jpg,1\nimg/./b.jpg,2\nimg/a.jpg,1\n./../c.jpg,1\n.,1\n"
    (tmp_path / "train.csv").write_text(f"path,class\n{lines}")
    found = read(tmp_path)
    assert found.train.ids.to_pylist() == found.train.paths.to_pylist() == ["img/a.jpg", "img/b.jpg"]
    assert [flaw.path for flaw in found.problems] == ["../c.jpg", ".", "img/a.jpg"]
    found = read(table(tmp_path, "path,class\n./a.jpg,1\n./b.jpg,2\n", folder="img"))
    assert (found.train.ids[0].as_py(), found.train.paths[0].as_py()) == ("a.jpg", "img/a.jpg")


def test_blanks_after_commas_are_in_no_cell_but_in_a_name_that_has_them(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", " c.jpg", "c.jpg"):
        (tmp_path / name).touch()
    lines = f"pear, a.jpg, train\napple, ./b.jpg , val \npear, c.jpg, train\napple, {tmp_path}/c.jpg, train\n"
    (tmp_path / "all.csv").write_text(f"class, path, split\n{lines}")
    found = read(tmp_path)
    assert [images.ids.to_pylist() for images in found.splits] == [["a.jpg", " c.jpg", "c.jpg"], ["b.jpg"], []]
    assert found.names == ("apple", "pear")
    (tmp_path / "all.csv").write_text("class, path\npear, /etc/passwd\n")
    with pytest.raises(Refused, match="'/etc/passwd' is absolute"):
        read(tmp_path)


@pytest.mark.parametrize("said", ["holdout", ""])
def test_a_split_that_is_none_is_refused_with_its_line(tmp_path: Path, said: str) -> None:
    with pytest.raises(Refused, match="split") as refused:
        read(table(tmp_path, f"path,class,split\na.jpg,1,train\nb.jpg,1,{said}\n", "labels.csv"))
    assert refused.value.where.endswith("labels.csv, line 3")


def test_a_table_is_a_catalogue_by_its_own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path, "path,class,split\na.jpg,1,train\nb.jpg,1,dev\n", "labels.csv")
    table(tmp_path, "path,class\n", "other.csv")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = read(Path("~/labels.csv"))
    assert (len(found.train), len(found.val), found.root) == (1, 1, tmp_path)


def test_test_rows_keep_their_place_whatever_their_class(tmp_path: Path) -> None:
    table(tmp_path, "path,class\na.jpg,pear\nb.jpg,apple\n")
    found = read(table(tmp_path, "path,class\nc.jpg,plum\nd.jpg,pear\ne.jpg,\n", "test.csv"))
    assert found.test.labels.tolist() == [-1, -1, -1]
    assert found.test_labels is not None
    assert found.test_labels.tolist() == [-1, 1, -1]
    assert [flaw.path for flaw in found.problems] == ["c.jpg"]


@pytest.mark.parametrize("refused", ["../x.jpg,unknown", "a.jpg,unknown", "a.jpg,01", "x//y.jpg,01"])
def test_a_row_that_is_refused_changes_no_class_id(tmp_path: Path, refused: str) -> None:
    text = "path,class\na.jpg,1\nb.jpg,2\nc.jpg,10\n"
    before = read(table(tmp_path, text))
    (tmp_path / "train.csv").write_text(f"{text}{refused}\n")
    found = read(tmp_path)
    assert (found.classes.tolist(), found.fingerprint) == ([1, 2, 10], before.fingerprint)
    assert len(found.problems) == 1
    assert "not in train" not in found.problems[0].problem


def test_a_class_that_looks_like_one_of_train_is_asked_about(tmp_path: Path) -> None:
    table(tmp_path, "path,class\na.jpg,0\nb.jpg,10\n")
    found = read(table(tmp_path, "path,class\nc.jpg,0.0\nd.jpg,10.00\ne.jpg,10\n", "val.csv"))
    assert found.val.ids.to_pylist() == ["e.jpg"]
    assert [flaw.problem.rpartition(". ")[2] for flaw in found.problems] == ["Did you mean 0?", "Did you mean 10?"]


@pytest.mark.parametrize("labels", [["pear", "apple"], [1, 0], pa.array(["pear", "apple"]).dictionary_encode()])
def test_parquet_is_a_table_too(tmp_path: Path, labels: object) -> None:
    pq.write_table(
        pa.table({"image": ["a.jpg", "b.jpg"], "label": labels, "split": ["train"] * 2}), tmp_path / "t.parquet"
    )
    found = read(tmp_path)
    assert found.train.labels.tolist() == [1, 0]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(60) + b"PAR1"])
def test_what_is_no_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(Refused, match="not Parquet"):
        read(tmp_path)


def test_parquet_with_pictures_or_gaps_is_refused(tmp_path: Path) -> None:
    inside = [{"bytes": b"1", "path": "a.jpg"}]
    pq.write_table(pa.table({"image": inside, "label": [1]}), tmp_path / "train.parquet")
    with pytest.raises(Refused, match="as text"):
        read(tmp_path)
    pq.write_table(pa.table({"image": ["a.jpg"], "label": pa.array([None], pa.int64())}), tmp_path / "train.parquet")
    with pytest.raises(Refused, match="blank") as refused:
        read(tmp_path)
    assert refused.value.where.endswith("train.parquet, row 1")


def test_a_table_beside_flat_pictures_gives_them_their_classes(tmp_path: Path) -> None:
    found = read(table(tmp_path, "image,label\na.jpg,1\nb.jpg,2\n", "labels.csv", "train"), Reading(val=0))
    assert found.train.paths.to_pylist() == ["train/a.jpg", "train/b.jpg"]


def test_a_test_table_need_not_have_the_columns_of_train(tmp_path: Path) -> None:
    table(tmp_path, "image,species\na.jpg,1\n")
    found = read(table(tmp_path, "image\nb.jpg\n", "test.csv"), Reading({"class": "species"}))
    assert (len(found.test), found.test_labels) == (1, None)
