"""Renders a long-tailed catalogue of product packages, of any size, in AliProducts layout.

Classes come in families of two to four (the last may be cut short), which differ in fine things: `packages` draws
them, `photograph` takes the pictures. A picture is a function of (seed, class number, split, number in the class):
neither of the catalogue's size nor of the number of processes. Its bytes are equal within one version of Pillow and
NumPy and one kind of CPU; ids and labels are equal everywhere.
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from aliprod.errors import Refused
from aliprod.processes import ordered_map
from aliprod.randomness import seed_of
from aliprod.store.commit import storage
from aliprod.synth.packages import face, look, photograph

LEAST = 5  # training images a class
TAIL = 5.0  # largest class / smallest class: as in the quickstart's first measurement
FIRST_ID = 1_000_000  # image ids have seven digits or more


@dataclass(frozen=True)
class Counts:
    """What was rendered; train, val and test count images."""

    path: str
    classes: int
    train: int
    val: int
    test: int


def synthesise(out: Path, classes: int, images: int, seed: int, processes: int = 1) -> Counts:
    """Render ``images`` training images of ``classes`` classes, and balanced val and test images.

    The training images a class fall off geometrically to a fifth, in an order of the classes that the seed draws;
    no class has under 5. Up to 100 classes have 6 val and 10 test images each, more have 2 and 4. The catalogue
    appears in one rename; what a killed call leaves is a hidden folder ``.NAME.*.partial`` beside it.

    Refused: the numbers make no catalogue, or ``out`` holds something. StorageFull: no room or no right to write;
    nothing is left behind. Failed: a process died.
    """
    if classes < 2:
        raise Refused(f"{classes} classes cannot be told apart.", "classes", "Ask for 2 or more.")
    if images < LEAST * classes:
        least = f"Every class has {LEAST} training images or more"
        advice = f"{least}: ask for {LEAST * classes:,} images, or fewer classes."
        raise Refused(f"{images:,} images are too few for {classes:,} classes.", "images", advice)
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise _taken(out)
    val, test = (6, 10) if classes <= 100 else (2, 4)
    sizes = {"train": class_sizes(classes, images, seed), "val": [val] * classes, "test": [test] * classes}
    # unique over all splits, in an order that gives no class away
    mixed = iter(sorted(range(sum(map(sum, sizes.values()))), key=lambda place: seed_of(seed, "id", place)))
    ids = {split: [[FIRST_ID + next(mixed) for _ in range(n)] for n in by_class] for split, by_class in sizes.items()}
    with _new_folder(out) as folder:
        _write_annotations(folder, ids, seed)
        (folder / "test").mkdir()
        tasks = ((number, {split: ids[split][number] for split in ids}) for number in range(classes))
        render = partial(_render, folder, seed)
        for _ in ordered_map(render, tasks, processes, lambda task: f"class {task[0]}", "Try fewer processes."):
            pass
    return Counts(str(out), classes, images, classes * val, classes * test)


def class_sizes(classes: int, images: int, seed: int) -> list[int]:
    """Training images of each class: a geometric tail, flattened where its end would have fewer than LEAST."""
    tail = [TAIL ** (-rank / (classes - 1)) for rank in range(classes)]
    mean, scale = images / classes, classes / sum(tail)
    flatness = min(1.0, (1 - LEAST / mean) / (1 - scale * tail[-1]))
    sizes = [int(mean * (1 + flatness * (scale * share - 1)) + 1e-6) for share in tail]
    for rank in range(images - sum(sizes)):  # what rounding down left goes to the largest classes
        sizes[rank] += 1
    order = sorted(range(classes), key=lambda number: seed_of(seed, "size", number))
    return [size for _, size in sorted(zip(order, sizes, strict=True))]


def _taken(out: Path) -> Refused:
    advice = "Name a new or empty folder, or remove this one first."
    return Refused("there is something already; nothing was written.", out, advice)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes it when all went well, and else is gone."""
    out = out.resolve()  # "." has a name, too
    folder = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    with storage(out):
        try:
            folder.mkdir(parents=True)
            yield folder
            os.replace(folder, out)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise _taken(out) from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _write_annotations(folder: Path, ids: dict[str, list[list[int]]], seed: int) -> None:
    rows = {split: [(image, number) for number, all_ in enumerate(ids[split]) for image in all_] for split in ids}
    rows["test"].sort()
    for name, split in (("train", "train"), ("val", "val"), ("test_labels", "test")):
        labelled = ({"image_id": f"{image}.jpg", "class_id": str(number)} for image, number in rows[split])
        _write_rows(folder / f"{name}.json", labelled)
    _write_rows(folder / "test.json", ({"image_id": f"{image}.jpg"} for image, _ in rows["test"]))
    (folder / "product_tree.json").write_text(json.dumps(_tree(len(ids["train"]), seed), indent=1), encoding="utf-8")


def _write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:  # a row a line: millions of rows are never one string
        file.write('{"images": [')
        for place, row in enumerate(rows):
            file.write((",\n" if place else "\n") + json.dumps(row))
        file.write("\n]}\n")


def _tree(classes: int, seed: int) -> dict[str, Any]:
    """Section, family, class below the root."""
    sections: dict[str, list[dict[str, Any]]] = {}
    looks = ((number, look(seed, number)) for number in range(classes))
    for (section, family), members in groupby(looks, lambda member: (member[1].section, member[1].family)):
        leaves = [{"name": f"{family} {one.flavour} {one.amount}", "class_id": str(number)} for number, one in members]
        sections.setdefault(section, []).append({"name": family, "children": leaves})
    return {"name": "all", "children": [{"name": name, "children": below} for name, below in sections.items()]}


def _render(folder: Path, seed: int, task: tuple[int, dict[str, list[int]]]) -> None:
    """All pictures of one class."""
    number, ids = task
    front = face(look(seed, number))
    for split, images in ids.items():
        below = folder / "test" if split == "test" else folder / split / f"{number:05}"
        below.mkdir(parents=True, exist_ok=True)
        for place, image in enumerate(images):
            picture_seed = seed_of(seed, number, split, place)
            quality = 55 + seed_of(picture_seed, "quality") % 41
            photograph(front, picture_seed).save(below / f"{image}.jpg", quality=quality)
