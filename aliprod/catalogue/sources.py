"""AliProducts, ImageFolder, CSV and prepared shards become a catalogue.

Rows are refused one by one, with a reason; a file that is wrong as a whole ends the reading. No picture is opened
and no file looked for: at 2.5 million rows that is the decoder's business, and check's.
"""

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aliprod.catalogue import annotations, shards
from aliprod.catalogue.annotations import PICTURE_SUFFIXES, class_fault, class_number, name_fault, path_fault, printable
from aliprod.catalogue.catalogue import Catalogue, Flaw, Images, Integers
from aliprod.errors import Refused, listing
from aliprod.store import commit

_ADVICE = (
    "A catalogue has train.json and train/00000/ (AliProducts), or train/NAME/ (ImageFolder), "
    "or train.csv with the columns path and class; or `aliprod data prepare` wrote it."
)


@dataclass
class _Rows:
    """Rows of ``split`` (a split, or test_labels) as they are collected.

    ``class_ids``: -1 unknown. ``words``: of class ids that were given to them, where the source has names.
    """

    split: str
    words: dict[int, str] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    class_ids: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    problems: list[Flaw] = field(default_factory=list)

    def add(self, image_id: str, class_id: int, path: str) -> None:
        self.ids.append(image_id)
        self.class_ids.append(class_id)
        self.paths.append(path)

    def note(self, path: str, problem: str, skipped: bool = False) -> None:
        self.problems.append(Flaw(printable(path), problem, skipped))


def read(path: Path) -> Catalogue:
    """The catalogue in a folder. Refused: no such folder, none of the four layouts, an annotation file that cannot be
    read, or no training row that can be used."""
    if not path.is_dir():
        raise Refused("is a file, not the folder of a catalogue." if path.exists() else "is not there.", path, _ADVICE)
    root = path.resolve()
    try:
        for train, is_there, layout in _LAYOUTS:
            if is_there(root / train):
                return _assembled(root, root / train, layout(root))
        if (root / commit.MANIFEST).is_file():
            return _from_shards(root)
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror}.", error.filename or path, "Check its permissions.") from error
    raise Refused("holds no catalogue.", path, _ADVICE)


# AliProducts


def _from_json(root: Path) -> Iterator[_Rows]:
    for split in ("train", "val", "test", "test_labels"):
        file = root / f"{split}.json"
        if file.is_file():
            yield _rows_of(file, _Rows(split), _class_folders(root, split))


def _rows_of(file: Path, rows: _Rows, folders: dict[int, str]) -> _Rows:
    split, labelled = rows.split, rows.split != "test"
    for number, row in enumerate(annotations.rows(file), 1):
        if not isinstance(row, dict) or isinstance(row, annotations.Repeated):
            no_row = "is no object with an image_id and a class_id"
            fault = f"has the key {row.twice} twice" if isinstance(row, annotations.Repeated) else no_row
            rows.note(file.name, f"row {number} {fault}", skipped=True)
            continue
        image_id = row["image_id"] if "image_id" in row else row.get("id")
        class_id = row["class_id"] if "class_id" in row else row.get("category_id")
        known = class_number(class_id) if labelled else -1
        folder = split if known is None or known < 0 else f"{split}/{folders.get(known) or f'{known:05d}'}"
        fault = name_fault(image_id) or (class_fault(class_id) if known is None else "")
        if not isinstance(image_id, str):
            rows.note(file.name, f"row {number}: {fault}", skipped=True)
        elif fault or known is None:
            rows.note(f"{folder}/{image_id}", f"row {number} of {file.name}: {fault}", skipped=True)
        else:
            rows.add(image_id, known, f"{folder}/{image_id}")
    return rows


def _class_folders(root: Path, split: str) -> dict[int, str]:
    """The folder of each class: five digits, else the number as it is, else padded in another way."""
    folders: dict[int, str] = {}
    for name in sorted(_folders(root, split), key=lambda name: (len(name) != 5, len(name))):
        class_id = class_number(name)
        if class_id is not None:
            folders.setdefault(class_id, name)
    return folders


# ImageFolder


