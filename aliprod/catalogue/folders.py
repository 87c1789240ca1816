"""Folders of pictures become rows: a class is the way below the split's folder, or below the catalogue's.

Links to folders are followed below the catalogue's folder and below the one that the user allows, each once for a
split; those that are not followed are named.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from aliprod.catalogue.annotations import PICTURE_SUFFIXES, UNREAD, UNREAD_SUFFIXES, name_fault
from aliprod.catalogue.rows import Numbering, Rows
from aliprod.errors import Refused
from aliprod.store import lease

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
    deep = [
        folder.way for folder in folders if "/" in folder.way and split_of(folder.way.rpartition("/")[2]) == "train"
    ]
    if deep and not tops["train"]:  # they would be taken for classes
        above, _, train_folder = deep[0].rpartition("/")
        advice = f"If {root / above} is the catalogue, name that. If {above} is a class, put its pictures into "
        raise Refused(f"has its splits below {above}: {deep[0]}.", root, f"{advice}{train_folder}/{above}.")
    classes = Numbering.of(folder.way for folder in folders if folder.is_class and any(map(_is_picture, folder.names)))
    train.words = classes.words
    yield _filled(train, folders, classes)
    for split in ("val", "test"):
        if split in tops:
            rows = Rows(split, classes.words, ids_are_unique=False)
            yield _filled(rows, _folders(rows, root, tops[split], links), classes)


def _filled(rows: Rows, folders: "Iterable[_Folder]", classes: Numbering) -> Rows:
    """The rows with the pictures of all folders; those of val and test need not be classes of train."""
    for folder in folders:
        class_id = classes.number(folder.way) if folder.is_class else None
        if class_id is not None or (folder.is_class and rows.split == "train"):
            if not _add(rows, folder, -1 if class_id is None else class_id) and rows.split == "train":
                rows.note(folder.path, "holds no picture: the class is not made up")
        elif rows.split == "test":
            if folder.is_class:
                rows.note(folder.path, "the class has no picture in train: its pictures are predicted, without a label")
            _add(rows, folder, -1)
        elif folder.is_class:
            hint = classes.hint(folder.way)
            rows.note(folder.path, f"the class has no picture in train: left out. {hint}".rstrip(". "), skipped=True)
        else:
            what = UNREAD if folder.way else "lies in no folder of a class: not used"
            for name in folder.names:
                if name.lower().endswith((*PICTURE_SUFFIXES, *UNREAD_SUFFIXES)):
                    rows.note(_joined(folder.path, name), what, skipped=True)
    return rows


def _add(rows: Rows, folder: "_Folder", class_id: int) -> int:
    """Add the pictures of a folder, name what else is there; how many there are. Of no class, an id has the folder."""
    before = len(rows.ids)
    for name in folder.names:
        path = f"{folder.path}/{name}"
        if fault := name_fault(name):
            rows.note(path, fault, skipped=True)
        elif name.lower().endswith(PICTURE_SUFFIXES):
            rows.add(name if class_id >= 0 else _joined(folder.way, name), class_id, path)
        elif name.lower().endswith(UNREAD_SUFFIXES):
            rows.note(path, UNREAD, skipped=True)
        elif name.lower() not in _LEFT_BEHIND:
            rows.note(path, "its name is not that of a picture")
    return len(rows.ids) - before


class _Folder(NamedTuple):
    """A folder: its ``way`` below the split's, its path below the catalogue's, the names of its files."""

    way: str
    path: str
    names: list[str]
    is_class: bool  # it has pictures of its own, or nothing below it


def _folders(rows: Rows, root: Path, top: str, links: Path | None) -> Iterator[_Folder]:
    """All folders below a split's, itself first, in the order of their names. What is not read is named, but for a
    storage folder: nothing in it is the user's."""
    goals = set[str]()  # of links
    for folder, below, files in os.walk(root / top, onerror=_raise, followlinks=True):
        path, way = (os.path.relpath(folder, start).removeprefix(".") for start in (root, root / top))
        if way and lease.FOLDER in below:
            below.clear()
            continue
        inner = []
        for name in sorted(name for name in below if name[0] != "."):
            fault = name_fault(name) or _link_fault(os.path.join(folder, name), (root, links), goals)  # noqa: PTH118
            if fault:
                rows.note(_joined(path, name), fault, skipped=True)
            else:
                inner.append(name)
        names = sorted(name for name in files if name[0] != ".")
        pictures = any(name.lower().endswith(PICTURE_SUFFIXES) for name in names)
        yield _Folder(way, path, names, bool(way) and (pictures or not inner))
        unread = inner if way and pictures else []
        below[:] = [] if unread else inner
        for name in unread:
            what = "lies in the folder of a class, which has pictures of its own: not read"
            rows.note(_joined(path, name), what, skipped=True)


def pictures_below(root: Path, top: str) -> Iterator[str]:
    """The paths of all pictures below a folder of a catalogue, but for those in a storage folder; links are not
    followed."""
    if (root / top).resolve().is_relative_to(root):
        for folder, below, names in os.walk(root / top):
            if lease.FOLDER in below:
                below.clear()
                continue
            relative = Path(folder).relative_to(root).as_posix()
            yield from sorted(
                f"{relative}/{name}" for name in names if name.lower().endswith(PICTURE_SUFFIXES) and name[0] != "."
            )


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES) and not name_fault(name)


def _raise(error: OSError) -> None:
    raise error


def _joined(*parts: str) -> str:
    return "/".join(filter(None, parts))


def _link_fault(path: str, allowed: tuple[Path | None, ...], goals: set[str]) -> str:
    """Why a folder is not read, where it is a link; '' where it is, and then its goal is one of ``goals``."""
    if not os.path.islink(path):  # noqa: PTH114
        return ""
    goal = os.path.realpath(path)
    known = goal in goals or Path(path).parent.resolve().is_relative_to(goal)
    goals.add(goal)
    if not is_inside(Path(goal), allowed):
        return "is a link that leads out of the catalogue: not followed, unless `links` names a folder above its goal"
    return "is a link to a folder that is read already: not followed" if known else ""
