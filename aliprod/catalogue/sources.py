"""AliProducts, ImageFolder, CSV and prepared shards become a catalogue.

Rows are refused one by one, with a reason; a file that is wrong as a whole ends the reading. No picture is opened
and no file looked for: at 2.5 million rows that is the decoder's business, and check's.
"""

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aliprod.catalogue import annotations, shards, tree
from aliprod.catalogue.catalogue import Catalogue, Flaw, Images, Integers
from aliprod.catalogue.identity import PICTURE_SUFFIXES, class_fault, class_number, name_fault, path_fault, printable
from aliprod.errors import Refused, listing
from aliprod.store import commit

_LAYOUTS = (
    "A catalogue has train.json and train/00000/ (AliProducts), or train/NAME/ (ImageFolder), "
    "or train.csv with the columns path and class; or `aliprod data prepare` wrote it."
)


def read(path: Path) -> Catalogue:
    """The catalogue in a folder.

    Raises:
        Refused: no such folder, none of the four layouts, an annotation file that cannot be read, or no
            training row that can be used.
    """
    if not path.is_dir():
        raise Refused("is a file, not the folder of a catalogue." if path.exists() else "is not there.", path, _LAYOUTS)
    root = path.resolve()
    try:
        if (root / "train.json").is_file():
            return _assemble(root, "train.json", _from_json(root), _test_labels(root))
        if (root / "train.csv").is_file():
            return _assemble(root, "train.csv", _from_csv(root))
        if (root / "train").is_dir():
            return _assemble(root, "train", _from_folders(root))
        if (root / commit.MANIFEST).is_file():
            return _from_shards(root)
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror}.", error.filename or path, "Check its permissions.") from error
    raise Refused("holds no catalogue.", path, _LAYOUTS)


@dataclass
class _Rows:
    """Rows of one split as they are collected; class id -1: unknown."""

    split: str
    ids: list[str] = field(default_factory=list)
    class_ids: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    problems: list[Flaw] = field(default_factory=list)
    words: dict[int, str] = field(default_factory=dict)  # class ids that were given, since the source has names

    def add(self, image_id: str, class_id: int, path: str) -> None:
        self.ids.append(image_id)
        self.class_ids.append(class_id)
        self.paths.append(path)

    def refuse(self, path: str, problem: str) -> None:
        self.problems.append(Flaw(printable(path), problem, skipped=True))

    def remark(self, path: str, problem: str) -> None:
        self.problems.append(Flaw(printable(path), problem))


# AliProducts


def _from_json(root: Path) -> Iterator[_Rows]:
    for split in ("train", "val", "test"):
        rows = _Rows(split)
        file = root / f"{split}.json"
        if split == "train" or file.is_file():
            _read_json(file, rows, _class_folders(root, split))
        yield rows


def _read_json(file: Path, rows: _Rows, folders: dict[int, str]) -> None:
    split, labelled = rows.split, rows.split != "test"
    for number, row in enumerate(annotations.rows(file), 1):
        if not isinstance(row, dict) or isinstance(row, annotations.Repeated):
            rows.refuse(file.name, f"row {number} {_row_fault(row)}")
            continue
        image_id = row["image_id"] if "image_id" in row else row.get("id")
        class_id = row["class_id"] if "class_id" in row else row.get("category_id")
        known = class_number(class_id) if labelled else -1
        folder = split if known is None or known < 0 else f"{split}/{folders.get(known) or f'{known:05d}'}"
        fault = name_fault(image_id) or (class_fault(class_id) if known is None else "")
        if not isinstance(image_id, str):
            rows.refuse(file.name, f"row {number}: {fault}")
        elif fault or known is None:
            rows.refuse(f"{folder}/{image_id}", f"row {number} of {file.name}: {fault}")
        else:
            rows.add(image_id, known, f"{folder}/{image_id}")


def _row_fault(row: object) -> str:
    if isinstance(row, annotations.Repeated):
        return f"has the key {row.twice} twice"
    return "is no object with an image_id and a class_id"


def _class_folders(root: Path, split: str) -> dict[int, str]:
    """The folder of each class: five digits, else the number as it is, else padded in another way."""
    folders: dict[int, str] = {}
    names = [entry.name for entry in _folders(root, root / split)]
    for name in sorted(names, key=lambda name: (len(name) != 5, len(name))):
        class_id = class_number(name)
        if class_id is not None:
            folders.setdefault(class_id, name)
    return folders


def _test_labels(root: Path) -> _Rows | None:
    file = root / "test_labels.json"
    if not file.is_file():
        return None
    rows = _Rows("test_labels")
    _read_json(file, rows, {})
    return rows