def _from_folders(root: Path) -> Iterator[_Rows]:
    number, words = _numbering(_folders(root, "train"))
    for split in ("train", "val"):
        rows = _Rows(split, words)
        for folder in _folders(root, split):
            class_id = number(folder)
            if class_id is None:
                rows.note(f"{split}/{folder}", "the class has no folder in train: left out", skipped=True)
            else:
                _add_files(rows, root, class_id, f"{split}/{folder}")
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
            rows.note(path, fault, skipped=True)
        elif not name.lower().endswith(PICTURE_SUFFIXES):
            rows.note(path, "its name is not that of a picture")
        else:
            rows.add(name, class_id, path)


def _folders(root: Path, folder: str) -> list[str]:
    """The names of the folders in a folder; those that are links out of the catalogue are not followed."""
    if not (root / folder).is_dir():
        return []
    entries = [entry for entry in os.scandir(root / folder) if entry.is_dir() and not entry.name.startswith(".")]
    inside = (entry for entry in entries if not entry.is_symlink() or Path(entry).resolve().is_relative_to(root))
    return sorted(entry.name for entry in inside)


def _numbering(written: Iterable[str]) -> tuple[Callable[[str], int | None], dict[int, str]]:
    """Class ids for classes as a source writes them, and the words among them.

    They are their numbers where all are numbers, else their places by name.
    """
    names = sorted(set(written))
    if all(class_number(name) is not None for name in names):
        return class_number, {}
    return {name: place for place, name in enumerate(names)}.get, dict(enumerate(names))


# CSV


def _from_csv(root: Path) -> Iterator[_Rows]:
    train = list(_lines(root / "train.csv", "path", "class"))
    number, words = _numbering(class_id for _, _, class_id in train if class_id)
    yield _of_lines(_Rows("train", words), train, number)
    for split, columns in (("val", ("path", "class")), ("test", ("path",))):
        file = root / f"{split}.csv"
        if file.is_file():
            yield _of_lines(_Rows(split, words), _lines(file, *columns), number)


def _of_lines(rows: _Rows, lines: Iterable[tuple[int, str, str]], number: Callable[[str], int | None]) -> _Rows:
    class_of: dict[str, int] = {}
    for line, path, written in lines:
        class_id = number(written) if rows.split != "test" else -1
        fault = path_fault(path)
        if not fault and class_id is None:
            fault = f"the class {written!r} is not in train.csv" if written and rows.words else class_fault(written)
        if not fault and class_of.setdefault(path, class_id or 0) != (class_id or 0):
            fault = "an earlier row gives it another class, which counts"
        if fault or class_id is None:
            rows.note(path or f"{rows.split}.csv", f"line {line} of {rows.split}.csv: {fault}", skipped=True)
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
        where = f"{file}, line {reader.line_num}"
        raise Refused(f"is not CSV: {error}.", where, "Quote it as RFC 4180 says.") from error


# Rows


def _assembled(root: Path, source: Path, found: Iterable[_Rows]) -> Catalogue:
    """The catalogue of rows: the classes are those of training rows (in ``source``), each (class, id) counts once."""
    splits = {split: _Rows(split) for split in ("train", "val", "test")} | {rows.split: rows for rows in found}
    rows = splits["train"]
    classes = np.unique(np.array(rows.class_ids, np.int64))
    if not len(classes):
        first = f" The first, {rows.problems[0].path!r}: {rows.problems[0].problem}." if rows.problems else ""
        raise Refused(f"has no row that can be trained on.{first}", source, _ADVICE)
    leaves, faults = annotations.leaves(root)
    if without := sorted(leaves.keys() - set(classes.tolist())):
        names = listing(map(str, without))
        faults.append(f"{len(without):,} of its classes have no training image and are left out: {names}")
    train, val, test = (_images(splits[split], classes, root) for split in ("train", "val", "test"))
    labels = _matched(splits["test_labels"], test, classes) if "test_labels" in splits else None
    known = {class_id: leaf.name for class_id, leaf in leaves.items()} | rows.words
    return Catalogue(
        root=root,
        classes=classes,
        names=tuple(known.get(class_id, "") for class_id in classes.tolist()),
        train=train,
        val=val,
        test=test,
        test_labels=labels,
        ancestor=annotations.ancestors(leaves, classes) if leaves else None,
        problems=(
            *(flaw for rows in splits.values() for flaw in rows.problems),
            *(Flaw(annotations.TREE, printable(fault)) for fault in faults),
        ),
    )


