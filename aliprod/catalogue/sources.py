"""AliProducts, ImageFolder, tables, tars and prepared shards become a catalogue.

Rows are refused one by one, with a reason; a file that is wrong as a whole ends the reading. No picture is opened
and hardly a file looked for: at 2.5 million rows that is the decoder's business, and check's.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from aliprod.catalogue import annotations, shards
from aliprod.catalogue.annotations import PICTURE_SUFFIXES, class_fault, class_number, name_fault
from aliprod.catalogue.catalogue import Catalogue, Flaw, Images
from aliprod.catalogue.folders import (
    by_split,
    folder_names,
    from_folders,
    is_inside,
    pictures_below,
    split_folders,
    split_of,
)
from aliprod.catalogue.held_out import hold_out
from aliprod.catalogue.remote_folder import RemoteFolder
from aliprod.catalogue.rows import ADVICE, Line, Numbering, Rows, assembled, of_lines
from aliprod.catalogue.tables import METADATA, TABLES, from_tables
from aliprod.catalogue.tars import Tars, members
from aliprod.errors import Refused, listing, near_file
from aliprod.shown import escaped
from aliprod.store import commit
from aliprod.store.layout import cache

_TAR = re.compile(r".*\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2|txz)", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_URI = re.compile(r"[a-z0-9+]{2,}:/", re.IGNORECASE)
_SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
_SHARE = 0.1  # held out of a catalogue without any split


@dataclass(frozen=True)
class Reading:
    """How a catalogue is read, where its folder does not say."""

    columns: Mapping[str, str] = field(default_factory=dict)  # of its tables, by role: path, class, split
    val: float | None = None  # held out where there is no val; None: a tenth where there is no split at all
    seed: int = 0  # of what is held out
    links: Path | None = None  # a folder below which links, and absolute paths of tables, may lead too
    kept: Path | None = None  # the folder that keeps which images were held out; None: this machine's cache


PLAIN = Reading()


def read(path: Path, reading: Reading = PLAIN, remote: RemoteFolder | None = None) -> Catalogue:
    """The catalogue in a folder, or of a table alone; ``remote`` is where its pictures are, if not on this machine.
    Refused: none of the layouts, two folders for one split, an unreadable annotation file, no training row."""
    path = path.expanduser()
    if not path.exists() or not (path.is_dir() or path.suffix.lower() in TABLES):
        raise _no_catalogue(path)
    links = reading.links and reading.links.expanduser().resolve()
    try:
        found, is_split = _found(path.resolve(), replace(reading, links=links))
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror}.", error.filename or path, "Check its permissions.") from error
    if wrong := next(filter(_CONTROL.search, found.names), ""):
        advice = "Rename it: letters, digits, blanks and signs of any language."
        raise Refused(f"has a class whose name holds a control character: {escaped(wrong)}.", path, advice)
    train, val, test = (replace(images, links=links, remote=remote) for images in found.splits)
    found = replace(found, train=train, val=val, test=test)
    share = reading.val if reading.val is not None or is_split else _SHARE
    if share and not len(val):
        return hold_out(found, share, reading.seed, reading.kept or cache() / "held-out")
    if share:
        note = f"val is there: nothing is held out, `val = {share:g}` does nothing."
    elif share is None and not len(val):
        note = "there is no val, and nothing is held out: --val 0.1, in a plan `val = 0.1`, holds out a tenth."
    else:
        return found
    return replace(found, notes=(*found.notes, note))


def _no_catalogue(path: Path) -> Refused:
    if _URI.match(str(path)):
        what = "is a URI, where a folder or a table of this machine is asked for."
        advice = "`aliprod data prepare URI OUT` reads it once and writes what can be checked and trained on."
        return Refused(what, str(path).replace(":/", "://", 1), advice)
    if path.suffix.lower() in _SPREADSHEETS:
        return Refused("is a spreadsheet.", path, "Save it as CSV.")
    if path.suffix.lower() == ".zip":
        return Refused("is a zip.", path, "Unpack it, and name the folder.")
    if path.exists():
        return Refused("is a file, not the folder of a catalogue.", path, ADVICE)
    return Refused("is not there.", path, near_file(path) or ADVICE)


def _found(path: Path, reading: Reading) -> tuple[Catalogue, bool]:
    """The catalogue as it lies there, and whether it is split: the first layout that is there is read."""
    root = path if path.is_dir() else path.parent
    if root == path:
        if (path / "train.json").is_file():
            return assembled(root, root / "train.json", _from_json(root)), True
        if (root / commit.MANIFEST).is_file() and not (path / "train.csv").is_file() and not (path / "train").is_dir():
            return _from_shards(root), True
    if tables := _tables(root, path):
        rows = list(from_tables(root, tables, reading.columns, reading.links))
        return assembled(root, tables["train"], rows), split_of(tables["train"].stem) == "train" or len(rows) > 1
    folders = split_folders(root)
    if "train" in folders and (_says_classes(root / folders["train"]) or not _tars(root)):
        return _from_splits(root, folders, reading), True
    if tars := _tars(root):
        if outside := [name for name in tars if not is_inside((root / name).resolve(), (root, reading.links))]:
            raise Refused("leads out of the catalogue by a link.", root / outside[0], "Name where to in `links`.")
        return assembled(root, root, _from_tars(root, tars)), any(map(_split_of_tar, tars))
    if not folders and folder_names(root):
        return _beside(assembled(root, root, from_folders(root, {"train": ""}, reading.links))), False
    has = f"has {listing(f'{name}/' for name in folders.values())}, but no train/." if folders else ""
    raise Refused(has or "holds no catalogue.", path, ADVICE)


def _from_json(root: Path) -> Iterator[Rows]:
    for split in ("train", "val", "test", "test_labels"):
        file = root / f"{split}.json"
        if file.is_file():
            # of a class five digits, else the number as it is, else padded in another way: the last that is named
            names = sorted(folder_names(root / split), key=lambda name: (len(name) == 5, -len(name)))
            folders = {class_id: name for name in names if (class_id := class_number(name)) is not None}
            yield _rows_of(file, Rows(split), folders)


def _rows_of(file: Path, rows: Rows, folders: dict[int, str]) -> Rows:
    split, labelled = rows.split, rows.split != "test"
    for number, row in enumerate(annotations.rows(file), 1):
        if not isinstance(row, dict) or isinstance(row, annotations.Repeated):
            twice = isinstance(row, annotations.Repeated) and f"has the key {row.twice} twice"
            rows.note(
                file.name, f"row {number} {twice or 'is no object with an image_id and a class_id'}", skipped=True
            )
            continue
        image_id = row.get("image_id", row.get("id"))
        class_id = row.get("class_id", row.get("category_id"))
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


def _tables(root: Path, path: Path) -> dict[str, Path]:
    """The table of each split in a folder; of one that is a table of its own, or the only one there, as train."""
    if path != root:
        return {"train": path}
    files = [file for file in sorted(root.iterdir()) if file.suffix.lower() in TABLES and file.is_file()]
    tables = {split: root / name for split, name in by_split(root, [file.name for file in files]).items()}
    if "train" in tables:
        return tables
    train = split_folders(root).get("train")
    flat = train is None or not _says_classes(root / train)
    return {"train": files[0]} if len(files) == 1 and flat else {}


def _from_splits(root: Path, folders: Mapping[str, str], reading: Reading) -> Catalogue:
    """Folders for splits: with a table beside the pictures of each, else with a folder for each class."""
    tables = {split: file for split, name in folders.items() if (file := _metadata(root / name))}
    by_table, links = "train" in tables, reading.links
    rows = from_tables(root, tables, reading.columns, links) if by_table else from_folders(root, folders, links)
    found = assembled(root, root / folders["train"], rows)
    notes = [f"{name}/ is read as {split}." for split, name in folders.items() if name.lower() != split]
    without = [name for split, name in folders.items() if by_table and split not in tables]
    flaws = [Flaw(name, "has no table of its pictures, as train has: not read", skipped=True) for name in without]
    beside = "lies beside the folders of the splits"
    others = [name for name in folder_names(root) if name not in folders.values()]
    lost = [name for name in others if _is_like_a_split(root / name, root / folders["train"])]
    flaws += [Flaw(name, f"{beside}: its pictures are not used", skipped=True) for name in lost]
    loose = sorted(file.name for file in root.iterdir() if file.name.lower().endswith(PICTURE_SUFFIXES))
    flaws += [Flaw(name, f"{beside}: not used", skipped=True) for name in loose]
    return _beside(replace(found, notes=(*notes, *found.notes), problems=(*found.problems, *flaws)))


def _is_like_a_split(folder: Path, train: Path) -> bool:
    """Whether it has pictures of its own, or folders of train's classes; those that train has as links are train's."""
    if any((train / name).is_dir() and not (train / name).is_symlink() for name in folder_names(folder)):
        return any(pictures_below(folder.parent, folder.name))
    return any(file.name.lower().endswith(PICTURE_SUFFIXES) for file in folder.iterdir())


def _beside(found: Catalogue) -> Catalogue:
    """The catalogue, with a word on the spreadsheets beside it."""
    sheets = sorted(file.name for file in found.root.iterdir() if file.suffix.lower() in _SPREADSHEETS)
    flaws = [Flaw(name, "is a spreadsheet, which is not read: save it as CSV", skipped=True) for name in sheets]
    return replace(found, problems=(*found.problems, *flaws))


def _says_classes(folder: Path) -> bool:
    return bool(folder_names(folder) or _metadata(folder))


def _metadata(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _tars(root: Path) -> list[str]:
    """The tars in a folder and in those below it. Refused: one is compressed."""
    files = (file for level in ("*", "*/*") for file in root.glob(level) if _TAR.fullmatch(file.name))
    tars = sorted(file.relative_to(root).as_posix() for file in files)
    if packed := [name for name in tars if not name.endswith(".tar")]:
        advice = "Unpack all such into .tar (gunzip, bunzip2, unxz or unzstd); the pictures in them stay as small."
        raise Refused("is compressed: pictures are read from the middle of a tar.", root / packed[0], advice)
    return tars


def _from_tars(root: Path, names: list[str]) -> Iterator[Rows]:
    found = [(tar, member) for tar, name in enumerate(names) for member in members(root / name)]
    places = np.array([(tar, member.start, member.size) for tar, member in found], np.int64).reshape(-1, 3)
    tars = Tars(root, tuple(names), *places.T)
    place_of = {f"{names[tar]}/{member.name}": place for place, (tar, member) in enumerate(found)}
    lines: dict[str, list[Line]] = {"train": []}
    for number, (tar, member) in enumerate(found, 1):
        path = f"{names[tar]}/{member.name}"
        lines.setdefault(_split_of_tar(names[tar]) or "train", []).append((number, path, member.written))
    classes = Numbering.of_lines(lines["train"])
    for split, of_split in lines.items():
        rows = of_lines(Rows(split, classes.words, tars=tars), of_split, classes, root)
        rows.places = [place_of[path] for path in rows.paths]
        yield rows


def _split_of_tar(name: str) -> str:
    """Of train for ``train-0007.tar``, ``train/0007.tar`` and ``shoes-train-{0007}.tar``."""
    return next(filter(None, map(split_of, re.split(r"[^a-z]+", name.lower()))), "")


def _from_shards(root: Path) -> Catalogue:
    found = shards.manifest(root)
    commit.fetch(root, *(f"{split}.arrow" for split in shards.SPLITS))
    record = found.record
    rows = ((split, *shards.read_rows(root, split, found)) for split in shards.SPLITS)
    train, val, test = (
        Images(split, ids, labels, ids, root, shards.Store(root, split, found.fingerprint, cache()))
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
