"""Folders of pictures become rows: a class is the way below the split's folder, or below the catalogue's.

Links to folders are followed below the catalogue's folder and below the one that the user allows, each once for a
split; those that are not followed are named.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from aliprod.catalogue.annotations import PICTURE_SUFFIXES, UNREAD, UNREAD_SUFFIXES, name_fault
from aliprod.catalogue.rows import Numbering, Rows
from aliprod.errors import Refused

_SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val", "valid": "val", "dev": "val"}
_SPLITS |= {"test": "test", "testing": "test"}
_LEFT_BEHIND = ("thumbs.db", "desktop.ini")  # by systems; others of theirs begin with a dot


def split_of(name: str) -> str:
    """The split that a name means, such as val for ``Valid``; '' none."""
    return _SPLITS.get(name.lower(), "")


def by_split(root: Path, names: list[str]) -> dict[str, str]:
    """Which name, without its suffix, stands for which split. Refused: two stand for one."""
    found: dict[str, str] = {}
    for name in sorted(names):
        if split := split_of(name.partition(".")[0]):
            if split in found:
                advice = f"Rename one of them, or move it away: only you can say which one is {split}."
                raise Refused(f"{found[split]} and {name} both mean {split}.", root, advice)
            found[split] = name
    return found


def split_folders(root: Path) -> dict[str, str]:
    """As `by_split`, of the folders in a catalogue's."""
    return by_split(root, [name for name in folder_names(root) if split_of(name)])


def folder_names(folder: Path) -> list[str]:
    """The names of the folders in a folder, and of links to some, sorted; none where it is none."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:  # os.path.isdir: a ring of links is no folder, and no error
        return sorted(entry.name for entry in entries if entry.name[0] != "." and os.path.isdir(entry.path))  # noqa: PTH112


def is_inside(path: Path, allowed: tuple[Path | None, ...]) -> bool:
    """Whether a resolved path lies in one of the folders; None is none."""
    return any(path.is_relative_to(folder) for folder in allowed if folder)


def from_folders(root: Path, tops: Mapping[str, str], links: Path | None) -> Iterator[Rows]:
    """The rows of each split, whose folder stands in ``tops`` ("": the catalogue's own). Refused: that one's classes
    are the folders of splits."""
    train = Rows("train", ids_are_unique=False)
    folders = list(_folders(train, root, tops["train"], links))
    if not tops["train"]:
        _check_no_split_below(root, [folder.way for folder in folders])
    classes = Numbering.of(folder.way for folder in folders if folder.is_class)
    train.words = classes.words
    for folder in folders:
        if not folder.way:
            _name_loose(train, folder)
        elif folder.is_class and not _add(train, folder, classes.number(folder.way)):
            train.note(folder.path, "holds no picture: the class is not made up")
    yield train
    for split in ("val", "test"):
        if split in tops:
            rows = Rows(split, classes.words, ids_are_unique=False)
            for folder in _folders(rows, root, tops[split], links):
                _add_known(rows, folder, classes)
            yield rows


def _check_no_split_below(root: Path, ways: list[str]) -> None:
    """Refused: a split's folder lies in another folder, where it would be taken for a class."""
    if deep := next((way for way in ways if "/" in way and split_of(way.rpartition("/")[2]) == "train"), ""):
        above = deep.rpartition("/")[0]
        advice = f"If {root / above} is the catalogue, name that. If {above} is a class, put its pictures into "
        raise Refused(f"has its splits below {above}: {deep}.", root, f"{advice}{deep.rpartition('/')[2]}/{above}.")


def _name_loose(rows: Rows, folder: "_Folder") -> None:
    """Name the pictures that lie beside the folders of classes."""
    for name in folder.names:
        if name.lower().endswith((*PICTURE_SUFFIXES, *UNREAD_SUFFIXES)):
            rows.note(_joined(folder.path, name), "lies in no folder of a class: not used", skipped=True)


def _add_known(rows: Rows, folder: "_Folder", classes: Numbering) -> None:
    """The pictures of a folder of val or test, which need not be one of train."""
    class_id = classes.number(folder.way)
    if class_id is not None and folder.way:
        _add(rows, folder, class_id)
    elif rows.split == "test":
        if folder.is_class:
            rows.note(folder.path, "the class has no folder in train: its pictures are predicted, without a label")
        _add(rows, folder, -1, f"{folder.way}/" if folder.way else "")
    elif folder.is_class:
        hint = classes.hint(folder.way)
        rows.note(folder.path, f"the class has no folder in train: left out. {hint}".rstrip(". "), skipped=True)
    elif not folder.way:
        _name_loose(rows, folder)


def _add(rows: Rows, folder: "_Folder", class_id: int | None, prefix: str = "") -> int:
    """Add the pictures of a folder, name what else is there; how many there are."""
    pictures = []
    for name in folder.names:
        if fault := name_fault(name):
            rows.note(f"{folder.path}/{name}", fault, skipped=True)
        elif name.lower().endswith(PICTURE_SUFFIXES):
            pictures.append(name)
        elif name.lower().endswith(UNREAD_SUFFIXES):
            rows.note(f"{folder.path}/{name}", UNREAD, skipped=True)
        elif name.lower() not in _LEFT_BEHIND:
            rows.note(f"{folder.path}/{name}", "its name is not that of a picture")
    rows.ids += [prefix + name for name in pictures]
    rows.class_ids += [-1 if class_id is None else class_id] * len(pictures)
    rows.paths += [f"{folder.path}/{name}" for name in pictures]
    return len(pictures)


class _Folder(NamedTuple):
    """A folder: its ``way`` below the split's, its path below the catalogue's, the names of its files."""

    way: str
    path: str
    names: list[str]
    is_class: bool  # it has pictures of its own, or nothing below it


def _folders(rows: Rows, root: Path, top: str, links: Path | None) -> Iterator[_Folder]:
    """All folders below a split's, itself first, in the order of their names. What is not read is named."""
    seen: set[str] = set()  # goals of links
    stack: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root / top),))]
    while stack:
        way, above = stack.pop()
        path = _joined(top, way)
        names, inner = list[str](), list[tuple[str, tuple[str, ...]]]()
        for entry in os.scandir(root / path):
            name = entry.name
            if name[0] == ".":
                continue
            if entry.is_file(follow_symlinks=False) or not os.path.isdir(entry.path):  # noqa: PTH112
                names.append(name)
                continue
            below, real, fault = _joined(way, name), f"{above[-1]}/{name}", name_fault(name)
            if entry.is_symlink() and not fault:
                real = os.path.realpath(entry.path)
                fault = _link_fault(real, (root, links), {*seen, *above})
                seen.add(real)
            if fault:
                rows.note(_joined(top, below), fault, skipped=True)
            else:
                inner.append((below, (*above, real)))
        pictures = any(name.lower().endswith(PICTURE_SUFFIXES) for name in names)
        yield _Folder(way, path, sorted(names), bool(way) and (pictures or not inner))
        if not (way and pictures):
            stack += sorted(inner, reverse=True)
            continue
        for below, _ in inner:
            what = "lies in the folder of a class, which has pictures of its own: not read"
            rows.note(_joined(top, below), what, skipped=True)


def _joined(*parts: str) -> str:
    return "/".join(filter(None, parts))


def _link_fault(real: str, allowed: tuple[Path | None, ...], seen: set[str]) -> str:
    """Why a link to a folder is not followed; '' where it is."""
    if not is_inside(Path(real), allowed):
        return "is a link that leads out of the catalogue: not followed, unless `links` names a folder above its goal"
    return "is a link to a folder that is read already: not followed" if real in seen else ""