def _images(rows: _Rows, classes: Integers, root: Path) -> Images:
    """Each (class, id) once, in the file's order; without the classes that have no training image."""
    ids, class_ids = pa.array(rows.ids, pa.string()), np.array(rows.class_ids, np.int64)
    codes = np.asarray(ids.dictionary_encode().indices).astype(np.int64)  # equal ids, equal codes
    listed, dense = np.unique(class_ids, return_inverse=True)
    once = np.zeros(len(ids), bool)
    once[np.unique(codes * len(listed) + dense, return_index=True)[1]] = True
    labels = _labels(class_ids, classes)
    known = (labels >= 0) | (class_ids < 0)
    kept = np.flatnonzero(once & known)
    shared = np.bincount(codes[kept])[codes[kept]] > 1
    for row in np.flatnonzero(~once):
        rows.note(rows.paths[row], "is listed more than once: it counts once")
    for row in np.flatnonzero(once & ~known):
        rows.note(rows.paths[row], f"class {class_ids[row]} has no training image: left out", skipped=True)
    for row in kept[shared]:
        rows.note(rows.paths[row], f"its id occurs under several classes: kept as {class_ids[row]}/{rows.ids[row]}")
    taken = pa.array(kept)
    names = ids.take(taken)
    qualified = pc.binary_join_element_wise(pa.array(class_ids[kept]).cast(pa.string()), names, "/")
    unique = pc.if_else(pa.array(shared), qualified, names)
    return Images(rows.split, unique, labels[kept], pa.array(rows.paths, pa.string()).take(taken), root)


def _labels(class_ids: Integers, classes: Integers) -> Integers:
    """Rows of the class list, -1 where a class is not in it."""
    place = np.minimum(np.searchsorted(classes, class_ids), len(classes) - 1)
    return np.where(classes[place] == class_ids, place, -1)


def _matched(labelled: _Rows, test: Images, classes: Integers) -> Integers:
    """The labels of the test images in their order."""
    of_id = dict(zip(labelled.ids, _labels(np.array(labelled.class_ids, np.int64), classes).tolist(), strict=True))
    labels = [of_id.pop(image_id, -1) for image_id in test.ids.to_pylist()]
    for image_id in of_id:
        labelled.note("test_labels.json", f"image {image_id} is not in test.json: left out")
    return np.array(labels, np.int64)


# Shards


def _from_shards(root: Path) -> Catalogue:
    found = shards.manifest(root)
    record = found.record
    rows = ((split, *shards.read_rows(root, split, found)) for split in shards.SPLITS)
    train, val, test = (
        Images(split, ids, labels, ids, root, shards.Store(root, split, found.fingerprint, shards.cache()))
        for split, ids, labels in rows
    )
    return Catalogue(
        root=root,
        classes=np.array(record.classes, np.int64),
        names=tuple(record.names),
        train=train,
        val=val,
        test=replace(test, labels=np.full(len(test), -1, np.int64)),
        test_labels=test.labels if record.test_labels else None,
        ancestor=None if record.ancestor is None else np.array(record.ancestor, np.int64),
        problems=(
            *(Flaw(path, reason, skipped=True) for path, reason in record.skipped),
            *(Flaw(path, problem) for path, problem in record.problems),
        ),
        prepared=found.fingerprint,
    )


# What holds the training rows, whether it is there, the rows of all splits; the first that is there is read.
_LAYOUTS: tuple[tuple[str, Callable[[Path], bool], Callable[[Path], Iterator[_Rows]]], ...] = (
    ("train.json", Path.is_file, _from_json),
    ("train.csv", Path.is_file, _from_csv),
    ("train", Path.is_dir, _from_folders),
)