# ImageFolder


def _from_folders(root: Path) -> Iterator[_Rows]:
    classes = _Classes([entry.name for entry in _folders(root, root / "train")])
    for split in ("train", "val"):
        rows = _Rows(split, words=classes.words)
        for folder in _folders(root, root / split):
            class_id = classes.number(folder.name)
            if class_id is None:
                rows.refuse(f"{split}/{folder.name}", "the class has no folder in train: left out")
                continue
            _add_files(rows, root, class_id, f"{split}/{folder.name}")
        yield rows
    test = _Rows("test")
    if (root / "test").is_dir():
        _add_files(test, root, -1, "test")
    yield test


def _add_files(rows: _Rows, root: Path, class_id: int, folder: str) -> None:
    for name in sorted(entry.name for entry in os.scandir(root / folder)):
        path = f"{folder}/{name}"
        if name.startswith("."):
            continue
        if fault := name_fault(name):
            rows.refuse(path, fault)
        elif not name.lower().endswith(PICTURE_SUFFIXES):
            rows.remark(path, "its name is not that of a picture")
        else:
            rows.add(name, class_id, path)


def _folders(root: Path, folder: Path) -> list["os.DirEntry[str]"]:
    """The folders in a folder, by name; those that are links out of the catalogue are not followed."""
    if not folder.is_dir():
        return []
    entries = [entry for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    inside = [entry for entry in entries if not entry.is_symlink() or Path(entry).resolve().is_relative_to(root)]
    return sorted(inside, key=lambda entry: entry.name)


class _Classes:
    """Class ids for the classes of a source: their numbers where all are numbers, else their place by name."""

    def __init__(self, written: list[str]) -> None:
        names = sorted(set(written))
        numbered = all(class_number(name) is not None for name in names)
        self.words = {} if numbered else dict(enumerate(names))
        places = {name: place for place, name in self.words.items()}
        self.number: Callable[[str], int | None] = class_number if numbered else places.get


# CSV


def _from_csv(root: Path) -> Iterator[_Rows]:
    train = list(_lines(root / "train.csv", "path", "class"))
    classes = _Classes([class_id for _, _, class_id in train if class_id])
    yield _of_lines(_Rows("train", words=classes.words), train, classes)
    for split, columns in (("val", ("path", "class")), ("test", ("path",))):
        file = root / f"{split}.csv"
        lines = _lines(file, *columns) if file.is_file() else iter(())
        yield _of_lines(_Rows(split, words=classes.words), lines, classes)


def _of_lines(rows: _Rows, lines: Iterable[tuple[int, str, str]], classes: _Classes) -> _Rows:
    class_of: dict[str, int] = {}
    for line, path, written in lines:
        class_id = classes.number(written) if rows.split != "test" else -1
        fault = path_fault(path)
        if not fault and class_id is None:
            fault = f"the class {written!r} is not in train.csv" if written and classes.words else class_fault(written)
        if not fault and class_of.setdefault(path, class_id or 0) != (class_id or 0):
            fault = "an earlier row gives it another class, which counts"
        if fault or class_id is None:
            rows.refuse(path or f"{rows.split}.csv", f"line {line} of {rows.split}.csv: {fault}")
        else:
            rows.add(path, class_id, path)
    return rows


def _lines(file: Path, *columns: str) -> Iterator[tuple[int, str, str]]:
    """Line number, path and class ("" where the file has no such column) of each row."""
    reader = csv.reader(io.StringIO(annotations.utf8(file), newline=""), strict=True)
    try:
        header = next(reader, [])
        missing = [column for column in columns if column not in header]
        if missing:
            what = f"has no column {missing[0]}; its first line says: {listing(header) or 'nothing'}."
            raise Refused(what, f"{file}, line 1", f"The first line should name the columns {' and '.join(columns)}.")
        places = [header.index(column) for column in columns]
        for row in reader:
            if row:
                path, *class_id = (row[place] if place < len(row) else "" for place in places)
                yield reader.line_num, path, class_id[0].strip() if class_id else ""
    except csv.Error as error:
        raise Refused(
            f"is not CSV: {error}.", f"{file}, line {reader.line_num}", "Quote it as RFC 4180 says."
        ) from error


# Shards


def _from_shards(root: Path) -> Catalogue:
    found = shards.manifest(root)
    record = found.record
    rows = {split: shards.read_rows(root, split, found) for split in shards.SPLITS}
    labels = {split: labels for split, (_, labels) in rows.items()}
    unknown = np.full(len(labels["test"]), -1, np.int64)
    train, val, test = (
        Images(
            split,
            ids,
            unknown if split == "test" else labels[split],
            ids,
            root,
            shards.Store(root, split, found.fingerprint, shards.cache()),
        )
        for split, (ids, _) in rows.items()
    )
    return Catalogue(
        root=root,
        classes=np.array(record.classes, np.int64),
        names=tuple(record.names),
        train=train,
        val=val,
        test=test,
        test_labels=labels["test"] if record.test_labels else None,
        ancestor=None if record.ancestor is None else np.array(record.ancestor, np.int64),
        problems=(
            *(Flaw(path, reason, skipped=True) for path, reason in record.skipped),
            *(Flaw(path, problem) for path, problem in record.problems),
        ),
        prepared=found.fingerprint,
    )


# The first three


def _assemble(root: Path, source: str, splits: Iterable[_Rows], test_labels: _Rows | None = None) -> Catalogue:
    train, val, test = splits
    classes = np.unique(np.array(train.class_ids, np.int64))
    if not len(classes):
        first = f" The first, {train.problems[0].path!r}: {train.problems[0].problem}." if train.problems else ""
        raise Refused(f"has no row that can be trained on.{first}", root / source, _LAYOUTS)
    leaves, faults = tree.leaves(root)
    missing = tree.without_pictures(leaves, classes)
    images = [_images(rows, classes, root) for rows in (train, val, test)]
    labels = None if test_labels is None else _matched(test_labels, images[2], classes)
    splits = [train, val, test, *([] if test_labels is None else [test_labels])]
    named = {class_id: leaf.name for class_id, leaf in leaves.items()} | train.words
    return Catalogue(
        root=root,
        classes=classes,
        names=tuple(named.get(class_id, "") for class_id in classes.tolist()),
        train=images[0],
        val=images[1],
        test=images[2],
        test_labels=labels,
        ancestor=tree.ancestors(leaves, classes) if leaves else None,
        problems=(
            *(problem for rows in splits for problem in rows.problems),
            *(Flaw(tree.FILE, printable(fault)) for fault in (*faults, missing) if fault),
        ),
    )


def _images(rows: _Rows, classes: Integers, root: Path) -> Images:
    """Each (class, id) once, in the file's order; without the classes that have no training image."""
    ids, paths = pa.array(rows.ids, pa.string()), pa.array(rows.paths, pa.string())
    class_ids = np.array(rows.class_ids, np.int64)
    codes = np.asarray(ids.dictionary_encode().indices).astype(np.int64)  # equal ids, equal codes
    listed, dense = np.unique(class_ids, return_inverse=True)
    once = np.zeros(len(ids), bool)
    once[np.unique(codes * len(listed) + dense, return_index=True)[1]] = True
    labels = _labels(class_ids, classes)
    known = (labels >= 0) | (class_ids < 0)
    kept = np.flatnonzero(once & known)
    shared = np.bincount(codes[kept])[codes[kept]] > 1
    for row in np.flatnonzero(~once):
        rows.remark(rows.paths[row], "is listed more than once: it counts once")
    for row in np.flatnonzero(once & ~known):
        rows.refuse(rows.paths[row], f"class {class_ids[row]} has no training image: left out")
    for row in kept[shared]:
        rows.remark(rows.paths[row], f"its id occurs under several classes: kept as {class_ids[row]}/{rows.ids[row]}")
    names = ids.take(pa.array(kept))
    qualified = pc.binary_join_element_wise(pa.array(class_ids[kept]).cast(pa.string()), names, "/")
    unique = pc.if_else(pa.array(shared), qualified, names)
    return Images(rows.split, unique, labels[kept], paths.take(pa.array(kept)), root)


def _labels(class_ids: Integers, classes: Integers) -> Integers:
    """Rows of the class list, -1 where a class is not in it."""
    place = np.minimum(np.searchsorted(classes, class_ids), len(classes) - 1)
    return np.where(classes[place] == class_ids, place, -1)


def _matched(labelled: _Rows, test: Images, classes: Integers) -> Integers:
    """The labels of the test images in their order."""
    of_id = dict(zip(labelled.ids, _labels(np.array(labelled.class_ids, np.int64), classes).tolist(), strict=True))
    rows = dict(zip(test.ids.to_pylist(), count(), strict=False))
    labels = np.full(len(test), -1, np.int64)
    for image_id, label in of_id.items():
        if image_id in rows:
            labels[rows[image_id]] = label
        else:
            labelled.remark("test_labels.json", f"image {image_id} is not in test.json: left out")
    return labels
