"""Tables become rows: CSV with commas, semicolons or tabs, JSON lines, Parquet. A row is a path and, but for test, a
class."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aliprod.catalogue import annotations
from aliprod.catalogue.annotations import path_fault, tidy
from aliprod.catalogue.folders import folder_names, split_of
from aliprod.catalogue.rows import Line, Numbering, Rows, line_of, of_lines
from aliprod.errors import Refused, did_you_mean, listing

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
METADATA = tuple(f"metadata{suffix}" for suffix in TABLES)  # beside the pictures of a split: Hugging Face's imagefolder

_GUESSED = {
    "path": ("path", "file_name", "filename", "filepath", "file", "image", "image_path", "img", "image_id", "id"),
    "class": ("class", "label", "class_name", "class_id", "category", "category_id", "species", "target"),
    "split": ("split", "subset"),
}
_PROBED = 20  # rows of a table whose files are looked for
_MOST_FOLDERS = 100  # that they are looked for in

Cells = Iterator[tuple[int, Sequence[str]]]  # number of each row, and what these columns say


def from_tables(
    root: Path, tables: Mapping[str, Path], columns: Mapping[str, str], links: Path | None
) -> Iterator[Rows]:
    """The rows of each split's table; of a table alone those of the splits that its column ``split`` names. Refused: a
    table cannot be read, lacks a column, or has a path, a class or a split that no row may have."""
    lines: dict[str, list[Line]] = {}
    notes: list[str] = []
    for split, table in tables.items():
        lines |= _below(table, _lines(table, split, len(tables) == 1, columns, notes), links)
    classes = Numbering.of_lines(lines.get("train", ()))
    for split in ("train", "val", "test"):
        if split in lines:
            table = tables[split] if split in tables else tables["train"]
            base = _base(root, table, split, [path for _, path, _ in lines[split][:_PROBED]])
            rows = Rows(split, classes.words, notes=list(dict.fromkeys(notes)))
            rows = of_lines(rows, lines[split], classes, table, base)
            if base and table.parent == root:
                rows.notes.append(f"{table.name}: the paths of {split} are taken to be below {base}.")
            yield rows
            notes = []


def paths(file: Path) -> Iterator[str]:
    """The paths of a table that need have no class. Refused: it cannot be read, or lacks a column of paths."""
    column = _chosen(file, {}, ("path",))["path"]
    return (path for _, (path,) in cells_of(file, [column]))


def cells_of(file: Path, names: list[str] | None) -> Cells:
    """The columns of a table with these names; None: its header alone."""
    return {".parquet": _parquet, ".jsonl": _jsonl}.get(file.suffix.lower(), _csv)(file, names)


def _lines(file: Path, split: str, alone: bool, columns: Mapping[str, str], notes: list[str]) -> dict[str, list[Line]]:
    """The lines of a table, by split."""
    chosen = _chosen(file, columns, ("path",) if split == "test" else ("path", "class", *columns))
    if not alone:  # each table is a split
        chosen.pop("split", None)
    if guessed := [role for role in chosen if role not in columns and chosen[role] != role]:
        taken = listing(f"{chosen[role]} is taken for the {role}" for role in guessed)
        notes.append(f"{file.name}: the column {taken}.")
    found: dict[str, list[Line]] = {split: []}
    for number, cells in cells_of(file, list(chosen.values())):
        row = dict(zip(chosen, cells, strict=True))
        of = split_of(row["split"].strip()) if "split" in row else split
        if not of:
            what, where = f"the split of {row['path']!r} is {row['split']!r}.", f"{file}, {line_of(file, number)}"
            raise Refused(what, where, "A split is train, val or test.")
        found.setdefault(of, []).append((number, _trimmed(row["path"], file.parent), row.get("class", "").strip()))
    return found


def _trimmed(path: str, folder: Path) -> str:
    """A path as it is counted from here on: without the blanks around it where its file is there only so."""
    bare = path.strip()
    if bare != path:
        there = [os.path.isfile(os.path.join(folder, name)) for name in (path, bare)]  # noqa: PTH113, PTH118
        path = bare if there == [False, True] else path
    return tidy(path)


def _below(table: Path, lines: Mapping[str, list[Line]], links: Path | None) -> dict[str, list[Line]]:
    """The lines with absolute paths made relative where they lead below the table's folder, links followed. Refused:
    one leads neither there nor below ``links``."""
    own, allowed = (f"{str(folder).rstrip('/')}/" for folder in (table.parent, links or table.parent))
    real = cache(os.path.realpath)  # of a folder; both of these are, too

    def nearer(path: str) -> str:
        if path[:1] == "/" and not path.startswith((own, allowed)) and not path_fault(path[1:]):
            folder, _, name = path.rpartition("/")
            path = f"{real(folder or '/').rstrip('/')}/{name}"
        return path.removeprefix(own)

    found = {of: [(number, nearer(path), said) for number, path, said in some] for of, some in lines.items()}
    far = [(n, path) for some in found.values() for n, path, _ in some if path[:1] in ("/", "\\") or path[1:3] == ":\\"]
    outside = [(n, path) for n, path in far if not (links and path.startswith(allowed))]
    if outside:
        above = os.path.commonpath([os.path.dirname(path) for _, path in outside if path[0] == "/"] or ["/"])  # noqa: PTH120
        advice = "Write it relative to the table's folder, or put the table above its pictures, or allow where they "
        advice += f"are: --links {above} (data check, init; in a plan `links`)."
        number = outside[0][0]
        written = next(path for some in lines.values() for n, path, _ in some if n == number)
        raise Refused(f"the path {written!r} is absolute.", f"{table}, {line_of(table, number)}", advice)
    return found


def _chosen(file: Path, columns: Mapping[str, str], needed: Iterable[str]) -> dict[str, str]:
    """The name of each column that is read: as `columns` says, else the first of the usual ones. Refused: it has no
    such column."""
    header = next(cells_of(file, None), (0, ()))[1]
    known = {name.strip().lower(): name for name in reversed(header)}
    chosen = {role: known[name] for role, names in _GUESSED.items() for name in reversed(names) if name in known}
    chosen |= {role: name for role, name in columns.items() if name in header or role in needed}
    for role in needed:
        if chosen.get(role) not in header:
            name = columns.get(role, role)
            near = did_you_mean(name, header) if role in columns else ""
            advice = f"The first line should name {listing(dict.fromkeys(needed))}; or say which they are: "
            advice += f"--column {role}=NAME, in a plan `columns`."
            what = f"has no column {name}; its columns are: {listing(header) or 'none'}."
            raise Refused(what, f"{file}, line 1", f"{near} {advice}".strip())
    return chosen


def _csv(file: Path, names: list[str] | None) -> Cells:
    """The number of a row is that of its first line: quoted cells may have several."""
    text = annotations.utf8(file)
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=max(",;\t", key=first.count))
    line = 1
    try:
        header = next(reader, [])
        if names is None:
            yield line, header
            return
        places = [header.index(name) for name in names]
        line = reader.line_num + 1
        for row in reader:
            if any(cell.strip() for cell in row[len(header) :]):
                what = f"has {len(row)} cells, where the header has {len(header)}."
                advice = f'Quote a cell with a {reader.dialect.delimiter!r} in it, as in "salt, fine".'
                raise Refused(what, f"{file}, line {line}", advice)
            if row:
                yield line, [row[place] if place < len(row) else "" for place in places]
            line = reader.line_num + 1
    except csv.Error as error:
        raise Refused(f"is not CSV: {error}.", f"{file}, line {line}", "Quote it as RFC 4180 says.") from error


def _jsonl(file: Path, names: list[str] | None) -> Cells:
    """An object a line; all keys of all lines are the columns, and one that a line lacks is blank there."""
    if names is None:
        yield 1, list(dict.fromkeys(key for _, row in _objects(file) for key in row))
        return
    for number, row in _objects(file):
        if odd := next((name for name in names if isinstance(row.get(name), (list, dict))), ""):
            what = f"has {json.dumps(row[odd])[:60]} under {odd}."
            raise Refused(what, f"{file}, line {number}", "A path, a class and a split are each a text or a number.")
        said = ("" if row.get(name) is None else str(row[name]) for name in names)
        yield number, [cell.encode("utf-8", "replace").decode() for cell in said]  # no halves of characters


def _objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The object of each line that is not blank, with the line's number. Refused: a line is none."""
    for number, line in enumerate(annotations.utf8(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            advice = 'Each line should be like {"file_name": "1.jpg", "label": "apple"}.'
            raise Refused("is no JSON object.", f"{file}, line {number}", advice)
        yield number, row


def _parquet(file: Path, names: list[str] | None) -> Cells:
    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        advice = "Was its download or its writing cut short? Write or fetch it again."
        raise Refused(f"is not Parquet: {str(error).splitlines()[0]}.", file, advice) from error
    if names is None:
        yield 0, table.schema_arrow.names
        return
    number = 0
    try:
        for batch in table.iter_batches(columns=names):
            texts = [batch.column(name).cast(pa.string()).fill_null("").to_pylist() for name in names]
            yield from enumerate(zip(*texts, strict=True), number + 1)
            number += len(batch)
    except (pa.ArrowException, OSError, KeyError) as error:
        what = f"its columns {listing(names)} cannot be read as text: {str(error).splitlines()[0]}."
        advice = "A path is a text, a class a text or a number; pictures themselves are files."
        raise Refused(what, file, advice) from error


def _base(root: Path, table: Path, split: str, paths: list[str]) -> str:
    """The folder that the paths of a table count from, with a slash behind it: its own, unless their files are not
    there but in one of the folders beside it; that of their split is asked first."""
    own = "" if table.parent == root else f"{table.parent.relative_to(root).as_posix()}/"
    sound = [path for path in paths if not path_fault(path)]

    def there(base: str) -> int:
        return sum(os.path.isfile(f"{root}/{base}{path}") for path in sound)  # noqa: PTH113 - a name that is too long

    if own or not sound or there("") == len(sound):
        return own
    folders = sorted(folder_names(root), key=lambda name: (split_of(name) != split, name))[:_MOST_FOLDERS]
    return max(("", *(f"{name}/" for name in folders)), key=there)
