"""Rows of the splits, as a source gives them, become a catalogue: one list of classes, each image once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aliprod.catalogue import annotations
from aliprod.catalogue.annotations import class_number, path_fault
from aliprod.catalogue.catalogue import Catalogue, Flaw, Images, Integers
from aliprod.catalogue.tars import Tars
from aliprod.errors import Refused, did_you_mean, listing
from aliprod.shown import escaped

ADVICE = (
    "A catalogue has train.json and train/00000/ (AliProducts), or train/NAME/ or NAME/ (ImageFolder), or a table such "
    "as train.csv with the columns path and class, or tars (WebDataset); or `aliprod data prepare` wrote it."
)
_ANOTHER = "an earlier row gives it another class, which counts"
_MOST_HINTS = 20  # of a table: the nearest of 50,000 names takes a moment

Line = tuple[int, str, str]  # its number, path, class as it is written ("" unknown)


@dataclass
class Rows:
    """Rows of ``split`` (a split, or test_labels) as they are collected."""

    split: str
    words: dict[int, str] = field(default_factory=dict)  # of class ids that were given to them, by a source with names
    ids: list[str] = field(default_factory=list)
    class_ids: list[int] = field(default_factory=list)  # -1 unknown
    paths: list[str] = field(default_factory=list)
    problems: list[Flaw] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was taken for granted
    ids_are_unique: bool = True  # where they are meant to be, that they are not is worth a word
    tars: Tars | None = None  # where the pictures are, if not in files
    places: list[int] = field(default_factory=list)  # in the tars

    def add(self, image_id: str, class_id: int, path: str) -> None:
        self.ids.append(image_id)
        self.class_ids.append(class_id)
        self.paths.append(path)

    def note(self, path: str, problem: str, skipped: bool = False) -> None:
        text = path.encode("utf-8", "replace").decode()  # a file's name may be no text at all
        self.problems.append(Flaw(text, problem, skipped))


@dataclass(frozen=True)
class Numbering:
    """The classes of train as a source writes them: ``number`` gives their ids, ``words`` those that were made up. They
    are their numbers where all are numbers, each written in one way, else their places by name."""

    number: Callable[[str], int | None]
    words: dict[int, str]

    @classmethod
    def of_lines(cls, lines: Iterable[Line]) -> "Numbering":
        """Of the lines of train that count: one that is refused makes up no class."""
        first, found = dict[str, str](), set[str]()
        for _, path, written in lines:
            counts = written and first.setdefault(path, written) == written
            if counts and written not in found and not path_fault(path.removeprefix("/")):
                found.add(written)
        return cls.of(found)

    @classmethod
    def of(cls, written: Iterable[str]) -> "Numbering":
        names = sorted(set(written))
        numbers = {class_number(name) for name in names}
        if None not in numbers and len(numbers) == len(names):
            return cls(class_number, {})
        return cls({name: place for place, name in enumerate(names)}.get, dict(enumerate(names)))

    def hint(self, written: str) -> str:
        """'Did you mean X?' for a class that train has not; of 0.0, 0."""
        whole, _, zeros = written.partition(".")
        if zeros and not zeros.strip("0") and self.number(whole) is not None:
            return f"Did you mean {whole}?"
        return did_you_mean(written, self.words.values())


def line_of(file: Path, number: int) -> str:
    """What a row of a file is called: text has lines."""
    return f"{'line' if file.suffix.lower() in ('.csv', '.tsv', '.jsonl') else 'row'} {number}"


def of_lines(rows: Rows, lines: Iterable[Line], classes: Numbering, file: Path, base: str = "") -> Rows:
    """Fill ``rows`` with the lines of a file whose paths are below ``base``, or absolute. Refused: a class is blank."""
    class_of: dict[str, int] = {}
    hints: dict[str, str] = {}
    for line, path, written in lines:
        class_id = classes.number(written) if written or rows.split != "test" else -1
        absolute = path[:1] == "/"
        fault = path_fault(path[absolute:])
        if not fault and class_id is None and written and rows.split == "train":
            fault = _ANOTHER
        if not fault and class_id is None:
            if not written:
                advice = "Write its class, or take the row out."
                raise Refused(f"the class of {path!r} is blank.", f"{file}, {line_of(file, line)}", advice)
            if written not in hints:
                hints[written] = classes.hint(written) if len(hints) < _MOST_HINTS else ""
            fault = f"the class {written!r} is not in train. {hints[written]}".rstrip()
            if rows.split == "test":
                rows.note(path, f"{line_of(file, line)} of {file.name}: {fault}: its label is left out")
                fault, class_id = "", -1
        if not fault and class_of.setdefault(path, class_id or 0) != (class_id or 0):
            fault = _ANOTHER
        if fault or class_id is None:
            rows.note(path or file.name, f"{line_of(file, line)} of {file.name}: {fault}", skipped=True)
        else:
            rows.add(path, class_id, path if absolute else base + path)
    return rows


def assembled(root: Path, source: Path, found: Iterable[Rows]) -> Catalogue:
    """The catalogue of rows: the classes are those of training rows (in ``source``), each (class, id) counts once.
    Refused: there is no training row."""
    splits = {split: Rows(split) for split in ("train", "val", "test")} | {rows.split: rows for rows in found}
    rows = splits["train"]
    classes = np.unique(np.array(rows.class_ids, np.int64))
    if not len(classes):
        first = f" The first, {rows.problems[0].path!r}: {rows.problems[0].problem}." if rows.problems else ""
        raise Refused(f"has no row that can be trained on.{first}", source, ADVICE)
    leaves, faults = annotations.leaves(root)
    if without := sorted(leaves.keys() - set(classes.tolist())):
        names = listing(map(str, without))
        faults.append(f"{len(without):,} of its classes have no training image and are left out: {names}")
    train, val, test = (_images(splits[split], classes, root) for split in ("train", "val", "test"))
    labels = test.labels if (test.labels >= 0).any() else None
    if "test_labels" in splits:
        labels = _matched(splits["test_labels"], test, classes)
    known = {class_id: leaf.name for class_id, leaf in leaves.items()} | rows.words
    return Catalogue(
        root=root,
        classes=classes,
        names=tuple(known.get(class_id, "") for class_id in classes.tolist()),
        train=train,
        val=val,
        test=replace(test, labels=np.full(len(test), -1, np.int64)),
        test_labels=labels,
        ancestor=annotations.ancestors(leaves, classes) if leaves else None,
        problems=(
            *(flaw for rows in splits.values() for flaw in rows.problems),
            *(Flaw(annotations.TREE, escaped(fault)) for fault in faults),
        ),
        notes=tuple(escaped(note) for rows in splits.values() for note in rows.notes),
    )


def _images(rows: Rows, classes: Integers, root: Path) -> Images:
    """Each (class, id) once, in the file's order; without the classes that have no training image, but in test."""
    ids, class_ids = pa.array(rows.ids, pa.string()), np.array(rows.class_ids, np.int64)
    codes = np.asarray(ids.dictionary_encode().indices).astype(np.int64)  # equal ids, equal codes
    listed, dense = np.unique(class_ids, return_inverse=True)
    once = np.zeros(len(ids), bool)
    _, first, pair = np.unique(codes * len(listed) + dense, return_index=True, return_inverse=True)
    once[first] = True
    labels = _labels(class_ids, classes)
    known = (labels >= 0) | (class_ids < 0)
    kept = np.flatnonzero(once & (known | (rows.split == "test")))
    shared = np.bincount(codes[kept])[codes[kept]] > 1
    for row in np.flatnonzero(~once):
        path, other = rows.paths[row], rows.paths[first[pair[row]]]
        said = f"has the name and the class of {other}, which counts: not used. Rename it"
        rows.note(path, "is listed more than once: it counts once" if path == other else said, skipped=path != other)
    for row in np.flatnonzero(once & ~known):
        what = "its label is " if rows.split == "test" else ""
        rows.note(rows.paths[row], f"class {class_ids[row]} has no training image: {what}left out", skipped=not what)
    for row in kept[shared] if rows.ids_are_unique else ():
        rows.note(rows.paths[row], f"its id occurs under several classes: kept as {class_ids[row]}/{rows.ids[row]}")
    names = ids.take(kept)
    qualified = pc.binary_join_element_wise(pa.array(class_ids[kept]).cast(pa.string()), names, "/")
    unique = pc.if_else(pa.array(shared), qualified, names)
    codes = np.asarray(unique.dictionary_encode().indices)
    clash = (np.bincount(codes)[codes] > 1) & ~shared  # a folder that is no class of train, named as a class id is
    unique = pc.if_else(pa.array(clash), pc.binary_join_element_wise(".", names, "/"), unique)
    paths = pa.array(rows.paths, pa.string()).take(kept)
    places = None if rows.tars is None else np.array(rows.places, np.int64)[kept]
    return Images(rows.split, unique, labels[kept], paths, root, rows.tars, places)


def _labels(class_ids: Integers, classes: Integers) -> Integers:
    """Rows of the class list, -1 where a class is not in it."""
    place = np.minimum(np.searchsorted(classes, class_ids), len(classes) - 1)
    return np.where(classes[place] == class_ids, place, -1)


def _matched(labelled: Rows, test: Images, classes: Integers) -> Integers:
    """The labels of the test images in their order."""
    of_id = dict(zip(labelled.ids, _labels(np.array(labelled.class_ids, np.int64), classes).tolist(), strict=True))
    labels = [of_id.pop(image_id, -1) for image_id in test.ids.to_pylist()]
    for image_id in of_id:
        labelled.note("test_labels.json", f"image {image_id} is not in test.json: left out")
    return np.array(labels, np.int64)
