"""Rows, as a layout of files and folders gives them, become a catalogue."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aliprod.catalogue import tree
from aliprod.catalogue.catalogue import Catalogue, Flaw, Images, Integers
from aliprod.catalogue.identity import printable
from aliprod.errors import Refused


@dataclass
class Rows:
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

    def refuse(self, path: str, problem: str) -> None:
        self.problems.append(Flaw(printable(path), problem, skipped=True))

    def remark(self, path: str, problem: str) -> None:
        self.problems.append(Flaw(printable(path), problem))


def assemble(root: Path, source: Path, found: Iterable[Rows], layouts: str) -> Catalogue:
    """The catalogue of rows: the classes are those of training rows, each (class, id) counts once.

    Args:
        source: the file or folder of the training rows. layouts: advice where there is none.
    Raises:
        Refused: no training row can be used.
    """
    splits = {split: Rows(split) for split in ("train", "val", "test")} | {rows.split: rows for rows in found}
    rows = splits["train"]
    classes = np.unique(np.array(rows.class_ids, np.int64))
    if not len(classes):
        first = f" The first, {rows.problems[0].path!r}: {rows.problems[0].problem}." if rows.problems else ""
        raise Refused(f"has no row that can be trained on.{first}", source, layouts)
    leaves, faults = tree.leaves(root)
    faults.append(tree.without_pictures(leaves, classes))
    train, val, test = (_images(splits[split], classes, root) for split in ("train", "val", "test"))
    labels = _matched(splits["test_labels"], test, classes) if "test_labels" in splits else None
    names = {class_id: leaf.name for class_id, leaf in leaves.items()} | rows.words
    return Catalogue(
        root=root,
        classes=classes,
        names=tuple(names.get(class_id, "") for class_id in classes.tolist()),
        train=train,
        val=val,
        test=test,
        test_labels=labels,
        ancestor=tree.ancestors(leaves, classes) if leaves else None,
        problems=(
            *(flaw for rows in splits.values() for flaw in rows.problems),
            *(Flaw(tree.FILE, printable(fault)) for fault in faults if fault),
        ),
    )


def _images(rows: Rows, classes: Integers, root: Path) -> Images:
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
        rows.remark(rows.paths[row], "is listed more than once: it counts once")
    for row in np.flatnonzero(once & ~known):
        rows.refuse(rows.paths[row], f"class {class_ids[row]} has no training image: left out")
    for row in kept[shared]:
        rows.remark(rows.paths[row], f"its id occurs under several classes: kept as {class_ids[row]}/{rows.ids[row]}")
    taken = pa.array(kept)
    names = ids.take(taken)
    qualified = pc.binary_join_element_wise(pa.array(class_ids[kept]).cast(pa.string()), names, "/")
    unique = pc.if_else(pa.array(shared), qualified, names)
    return Images(rows.split, unique, labels[kept], pa.array(rows.paths, pa.string()).take(taken), root)


def _labels(class_ids: Integers, classes: Integers) -> Integers:
    """Rows of the class list, -1 where a class is not in it."""
    place = np.minimum(np.searchsorted(classes, class_ids), len(classes) - 1)
    return np.where(classes[place] == class_ids, place, -1)


def _matched(labelled: Rows, test: Images, classes: Integers) -> Integers:
    """The labels of the test images in their order."""
    of_id = dict(zip(labelled.ids, _labels(np.array(labelled.class_ids, np.int64), classes).tolist(), strict=True))
    labels = [of_id.pop(image_id, -1) for image_id in test.ids.to_pylist()]
    for image_id in of_id:
        labelled.remark("test_labels.json", f"image {image_id} is not in test.json: left out")
    return np.array(labels, np.int64)
